"""Shared by the tests of the page: a server, a browser, and a record of everything that goes wrong in it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from iosr_fast import Classifier
from iosr_fast.backbones.demo.pictures import load_pictures
from tests import browser as chromium
from tests.serving import http_client, http_edge
from tests.serving.http_client import TOKEN
from tests.store.live_parts import with_tree

NEWCOMER = "santa claus"
PLACE = ("<i>left", "near")  # in the tree
WIDE, PHONE = {"viewport": {"width": 1280, "height": 900}}, {"viewport": {"width": 390, "height": 844}}
PHONE |= {"has_touch": True, "is_mobile": True}
browser = chromium.browser


def file(image: np.ndarray | bytes, name: str = "picture.png", kind: str = "image/png") -> Any:
    """A picture as playwright's set_input_files takes it."""
    data = image if isinstance(image, bytes) else http_client.encode(image)
    return {"name": name, "mimeType": kind, "buffer": data}


@dataclass
class Site:
    """A running server and its pictures."""

    address: str
    classifier: Classifier
    queries: list[bytes]  # one picture of each class, not in the support, as PNG
    newcomer: list[np.ndarray]  # pictures of NEWCOMER, which is no class


@dataclass
class Visit:
    """A tab, everything that went wrong in it, and the statuses of refusals."""

    page: Any
    site: Site
    problems: list[str] = field(default_factory=list)
    refusals: list[int] = field(default_factory=list)

    def open(self, known: str = "#facts") -> Visit:
        """Load the page; note console errors (a violated security policy is one), exceptions, requests elsewhere."""

        def on_console(message: Any) -> None:
            # The browser's own line about a status is looked at as a status, in `refusals`.
            if message.type in ("error", "warning") and "Failed to load resource: the server" not in message.text:
                self.problems.append(message.text)

        own = self.site.address, f"blob:{self.site.address}"
        self.page.on("console", on_console)
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("request", lambda it: it.url.startswith(own) or self.problems.append(it.url))
        self.page.on("response", lambda it: self.refusals.append(it.status) if it.status >= 400 else None)
        # While somebody listens the browser asks the test for files; to begin listening after a key is too late.
        self.page.on("filechooser", lambda chooser: None)
        self.page.goto(self.site.address)
        self.page.locator(known, has_text="demo").wait_for()
        return self

    def choose(self, *files: Any) -> Visit:
        """Choose pictures to classify and wait for all answers; the first of them is shown."""
        self.page.set_input_files("#choose", list(files))
        self.page.locator("label:has(:checked)", has_text=files[0]["name"]).wait_for()
        self.page.locator("#progress").wait_for(state="hidden")
        return self

    def add_class(self, name: str, pictures: list[Any]) -> None:
        """Fill in the form of a new class and send it, with the token."""
        self.page.fill("#new-name", name)
        self.page.set_input_files("#new-examples", pictures)
        self.page.click("#add-class")
        self.enter(TOKEN)

    def enter(self, token: str, words: str = "Enter the token.") -> None:
        """Enter the token that the page asks for in these words, because the server has refused a request."""
        self.page.locator("#ask", has_text=words).locator("#token:focus").fill(token)
        self.was_refused(401)
        self.page.keyboard.press("Enter")  # which sends it: what is wrong is refused again

    def text(self, selector: str) -> str:
        return str(self.page.locator(selector).inner_text())

    def texts(self, selector: str) -> list[str]:
        return list(self.page.locator(selector).all_inner_texts())

    def notice(self, words: str) -> None:
        """Wait for the notice, which screen readers announce, to say these words."""
        self.page.locator("#notice[role=status] p", has_text=words).wait_for()

    def refused(self, field: str, words: str) -> None:
        """Wait until the focus is on the field; the browser says these words there."""
        self.page.locator(f"#{field}:focus:user-invalid").wait_for()
        assert words in self.page.locator(f"#{field}").evaluate("field => field.validationMessage")

    def was_refused(self, *statuses: int) -> None:
        """The server refused exactly this since the last call; any other refusal fails the test."""
        assert self.refusals == list(statuses)
        self.refusals.clear()


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    """Its first two classes are in a tree."""
    classifier = with_tree(http_client.load(), [PLACE, PLACE, *[()] * 6])
    classifier.rename_class("~2", "longwordthatiswiderthanthescreenofaphone", keep_text=True)
    queries = dict(zip(http_client.query_labels(), http_client.queries(), strict=True))
    pictures = load_pictures("held-out")
    newcomer = list(pictures.images[pictures.concepts == pictures.names.index(NEWCOMER)])
    with http_client.serving(classifier) as client, http_edge.site(client.app) as edge:
        yield Site(f"http://127.0.0.1:{edge.port}/", classifier, list(queries.values()), newcomer)


@pytest.fixture
def visit(site: Site, browser: Any, request: pytest.FixtureRequest) -> Iterator[Visit]:
    """A new tab, in which nothing may go wrong. Classes that the test adds are removed afterwards."""
    before = {info.class_id for info in site.classifier.classes()}
    context = browser.new_context(**getattr(request, "param", {}))
    context.set_default_timeout(20_000)
    visit = Visit(context.new_page(), site)
    yield visit.open()
    context.close()
    for info in site.classifier.classes():
        if info.class_id not in before:
            site.classifier.remove_class(info.class_id)
    assert visit.problems == [] and visit.refusals == []
