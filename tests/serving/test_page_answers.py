"""The page in a real browser: answers that are not sure, what confirms or corrects them, and samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.serving import page_server
from tests.serving.http_client import TOKEN
from tests.serving.page_server import NEWCOMER, Visit, file

pytestmark = pytest.mark.slow
site, browser, visit = page_server.site, page_server.browser, page_server.visit  # pytest finds fixtures by these names
STILL = {"reduced_motion": "reduce"}


def changed(visit: Visit, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the next prediction that the server answers."""

    def answer(route: Any) -> None:
        body = route.fetch().json()
        change(body["predictions"][0])
        route.fulfill(json=body)

    visit.page.route("**/v1/predict*", answer, times=1)


def test_answers_that_are_not_sure_differ_in_words_and_shape(visit: Visit) -> None:
    page, (expected,) = visit.page, visit.site.classifier.explain([visit.site.queries[0]])
    best, second = expected.top[:2]

    def reject(prediction: dict[str, Any]) -> None:
        prediction |= {"label": None, "class_id": None, "unknown": {"score": 3.21, "rejected": True}}

    looks = []
    for change, words, strip in (
        (lambda prediction: prediction.update(probability=0.5), best.label, best.label),
        (lambda prediction: prediction.update(probability=0.499), f"Not sure: {best.label}?", f"? {best.label}"),
        (reject, "None of these", "none of these"),
    ):
        changed(visit, change)
        visit.choose(file(visit.site.queries[0], f"{len(looks)}.png"))
        assert visit.text("#answer .label").startswith(words)
        assert page.locator("#strip .name").all_inner_texts()[-1] == strip
        looks.append(
            page.locator("#answer .label").evaluate(
                "p => ['fontStyle', 'borderLeftStyle', 'color'].map((name) => getComputedStyle(p)[name])"
            )
        )
    assert looks[0][:2] == ["normal", "none"] and len({tuple(look[:2]) for look in looks}) == 3
    assert len({look[2] for look in looks}) == 1, "the colour is the same"
    assert f"The nearest is “{best.label}”" in visit.text("#answer") and second.label not in visit.text("#answer")
    assert page.input_value("#truth") == ""
    page.locator("details.numbers summary").click()
    assert "Unlikeness to all classes: 3.21" in visit.text("details.numbers")
    page.locator("#strip button").nth(1).click()
    assert f"It may also be “{second.label}”" in visit.text("#answer") and page.input_value("#truth") == best.label


def facts(visit: Visit, unknown: dict[str, Any] | None) -> None:
    """Load the page anew, with these facts of what the classifier can reject."""
    body = {"version": visit.site.classifier.version, "model": "demo", "measured": None, "unknown": unknown}
    visit.page.route("**/v1/classifier", lambda route: route.fulfill(json=body), times=1)
    visit.page.reload()
    visit.page.locator("#facts", has_text="demo").wait_for()


@pytest.mark.parametrize("known", [True, False], ids=["known", "found by asking"])
def test_without_a_promise_nothing_is_rejected(visit: Visit, known: bool) -> None:
    asked: list[bool] = []
    visit.page.on("request", lambda it: asked.append("unknown=reject" in it.url) if "predict" in it.url else None)
    words = "the promise needs 19 images"
    facts(visit, {"promised": False, "keep": 0.95, "sentence": words} if known else None)
    body = {"error": {"code": "no_promise", "message": words}}
    visit.page.route("**/v1/predict*unknown=reject", lambda route: route.fulfill(status=422, json=body), times=1)
    visit.choose(file(visit.site.queries[0], "first.png"))
    visit.page.locator("details.numbers summary").click()
    assert f"Not checked for “none of these”: {words}" in visit.text("details.numbers")
    visit.choose(file(visit.site.queries[1], "second.png"))
    assert asked == [False, False] if known else [True, False, False]
    visit.was_refused(*([] if known else [422]))


def test_a_fit_that_takes_long_delays_no_answer(visit: Visit) -> None:
    page, learnt = visit.page, []
    facts(visit, None)

    def answer(route: Any) -> None:
        if not learnt:
            return route.fulfill(status=504, json={"error": {"code": "deadline_exceeded", "message": "late"}})
        body = route.fetch().json()
        body["predictions"][0] |= {"label": None, "class_id": None, "unknown": {"score": 3.21, "rejected": True}}
        return route.fulfill(json=body)

    page.route("**/v1/predict*unknown=reject", answer)
    visit.choose(file(visit.site.queries[0], "first.png"))
    assert visit.text("#answer .label") != "None of these"
    page.locator("details.numbers summary").click()
    assert "still being learnt" in visit.text("details.numbers")
    learnt.append(True)
    page.locator("#answer .label", has_text="None of these").wait_for()
    assert set(visit.refusals) == {504}
    visit.refusals.clear()


