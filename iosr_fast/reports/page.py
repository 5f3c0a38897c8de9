"""The parts of a report: tables, pictures, bars, line charts and the page around them. All text is escaped.

A part is Html; everything else that a part is given (text, numbers) is shown as text. Pictures become data: URIs, the
stylesheet and scripts stand in the file, and a Content-Security-Policy keeps it from loading anything.
"""

from __future__ import annotations

import html
import math
from base64 import b64encode
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

_KINDS = {b"\x89PNG": "png", b"\xff\xd8\xff": "jpeg", b"RIFF": "webp", b"GIF8": "gif"}
_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _EDGE = 420, 262, 48, 36, 12  # of a chart, in units of its view box
_BOTTOMS = (0.0, 0.5, 0.75, 0.9)  # where a chart begins; five steps from there to 1 are round


class Html(str):
    """Markup that is shown as it is."""


def text(value: Any) -> Html:
    """A value as markup: Html as it is, text and numbers escaped, None as nothing.

    >>> text("<b>"), text(3), text(None)
    ('&lt;b&gt;', '3', '')
    """
    return value if isinstance(value, Html) else Html("" if value is None else html.escape(str(value)))


def element(tag: str, *parts: Any, **attributes: Any) -> Html:
    """`<tag attributes>parts</tag>`. class_ is class, an underscore else a hyphen; an attribute None is left out, True
    has no value.

    >>> element("p", "1 < 2", class_="quiet", data_n=3)
    '<p class="quiet" data-n="3">1 &lt; 2</p>'
    """
    names = {name.rstrip("_").replace("_", "-"): value for name, value in attributes.items() if value is not None}
    written = "".join(f" {name}" if value is True else f' {name}="{text(value)}"' for name, value in names.items())
    return Html(f"<{tag}{written}>{join(*parts)}</{tag}>" if tag not in ("img", "input") else f"<{tag}{written}>")


def join(*parts: Any) -> Html:
    """The parts one after another."""
    return Html("".join(map(text, parts)))


def percent(share: float, digits: int = 1) -> str:
    """A share in 0..1; nothing for NaN."""
    return "" if math.isnan(share) else f"{share:.{digits}%}"


def first_of(sentence: str, shown: int, count: int) -> str:
    """The sentence, and how many of `count` are shown where it is not all.

    >>> first_of("Pairs.", 100, 20), first_of("Pairs.", 100, 1234)
    ('Pairs.', 'Pairs. The first 100 of 1,234 are shown.')
    """
    return sentence if shown >= count else f"{sentence} The first {shown:,} of {count:,} are shown."


def short_path(image: Any) -> str:
    """An image's file and the folder that it lies in.

    >>> short_path("validation/lemon/4.jpg"), short_path(4)
    ('lemon/4.jpg', '4')
    """
    return "/".join(Path(str(image)).parts[-2:])


def table(heads: Sequence[Any], rows: Iterable[Sequence[Any]]) -> Html:
    """A table that scrolls sideways where it is wider than the screen. Numbers, and text that starts with a digit or a
    sign, are set to the right."""
    head = element("thead", element("tr", *(element("th", cell, scope="col") for cell in heads)))
    body = element("tbody", *(element("tr", *map(_cell, row)) for row in rows))
    return element("div", element("table", head, body), class_="wide", tabindex=0)


def long_table(heads: Sequence[Any], rows: Sequence[Sequence[Any]], shown: int = 24) -> Html:
    """A table whose rows beyond the first `shown` are shown on demand."""
    rest = rows[shown:]
    more = details(f"{len(rest)} more", table(heads, rest)) if rest else None
    return join(table(heads, rows[:shown]), more)


def _cell(value: Any) -> Html:
    plain = "" if isinstance(value, Html) else str(value)
    numeric = plain.lstrip("+-−")[:1].isdigit()
    return element("td", value, class_="number" if numeric else None)


def matrix(names: Sequence[str], counts: Sequence[Sequence[int]]) -> Html:
    """A square table of counts, each shaded by its share of the row, the diagonal in another colour. Columns have the
    numbers of the rows; it scrolls sideways."""
    numbers = range(1, len(names) + 1)
    head = element("tr", element("th"), *(element("th", k, scope="col", title=names[k - 1]) for k in numbers))
    rows = []
    for k, (name, row) in enumerate(zip(names, counts, strict=True)):
        cells = [
            element(
                "td",
                count or "",
                style=f"--share:{count / sum(row):.2f}" if count else None,
                class_="same" if j == k else None,
                title=f"{name} taken for {names[j]}: {count}" if count else None,
            )
            for j, count in enumerate(row)
        ]
        rows.append(element("tr", element("th", f"{k + 1} {name}", scope="row"), *cells))
    parts = element("thead", head), element("tbody", *rows)
    return element("div", element("table", *parts, class_="matrix"), class_="wide", tabindex=0)


def picture(data: bytes | None, alt: str) -> Html:
    """An encoded picture (PNG, JPEG, WebP or GIF) as a data: URI; without one an empty frame with `alt`."""
    if data is None:
        return element("span", alt, class_="picture none")
    kind = next((kind for head, kind in _KINDS.items() if data.startswith(head)), None)
    if kind is None:
        raise ValueError(f"expected a PNG, JPEG, WebP or GIF, got {data[:8]!r}")
    source = f"data:image/{kind};base64,{b64encode(data).decode()}"
    return element("img", src=source, alt=alt, class_="picture")


