"""`iosr-fast suggest` and `classify`: files and pages that take labels, also in a browser."""

from __future__ import annotations

import csv
import math
import re
from pathlib import Path
from typing import Any

import pytest

from iosr_fast import Classifier, labelled_images
from iosr_fast.exceptions import IosrFastError
from iosr_fast.files.tables import Labelled
from iosr_fast.reports import predictions_report
from iosr_fast.reports.predictions_report import predictions_page
from tests.cli.runs import refused, run
from tests.reports.conftest import NAMES, opened

pytestmark = pytest.mark.slow


def test_suggest_writes_a_csv_that_fit_reads_once_labels_are_in(place: Path) -> None:
    done = run("suggest", place / "classifier", place / "unlabelled", "-n", 5, "--out", place / "s.csv")
    assert done.exit_code == 0, done.output
    with (place / "s.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 5 and sum(int(row["stands_for"]) for row in rows) == 18
    assert {row["guess"] for row in rows} <= set(NAMES) and not any(row["label"] for row in rows)
    with pytest.raises(IosrFastError, match="5 rows without one"):
        labelled_images(place / "s.csv")
    printed = run("suggest", place / "classifier", place / "unlabelled", "-n", 2)
    assert printed.output.startswith("path,label,guess,probability,stands_for\n")


def test_labels_typed_on_the_page_are_kept_and_saved_as_that_csv(place: Path, browser: Any) -> None:
    Classifier.load("").rename_class("three", "strawberry")
    done = run("suggest", place / "classifier", place / "unlabelled", "-n", 4, "--html", place / "s.html")
    assert done.exit_code == 0 and not done.stdout, done.output
    page = opened(browser, place / "s.html")
    fields, status = page.get_by_label("Label"), page.get_by_role("status")
    assert fields.count() == 4 and page.locator("datalist option").count() == 5
    page.get_by_role("button", name="Take").first.click()
    assert fields.nth(0).input_value() in NAMES
    fields.nth(0).fill("two")
    fields.nth(0).press("Enter")
    assert fields.nth(1).evaluate("(field) => field === document.activeElement")
    picture = page.locator("li").nth(1).locator("button").first
    picture.press("Enter")
    assert page.locator("dialog img").evaluate("(image) => image.complete && image.alt").endswith(".png")
    page.keyboard.press("Escape")
    assert not page.locator("dialog").is_visible() and picture.evaluate("(it) => it === document.activeElement")
    fields.nth(2).fill('=a "new", one')
    asked = page.get_by_role("button", name="Did you mean")
    close = {"Two": "two", "straw-berry": "strawberry", "strawbery": "strawberry", "starwberrys": ""}
    close |= {"starwberry": "strawberry", "strawberrys": "strawberry", "trawberry": "strawberry"}
    for typed, meant in (close | {"strawberries": "", "fve": ""}).items():
        fields.nth(3).fill(typed)
        assert asked.all_inner_texts() == [f"Did you mean {meant}?"] * bool(meant)
        if meant:
            asked.click()
            assert fields.nth(3).input_value() == meant and not asked.count()
    fields.nth(3).fill("")
    page.reload()
    assert [fields.nth(k).input_value() for k in range(4)] == ["two", "", '=a "new", one', ""]
    assert status.inner_text() == "2 of 4 images labelled; kept in this browser"
    with page.expect_download() as download:
        page.get_by_role("button", name="Save labels.csv").click()
    download.value.save_as(place / "labels.csv")
    assert status.inner_text() == "2 of 4 images labelled; saved"
    paths, labels, *_ = labelled_images(place / "labels.csv")
    assert labels == ["two", '=a "new", one'] and all(path.parent == place / "unlabelled" for path in paths)

    run("suggest", place / "classifier", place / "unlabelled", "-n", 5, "--html", place / "other.html")
    page.goto((place / "other.html").as_uri())
    assert status.inner_text() == "0 of 5 images labelled", "labels belong to one report"
    page.add_init_script("Object.defineProperty(window, 'localStorage', { get() { throw new Error('none'); } })")
    page.reload()
    fields.nth(0).fill("two")
    assert status.inner_text() == "1 of 5 images labelled; not kept, save them"


def test_classify_writes_a_page_of_pictures_by_label(place: Path) -> None:
    folder = place / "unlabelled"
    (folder / "broken.png").write_bytes(b"no picture")
    words = ("classify", place / "classifier", folder, "--skip-bad", "--html")
    alone = run(*words, place / "alone.html")
    assert alone.exit_code == 0 and not alone.stdout, alone.output
    rejecting = ("--reject-unknown", "--keep", "0.9", "--unknown-label", "<other>", "--out", place / "r.csv")
    done = run(*words, place / "r.html", *rejecting)
    assert done.exit_code == 0 and "<other>" in (place / "r.csv").read_text(), done.output
    pages = [(place / name).read_text() for name in ("alone.html", "r.html")]
    for page in pages:
        assert page.count("data:image/webp;base64,") == 18 and "<b>one" not in page
        assert "<dt>unreadable</dt><dd>1</dd>" in page
    assert "<h2>&lt;other&gt;</h2>" in pages[1] and "broken.png: it is not an image" in pages[1]
    assert "expected a file for --out with --html" in refused(*words, place / "n.html", "--out", place / "parts")


def test_classify_writes_several_labels_a_picture(tags: Path, browser: Any) -> None:
    import pyarrow.parquet as pq

    words = ("classify", tags / "classifier", tags / "tagged")
    images, classifier = sorted((tags / "tagged").iterdir()), Classifier.load("")
    given, accepted = classifier.predict(images), classifier.predict(images, max_error=0.2)
    said = run(*words, "--max-error", "20%", "--out", tags / "t.csv", "--html", tags / "t.html")
    number = sum(map(len, accepted))
    assert said.exit_code == 0 and f"accepted {number} labels of 30 images" in said.output, said.output
    rows = list(csv.DictReader((tags / "t.csv").open()))
    assert [set(filter(None, row["labels"].split(";"))) for row in rows] == given.tolist()
    for row, labels in zip(rows, accepted, strict=True):
        marks = zip(row["labels"].split(";"), row["accepted"].split(";"), strict=True)
        assert {label for label, mark in marks if mark == "true"} == labels
    done = run(*words, "--max-error", "20%", "--out", tags / "parts")
    table = pq.read_table(tags / "parts" / "part-00000.parquet").to_pylist()
    assert done.exit_code == 0 and [set(row["labels"]) for row in table] == given.tolist(), done.output
    assert [sum(row["accepted"]) for row in table] == [*map(len, accepted)]
    look = [k for k, both in enumerate(zip(given, accepted, strict=True)) if both[0] != both[1] or not both[0]]
    page = opened(browser, tags / "t.html", 1280)
    assert page.locator("li img").count() == len(look), "each once"
    names = page.locator("h2").all_inner_texts()[1:]
    assert names[0] == "(no label)" and set(names[1:]) <= set(NAMES)
    for section in page.locator("section:has(li)").all()[1:]:
        for card in section.locator("li").all():
            bars = card.locator(".measure").all_inner_texts()
            unsure = dict(words.split("% ")[::-1] for words in bars if not words.endswith(", accepted"))
            assert unsure[section.locator("h2").inner_text()] == min(unsure.values(), key=int)
    card = page.locator("section:has(li)").nth(1).locator("li").first
    card.get_by_role("button", name="Take").click()
    with page.expect_download() as download:
        page.get_by_role("button", name="Save labels.csv").click()
    download.value.save_as(tags / "labels.csv")
    [path], [labels], *_ = labelled_images(tags / "labels.csv")
    assert labels == given[images.index(path)] != frozenset()
    assert "--top is for one label a picture" in refused(*words, "--top", 3)
    assert "--sort is for one label a picture" in refused(*words, "--max-error", "20%", "--sort", tags / "s")


def test_a_page_of_labels_is_filtered_and_takes_labels(place: Path, browser: Any) -> None:
    images = sorted((place / "unlabelled").iterdir())
    rows = [Labelled(str(images[k]), "one" if k < 9 else "two", 0.9, math.nan, "") for k in range(18)]
    (place / "p.html").write_text(predictions_page(rows, "Labels", classes=NAMES))
    page = opened(browser, place / "p.html", 1280)
    words, label = page.get_by_label("Path or label"), page.locator("select")
    sections, cards = page.locator("section:has(li):visible h2"), page.locator("li:visible")
    for text, chosen, count, names in (("5.PNG", "", 2, ["one", "two"]), ("", "two", 9, ["two"])):
        words.fill(text)
        label.select_option(chosen)
        assert cards.count() == count and sections.all_inner_texts() == names
    words.fill("/3.png")
    cards.get_by_role("button", name="Take two").click()
    cards.get_by_label("Label").press("Enter")
    assert page.evaluate("document.activeElement.id") == "save", "fields that are filtered out are left out"
    assert cards.get_by_label("Label").input_value() == "two"
    assert page.locator("#status").inner_text().startswith("1 of 18 images labelled")


def test_a_page_with_a_promise_shows_the_labels_that_need_a_look(place: Path) -> None:
    images = sorted((place / "unlabelled").iterdir())
    rows = [Labelled(str(images[k]), "aab"[k % 3], 0.9 - k / 20, math.nan, "", k < 4 or k == 5) for k in range(9)]
    page = predictions_page(rows, "Labels")
    assert page.count("data:image/webp;base64,") == 4 and "5 of 9 images are left out" in page
    assert "<dt>need a look</dt><dd>4</dd>" in page
    cells = [re.findall(r"<td[^>]*>([^<]*)</td>", row)[:3] for row in re.findall("<tr>.*?</tr>", page)]
    assert cells[1:] == [["a", "6", "3"], ["b", "3", "1"]]


def test_a_page_of_labels_shows_the_unsure_first_and_says_what_it_leaves_out(
    place: Path, browser: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predictions_report, "_PICTURES", 9)
    monkeypatch.setattr(predictions_report, "_OPEN", 2)
    images = sorted((place / "unlabelled").iterdir())
    rows = [Labelled(str(images[k]), "abbbb<bbb"[k], 0.9 - k / 20, math.nan, "") for k in range(9)]
    rows.append(Labelled("gone.png", "a", 0.2, math.nan, ""))
    (place / "p.html").write_text(predictions_page(rows, "Labels"))
    for width in (390, 1280):
        page = opened(browser, place / "p.html", width)
        assert page.locator("h2").all_inner_texts() == ["Labels", "<", "a", "b"]
        assert "4 of 10 images are left out" in page.locator("header").inner_text()
        section = page.locator("section").nth(3)
        assert section.locator("p").all_inner_texts()[:2] == ["7 images.", "The first 3 of 7 are shown."]
        assert section.locator("li .measure").all_inner_texts() == ["50%", "55%", "60%"]
        assert page.locator(".wide").evaluate("(table) => table.scrollWidth <= table.clientWidth")
        assert page.locator("span.picture").all_inner_texts() == ["gone.png"]
    (place / "p.html").write_text(predictions_page([rows[0]._replace(label="w" * 512)], "Labels"))
    opened(browser, place / "p.html")
