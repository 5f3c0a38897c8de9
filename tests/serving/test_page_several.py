"""The page of a classifier of several labels a picture, in a real browser: answers, corrections, changed examples."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from iosr_fast.classifier import Classifier
from tests.serving import http_client, http_edge, page_server
from tests.serving.http_client import TAGS, TOKEN
from tests.serving.page_server import PHONE, WIDE, Site, Visit, file
from tests.serving.test_page import change, saved_rows

pytestmark = pytest.mark.slow
browser, visit = page_server.browser, page_server.visit  # pytest finds fixtures by these names
PICTURES = dict(zip(TAGS, http_client.tagged()[2], strict=True))


@pytest.fixture
def site() -> Iterator[Site]:
    classifier = Classifier.load(http_client.several_bundle(), verify=False)
    with http_client.serving(classifier, max_error=0.5) as client, http_edge.site(client.app) as edge:
        yield Site(f"http://127.0.0.1:{edge.port}/", classifier, [*PICTURES.values()], [])


def labels_of(classifier: Classifier, example_id: str) -> set[str]:
    return {one.name for one in classifier.classes() if example_id in classifier.examples(one.name)}


@pytest.mark.parametrize("visit", [WIDE, PHONE], indirect=True, ids=["wide", "phone"])
def test_each_label_is_shown_with_its_doubt_and_no_label_as_such(visit: Visit, tmp_path: Path) -> None:
    page, classifier = visit.page, visit.site.classifier
    page.locator("#promise", has_text="Each picture gets those it shows of the 5 classes below, or none.").wait_for()
    assert re.search(r"% of \d+ labels of left-out support images right", visit.text("#facts"))
    none = next(name for name, one in PICTURES.items() if not classifier.explain([one])[0].top)
    two, bare = classifier.explain([PICTURES["green heart"], PICTURES[none]], nearest=6)
    change(visit, {"accepted": [True, False]}, {"accepted": None}, {})
    for name in ("green heart", "light blue heart", none):
        visit.choose(file(PICTURES[name], f"{name}.png"))
        if name == "green heart":
            shown = [text.split("\n") for text in visit.texts("#answer .chip")]
            doubt = ["accepted", "look at it"]
            assert [chip[0] for chip in shown] == [label for label, _ in two.pairs]
            assert [chip[-1].rpartition(", ")[2] for chip in shown] == doubt
            looks = page.locator("#answer .chip").evaluate_all(
                "all => all.map((one) => getComputedStyle(one).borderStyle)"
            )
            assert looks == ["solid", "dotted"] and not page.locator("#bars").is_visible()
        if name == "light blue heart":
            assert not re.search("accepted|look at it", visit.text("#answer"))
    assert visit.texts("#answer p")[0] == "No label" and f"{bare.probability:.1%}" in visit.texts("#answer p")[1]
    assert visit.texts(".strip .name") == [one.label.replace(";", ", ") or "no label" for one in bare.nearest]
    first, second = (label for label, _ in two.pairs)
    assert visit.texts("#items .name")[::2] == [f"{first}, ? {second}", "no label"]
    rows = saved_rows(visit, tmp_path / "classified.csv")
    assert [rows[0]["label"], rows[2]["label"], rows[2]["confidence"]] == [f"{first};{second}", "", ""]
    assert page.evaluate("document.documentElement.scrollWidth") <= page.viewport_size["width"]


def choose_labels(visit: Visit, before: list[str], *wanted: str) -> None:
    """In the dialog, which has these ticked, tick the wanted ones and save them."""
    ticked = visit.page.locator("#labels[open] li:has(:checked)")
    assert ticked.all_inner_texts() == before
    for name in {*before} ^ {*wanted}:
        visit.page.locator("#labels-list").get_by_label(name, exact=True).click()
    visit.page.get_by_role("button", name="Save", exact=True).click()


def test_labels_are_corrected_one_by_one(visit: Visit) -> None:
    page, classifier = visit.page, visit.site.classifier
    before = {one.name: set(classifier.examples(one.name)) for one in classifier.classes()}
    visit.choose(file(PICTURES["orange book"], "shown.png"), file(PICTURES["kimono"], "other.png"))
    page.click("#correct-button")
    choose_labels(visit, visit.texts("#answer .name"), "book", "blue")
    visit.enter(TOKEN)
    visit.notice("1 example added to ")
    page.locator("#taught:focus", has_text="Added to the examples of ").wait_for()
    (added,) = set(classifier.examples("book")) - before["book"]
    assert labels_of(classifier, added) == {"book", "blue"}

    page.locator("#items label", has_text="other.png").click()
    page.click("#correct-button")
    choose_labels(visit, visit.texts("#answer .name"))
    visit.notice("1 example added to no class.")
    page.locator("#classes summary", has_text="No label").get_by_text("16 examples").wait_for()


def test_examples_get_other_labels_and_are_added_with_several(visit: Visit) -> None:
    page, classifier = visit.page, visit.site.classifier
    first = classifier.examples("face")[0]
    page.locator("#classes summary", has_text="face").click()
    page.get_by_role("button", name="Labels of example 1 of face").press("Enter")
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Labels of example 1 of face").press("Enter")
    choose_labels(visit, ["face"], "face", "heart")
    visit.enter(TOKEN)
    visit.notice("Labels changed to “face”, “heart”.")
    assert labels_of(classifier, first) == {"face", "heart"}
    page.set_input_files(".panel input", [file(PICTURES["nerd face"], "new.png")])
    page.locator("#labels[open]", has_text="Labels of 1 new example").wait_for()
    choose_labels(visit, ["face"], "face", "green")
    visit.notice("1 example added to “face”, “green”.")
    last = classifier.examples("face")[-1]
    assert labels_of(classifier, last) == {"face", "green"}
    page.once("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name="Remove class").click()
    visit.notice("Removed “face”.")
    page.locator("#classes summary", has_text="No label").get_by_text("24 examples").wait_for()
    assert labels_of(classifier, first) == {"heart"} and labels_of(classifier, last) == {"green"}
