"""`iosr-fast audit`, `evaluate`, and pages of heads: text, files and pages, also in a browser."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from iosr_fast import Classifier, FewShotHead, labelled_images
from iosr_fast.exceptions import IosrFastError
from iosr_fast.files import evaluate
from iosr_fast.methods.automation import PROMISES, Automation
from iosr_fast.methods.judgement import judge_promises
from iosr_fast.methods.support_audit import Suspect
from iosr_fast.reports import evaluation_report
from iosr_fast.reports.audit_report import audit_page
from tests.cli.runs import never, refused, run
from tests.reports.conftest import NAMES, opened
from tests.store.live_parts import pairs_of_pictures, pictures, with_tree

pytestmark = pytest.mark.slow


def test_audit_prints_and_writes_what_it_found(place: Path, browser: Any) -> None:
    done = run("audit", place / "classifier", "--html", place / "a.html", "--json", place / "a.json")
    assert done.exit_code == 0, done.output
    assert "labels that are likely wrong: 1" in done.output and "four is rather two" in done.output
    found = json.loads((place / "a.json").read_text())
    assert [one["suggested"] for one in found["suspects"] if one["suspicion"] > 0.5] == ["two"]
    written = (place / "a.html").read_text()
    assert "&lt;b&gt;one&lt;/b&gt;" in written and "<b>one" not in written
    assert "An image without a file has no field" in written and "labels.csv" not in written
    for width in (390, 1280):
        page = opened(browser, place / "a.html", width)
        assert page.locator("h2").all_inner_texts()[0] == "Labels likely wrong"
        assert page.locator("img").count() >= 4  # the picture and three neighbours


@pytest.mark.parametrize("suspicion", [0.3, 0.7])
def test_doubtful_labels_are_unfolded_where_none_is_likely_wrong(suspicion: float, rng: np.random.Generator) -> None:
    audit = FewShotHead(look_alikes=False).fit(rng.standard_normal((24, 16)), np.repeat(["a", "b"], 12)).audit()
    pair = tuple(Suspect(i, "a", chance, "b", 0.9, ()) for i, chance in enumerate((suspicion, 0.2)))
    assert ("<details open><summary>Doubtful" in audit_page(replace(audit, suspects=pair), lambda _: None, "A")) == (
        suspicion < 0.5
    )


def test_the_page_of_an_audit_takes_labels_of_files(place: Path, browser: Any) -> None:
    rows = ["path,label"]
    for i, (image, c) in enumerate(zip(*pictures(np.random.default_rng(3), 5, 6), strict=True)):
        Image.fromarray(image).save(place / f"<i>{i}.png")
        rows.append(f"<i>{i}.png,{NAMES[3 if i == 7 else c]}")
    (place / "test.csv").write_text("\n".join(rows))
    Classifier.load("").fit_folder(place / "test.csv")
    done = run("audit", place / "classifier", "--html", place / "a.html", "--json", place / "a.json")
    assert f"{place.name}/<i>7.png (e7): four is rather two" in done.output, done.output
    paths = [one["path"] for one in json.loads((place / "a.json").read_text())["suspects"]]
    first = next(i for i, path in enumerate(paths) if path == str(place / "<i>7.png"))
    page = opened(browser, place / "a.html")
    fields, card = page.get_by_label("Label"), page.locator("li").nth(first)
    assert fields.count() == len(paths) and card.locator(f"[title='{paths[first]}']").inner_text().endswith("(e7)")
    card.get_by_role("button", name="Take two").click()
    with page.expect_download() as download:
        page.get_by_role("button", name="Save labels.csv").click()
    download.value.save_as(place / "labels.csv")
    assert page.get_by_role("status").inner_text() == f"1 of {len(paths)} images labelled; saved"
    assert labelled_images(place / "test.csv", place / "labels.csv").labels == [
        name for name in NAMES for _ in range(6)
    ]


def test_the_page_of_an_audit_takes_all_labels_of_a_picture(place: Path, browser: Any) -> None:
    images, right, given = pairs_of_pictures(NAMES)
    given[8] = {min(right[8]), *(given[8] - right[8])}  # one label is wrong, another one missing
    for i, image in enumerate([*images, images[7] ^ 0x80]):
        Image.fromarray(image).save(place / f"<i>{i}.png")
    rows = [f"<i>{i}.png,{';'.join(sorted(names))}" for i, names in enumerate([*given, {"five"}])]
    (place / "test.csv").write_text("\n".join(["path,labels", *rows]))
    Classifier.load("").set_params(method="auto", alpha=None).fit_folder(place / "test.csv")
    done = run("audit", place / "classifier", "--html", place / "a.html", "--json", place / "a.json")
    assert "labels that are likely wrong: 6, likely missing: 6;" in done.output, done.output
    assert f"<i>8.png (e8): {max(right[8])} is missing (" in done.output
    assert json.loads((place / "a.json").read_text())["label_sets"]["e60"] == ["five"]
    page = opened(browser, place / "a.html")
    assert page.locator("h2").all_inner_texts()[0] == "Labels likely wrong or missing"
    cards = page.locator("section").first.locator("li")
    assert cards.count() == 11 == cards.get_by_label("Label").count()
    card = cards.filter(has_text="<i>8.png")
    assert card.inner_text().count(" is wrong") == card.inner_text().count(" is missing") == 1
    for i in range(11):
        cards.nth(i).get_by_role("button", name="Take").click()
    assert cards.filter(has_text="<i>60.png").get_by_role("button").inner_text() == "Take no label"
    with page.expect_download() as download:
        page.get_by_role("button", name="Save labels.csv").click()
    download.value.save_as(place / "labels.csv")
    assert labelled_images(place / "test.csv", place / "labels.csv").labels == [*right, frozenset()]
    card.get_by_label("Label").fill("two; Three")
    assert card.get_by_role("button", name="Did you mean two;three?").is_visible()


def test_evaluate_prints_and_writes_what_it_measured(place: Path, labelled: Path, browser: Any) -> None:
    words = ("--html", place / "e.html", "--json", place / "e.json", "--unknown", place / "unlabelled", "--keep", 0.5)
    done = run("evaluate", place / "classifier", labelled, *words)
    assert done.exit_code == 0, done.output
    assert "80.0% of 10 images are right" in done.output and "18 images of no class" in done.output
    assert "<b>one</b>: 1 of 2" in done.output and "two taken for <b>one</b>: 1 of 3" in done.output
    found = json.loads((place / "e.json").read_text())
    assert found["wrong"] == 2 and {Path(one["image"]).name for one in found["mistakes"]} == {"<i>0.png", "<i>9.png"}
    written = (place / "e.html").read_text()
    assert "&lt;b&gt;one&lt;/b&gt;" in written and "<b>one" not in written and "<i>" not in written
    for width in (390, 1280):
        page = opened(browser, place / "e.html", width)
        expected = found["expected_accuracy_at_class_sizes"]
        titles = [f"80.0% right, {expected:.1%} expected", "No label is accepted", "Confusion", "Mistakes", "Classes"]
        assert page.locator("h2").all_inner_texts()[:5] == titles
        assert page.locator(".matrix td").count() == 25
        confused = page.locator("section").nth(1).locator("li")
        assert confused.locator("img").count() == 4 and "two taken for <b>one</b>" in confused.all_inner_texts()[1]
        probabilities = page.locator("section").nth(2).locator(".measure").all_inner_texts()
        assert probabilities == sorted(probabilities, reverse=True) and len(probabilities) == 2
        assert page.evaluate("Math.max(...[...document.images].map((image) => image.naturalWidth))") == 160


def test_evaluate_measures_several_labels_a_picture(tags: Path, browser: Any) -> None:
    words = ("evaluate", tags / "classifier")
    done = run(*words, tags / "tags.csv", "--html", tags / "e.html", "--json", tags / "e.json")
    found = json.loads((tags / "e.json").read_text())
    assert done.exit_code == 0 and f"{found['found']:.1%} of all {found['labels']} labels found" in done.output
    mistake = next(one for one in found["mistakes"] if one["predicted"] is None)
    assert f"{mistake['image']}: {mistake['label']} missed ({mistake['label_probability']:.0%})" in done.output
    page = opened(browser, tags / "e.html", 1280)
    titles = page.locator("h2").all_inner_texts()
    assert titles[0].startswith(f"{found['accuracy']:.1%} of labels given right")
    assert titles[2:] == ["Mistakes", "Classes", "Probabilities", "What may be automated"]
    assert page.locator("section").nth(1).locator("li").count() == found["wrong"] + found["missed"]
    (tags / "one.csv").write_text("path,label\ntagged/01.png,two\n")
    assert "several labels a picture, 1 images" in run(*words, tags / "one.csv").output  # this label and no other
    more = (tags / "tags.csv", "--unknown", tags / "unlabelled")
    assert "unknown_images, keep or coverage is for one label a picture" in refused(*words, *more)


def test_labels_of_no_class_are_refused_before_an_image_is_read(
    place: Path, labelled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Classifier, "evaluate", never)
    (labelled.parent / "6.png").touch()
    labelled.write_text(labelled.read_text() + "6.png,six\n")
    words = refused("evaluate", place / "classifier", labelled)
    assert "among the 5 classes" in words and "got 'six': rename these or leave them out" in words
    words = refused("evaluate", place / "classifier", labelled, "--unknown", place / "engine")
    assert "expected pictures of none of the classes" in words
    assert "found no folder" in refused("evaluate", place, place / "none")


def test_nested_folders_of_a_tree_are_evaluated_by_their_leaves(place: Path) -> None:
    with_tree(Classifier.load(""), [(), ("odd",), ("odd",), (), ()])
    images, labels = pictures(np.random.default_rng(5), 5, 2)
    for i, (image, c) in enumerate(zip(images, labels, strict=True)):
        if c:  # the name of the first is none of a folder
            (folder := place / "test" / ("odd" if c < 3 else "") / NAMES[c]).mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / f"{i}.png")
    words = refused("evaluate", place / "classifier", place / "test")
    assert "got 'odd': read nested folders of a tree by --nested" in words
    done = run("evaluate", place / "classifier", place / "test", "--nested")
    assert done.exit_code == 0 and "of 8 images are right" in done.output, done.output


def test_a_page_of_many_mistakes_says_what_is_left_out(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "MISTAKES", 4)
    monkeypatch.setattr(evaluation_report, "MATRIX", 4)
    images = sorted((place / "unlabelled").iterdir())[:15]
    found = Classifier.load("").evaluate(images, [NAMES[k % 5] for k in range(15)])
    written = evaluation_report.evaluation_page(found, lambda _: None, "title")
    assert found.wrong > 4 and f"The first 4 of {found.wrong} are shown." in written
    assert "Pairs of classes, the most frequent first." in written and 'class="matrix"' not in written


def test_a_page_draws_what_promises_about_errors_were_worth(place: Path, browser: Any) -> None:
    images, accepted = sorted((place / "unlabelled").iterdir())[:5], np.array([0, 1, 1, 2, 2, 3, 4, 5, 5])
    shares, errors = accepted / 5, np.where(accepted == 5, 0.2, 0)
    curve = shares, errors, shares[:, None], errors[:, None]
    promised = Automation(500, 500.0, 0.006, 0.006, np.array(PROMISES), np.full(9, 0.5), *curve)
    found = Classifier.load("").evaluate(images, NAMES)
    assert "No label is accepted" in evaluation_report.evaluation_page(found, lambda _: None, "title")
    counts = np.stack([accepted, accepted == 5], 1)
    promises = judge_promises(PROMISES, counts, counts.astype(float))
    found = replace(found, automation=promised, expected_automation=promised, promises=promises)
    (place / "e.html").write_text(evaluation_report.evaluation_page(found, lambda _: None, "title"))
    page = opened(browser, place / "e.html")
    section = page.locator("section", has_text="What may be automated")
    assert section.locator("svg text").all_text_contents()[:2] == ["of these wrong", "labels accepted"]
    assert [line.count(",") for line in re.findall('points="(.*?)"', section.inner_html())] == [8, 8]
    assert section.locator("tbody tr").first.locator("td").all_inner_texts() == [
        "1.0%",
        "too few",
        "1 (20.0%)",
        "0 (0.0%)",
        "up to 1",
        "20.0%",
        "0.500",
    ]


def test_a_page_says_first_what_broke(place: Path, browser: Any) -> None:
    images, accepted = sorted((place / "unlabelled").iterdir())[:5], np.arange(9) > 3
    found = Classifier.load("").evaluate(images, NAMES)
    promised = replace(found.automation, shares=1.0 * accepted, errors=np.where(accepted, 0.8, np.nan))
    counts = np.outer(accepted, [5, 4])
    promises = judge_promises(PROMISES, counts, counts.astype(float))
    expected = {"expected": 0.95, "expected_images": 200, "expected_at_sizes": (0.95, 200.0)}
    found = replace(found, automation=promised, promises=promises, **expected)
    (place / "e.html").write_text(evaluation_report.evaluation_page(found, lambda _: None, "title"))
    page = opened(browser, place / "e.html")
    first = page.locator("section").first
    assert first.locator("h2.bad").all_inner_texts()[-1] == "The promise of 5% broke"
    assert "still agree with the promise of 5%; the same goes for 7%" in first.inner_text()
    assert "These pictures differ from the left-out support images" in first.inner_text()
    assert first.locator("p").count() == 3 and first.locator(".quiet").count() == 0


def test_mistakes_are_refused_before_any_work(tmp_path: Path) -> None:
    assert "found none" in refused("audit", tmp_path, "--html", tmp_path / "none" / "a.html")
    assert "-n" in refused("suggest", tmp_path, tmp_path, "-n", 0)
    for command in (("audit", tmp_path), ("suggest", tmp_path, tmp_path, "-n", 1), ("evaluate", tmp_path, tmp_path)):
        assert "to end in .html or .htm" in refused(*command, "--html", tmp_path / "a.png")
    assert "to end in .csv" in refused("suggest", tmp_path, tmp_path, "-n", 1, "--out", tmp_path / "a.png")


def test_names_that_no_page_can_hold_are_refused(place: Path) -> None:
    for name in ("one", "two"):
        (place / "test" / name).mkdir(parents=True)
        shutil.copy(place / "unlabelled" / "0.png", os.fsencode(place / "test" / name) + b"/\xff.png")
    for command, *options in (("evaluate",), ("classify",), ("suggest", "-n", 1)):
        words = refused(command, place / "classifier", place / "test", *options, "--html", place / "a.html")
        assert "expected file names in UTF-8, got" in words
    assert not (place / "a.html").exists()


def test_heads_have_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, browser: Any) -> None:
    monkeypatch.chdir(tmp_path)
    images, labels = pictures(np.random.default_rng(3), 5, 6)
    names, keys = [NAMES[c] for c in (*labels[:7], 3, *labels[8:])], [f"<i>{i}.png" for i in range(30)]
    for key, image in zip(keys, images, strict=True):
        Image.fromarray(image).save(key)
    x = images.reshape(30, -1) / 255.0
    with pytest.raises(IosrFastError, match="expected a path for each of the 30 rows of X, got 29"):
        FewShotHead("gda").fit(x, names, paths=keys[1:])
    with pytest.raises(IosrFastError, match="expected the paths of picture files, got nan"):
        FewShotHead("gda").fit(x, names, paths=[*keys[1:], math.nan])
    column = pd.Series(keys, range(29, -1, -1))  # whose index is no position
    FewShotHead("gda").fit(x, names, paths=column).save("head")
    assert FewShotHead.load("head").snapshot().examples.paths[0] == str(tmp_path / keys[names.index(min(names))])
    np.savez("x.npz", x=x + 0.2, y=names[1:] + names[:1], keys=keys)
    for command, *words in (("audit",), ("evaluate", "x.npz"), ("classify", "x.npz"), ("suggest", "x.npz", "-n", 9)):
        done = run(command, "head", *words, "--html", f"{command}.html")
        assert done.exit_code == 0, done.output
        page = opened(browser, tmp_path / f"{command}.html")
        assert page.locator("img").count() >= 4 and page.locator("span.picture").count() == 0
        if command != "evaluate":
            assert Path(page.locator("input[data-path]").first.get_attribute("data-path")).is_file()
