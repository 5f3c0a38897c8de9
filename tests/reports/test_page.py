"""The parts of a report: nothing of what a user names becomes markup, and the file loads nothing."""

from __future__ import annotations

import io
import re
from html.parser import HTMLParser

import pytest
from PIL import Image

from iosr_fast.reports.page import (
    Html,
    bar,
    cards,
    details,
    element,
    facts,
    line_chart,
    note,
    page,
    picture,
    section,
    table,
    text,
)

ATTACK = "<script>alert(1)</script>\"'&"
VOID = {"meta", "img", "input"}


class Balanced(HTMLParser):
    """Collects tags, texts and attributes, and asserts that tags close in order."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.texts: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(source)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def encoded(kind: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 3), "red").save(file, kind)
    return file.getvalue()


def test_the_stylesheet_defines_its_colours() -> None:
    style = page("Report").partition("<style>")[2].partition("</style>")[0]
    assert set(re.findall(r"var\((--[\w-]+)\)", style)) <= set(re.findall(r"(--[\w-]+):", style)) and "--bad" in style


def test_text_of_users_never_becomes_markup() -> None:
    parts = [
        table([ATTACK], [[ATTACK]]),
        picture(None, ATTACK),
        picture(encoded("PNG"), ATTACK),
        bar(0.5, ATTACK),
        cards([element("p", ATTACK, title=ATTACK)]),
        facts({ATTACK: ATTACK}),
        note(ATTACK),
        details(ATTACK, ATTACK),
        section(ATTACK, ATTACK),
        line_chart({ATTACK: [(1, 0.5), (2, 0.6)]}, ATTACK, ATTACK),
    ]
    written = page(ATTACK, *parts, lead=ATTACK)
    parsed = Balanced(written)
    assert "script" not in parsed.tags and "<script" not in written
    assert parsed.texts.count(ATTACK) >= 12
    assert ("title", ATTACK) in parsed.attributes and ("alt", ATTACK) in parsed.attributes


@pytest.mark.parametrize(("kind", "mime"), [("PNG", "png"), ("JPEG", "jpeg"), ("WEBP", "webp"), ("GIF", "gif")])
def test_pictures_are_in_the_file(kind: str, mime: str) -> None:
    assert f'src="data:image/{mime};base64,' in picture(encoded(kind), "red")


def test_a_picture_of_another_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="expected a PNG, JPEG, WebP or GIF"):
        picture(b"<svg onload=alert(1)>", "no")


def test_a_page_names_nothing_to_load_and_allows_only_its_own_script() -> None:
    written = page("title", note("text"), scripts=("labels.js",))
    assert not re.search(r"<(link|iframe|object)|\b(src|href)=|url\(|@import", written)
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]+)"', written)
    assert "default-src 'none'" in policy and policy.count("sha256-") == 1 and "connect" not in policy
    assert "script-src 'none'" in page("title")


def test_cells_of_numbers_are_set_to_the_right() -> None:
    made = table(["a"], [[3], ["+1.5"], ["cat"], [Html("<b>4</b>")]])
    assert made.count('class="number"') == 2 and "<b>4</b>" in made


def test_a_chart_has_its_points_in_words_and_within_its_box() -> None:
    made = line_chart({"measured": [(1, 0.52), (2, 0.6), (4, 1.0)], "estimate (guess)": [(4, 1.0), (8, 1.0)]}, "n", "y")
    assert "1: 52.0%, 2: 60.0%, 4: 100.0%" in made and "dashed" in made
    places = [(float(x), float(y)) for x, y in re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', made)]
    assert len(places) == 5 and all(48 <= x <= 408 and 12 <= y <= 226 for x, y in places)
    assert places[0][1] > places[1][1] > places[2][1]
    assert line_chart({}, "x", "y") == ""
    single = line_chart({"one": [(1, 0.3)]}, "x", "y", x_log=True)
    assert "circle" in single and "dashed" in line_chart({"c": [(0.2, 0.3)]}, "x", "y", diagonal=True)


def test_values() -> None:
    assert text(None) == "" and text(Html("<i>")) == "<i>" and text(0.5) == "0.5"
    assert "width:0.0%" in bar(float("nan")) and "width:100.0%" in bar(7.0)
    assert element("input", required=True, value=None) == "<input required>"
