"""The parts of a report: tables, pictures, bars and the page around them. All text is escaped.

A part is Html; everything else that a part is given (text, numbers) is shown as text. Pictures become data: URIs, the
stylesheet and scripts stand in the file, and a Content-Security-Policy keeps it from loading anything.
"""

from __future__ import annotations

import math
from base64 import b64encode
from collections.abc import Callable, Iterable, Mapping, Sequence
from hashlib import sha256
from itertools import chain
from pathlib import Path
from typing import Any

from iosr_fast.exceptions import BadImageError
from iosr_fast.images.preprocess import open_image, thumbnail
from iosr_fast.pages import page_file
from iosr_fast.sealed.outputs import PAGE_MARK
from iosr_fast.utils.html import Html, as_table, element, join, text

_OPEN = 24  # rows of a table and cards that are in sight at once
_AXIS, _LINES = "#808080", ("#808080", "#4a7fd6", "#c9762b")  # of curves, on a light page and on a dark one


def percent(share: float, digits: int = 1) -> str:
    """A share in 0..1; nothing for NaN."""
    return "" if math.isnan(share) else f"{share:.{digits}%}"


def short_path(image: Any) -> str:
    """An image's file and the folder that it lies in.

    >>> short_path("validation/lemon/4.jpg"), short_path(4)
    ('lemon/4.jpg', '4')
    """
    return "/".join(Path(str(image)).parts[-2:])


def breaking(path: Any) -> Html:
    """A path that a line breaks at a slash."""
    return Html(text(path).replace("/", "/<wbr>"))


def table(rows: Sequence[Mapping[str, Any]], most: int | None = None) -> Html:
    """A table of `most` rows, whose columns are the names in the first one; nothing without rows. It scrolls sideways
    where it is wider than the screen; the first rows are in sight, the others on demand."""

    def part(some: Sequence[Mapping[str, Any]]) -> Html:
        return element("div", as_table(some), class_="wide", tabindex=0)

    return _some(rows[:most], len(rows), _OPEN, part)


def _some(shown: Sequence[Any], total: int, open_: int, part: Callable[[Sequence[Any]], Html]) -> Html:
    """Things in parts: the first `open_` in sight, the others on demand; of `total`, which is said if it is more."""
    left_out = f"The first {len(shown):,} of {total:,} are shown." if len(shown) < total else ""
    first, rest = (part(some) if some else None for some in (shown[:open_], shown[open_:]))
    return join(note(left_out), first, details(f"{len(shown) - open_} more", rest))


def matrix(names: Sequence[str], counts: Sequence[Sequence[int]]) -> Html:
    """A square table of counts, each shaded by its share of the row, the diagonal in another colour. Columns have the
    numbers of the rows; it scrolls sideways."""
    numbers = range(1, len(names) + 1)
    head = element("tr", element("th"), *(element("th", k, scope="col", title=names[k - 1]) for k in numbers))
    rows = []
    for k, (name, row) in enumerate(zip(names, counts, strict=True)):
        cells = []
        for j, count in enumerate(row):
            tint = f"--tint:var(--{'first' if j == k else 'bad'});--share:{count / max(1, sum(row)):.2f}"
            title = f"{name} taken for {names[j]}: {count}" if count else None
            cells.append(element("td", count or "", style=tint, title=title))
        rows.append(element("tr", element("th", f"{k + 1} {name}", scope="row"), *cells))
    whole = element("table", element("thead", head), element("tbody", *rows), class_="matrix")
    return element("div", whole, class_="wide", tabindex=0)


def photo(image: Any, alt: str, exif_orientation: bool = True, side: int = 160) -> Html:
    """An image, as Classifier takes it, of at most `side` pixels a side; an empty frame if it can't be read any more,
    because a report stands at the end of long work."""
    try:
        small = open_image(image, exif_orientation=exif_orientation)
    except BadImageError:
        return picture(None, alt)
    return picture(thumbnail(small, side), alt)


def large_photo(path: str, exif_orientation: bool) -> Html:
    """An image that opens larger than the page shows it (pictures.js)."""
    return element("button", photo(path, path, exif_orientation, 360), type="button", class_="larger")


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