def test_an_answer_is_confirmed_or_corrected(visit: Visit) -> None:
    page, classifier = visit.page, visit.site.classifier
    right, wrong = (str(name) for name in classifier.classes_[[3, 0]])
    before = {name: classifier.examples(name) for name in (right, wrong)}
    visit.choose(file(visit.site.queries[3], "shown.png"))
    assert wrong in page.locator("#names option").evaluate_all("all => all.map(option => option.value)")
    page.fill("#truth", "")
    page.click("#correct-button")
    visit.refused("truth", "Which class is it?")
    page.fill("#truth", right)
    assert visit.text("#correct-button") == "Confirm" and visit.text("#truth-error") == ""
    page.click("#correct-button")
    visit.refused("token", "Enter the token.")
    visit.was_refused(401)
    page.fill("#token", TOKEN)
    page.click("#correct-button")
    visit.notice(f"1 example added to “{right}”")
    page.locator("#taught", has_text=f"Added to the examples of “{right}”.").wait_for()
    page.locator("#answer", has_text="Before the change").wait_for()
    assert visit.text("#answer .label").startswith(right) and not page.locator("#correct").is_visible()
    page.locator("#taught:focus").wait_for()
    (added,) = set(classifier.examples(right)) - set(before[right])
    assert classifier.examples(wrong) == before[wrong]
    classifier.remove_examples([added])


@pytest.mark.parametrize("visit", [STILL, {}], indirect=True)
def test_a_new_class_is_in_sight(visit: Visit) -> None:
    page = visit.page
    page.set_viewport_size({"width": 900, "height": 500})
    page.fill("#filter", str(visit.site.classifier.classes_[0]))
    visit.fill_in(NEWCOMER, [file(visit.site.newcomer[0])]).page.click("#add-class")
    row = page.locator("#classes li.new")
    row.wait_for()
    assert row.inner_text().split("\n")[0] == f"{NEWCOMER} new" and page.input_value("#filter") == ""
    page.wait_for_function(
        """() => {
          const { top, bottom } = document.querySelector("#classes li.new").getBoundingClientRect();
          return top >= 0 && bottom <= innerHeight;
        }"""
    )
    animated = row.evaluate("row => getComputedStyle(row).animationName")
    assert animated == ("none" if page.evaluate("matchMedia('(prefers-reduced-motion: reduce)').matches") else "appear")


def test_an_unknown_picture_becomes_a_new_class(visit: Visit) -> None:
    page = visit.page
    visit.choose(file(visit.site.newcomer[3], "other.png"))
    page.fill("#truth", NEWCOMER)
    assert visit.text("#correct-button") == "Add as a new class"
    page.fill("#token", TOKEN)
    page.click("#correct-button")
    visit.notice(f"Class “{NEWCOMER}” added with 1 example")
    page.locator("#answer .label", has_text=NEWCOMER).wait_for()
    assert page.locator("#classes li.new").count() == 1


def test_the_headline_and_the_samples(visit: Visit) -> None:
    page, classifier = visit.page, visit.site.classifier
    page.locator("#facts", has_text=f"demo · {classifier.method_} · accuracy not measured").wait_for()
    measured = {"accuracy": 0.725, "interval": [0.65, 0.79], "images": 40, "protocol": "loo", "stale": True}
    measured["summary"] = "72.5% right; 2 of 9 classes have a single image"
    body = {"model": "demo", "method": "stack", "measured": measured}
    page.route("**/v1/classifier", lambda route: route.fulfill(json=body), times=1)
    page.reload()
    words = "demo · stack · 72.5% of 40 left-out pictures right (95%: 65.0% to 79.0%); measured before the last changes"
    page.locator("#facts", has_text=words).wait_for()
    assert page.locator("#facts").get_attribute("title") == measured["summary"]

    samples = page.locator("#samples-list button")
    samples.nth(5).wait_for()
    assert samples.count() == 6 and page.locator("#samples-list img").first.get_attribute("alt")
    samples.nth(1).focus()
    page.keyboard.press("Enter")
    name = str(classifier.classes_[1])
    page.locator("#file-name", has_text=f"example of {name}").wait_for()
    page.locator("#answer .label", has_text=name).wait_for()
    assert not page.locator("#samples").is_visible() and page.evaluate("document.activeElement.id") == "choose"
