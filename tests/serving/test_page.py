"""The page in a real browser against the real server: classifying pictures and changing classes."""

from __future__ import annotations

import io
import re
import urllib.request
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests import ROOT
from tests.pictures import encode, turned
from tests.serving import page_server
from tests.serving.http_client import TOKEN
from tests.serving.page_server import NEWCOMER, Visit, file

pytestmark = pytest.mark.slow
site, browser, visit = page_server.site, page_server.browser, page_server.visit  # pytest finds fixtures by these names
PAGE = ROOT / "iosr_fast" / "serving" / "http" / "page"
PARTS = ("texts", "examples", "adapter")
PHONE = {"viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True}


def test_comes_whole_from_its_own_server(visit: Visit) -> None:
    with urllib.request.urlopen(visit.site.address) as answer:
        policy, markup = answer.headers["Content-Security-Policy"], answer.read().decode()
    assert "default-src 'self'" in policy and "unsafe" not in policy
    assert not re.search(r"https?://|<style|style=|<script(?! type=\"module\" src=)|\son\w+=", markup)
    for path in PAGE.iterdir():
        if path.suffix != ".py" and path.is_file():
            assert urllib.request.urlopen(f"{visit.site.address}static/{path.name}").read() == path.read_bytes()
    forbidden = re.compile(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|https?://(?!www\.w3\.org/2000/svg\")"
    )
    assert [path.name for path in PAGE.glob("*.js") if forbidden.search(path.read_text(encoding="utf-8"))] == []


def test_the_empty_page_says_what_it_does(visit: Visit) -> None:
    visit.page.locator("#answer", has_text="Each picture gets one of the 8 classes below, or none.").wait_for()
    assert visit.text("#matches") == "8 classes" and not visit.page.locator(".legend").is_visible()
    assert visit.text("#stage strong.for-mouse") == "Drop pictures"
    visit.choose(file(visit.site.queries[0]))
    assert visit.page.locator(".legend").is_visible()
    assert visit.text("#stage strong.for-mouse") == "Drop more pictures"


def test_a_chosen_picture_is_explained(visit: Visit) -> None:
    query = visit.site.queries[0]
    (expected,) = visit.site.classifier.explain([query], top=5, nearest=6)
    visit.choose(file(query, "chosen.png"))
    page = visit.page
    assert visit.text("#answer .label").startswith(expected.label)
    rows = page.locator(".bars li[data-class]")
    assert rows.locator(".name").all_inner_texts() == [score.label for score in expected.top]
    shown = [float(text.strip("<>% ")) for text in rows.locator(".probability").all_inner_texts()]
    np.testing.assert_allclose(shown, [100 * score.probability for score in expected.top], atol=0.11)
    assert visit.text(".bars .rest .name") == "3 other classes"

    parts = np.array([[score.zero_shot, score.cache - score.adapter, score.adapter] for score in expected.top])
    from_start = parts - parts.min(0) + 0.1 * np.ptp(parts, 0)
    lengths = [
        page.locator(f".bar rect.{part}").evaluate_all("all => all.map(rect => parseFloat(rect.getAttribute('width')))")
        for part in PARTS
    ]
    np.testing.assert_allclose(np.transpose(lengths), 100 * from_start / from_start.sum(1).max(), atol=0.1)
    assert np.min(lengths) > 0, "the smallest part has a length too"

    page.locator("details.numbers summary").click()
    cells = page.locator("details.numbers tbody tr").first.locator("td").all_inner_texts()
    numbers = [float(text.replace("\u2212", "-")) for text in cells]
    np.testing.assert_allclose(numbers, [*parts[0], expected.logit], atol=0.006)
    assert page.locator("details.numbers thead th").all_inner_texts() == ["class", *PARTS, "sum"]
    assert page.locator(".key:visible").all_inner_texts() == list(PARTS)
    times = r"\d+\.\d ms in the server, \d+\.\d ms round trip, model version \d+"
    assert re.fullmatch(times, visit.text("details.numbers p:last-child"))

    near = page.locator(".nearest li")
    assert near.locator(".name").all_inner_texts() == [neighbour.label for neighbour in expected.nearest]
    cosines = [float(text.replace("\u2212", "-")) for text in near.locator(".quiet").all_inner_texts()]
    np.testing.assert_allclose(cosines, [neighbour.similarity for neighbour in expected.nearest], atol=0.006)
    near.locator("img").first.scroll_into_view_if_needed()
    page.wait_for_load_state("networkidle")
    assert near.locator("img").evaluate_all("images => images.every(i => i.complete && i.naturalWidth > 0)")


def test_bars_of_any_sign(visit: Visit) -> None:
    lengths = visit.page.evaluate(
        """async () => {
          const { barLengths } = await import("/static/result.js");
          const top = (...rows) => rows.map(([zero_shot, cache, adapter = 0]) => ({ zero_shot, cache, adapter }));
          return [
            top([-4, 3], [-5, 1], [-2, -3]),
            top([7, -7]),
            top([1, 2], [1, 2]),
            top([0, 5, 5], [0, 1, 1]),
            top([0, 3, 1], [0, 0, 2]),
          ]
            .map(barLengths);
        }"""
    )
    mixed, alone, tied, adapted, three = lengths
    longest = 7.9  # (-4 + 5 + 0.3) + (3 + 3 + 0.6)
    assert mixed["longest"] == pytest.approx(longest)
    lengths = [[bar["texts"], bar["examples"]] for bar in mixed["bars"]]
    np.testing.assert_allclose(np.array(lengths) * longest, [[1.3, 6.6], [0.3, 4.6], [3.3, 0.6]])
    none = dict.fromkeys(PARTS, 0)
    assert (
        alone["bars"] == [none] and tied["bars"] == [none] * 2 and [bar["adapter"] for bar in mixed["bars"]] == [0] * 3
    )
    assert [(bar["texts"], bar["examples"]) for bar in adapted["bars"]] == [(0, 0)] * 2
    lengths = [[bar[part] for part in PARTS] for bar in three["bars"]]  # examples 2 and -2, adapter 1 and 2
    np.testing.assert_allclose(np.array(lengths) * three["longest"], [[0, 4.4, 0.1], [0, 0.4, 1.1]], atol=1e-9)


def test_a_classifier_without_adapted_embeddings_has_no_such_part(visit: Visit) -> None:
    """The server's answer, without its parts that come through the adapter."""

    def without_adapter(route: Any) -> None:
        body = route.fetch().json()
        for score in body["predictions"][0]["top"]:
            score["adapter"] = 0.0
        route.fulfill(json=body)

    visit.page.route("**/v1/predict*", without_adapter, times=1)
    visit.choose(file(visit.site.queries[0], "plain.png"))
    page = visit.page
    assert page.locator(".key:visible").all_inner_texts() == ["texts", "examples"]
    assert page.locator(".bar rect.examples").count() == 5 and page.locator(".bar rect.adapter").count() == 0
    assert page.locator("details.numbers thead th").all_text_contents() == ["class", "texts", "examples", "sum"]


@pytest.mark.parametrize("visit", [{"permissions": ["clipboard-read", "clipboard-write"]}], indirect=True)
def test_paste(visit: Visit) -> None:
    visit.page.evaluate(
        """async (bytes) => navigator.clipboard.write(
          [new ClipboardItem({ "image/png": new Blob([new Uint8Array(bytes)], { type: "image/png" }) })])""",
        list(visit.site.queries[1]),
    )
    visit.page.keyboard.press("Control+V")
    visit.page.locator(".bars li").first.wait_for()
    assert visit.text("#answer .label").startswith(visit.site.classifier.predict([visit.site.queries[1]])[0])
    visit.page.evaluate("navigator.clipboard.writeText('words')")
    visit.page.keyboard.press("Control+V")
    visit.notice("no picture in the clipboard")


def test_drop_of_several_with_one_that_is_unreadable(visit: Visit) -> None:
    page, queries = visit.page, visit.site.queries
    given = [list(queries[2]), list(b"no picture at all"), list(queries[3])]
    transfer = page.evaluate_handle(
        """(files) => {
          const transfer = new DataTransfer();
          files.forEach((bytes, i) =>
            transfer.items.add(new File([new Uint8Array(bytes)], `${i}.png`, { type: "image/png" })));
          return transfer;
        }""",
        given,
    )
    page.dispatch_event("#stage", "dragover", {"dataTransfer": transfer})
    page.locator("html.hovered").wait_for()
    page.dispatch_event("#stage", "drop", {"dataTransfer": transfer})
    assert page.locator(".hovered").count() == 0
    page.locator("#file-name", has_text="2.png").wait_for()
    second, third = (visit.site.classifier.predict([queries[i]])[0] for i in (2, 3))
    assert page.locator("#strip .name").all_inner_texts() == [second, "failed: 1.png", third]
    assert visit.text("#answer .label").startswith(third)

    page.locator("#strip button").nth(1).click()
    assert visit.text("#answer .label") == "Not classified" and not page.locator("#scores").is_visible()
    expected = "1.png: expected a JPEG, PNG or WebP image, got a file of another kind; convert it to one of these"
    assert expected in visit.text("#answer") and not page.locator(".legend").is_visible()
    inside = "(box) => [box.scrollWidth - box.clientWidth, box.scrollHeight - box.clientHeight]"
    assert page.locator("#picture .missing").evaluate(inside) == [0, 0]
    assert page.get_attribute("#answer", "aria-live") == "polite"
    page.locator("#strip button").nth(0).click()
    assert visit.text("#answer .label").startswith(second) and visit.text("#file-name") == "0.png"
    visit.was_refused(422)


def test_a_photo_is_turned_upright_before_it_is_sent(visit: Visit) -> None:
    """A classifier may take pixels as they are stored; a phone stores them as its sensor lies and says how in EXIF."""
    upright = np.zeros((32, 64, 3), np.uint8)
    upright[:, :32, 0] = upright[:, 32:, 2] = 255  # red left, blue right
    stored, exif = Image.fromarray(np.rot90(upright)), Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    photo = encode(stored, "JPEG", exif=exif, quality=95)
    sent = visit.page.evaluate(
        """async (bytes) => {
          const { prepared } = await import("/static/upright.js");
          const { file } = await prepared(new File([new Uint8Array(bytes)], "photo.jpg", { type: "image/jpeg" }));
          return [...new Uint8Array(await file.arrayBuffer())];
        }""",
        list(photo),
    )
    visit.choose(file(photo, "photo.jpg", "image/jpeg"))
    redrawn = Image.open(io.BytesIO(bytes(sent)))
    assert redrawn.getexif().get(0x0112, 1) == 1, "or the server would turn it again"
    got = np.asarray(redrawn).astype(int)
    assert got.shape == upright.shape and np.abs(got - upright)[:, [4, 60]].max() < 40
    assert visit.text("#file-name") == "photo.jpg (turned upright before sending)"


@pytest.mark.parametrize(
    ("size", "redrawn"), [((2000, 1500), (1024, 768)), ((400, 3000), (400, 3000)), ((4000, 1000), (2048, 512))]
)
def test_a_redrawn_picture_keeps_its_aspect_ratio_and_pixels_on_both_sides(
    visit: Visit, size: tuple[int, int], redrawn: tuple[int, int]
) -> None:
    """A model may crop the centre or squash all of it: it needs the shorter side's pixels either way."""
    sent = visit.page.evaluate(
        """async (bytes) => {
          const { prepared } = await import("/static/upright.js");
          const { file } = await prepared(new File([new Uint8Array(bytes)], "photo.jpg", { type: "image/jpeg" }));
          return [...new Uint8Array(await file.arrayBuffer())];
        }""",
        list(turned(Image.new("RGB", size, "green"), 3)),
    )
    assert Image.open(io.BytesIO(bytes(sent))).size == redrawn


@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_a_turned_photo_gets_the_label_of_the_upright_one(visit: Visit, orientation: int) -> None:
    upright = Image.open(io.BytesIO(visit.site.queries[2])).resize((300, 200), Image.Resampling.BICUBIC)
    photo = turned(upright, orientation, quality=95)
    classifier = visit.site.classifier
    (expected,) = classifier.explain([photo], top=1)
    assert expected.label == classifier.predict([upright])[0]
    visit.choose(file(photo, "photo.jpg", "image/jpeg"))
    assert visit.text("#answer .label").startswith(expected.label)
    shown = visit.page.locator(".bars li[data-class] .probability").first.inner_text()
    assert abs(float(shown.strip("<>% ")) - 100 * expected.probability) < 2, "the browser encodes it once more"


def test_busy_is_waited_for_once(visit: Visit) -> None:
    busy = {
        "status": 503,
        "headers": {"Retry-After": "1", "Content-Type": "application/json"},
        "body": '{"error": {"code": "queue_full", "message": "the queue is full"}}',
    }
    visit.page.route("**/v1/predict*", lambda route: route.fulfill(**busy), times=1)
    visit.page.set_input_files("#choose", [file(visit.site.queries[4], "once.png")])
    visit.notice("The server is busy. The page tries again in 1 second.")
    visit.page.locator(".bars li").first.wait_for()
    assert not visit.page.locator("#notice").is_visible()
    visit.was_refused(503)
    visit.page.route("**/v1/predict*", lambda route: route.fulfill(**busy), times=2)
    visit.choose(file(visit.site.queries[5], "twice.png"))
    assert "twice.png: the queue is full" in visit.text("#answer")
    visit.was_refused(503, 503)


@pytest.mark.parametrize("visit", [PHONE], indirect=True)
def test_phone_scrolls_one_way_only(visit: Visit) -> None:
    page = visit.page
    assert page.locator(".camera").is_visible() and page.get_attribute("#camera", "capture") == "environment"
    width = "document.documentElement.scrollWidth"
    assert page.evaluate(width) <= 360
    name = "a-rather-long-name-without-any-break-in-it-at-all"
    visit.choose(*(file(query, f"{name}-{i}.png") for i, query in enumerate(visit.site.queries)))
    page.locator("summary").tap()
    page.locator("#classes button").first.tap()
    page.locator(".panel img").first.wait_for()
    page.locator(".panel button", has_text="Rename").tap()
    visit.fill_in("x" * 200, [file(image, f"{i}.png") for i, image in enumerate(visit.site.newcomer)], token="wrong")
    page.locator("#add-class").tap()
    visit.refused("token", "Wrong token.")
    below, above = (page.locator(selector).bounding_box()["y"] for selector in ("#teach", "#classes"))
    assert above < below
    assert page.evaluate(width) <= 360
    visit.was_refused(401)


@pytest.mark.parametrize("visit", [{"color_scheme": scheme} for scheme in ("light", "dark")], indirect=True)
def test_contrast(visit: Visit) -> None:
    """WCAG 2.2 AA: 4.5 for text, 3 for what is drawn and for the edges of fields."""
    visit.choose(file(visit.site.queries[6], "contrast.png"))
    least = {"ink": 7, "quiet": 4.5, "first": 4.5, "second": 4.5, "third": 4.5, "bad": 4.5, "edge": 3}
    found = visit.page.evaluate(
        """(names) => names.map((name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`))""",
        ["paper", "raised", *least],
    )
    paper, raised, *others = [[int(colour.strip()[i : i + 2], 16) for i in (1, 3, 5)] for colour in found]

    def luminance(colour: list[int]) -> float:
        channels = np.array(colour) / 255
        linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    for ground in (paper, raised):
        for (name, ratio), colour in zip(least.items(), others, strict=True):
            dark, light = sorted((luminance(ground), luminance(colour)))
            assert (light + 0.05) / (dark + 0.05) >= ratio, (ground, name)
    for part, colour in zip(PARTS, others[2:5], strict=True):
        fill = visit.page.locator(f"rect.{part}").first.evaluate("rect => getComputedStyle(rect).fill")
        assert fill == f"rgb({', '.join(map(str, colour))})"


# --- changes ---


def test_a_class_is_added_and_wins(visit: Visit) -> None:
    page, site = visit.page, visit.site
    *support, other = site.newcomer[:4]
    visit.choose(file(other, "other.png"))
    before = visit.text("#answer .label")
    visit.fill_in(NEWCOMER, [file(image, f"{i}.png") for i, image in enumerate(support)]).page.click("#add-class")
    visit.notice(f"Class “{NEWCOMER}” added with 3 examples")
    page.locator("#answer .label", has_text=NEWCOMER).wait_for()  # without a second request
    assert visit.text(".bars li:first-child .tag") == "new"
    assert re.sub(r"\s[\d.]+%$", "", before) in visit.text("#answer p:nth-child(2)")
    assert site.classifier.predict([other])[0] == NEWCOMER and len(site.classifier.examples(NEWCOMER)) == 3
    assert visit.text("#matches") == "9 classes"
    kept = page.evaluate("[{...sessionStorage}, {...localStorage}, document.cookie]")
    assert kept == [{"iosr_fast.token": TOKEN}, {}, ""]
    assert page.input_value("#new-name") == "" and page.locator("#new-strip li").count() == 0


def test_markup_in_names_is_text(visit: Visit) -> None:
    name = '<script>alert(1)</script><img src=x onerror="alert(2)"><b>bold'
    visit.choose(file(visit.site.newcomer[3], f"{name}.png".replace("/", "")))
    visit.fill_in(name, [file(image, "<i>.png") for image in visit.site.newcomer[:3]]).page.click("#add-class")
    visit.page.locator("#answer .label", has_text=name).wait_for()
    assert visit.text(".bars li:first-child .name") == f"{name} new"
    visit.page.fill("#filter", "<SCRIPT>")
    assert visit.page.locator("#classes .name").all_inner_texts() == [f"{name} new"]
    assert name in visit.text("#notice-text") and name in visit.page.locator(".nearest .name").all_inner_texts()
    assert visit.page.locator("main script, main b, main i, [onerror]").count() == 0


def test_what_is_refused_is_said_and_nothing_is_lost(visit: Visit) -> None:
    page, site = visit.page, visit.site
    page.click("#add-class")
    visit.refused("new-name", "The class needs a name.")
    page.fill("#new-name", "x")
    assert visit.text("#new-name-error") == "" and page.get_attribute("#new-name", "aria-invalid") is None
    page.click("#add-class")
    visit.refused("new-examples", "The class needs at least one example.")
    visit.fill_in("refused", [file(site.newcomer[0])], token="").page.click("#add-class")
    assert visit.text("#new-examples-error") == ""
    visit.refused("token", "Enter the token.")
    page.fill("#token", "wrong")
    page.click("#add-class")
    visit.refused("token", "Wrong token.")
    assert "--token-file" in visit.text("#token-hint")
    visit.was_refused(401, 401)
    page.fill("#token", TOKEN)
    page.fill("#new-name", str(site.classifier.classes_[0]))
    page.click("#add-class")
    visit.refused("new-name", "Another class has this name.")
    page.locator("#classes button").nth(1).click()
    page.click(".panel button:has-text('Rename')")
    for name, words in (("", "The class needs a name."), (site.classifier.classes_[0], "Another class has this name.")):
        page.fill("#rename", str(name))
        page.keyboard.press("Enter")
        visit.refused("rename", words)
    visit.was_refused(409, 409)
    assert page.locator("#new-strip li").count() == 1 and len(site.classifier.classes_) == 8


def tab_to(page: Any, what: str) -> None:
    """Press Tab until the focus is on `what`; wherever it is, it has to be seen."""
    for _ in range(60):
        page.keyboard.press("Tab")
        outline, found = page.evaluate(
            """(what) => {
              const at = document.activeElement;
              const seen = at.matches("input[type=file]") ? at.closest("label") : at;
              return [at === document.body ? "3px" : getComputedStyle(seen).outlineWidth, at.matches(what)];
            }""",
            what,
        )
        assert outline == "3px"
        if found:
            return
    raise AssertionError(f"Tab never came to {what}")


def choose_by_key(visit: Visit, what: str, files: list[Any]) -> None:
    tab_to(visit.page, what)
    with visit.page.expect_file_chooser() as chooser:
        visit.page.keyboard.press("Enter")
    chooser.value.set_files(files)


def test_all_of_it_by_keyboard(visit: Visit) -> None:
    page, keys, site = visit.page, visit.page.keyboard, visit.site
    choose_by_key(visit, "#choose", [file(site.newcomer[3], "first.png"), file(site.queries[0], "second.png")])
    page.locator("#file-name", has_text="second.png").wait_for()
    tab_to(page, "#strip li:first-child button")
    keys.press("Enter")
    assert visit.text("#file-name") == "first.png"
    tab_to(page, "summary")
    keys.press("Enter")
    assert page.locator("details.numbers table").is_visible()
    tab_to(page, "#new-name")
    keys.type("typed")
    choose_by_key(visit, "#new-examples", [file(image, f"{i}.png") for i, image in enumerate(site.newcomer[:3])])
    page.locator("#new-strip li").nth(2).wait_for()
    tab_to(page, "#new-strip li:last-child button")
    keys.press("Enter")  # leaves one of the three out
    tab_to(page, "#token")
    keys.type(TOKEN)
    keys.press("Enter")
    visit.notice("Class “typed” added with 2 examples")

    tab_to(page, "#filter")
    keys.type("TYPED")
    tab_to(page, "#classes button")
    keys.press("Enter")
    page.locator(".panel img").nth(1).wait_for()
    choose_by_key(visit, ".panel label input", [file(site.newcomer[4], "more.png")])
    visit.notice("1 example added to “typed”")
    page.locator(".panel img").nth(2).wait_for()
    tab_to(page, ".panel .drop-one")
    keys.press("Enter")
    tab_to(page, "dialog button[value=yes]")
    keys.press("Enter")
    visit.notice("Example of “typed” removed")
    page.locator("#classes .row-button", has_text="2 examples").wait_for()
    tab_to(page, ".panel .row > button")
    keys.press("Enter")
    keys.type("typed again")
    keys.press("Enter")
    visit.notice("“typed” renamed to “typed again”")
    assert site.classifier.classes_[-1] == "typed again" and len(site.classifier.examples("typed again")) == 2
    for answer in ("Escape", "Enter"):
        tab_to(page, ".panel .danger")
        keys.press("Enter")
        if answer == "Enter":
            tab_to(page, "dialog button[value=yes]")
        keys.press(answer)
        assert not page.locator("dialog").is_visible()
    visit.notice("Class “typed again” removed")
    assert "typed again" not in site.classifier.classes_


def test_a_thousand_classes(visit: Visit) -> None:
    classes = [{"class_id": f"~{i}", "name": f"class {i}", "examples": i % 3} for i in range(1000)]

    def page_of(route: Any) -> None:
        start = int((re.search(r"after=(?:~|%7E)([0-9]+)", route.request.url) or [0, -1])[1]) + 1
        last = start + 400 >= len(classes)
        body = {"version": 1, "total": len(classes), "classes": classes[start : start + 400]}
        route.fulfill(json={**body, "next": None if last else classes[start + 399]["class_id"]})

    visit.page.route(re.compile(r".*/v1/classes(\?.*)?$"), page_of)
    visit.page.route("**/v1/classes/*/examples*", lambda route: route.fulfill(json={"example_ids": ["e0"]}))
    visit.page.reload()
    visit.page.locator("#matches", has_text="1,000 classes").wait_for()
    assert visit.page.locator("#classes li").count() == 12
    assert visit.text("#more") == "Show 100 more of 988"
    visit.page.click("#more")
    assert visit.page.locator("#classes li").count() == 112
    assert visit.page.evaluate("document.activeElement.innerText").startswith("class 12")
    visit.page.fill("#filter", "Class 77")
    assert visit.text("#matches") == "11 of 1,000 classes" and not visit.page.locator("#more").is_visible()
    assert visit.page.locator("#classes li").nth(10).inner_text().split("\n") == ["class 779", "2 examples"]
