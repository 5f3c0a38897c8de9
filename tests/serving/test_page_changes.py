"""The page in a real browser: classes are added, corrected, renamed and removed; what is rejected meanwhile."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.pictures import GREY
from tests.serving import http_client, http_edge, page_server
from tests.serving.http_client import TOKEN
from tests.serving.page_server import NEWCOMER, PHONE, Site, Visit, file

pytestmark = pytest.mark.slow
site, browser, visit = page_server.site, page_server.browser, page_server.visit  # pytest finds fixtures by these names


def reload(visit: Visit, **facts: Any) -> None:
    """Load the page anew, with these facts about the classifier."""
    body = {"version": visit.site.classifier.version, "model": "demo", "method": "stack", "doubts": [], **facts}
    visit.page.route("**/v1/classifier", lambda route: route.fulfill(json=body), times=1)
    visit.page.reload()
    visit.page.locator("#facts", has_text="demo").wait_for()


def test_a_class_is_added_and_wins_and_markup_in_names_is_text(visit: Visit) -> None:
    page, site, name = visit.page, visit.site, "<img src onerror=f()>"
    *support, other = site.newcomer[:4]
    visit.choose(file(other, f"{name}.png".replace("/", "")), file(site.queries[0], "same.png"))
    visit.add_class(name, [file(image, f"<i>{i}.png") for i, image in enumerate(support)])
    visit.notice(f"Class “{name}” added with 3 examples")
    page.locator("#answer .label", has_text=name).wait_for()  # without a second request
    assert site.classifier.predict([other])[0] == name and len(site.classifier.examples(name)) == 3
    assert visit.text("#matches") == "9 classes" and name in visit.text("#classes li:last-child")
    assert page.locator(":user-invalid").count() == 0
    assert page.locator("main script, main b, main i, [onerror]").count() == 0
    kept = page.evaluate("[{...sessionStorage}, {...localStorage}, document.cookie]")
    assert kept == [{"iosr_fast.token": TOKEN}, {}, ""]
    page.get_by_role("button", name="Classify 1 again").click()  # the other answer is older than the class
    page.locator("#again").wait_for(state="hidden")


def test_what_is_refused_is_said_and_nothing_is_lost(visit: Visit) -> None:
    page, site = visit.page, visit.site
    taken = str(site.classifier.classes_[0])
    page.click("#add-class")
    visit.refused("new-name", "fill out this field")
    page.fill("#new-name", taken)
    page.click("#add-class")
    visit.refused("new-name", "Another class has this name.")
    page.fill("#new-name", "new")
    page.click("#add-class")
    visit.refused("new-examples", "select one or more files")
    page.set_input_files("#new-examples", [file(site.newcomer[0])])
    page.click("#add-class")
    visit.enter("wrong\u2028")
    page.locator("#ask", has_text="Wrong token.").press("Escape")
    visit.was_refused(401)
    page.locator("#classes summary").nth(1).click()
    page.once("dialog", lambda dialog: dialog.accept(taken))
    page.get_by_role("button", name="Rename").click()
    visit.enter(TOKEN, "Wrong token.")
    visit.notice("choose another name")
    visit.was_refused(409)
    assert page.locator("#new-examples").evaluate("input => input.files.length") == 1
    assert len(site.classifier.classes_) == 8


def test_a_prediction_that_needs_a_token_asks_for_it(visit: Visit) -> None:
    shop, classifier, queries = "shops-secret-token", visit.site.classifier, visit.site.queries
    tokens = f"shop {shop} predict\nall {TOKEN}"
    with http_client.serving(classifier, token=tokens) as client, http_edge.site(client.app) as edge:
        address = f"http://127.0.0.1:{edge.port}/"
        guarded = Visit(visit.page.context.new_page(), replace(visit.site, address=address)).open()
        pictures = [file(query, f"{i}.png") for i, query in enumerate(queries[:6])]
        with guarded.page.expect_event("response", lambda _: len(guarded.refusals) == 4):  # requests at a time
            guarded.page.set_input_files("#choose", pictures)
        guarded.page.locator("#token:focus").press("Escape")
        guarded.page.locator("#answer", has_text="0.png: Enter the token.").wait_for()
        with guarded.page.expect_event("response", lambda _: len(guarded.refusals) == 8):
            guarded.page.get_by_role("button", name="Classify 6 again").click()
        guarded.page.locator("#token:focus").fill(shop)
        guarded.page.keyboard.press("Enter")
        guarded.page.locator("#answer .label", has_text=classifier.predict([queries[0]])[0]).wait_for()
        guarded.was_refused(*[401] * 8)
        guarded.page.get_by_role("button", name="Confirm").click()
        guarded.page.locator("#ask", has_text="the token 'shop' may only predict").wait_for()
        guarded.was_refused(403)
    assert guarded.problems == []


@pytest.mark.parametrize("visit", [PHONE], indirect=True)
def test_an_answer_is_confirmed_or_corrected(visit: Visit) -> None:
    page, classifier = visit.page, visit.site.classifier
    right = str(classifier.classes_[3])
    before = classifier.examples(right)
    visit.choose(file(visit.site.queries[3], "shown.png"))
    page.fill("#truth", "")
    page.click("#correct-button")
    visit.refused("truth", "fill out this field")
    assert page.locator("#names option").evaluate_all("all => all.map((one) => one.value)") == list(classifier.classes_)
    page.fill("#truth", NEWCOMER)
    assert visit.text("#correct-button") == "Add as a new class"
    page.fill("#truth", right)
    assert visit.text("#correct-button") == "Confirm"
    place = page.locator("#correct-button").bounding_box()
    page.click("#correct-button")
    page.locator("#token:focus").press("Escape")
    assert page.locator("#correct-button:focus").bounding_box() == place and page.input_value("#truth") == right
    visit.was_refused(401)
    page.click("#correct-button")
    visit.enter(TOKEN)
    visit.notice(f"1 example added to “{right}”")
    page.locator("#taught:focus", has_text=f"Added to the examples of “{right}”.").wait_for()
    page.locator("#result[aria-busy=false]").wait_for()
    assert visit.text("#answer .label").startswith(right) and not page.locator("#correct").is_visible()
    (added,) = set(classifier.examples(right)) - set(before)
    classifier.remove_examples([added])


def test_all_of_it_by_keyboard(visit: Visit) -> None:
    page, keys, newcomer = visit.page, visit.page.keyboard, visit.site.newcomer
    state = """(what) => {
        const at = document.activeElement;
        const seen = at.matches(".cover") ? at.closest("label") : at;
        return [at === document.body || getComputedStyle(seen).outlineWidth === "3px", at.matches(what)];
    }"""

    def press(what: str, key: str = "Enter") -> None:
        """Press Tab until the focus is on `what`, and `key` there; wherever the focus is, it has to be seen."""
        for _ in range(60):
            keys.press("Tab")
            seen, found = page.evaluate(state, what)
            assert seen
            if found:
                return keys.press(key)
        raise AssertionError(f"Tab never came to {what}")

    def choose(what: str, *images: Any) -> None:
        with page.expect_file_chooser() as chooser:
            press(what)
        chooser.value.set_files([file(image, f"{i}.png") for i, image in enumerate(images)])

    choose("#choose", newcomer[3], visit.site.queries[0])
    page.locator("#items .probability").nth(1).wait_for()
    press("#items input", "ArrowDown")
    page.locator("label:has(:checked)", has_text="1.png").wait_for()
    press("#new-name", "Home")
    keys.type("typed")
    choose("#new-examples", *newcomer[:2])
    press("#add-class")
    visit.enter(TOKEN)
    visit.notice("Class “typed” added")
    press("#filter", "Home")
    keys.type("typed")
    press("#classes summary")
    page.locator(".panel img").nth(1).wait_for()
    choose(".panel label input", newcomer[4])
    visit.notice("1 example added to “typed”")
    page.locator(".panel img").nth(2).wait_for()
    answers = [True, "typed again", False, True]  # remove an example; rename; remove the class: no, yes
    page.on("dialog", lambda it: it.accept(str(answer)) if (answer := answers.pop(0)) else it.dismiss())
    press(".panel .drop-one")
    page.locator("#classes summary", has_text="2 examples").wait_for()
    press(".panel .row > button")
    page.locator("#classes summary", has_text="typed again").wait_for()
    press(".panel .bad")
    press(".panel .bad")
    visit.notice("Removed “typed again” and its 2 examples")
    assert not answers and "typed again" not in visit.site.classifier.classes_


def test_a_thousand_classes(visit: Visit) -> None:
    classes = [{"class_id": f"~{i}", "name": f"class {i}", "examples": 0} for i in range(1000)]

    def page_of(route: Any) -> None:
        start = 400 if "after=" in route.request.url else 0
        rows = classes[start : start + 400] if start == 0 else classes[start:]
        route.fulfill(json={"version": 1, "classes": rows, "next": "~399" if start == 0 else None})

    visit.page.route(re.compile(r".*/v1/classes(\?.*)?$"), page_of)
    visit.page.reload()
    visit.page.locator("#matches", has_text="1,000 classes, the first 100 are shown").wait_for()
    assert visit.page.locator("#classes li").count() == 100
    visit.page.fill("#filter", "Class 77")
    assert visit.text("#matches") == "11 of 1,000 classes" and "class 779" in visit.text("#classes li:last-child")


def test_what_the_server_knows_of_the_classifier_is_said(visit: Visit) -> None:
    page, words, note = (
        visit.page,
        "of 8 accepted labels that you checked 7 were wrong",
        "40% of the last 50 are strange",
    )
    reload(
        visit, measured=None, doubts=["promises may break"], checked={"refuted": False, "sentence": words}, note=note
    )
    page.locator("#facts", has_text="demo · stack · accuracy not measured").wait_for()
    assert visit.text("#alarm") == f"{note}. Promises may break."
    unknown = {"promised": False, "keep": 0.95, "sentence": "the promise needs 19 images"}
    checked, measured = {"refuted": True, "sentence": words}, {"summary": "72.5% of 40 right\nand a doubt"}
    reload(visit, measured=measured, checked=checked, note=note, unknown=unknown)
    page.locator("#facts", has_text=re.compile("demo · stack · 72.5% of 40 right$")).wait_for()
    assert visit.text("#alarm") == f"Of{words[2:]}. {note}.", "a broken promise is said first"
    visit.choose(file(visit.site.queries[0], "first.png"))
    assert visit.text("#unchecked") == "Not checked for “unknown”: the promise needs 19 images."


def test_several_classifiers_are_listed_each_with_a_page_below_its_name(browser: Any, tmp_path: Path) -> None:
    for name in ("broken", "kind"):
        shutil.copytree(http_client.bundle(), tmp_path / name)
    (tmp_path / "broken" / "support.safetensors").write_bytes(b"?")
    with http_client.serving_several(tmp_path) as client, http_edge.site(client.app) as edge:
        address, classifier = f"http://127.0.0.1:{edge.port}/", client.site.served["kind"].classifier
        visit = Visit(browser.new_page(), Site(address, classifier, [], [])).open("#classifiers")
        page, picture = visit.page, http_client.queries()[0]
        broken, kind = visit.texts("#classifiers li")
        assert kind == "kind 8 classes, version 1, demo" and "support.safetensors" in broken
        page.locator("#classifiers a").click()  # the only one
        page.locator("#facts", has_text="kind · demo · ").wait_for()
        visit.choose(file(picture, "chosen.png"))
        assert classifier.predict([picture])[0] in visit.text("#answer .label")
        visit.add_class("grey", [file(GREY)])
        visit.notice("Class “grey” added with 1 example.")
        page.route("**/v1/classifiers", lambda route: route.fulfill(status=503, json={"error": {}}))
        page.goto(address)
        page.locator("#problem[role=status]", has_text="doesn't list its classifiers").wait_for()
        visit.was_refused(503)
        page.close()
    assert visit.problems == [] and "grey" in classifier.classes_