def ratio(count: int, total: int, none: str = "") -> Html | str:
    """A bar of the share, with both numbers beside it; `none` without a total."""
    return bar(count / total, f"{count} of {total}") if total else none


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


def cards(items: Iterable[Html], total: int = 0, shown: int = _OPEN, least: float = 16.0, look: str = "") -> Html:
    """Items of `total`, if these are more, side by side, each at least `least` rem wide; those beyond the first `shown`
    on demand; nothing without items. `look` is a class of the stylesheet."""
    listed, style = [element("li", item) for item in items], f"--least:{least}rem"
    return _some(listed, total, shown, lambda some: element("ul", *some, class_=f"cards {look}", style=style))


def facts(values: Mapping[str, Any]) -> Html:
    """The main numbers of a report, without those that are None."""
    shown = {name: value for name, value in values.items() if value is not None}
    pairs = (element("div", element("dt", name), element("dd", value)) for name, value in shown.items())
    return element("dl", *pairs, class_="facts", style="--least:9rem")


def note(*parts: Any) -> Html:
    """An explanation in a quieter colour; nothing without text."""
    return element("p", content, class_="quiet") if (content := join(*parts)) else content


def details(summary: str, *parts: Any, unfolded: bool = False) -> Html:
    """Parts that are shown on demand, or `unfolded` at first; nothing without them."""
    content = join(*parts)
    return element("details", element("summary", summary), content, open=unfolded or None) if content else content


def label_field(path: str, suggested: Any = None, words: str = "") -> Html:
    """A field for the label of an image, by its absolute path; a button takes what is `suggested`, which the `words`
    name (labels.js)."""
    field = element("input", list="classes", data_path=path, autocomplete="off")
    button = element("button", f"Take {words or suggested}", type="button", class_="button", data_label=suggested)
    return join(element("label", "Label", field, class_="quiet"), None if suggested is None else button)


def save_labels(paths: Iterable[str], classes: Iterable[Any], several: bool = False) -> Html:
    """The button that saves the labels of these images as CSV; `classes` are offered in their fields. An image may have
    `several`, joined by ";": the column is then `labels`."""
    column = "labels" if several else None
    key = sha256("\0".join(paths).encode()).hexdigest()
    button = element(
        "button", "Save labels.csv", id="save", type="button", class_="button strong", data_key=key, data_column=column
    )
    status = element("span", id="status", role="status", class_="quiet")
    offered = element("datalist", *(element("option", value=name) for name in classes), id="classes")
    return join(offered, element("div", button, status, class_="row actions"))


def section(title: str, *parts: Any) -> Html:
    """A part with a heading; nothing without parts."""
    return element("section", element("h2", title), content) if (content := join(*parts)) else content


def unreadable(errors: Sequence[Any]) -> Html:
    """The images that can't be read, the first hundred of them; nothing without one."""
    listed = _some(errors[:100], len(errors), 100, lambda some: join(*map(note, map(breaking, some))))
    return section("Unreadable images", listed)


def document(title: str, *parts: Any, lead: str = "", scripts: Sequence[str] = ()) -> str:
    """The HTML file. `scripts` are names of files of pages/report, which stand at the end of the body, after the page's
    csv.js."""
    code = [_read("server/csv.js"), *(_read(f"report/{name}") for name in scripts)] if scripts else []
    hashes = " ".join(f"'sha256-{b64encode(sha256(script.encode()).digest()).decode()}'" for script in code)
    allowed = hashes or "'none'"
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src {allowed}"
    head = join(
        Html('<meta charset="utf-8">'),
        Html(PAGE_MARK),
        Html(f'<meta http-equiv="Content-Security-Policy" content="{policy}">'),
        Html('<meta name="viewport" content="width=device-width, initial-scale=1">'),
        Html('<meta name="color-scheme" content="light dark">'),
        element("title", title),
        element("style", Html(_read("server/theme.css") + _read("report/report.css"))),
    )
    header = element("header", element("h1", title), note(lead) if lead else None)
    body = element("body", header, element("main", *parts), *(element("script", Html(script)) for script in code))
    return f"<!doctype html>\n{element('html', element('head', head), body, lang='en')}\n"


def _read(name: str) -> str:
    return page_file(name).decode()
