"""The page in a real browser against the real server: answers, and the list of all pictures."""

from __future__ import annotations

import csv
import io
import re
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from iosr_fast.utils.csv_text import escaped
from tests import ROOT
from tests.pictures import turned
from tests.serving import page_server
from tests.serving.page_server import PHONE, PLACE, WIDE, Visit, file

pytestmark = pytest.mark.slow
site, browser, visit = page_server.site, page_server.browser, page_server.visit  # pytest finds fixtures by these names
PAGE = ROOT / "iosr_fast" / "pages" / "server"


def change(visit: Visit, *changes: dict[str, Any]) -> None:
    """Change the predictions of the next answers, which have one each."""
    left = list(changes)

    def changed(route: Any) -> None:
        body = route.fetch().json()
        body["predictions"][0] |= left.pop(0)
        route.fulfill(json=body)

    visit.page.route("**/v1/predict*", changed)


def saved_rows(visit: Visit, path: Path) -> list[dict[str, str]]:
    """The list as CSV."""
    with visit.page.expect_download() as download:
        visit.page.get_by_role("button", name="Save as CSV").click()
    download.value.save_as(path)
    with path.open(newline="", encoding="utf-8") as opened:
        return list(csv.DictReader(opened))


def test_comes_whole_from_its_own_server(visit: Visit) -> None:
    with urllib.request.urlopen(visit.site.address) as answer:
        policy = answer.headers["Content-Security-Policy"]
    assert "default-src 'self'" in policy and "require-trusted-types-for" in policy and "unsafe" not in policy
    markup = re.compile(r"https?://|<style|style=|<script(?! (type=\"module\" )?src=)|\son\w+=")
    script = re.compile(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|https?://")
    for path in PAGE.iterdir():
        assert urllib.request.urlopen(f"{visit.site.address}static/{path.name}").read() == path.read_bytes()
        forbidden = {".html": markup, ".js": script}.get(path.suffix)
        assert forbidden is None or not forbidden.search(path.read_text(encoding="utf-8")), path.name


def test_somebody_without_a_picture_tries_an_example(visit: Visit) -> None:
    name = visit.site.classifier.classes()[0].name
    sample = visit.page.get_by_role("button", name=f"Classify an example of {name}", exact=True)
    sample.press("Enter")
    visit.page.locator("#answer .label", has_text=name).wait_for()
    assert not sample.is_visible()


def test_a_chosen_picture_is_answered_and_explained(visit: Visit) -> None:
    page, query = visit.page, visit.site.queries[0]
    page.locator("#promise", has_text="Each picture gets one of the 8 classes below, or none.").wait_for()
    (expected,) = visit.site.classifier.explain([query], top=5, nearest=6)
    visit.choose(file(query, "chosen.png"))
    assert not page.locator("#promise").is_visible() and expected.label in visit.text("#answer .label")
    assert visit.texts(".bars .name") == [*(score.label for score in expected.top), "3 other classes"]
    shares = [score.probability for score in expected.top]
    shares.append(1 - sum(shares))
    shown = [float(text.strip("<>% ")) for text in visit.texts(".bars .probability")]
    np.testing.assert_allclose(shown, [100 * share for share in shares], atol=0.11)
    bar, whole = page.locator(".bar > span"), page.locator(".bar").first.bounding_box()["width"]
    widths = bar.evaluate_all("all => all.map((one) => one.getBoundingClientRect().width)")
    np.testing.assert_allclose(np.array(widths) / whole, shares, atol=0.01)
    assert visit.texts(".strip .name") == [neighbour.label for neighbour in expected.nearest]
    page.locator("#picture canvas").wait_for()


def test_answers_that_are_not_sure_differ_in_words_and_shape(visit: Visit) -> None:
    page, best = visit.page, visit.site.classifier.predict([visit.site.queries[0]])[0]
    unknown = {"label": None, "class_id": None, "unknown": {"score": 3.21, "rejected": True}}
    doubtful = {"accepted": False, "probability": 0.9}
    accepted = {"accepted": True, "probability": 0.4}
    change(visit, {"probability": 0.5}, {"probability": 0.499}, accepted, doubtful, unknown)
    looks = []
    for name in ("sure.png", "unsure.png", "accepted.png", "doubtful.png", "unknown.png"):
        visit.choose(file(visit.site.queries[0], name))
        border = page.locator("#answer .label").evaluate("label => getComputedStyle(label).borderLeftStyle")
        looks.append((re.sub(r" \S+%$", "", visit.text("#answer .label")), border, page.input_value("#truth")))
    sure, unsure = (best, "none", best), (f"Not sure: {best}?", "dotted", best)
    look = f"Needs a look: {best}?", "dotted", best
    assert looks == [sure, unsure, sure, look, ("Unknown", "double", "")]
    assert visit.texts("#items .name") == [best, f"? {best}", best, f"? {best}", "unknown"]


def test_a_node_is_shown_with_its_place_and_taught_as_a_class(visit: Visit) -> None:
    page, (first, second, third, *_) = visit.page, visit.site.classifier.classes_
    node = {"label": "near", "class_id": None, "probability": 0.99, "accepted": True, "level": 1, "path": PLACE[:1]}
    visit.choose(file(visit.site.queries[0], "class.png"))
    assert visit.texts("#answer p")[1] == f"<i>left > near > {first}"
    change(visit, node)
    visit.choose(file(visit.site.queries[0], "node.png"))
    assert visit.texts("#answer p") == ["near 99.0%", "<i>left > near"] and page.input_value("#truth") == first
    assert visit.texts("#items .name")[-1] == "near" and visit.texts(".bars .name")[0] == first
    rows = visit.texts("#classes summary")
    assert [" > ".join(PLACE) in row for row in rows] == [True, True, *[False] * 6] and third in rows[2]
    page.fill("#filter", "LEFT > n")
    assert [first in row or second in row for row in visit.texts("#classes summary")] == [True, True]


# --- the list ---


@pytest.mark.parametrize("visit", [WIDE, PHONE], indirect=True, ids=["wide", "phone"])
def test_all_pictures_are_listed_selected_saved_and_cleared(visit: Visit, tmp_path: Path) -> None:
    page, queries = visit.page, visit.site.queries
    names = ["=1+2.png", "no picture.png", 'a "long", name ' * 9 + ".png", *(f"{i}.png" for i in range(17))]
    pictures = [queries[2], b"no picture at all", queries[3], *(queries[i % 8] for i in range(17))]
    visit.choose(*map(file, pictures, names))
    visit.was_refused(422)
    expected = visit.site.classifier.explain([picture for i, picture in enumerate(pictures) if i != 1], top=5)
    labels = [one.label for one in expected]
    shown = [label.removeprefix("? ") for label in visit.texts("#items .name")]
    reason = "expected a JPEG, PNG or WebP image, got a file of another kind; convert it to one of these"
    assert shown == [labels[0], reason, *labels[1:]]
    assert visit.text("#list-title") == "20 pictures"
    assert visit.text("#classified[role=status]") == "20 pictures classified."
    assert page.locator("#items canvas").count() == 19 and labels[0] in visit.text("#answer .label")
    width = page.viewport_size["width"]
    page.locator("#classes summary").first.click()
    page.locator(".panel img").first.wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.locator("#items .file wbr").count() > 20, "names break behind dots"

    page.locator("#items :checked").focus()
    page.keyboard.press("ArrowDown")
    assert visit.text("#answer .label") == "Not classified" and reason in visit.text("#answer")
    page.locator("#picture .missing").wait_for()
    assert not page.locator("#scores").is_visible()
    for _ in range(2):
        page.keyboard.press("ArrowUp")  # from the first to the last
    (last,) = page.locator("#items label:has(:checked:focus)").all()
    assert "16.png" in last.inner_text() and labels[-1] in visit.text("#answer .label")
    box, row = page.locator("#items").bounding_box(), last.bounding_box()
    assert row["y"] + row["height"] <= box["y"] + box["height"] + 1, "it is scrolled into sight"

    rows = saved_rows(visit, tmp_path / "classified.csv")
    assert list(rows[0]) == ["file", "label", "confidence", "alternatives", "error"]
    assert [row["file"] for row in rows] == list(map(escaped, names)) and rows[0]["file"].startswith("'=")
    assert rows[1] == dict.fromkeys(rows[0], "") | {"file": names[1], "error": reason}
    assert [row["label"] for row in rows if not row["error"]] == labels
    others = [part.rpartition(" ")[0] for part in rows[0]["alternatives"].split("; ")]
    assert others == [score.label for score in expected[0].top[1:]]
    assert float(rows[0]["confidence"]) == pytest.approx(expected[0].probability, abs=1e-3)

    page.once("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name="Clear").click()
    page.locator("#promise").wait_for()
    assert page.locator("#items label").count() == 0 and not page.locator("#list").is_visible()
    visit.choose(file(queries[0], "anew.png"))
    assert visit.text("#list-title") == "1 picture"


def test_busy_is_waited_for_and_what_failed_is_classified_again(visit: Visit) -> None:
    page, body = visit.page, {"error": {"code": "queue_full", "message": "the queue is full"}}

    def busy(seconds: int, times: int) -> None:
        headers = {"Retry-After": str(seconds)}
        page.route("**/v1/predict*", lambda it: it.fulfill(status=503, headers=headers, json=body), times=times)

    busy(1, times=1)
    page.set_input_files("#choose", [file(visit.site.queries[4], "once.png")])
    visit.notice("The server is busy. The page tries again in 1 second.")
    page.locator(".bars li").first.wait_for()
    assert not page.locator("#notice").is_visible()
    busy(0, times=10)
    visit.choose(file(visit.site.queries[5], "ten-times.png"))
    assert "ten-times.png: the queue is full" in visit.text("#answer")
    visit.was_refused(*[503] * 11)
    page.get_by_role("button", name="Classify 1 again").click()
    page.locator("#answer .label", has_text=visit.site.classifier.predict([visit.site.queries[5]])[0]).wait_for()


# --- files ---


def test_pictures_are_pasted_or_dropped(visit: Visit) -> None:
    page = visit.page

    def transfer(*names: str) -> Any:
        script = """([bytes, names]) => {
          const transfer = new DataTransfer();
          for (const name of names) transfer.items.add(new File([new Uint8Array(bytes)], name, { type: "image/png" }));
          return transfer;
        }"""
        return page.evaluate_handle(script, [list(visit.site.queries[1]), names])

    def paste(*names: str) -> None:
        script = (
            "(data) => document.body.dispatchEvent(new ClipboardEvent('paste', { clipboardData: data, bubbles: true }))"
        )
        page.evaluate(script, transfer(*names))

    paste()
    visit.notice("no picture in the clipboard")
    paste("pasted.png")
    page.locator("label:has(:checked)", has_text="pasted.png").wait_for()
    page.dispatch_event("#stage", "dragover", {"dataTransfer": transfer("dropped.png")})
    page.locator("html.hovered").wait_for()
    page.dispatch_event("#stage", "drop", {"dataTransfer": transfer("dropped.png")})
    page.locator("label:has(:checked)", has_text="dropped.png").wait_for()
    assert page.locator(".hovered").count() == 0

    page.focus("#new-name")
    paste("first.png")
    page.dispatch_event("#new-examples", "drop", {"dataTransfer": transfer("second.png", "third.png")})
    names = page.locator("#new-examples").evaluate("input => [...input.files].map(({ name }) => name)")
    assert names == ["first.png", "second.png", "third.png"] and visit.text("#list-title") == "2 pictures"


def test_a_photo_is_turned_upright_and_a_large_one_keeps_enough_pixels_on_both_sides(visit: Visit) -> None:
    """A classifier may crop the centre or squash all of it."""
    script = """async (bytes) => {
      const { prepared } = await import("/static/pictures.js");
      const large = [new Uint8Array(bytes), new Uint8Array(2 << 20)];
      const file = await prepared(new File(large, "photo.jpg", { type: "image/jpeg" }));
      return [...new Uint8Array(await file.arrayBuffer())];
    }"""
    for (width, height), redrawn in (((64, 32), (64, 32)), ((400, 3000), (400, 3000)), ((4000, 1000), (3072, 768))):
        photo = Image.new("RGB", (width, height), "blue")
        photo.paste("red", (0, 0, width // 2, height))
        got = Image.open(io.BytesIO(bytes(visit.page.evaluate(script, list(turned(photo, 6, quality=95))))))
        assert got.size == redrawn and got.getexif().get(0x0112, 1) == 1, "or the server would turn it again"
        row = np.asarray(got).astype(int)[redrawn[1] // 2]
        assert np.abs(row[[4, -4]] - [[255, 0, 0], [0, 0, 255]]).max() < 40

    upright = Image.open(io.BytesIO(visit.site.queries[2])).resize((300, 200), Image.Resampling.BICUBIC)
    visit.choose(file(turned(upright, 8, quality=95), "small.jpg", "image/jpeg"))
    assert visit.site.classifier.predict([upright])[0] in visit.text("#answer .label")
