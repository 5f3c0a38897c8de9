"""Classes that are added, changed and removed on the server's page, in a real browser."""

from __future__ import annotations

import re
from typing import Any

from tests.serving import page_server
from tests.serving.http_client import TOKEN
from tests.serving.page_server import NEWCOMER, Visit, file

site, browser, visit = page_server.site, page_server.browser, page_server.visit  # pytest finds fixtures by these names


def test_a_class_is_added_and_wins(visit: Visit) -> None:
    page, site = visit.page, visit.site
    *support, other = site.newcomer[:4]
    visit.choose(file(other, "other.png"))
    before = visit.text("#answer .label")
    visit.fill_in(NEWCOMER, [file(image, f"{i}.png") for i, image in enumerate(support)]).page.click("#add-class")
    visit.notice(f"Class “{NEWCOMER}” added with 3 pictures")
    page.locator("#answer .label", has_text=NEWCOMER).wait_for()  # nobody asked again
    assert visit.text(".bars li:first-child .tag") == "new"
    assert re.sub(r"\s[\d.]+%$", "", before) in visit.text("#answer p:nth-child(2)")
    assert site.classifier.predict([other])[0] == NEWCOMER and len(site.classifier.examples(NEWCOMER)) == 3
    assert visit.text("#model") == f"9 classes, model version {site.classifier.version}"
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
    assert visit.page.locator("#classes .name").all_inner_texts() == [name]
    assert name in visit.text("#notice-text") and name in visit.page.locator(".nearest .name").all_inner_texts()
    assert visit.page.locator("main script, main b, main i, [onerror]").count() == 0


def test_what_is_refused_is_said_and_nothing_is_lost(visit: Visit) -> None:
    page, site = visit.page, visit.site
    page.click("#add-class")
    visit.notice("The class needs a name.")
    page.fill("#new-name", "x")
    page.click("#add-class")
    visit.notice("The class needs at least one picture.")
    visit.fill_in("refused", [file(site.newcomer[0])], token="wrong").page.click("#add-class")
    visit.notice("The token was not accepted")
    assert page.evaluate("document.activeElement.id") == "token" and page.get_attribute("#token", "aria-invalid")
    visit.was_refused(401)
    page.fill("#token", TOKEN)
    page.fill("#new-name", str(site.classifier.classes_[0]))
    page.click("#add-class")
    visit.notice("already")
    visit.was_refused(409)
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
    choose_by_key(visit, "#new-pictures", [file(image, f"{i}.png") for i, image in enumerate(site.newcomer[:3])])
    page.locator("#new-strip li").nth(2).wait_for()
    tab_to(page, "#new-strip li:last-child button")
    keys.press("Enter")  # leaves one of the three out
    tab_to(page, "#token")
    keys.type(TOKEN)
    keys.press("Enter")
    visit.notice("Class “typed” added with 2 pictures")

    tab_to(page, "#filter")
    keys.type("TYPED")
    tab_to(page, "#classes button")
    keys.press("Enter")
    page.locator(".panel img").nth(1).wait_for()
    choose_by_key(visit, ".panel label input", [file(site.newcomer[4], "more.png")])
    visit.notice("1 picture added to “typed”")
    page.locator(".panel img").nth(2).wait_for()
    tab_to(page, ".panel .drop-one")
    keys.press("Enter")
    tab_to(page, "dialog button[value=yes]")
    keys.press("Enter")
    visit.notice("Picture of “typed” removed")
    page.locator("#classes .row-button", has_text="2 pictures").wait_for()
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
    visit.page.reload()
    visit.page.locator("#model", has_text="1,000 classes").wait_for()
    assert visit.page.locator("#classes li").count() == 12
    visit.page.click("#more")
    assert visit.page.locator("#classes li").count() == 24
    assert visit.page.evaluate("document.activeElement.innerText").startswith("class 12")
    visit.page.fill("#filter", "Class 77")
    assert visit.text("#matches") == "11 of 1,000 classes" and not visit.page.locator("#more").is_visible()
    assert visit.page.locator("#classes li").nth(10).inner_text().split("\n") == ["class 779", "2 pictures"]
