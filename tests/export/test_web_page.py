"""The page of an exported file, in a real browser, served as `python -m http.server` does."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.runtimes import site
from iosr_fast import Classifier
from iosr_fast.exceptions import IosrFastError
from iosr_fast.export.web import NEEDED, RUNTIME, write_page
from tests import browser as chromium
from tests.cli.runs import done, refused
from tests.demo_cache import demo_bundle
from tests.export.recipes import npm
from tests.pictures import encode
from tests.store.live_parts import with_tree
from tools.demo.bundle import held_out_queries

pytestmark = pytest.mark.slow
browser = chromium.browser  # pytest finds the fixture by this name
HOSTILE = '</script><script>hacked = 1</script><img src=x onerror="hacked = 1">'


@pytest.fixture(scope="module")
def classifier() -> Classifier:
    """Its first class has a hostile name, and it has a tree."""
    classifier = with_tree(Classifier.load(demo_bundle(12, 5)), [(f"node {c // 6}",) for c in range(12)])
    classifier.rename_class(classifier.classes_[0], HOSTILE, keep_text=True)
    return classifier


@pytest.fixture(scope="module")
def model(classifier: Classifier, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "pets.onnx"
    classifier.export(path, max_error=0.2, unknown="reject")
    return path


@pytest.fixture
def page(browser: Any, model: Path) -> Iterator[Any]:
    """A tab with the page, in which nothing goes wrong but `page.refused`, and no request goes elsewhere; `page.files`
    is its folder."""
    with site(npm(), model) as (folder, address):
        tab = browser.new_page()
        tab.set_default_timeout(20_000)
        tab.files, tab.refused, problems = folder, "", []
        tab.on("console", lambda it: problems.append(it.text) if it.type in ("error", "warning") else None)
        tab.on("pageerror", lambda error: problems.append(str(error)))
        tab.on("request", lambda it: it.url.startswith((address, f"blob:{address}")) or problems.append(it.url))
        tab.goto(address)
        yield tab
        tab.close()
        assert bool(problems) == bool(tab.refused) and all(tab.refused in text for text in problems), problems


def test_pictures_get_the_labels_of_the_library(page: Any, classifier: Classifier) -> None:
    images = list(held_out_queries(12, 5)[0])
    files = [{"name": f"{i}.png", "mimeType": "image/png", "buffer": encode(image)} for i, image in enumerate(images)]
    page.locator("#stage").wait_for()
    assert "at most 20% are wrong" in page.locator("#promise").inner_text()
    page.set_input_files("#choose", [*files, {"name": "a.jpg", "mimeType": "image/jpeg", "buffer": b"no picture"}])
    page.locator("#status", has_text="Done.").wait_for()
    labels, sure = classifier.predict(images), classifier.predict(images, max_error=0.2)
    expected = []
    for label, accepted, known in zip(labels, sure, classifier.predict(images, unknown="reject"), strict=True):
        words = accepted or f"Needs a look: {label}?"
        expected.append(words if known == label else f"None of the classes; the nearest is {label}")
    assert page.locator("#results .label").all_inner_texts() == expected
    assert {words.split(":")[0].split(";")[0] for words in expected} >= {"Needs a look", "None of the classes", HOSTILE}
    assert any(words.startswith("node") for words in expected)
    assert page.locator(".bars").first.locator("li").count() == 5
    assert page.evaluate("window.hacked") is None and page.locator("img").count() == 0
    assert page.locator("#results .bad").inner_text().startswith("a.jpg: ")


def test_a_dropped_picture_is_classified(page: Any) -> None:
    page.locator("#stage").wait_for()
    data = list(encode(held_out_queries(12, 5)[0][0]))
    drop = "data => { const drop = new DataTransfer(); drop.items.add(new File([new Uint8Array(data)], 'a.png', "
    dropped = page.evaluate_handle(drop + "{ type: 'image/png' })); return drop; }", data)
    page.dispatch_event("body", "drop", {"dataTransfer": dropped})
    page.locator("#results .label").wait_for()


def test_without_its_runtime_it_says_the_commands(page: Any) -> None:
    page.refused = "404"
    (page.files / RUNTIME[0]).unlink()
    page.reload()
    page.locator("#status", has_text="npm install").wait_for()
    assert page.locator("#status").inner_text() == NEEDED and not page.locator("#stage").is_visible()


def test_another_model_than_the_pages_is_refused(page: Any) -> None:
    """Its classes have other names; a browser may keep an older model. A server tells files apart by whole seconds."""
    page.locator("#stage").wait_for()  # the whole first model is read
    page.refused = "integrity"
    model = page.files / "model.onnx"
    model.write_bytes(model.read_bytes() + b" ")
    os.utime(model, (time.time(), time.time() + 2))
    page.reload()
    page.locator("#status", has_text="of another export").wait_for()
    assert not page.locator("#stage").is_visible()


def test_the_command_writes_it_for_pictures_only(tmp_path: Path) -> None:
    bundle, web = demo_bundle(12, 5), tmp_path / "web"
    assert "no --pixels with --web" in refused("export", bundle, tmp_path / "a.onnx", "--pixels", "--web", web)
    for _ in range(2):  # the second replaces the first
        done("export", bundle, tmp_path / "a.onnx", "--web", web)
    assert (web / "model.onnx").read_bytes() == (tmp_path / "a.onnx").read_bytes() and (web / "index.html").is_file()
    done("export", bundle, tmp_path / "b.onnx", "--pixels")
    with pytest.raises(IosrFastError, match="exported for pictures"):
        write_page(tmp_path / "b.onnx", web)
    web = tmp_path / "in-place"
    web.mkdir()
    done("export", bundle, web / "model.onnx", "--web", web)


@pytest.mark.parametrize("name", ["index.html", "model.onnx", "page.css", ""])
def test_what_the_page_would_replace_is_found_before_the_export(name: str, tmp_path: Path) -> None:
    """A file of another page, and a file in place of the folder."""
    web = tmp_path / "web"
    if name:
        web.mkdir()
    (web / name).write_text("another")
    message = "expected a folder without a page" if name else "expected a folder to write"
    assert message in refused("export", demo_bundle(12, 5), tmp_path / "a.onnx", "--web", web)
    assert (web / name).read_text() == "another" and not (tmp_path / "a.onnx").exists()


def test_a_classifier_of_pictures_as_stored_gets_no_page(tmp_path: Path) -> None:
    images, labels = held_out_queries(12, 5)
    classifier = Classifier("demo", runtime="onnxruntime", method="gda", exif_orientation=False)
    classifier.fit(images, labels).save(tmp_path / "saved")
    answer = refused("export", tmp_path / "saved", tmp_path / "a.onnx", "--web", tmp_path / "web")
    assert "browsers always do" in answer and [path.name for path in tmp_path.iterdir()] == ["saved"]
