"""The parts of a report: tables, pictures, bars and the page around them. All text is escaped.

A part is Html; everything else that a part is given (text, numbers) is shown as text. Pictures become data: URIs, the
stylesheet and scripts stand in the file, and a Content-Security-Policy keeps it from loading anything.
"""

from __future__ import annotations

import html
import io
import math
from base64 import b64encode
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from hashlib import sha256
from itertools import chain, islice
from pathlib import Path
from typing import Any

from iosr_fast.exceptions import BadImageError
from iosr_fast.images.preprocess import open_image

_OPEN = 24  # rows of a table and cards that are in sight at once
_AXIS, _LINES = "#808080", ("#808080", "#4a7fd6", "#c9762b")  # of curves, on a light page and on a dark one
_SITE = "../serving/http/page"  # the server's page, which shares files with reports


class Html(str):
    """Markup that is shown as it is."""


def text(value: Any) -> Html:
    """A value as markup: Html as it is, text and numbers escaped, None as nothing. A browser reads a carriage return
    that is not escaped as a line feed, so a path would name another file.

    >>> text("<b>"), text(3), text(None), text("a\\rb")
    ('&lt;b&gt;', '3', '', 'a&#13;b')
    """
    if isinstance(value, Html):
        return value
    return Html("" if value is None else html.escape(str(value)).replace("\r", "&#13;"))


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


def table(heads: Sequence[Any], rows: Sequence[Sequence[Any]]) -> Html:
    """A table that scrolls sideways where it is wider than the screen; nothing without rows. The first rows are in
    sight, the others on demand. Numbers, and text that starts with a digit or a sign, are set to the right."""
    if not rows:
        return Html("")
    columns = (element("th", head, scope="col", class_=_look(cell)) for head, cell in zip(heads, rows[0], strict=True))
    head = element("thead", element("tr", *columns))

    def part(some: Sequence[Sequence[Any]]) -> Html:
        body = (element("tr", *(element("td", cell, class_=_look(cell)) for cell in row)) for row in some)
        return element("div", element("table", head, element("tbody", *body)), class_="wide", tabindex=0)

    return join(part(rows[:_OPEN]), _more(part(rows[_OPEN:]), len(rows) - _OPEN))


def _look(value: Any) -> str | None:
    numeric = not isinstance(value, Html) and str(value).lstrip("+-−")[:1].isdigit()
    return "number" if numeric else None


def _more(parts: Html, count: int) -> Html | None:
    return details(f"{count} more", parts) if count > 0 else None


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


def thumbnail(image: Any, side: int, exif_orientation: bool = True) -> bytes | None:
    """An image, as Classifier takes it, as a WebP of at most `side` pixels a side; None if it can't be read any more,
    because a report stands at the end of long work.

    >>> import numpy as np
    >>> thumbnail(np.zeros((40, 80, 3), np.uint8), 16)[:4]
    b'RIFF'
    """
    try:
        small = open_image(image, exif_orientation=exif_orientation)
    except BadImageError:
        return None
    small.thumbnail((side, side))
    file = io.BytesIO()
    small.save(file, "WEBP", quality=80)
    return file.getvalue()


def picture(data: bytes | None, alt: str) -> Html:
    """A WebP, as thumbnails and stored pictures are, as a data: URI; without one an empty frame with `alt`."""
    if data is None:
        return element("span", alt, class_="picture")
    return element("img", src=f"data:image/webp;base64,{b64encode(data).decode()}", alt=alt, class_="picture")


def bar(share: float, label: str = "") -> Html:
    """A horizontal bar, `share` of it filled, with its percentage or `label` beside it."""
    filled = 0.0 if math.isnan(share) else 100 * min(max(share, 0.0), 1.0)
    line = element("span", element("span", style=f"width:{filled:.1f}%"), class_="bar", aria_hidden="true")
    return element("span", line, element("span", label or percent(share, 0)), class_="measure")