def bar(share: float, label: str = "") -> Html:
    """A horizontal bar, `share` of it filled, with its percentage or `label` beside it."""
    filled = 0.0 if math.isnan(share) else 100 * min(max(share, 0.0), 1.0)
    line = element("span", element("span", style=f"width:{filled:.1f}%"), class_="bar", aria_hidden="true")
    return element("span", line, element("span", label or percent(share, 0)), class_="measure")


def cards(items: Iterable[Html]) -> Html:
    """Items side by side, as many as fit; nothing without items."""
    listed = [element("li", item) for item in items]
    return element("ul", *listed, class_="cards") if listed else Html("")


def facts(values: Mapping[str, Any]) -> Html:
    """The main numbers of a report."""
    pairs = (element("div", element("dt", name), element("dd", value)) for name, value in values.items())
    return element("dl", *pairs, class_="facts")


def note(*parts: Any) -> Html:
    """An explanation in a quieter colour."""
    return element("p", *parts, class_="quiet")


def details(summary: str, *parts: Any) -> Html:
    """Parts that are shown on demand."""
    return element("details", element("summary", summary), *parts)


def section(title: str, *parts: Any) -> Html:
    return element("section", element("h2", title), *parts)


def line_chart(
    series: Mapping[str, Sequence[tuple[float, float]]], x: str, y: str, x_log: bool = False, diagonal: bool = False
) -> Html:
    """Lines of (x, y) points, y in 0..1 as percentages; a name with "(" is dashed. `diagonal` draws y = x."""
    points = [point for line in series.values() for point in line]
    if not points:
        return Html("")
    at = (lambda value: math.log2(value)) if x_log else float
    low, high = (f(at(px) for px, _ in points) for f in (min, max))
    low, high = (0.0, 1.0) if diagonal else (low, high if high > low else low + 1)
    least = 0.0 if diagonal else min(py for _, py in points)
    bottom = max(level for level in _BOTTOMS if level <= max(least, 0.0))

    def place(px: float, py: float) -> tuple[float, float]:
        right, height = _WIDTH - _LEFT - _EDGE, _HEIGHT - _BOTTOM - _EDGE
        share = (py - bottom) / (1 - bottom)
        return _LEFT + right * (at(px) - low) / (high - low), _EDGE + height * (1 - share)

    ticks = sorted({px for px, _ in points}) if not diagonal else [0.0, 0.25, 0.5, 0.75, 1.0]
    parts = [_label(place(px, bottom)[0], _HEIGHT - 19, f"{px:g}", "middle") for px in ticks]
    for k in range(6):
        level = bottom + k * (1 - bottom) / 5
        height = place(ticks[0], level)[1]
        parts += [_line([(_LEFT, height), (_WIDTH - _EDGE, height)], "grid"), _label(42, height + 4, f"{level:.0%}")]
    if diagonal:
        parts.append(_line([place(0, 0), place(1, 1)], "dashed"))
    for k, (name, line) in enumerate(series.items()):
        places = [place(*point) for point in line]
        parts.append(_line(places, f"line-{k % 3}" + (" dashed" if "(" in name else "")))
        dots = (element("circle", cx=f"{a:.1f}", cy=f"{b:.1f}", r=4, class_=f"dot-{k % 3}") for a, b in places)
        parts += dots
    parts.append(_label(_WIDTH - _EDGE, _HEIGHT - 4, x))
    description = "; ".join(f"{n}: " + ", ".join(f"{a:g}: {b:.1%}" for a, b in line) for n, line in series.items())
    keys = (element("span", name, class_=f"key line-{k % 3}") for k, name in enumerate(series))
    drawn = element(
        "svg", *parts, viewBox=f"0 0 {_WIDTH} {_HEIGHT}", role="img", aria_label=f"{y} by {x}. {description}"
    )
    return element("figure", element("figcaption", element("span", y), *keys), drawn)


def _line(points: Sequence[tuple[float, float]], kind: str) -> Html:
    return element("polyline", points=" ".join(f"{a:.1f},{b:.1f}" for a, b in points), class_=kind)


def _label(x: float, y: float, value: str, anchor: str = "end") -> Html:
    return element("text", value, x=f"{x:.1f}", y=f"{y:.1f}", text_anchor=anchor)


def page(title: str, *parts: Any, lead: str = "", scripts: Sequence[str] = ()) -> str:
    """The HTML file. `scripts` are names of this package's files, which stand at the end of the body."""
    code = [_file(name) for name in scripts]
    hashes = " ".join(f"'sha256-{b64encode(sha256(script.encode()).digest()).decode()}'" for script in code)
    allowed = hashes or "'none'"
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src {allowed}"
    head = join(
        Html('<meta charset="utf-8">'),
        Html(f'<meta http-equiv="Content-Security-Policy" content="{policy}">'),
        Html('<meta name="viewport" content="width=device-width, initial-scale=1">'),
        Html('<meta name="color-scheme" content="light dark">'),
        element("title", title),
        element("style", Html(_file("../serving/http/page/theme.css") + _file("report.css"))),
    )
    header = element("header", element("h1", title), note(lead) if lead else None)
    body = element("body", header, element("main", *parts), *(element("script", Html(script)) for script in code))
    return f"<!doctype html>\n{element('html', element('head', head), body, lang='en')}\n"


@cache
def _file(name: str) -> str:
    return (Path(__file__).parent / name).read_text(encoding="utf-8")