def curves(lines: Mapping[str, Sequence[tuple[float, float]]], across: str, up: str, **attributes: Any) -> Html:
    """Lines through points (x, y), shares in 0..1, as an SVG that needs no stylesheet; both axes have names."""
    xs, ys = zip(*chain.from_iterable(lines.values()), strict=True)
    left = min(math.floor(10 * min(xs)) / 10, 0.9)
    high = 5 * next(step for step in (0.01, 0.02, 0.05, 0.1, 0.2) if 5 * step >= max(ys))

    def place(x: float, y: float) -> tuple[float, float]:
        return round(56 + 480 * (x - left) / (1 - left), 1), round(290 - 240 * y / high, 1)

    def words(content: str, x: float, y: float, colour: str = _AXIS, anchor: str = "start") -> Html:
        return element("text", content, x=x, y=y, fill=colour, text_anchor=anchor)

    parts = [words(up, 0, 20), words(across, 536, 336, anchor="end")]
    for k in range(6):
        (x, _), (_, y) = place(left + k * (1 - left) / 5, 0), place(1, k * high / 5)
        parts.append(element("path", d=f"M56 {y}H536", stroke=_AXIS, stroke_opacity=0.3))
        parts += [words(percent(k * high / 5, 0), 48, y + 5, anchor="end")]
        parts += [words(percent(left + k * (1 - left) / 5, 0), x, 312, anchor="middle")]
    for k, ((name, points), colour) in enumerate(zip(lines.items(), _LINES, strict=False)):
        path = " ".join("{},{}".format(*place(*point)) for point in points)
        dashes = None if k else "6 5"
        parts.append(
            element("polyline", points=path, fill="none", stroke=colour, stroke_width=2, stroke_dasharray=dashes)
        )
        parts.append(words(name, 68, 66 + 20 * k, colour))
    return element("svg", *parts, viewBox="0 0 560 344", font_family="system-ui,sans-serif", font_size=14, **attributes)


def cards(items: Iterable[Html], shown: int = _OPEN) -> Html:
    """Items side by side, as many as fit; those beyond the first `shown` on demand; nothing without items."""
    listed = iter([element("li", item) for item in items])
    first, rest = ([*islice(listed, count)] for count in (shown, None))
    parts = element("ul", *first, class_="cards"), _more(element("ul", *rest, class_="cards"), len(rest))
    return join(*parts) if first else Html("")


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


def label_field(path: str, suggested: Any = None) -> Html:
    """A field for the label of an image, by its absolute path; a button takes the `suggested` class (labels.js)."""
    field = element("input", list="classes", data_path=path, autocomplete="off")
    button = element("button", f"Take {suggested}", type="button", class_="button", data_label=suggested)
    return join(element("label", "Label", field, class_="quiet"), None if suggested is None else button)


def save_labels(paths: Iterable[str], classes: Iterable[Any]) -> Html:
    """The button that saves the labels of these images as CSV; `classes` are offered in their fields."""
    key = sha256("\0".join(paths).encode()).hexdigest()
    button = element("button", "Save labels.csv", id="save", type="button", class_="button strong", data_key=key)
    status = element("span", id="status", role="status", class_="quiet")
    offered = element("datalist", *(element("option", value=name) for name in classes), id="classes")
    return join(offered, element("div", button, status, class_="row actions"))


def section(title: str, *parts: Any) -> Html:
    return element("section", element("h2", title), *parts)


def page(title: str, *parts: Any, lead: str = "", scripts: Sequence[str] = ()) -> str:
    """The HTML file. `scripts` are names of this folder's files, which stand at the end of the body, after the page's
    csv.js."""
    code = [_file(name) for name in (f"{_SITE}/csv.js", *scripts)] if scripts else []
    hashes = " ".join(f"'sha256-{b64encode(sha256(script.encode()).digest()).decode()}'" for script in code)
    allowed = hashes or "'none'"
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src {allowed}"
    head = join(
        Html('<meta charset="utf-8">'),
        Html(f'<meta http-equiv="Content-Security-Policy" content="{policy}">'),
        Html('<meta name="viewport" content="width=device-width, initial-scale=1">'),
        Html('<meta name="color-scheme" content="light dark">'),
        element("title", title),
        element("style", Html(_file(f"{_SITE}/theme.css") + _file("report.css"))),
    )
    header = element("header", element("h1", title), note(lead) if lead else None)
    body = element("body", header, element("main", *parts), *(element("script", Html(script)) for script in code))
    return f"<!doctype html>\n{element('html', element('head', head), body, lang='en')}\n"


@cache
def _file(name: str) -> str:
    return (Path(__file__).parent / name).read_text(encoding="utf-8")
