"""HTML, of which all text is escaped: the elements of pages, and what a notebook shows of a result."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

_SHOWN = 20  # rows in a notebook


def overview(summary: str, columns: Mapping[str, Any]) -> Html:
    """The lines of a summary, and a table of the first rows in the colours of the notebook."""
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    more = f"and {len(rows) - _SHOWN:,} more" if len(rows) > _SHOWN else ""
    lines = [element("p", line) for line in (*summary.split("\n"), more) if line]
    lines.insert(len(lines) - bool(more), as_table(rows[:_SHOWN]))
    return element("div", *lines)


class Html(str):
    """Markup that is shown as it is."""


def text(value: Any) -> Html:
    """A value as markup: Html as it is, text escaped, fractions with four digits, None and NaN as nothing. A browser
    reads a carriage return that is not escaped as a line feed, so a path would name another file.

    >>> text("<b>"), text(0.12345), text(None), text("a\\rb")
    ('&lt;b&gt;', '0.1235', '', 'a&#13;b')
    """
    if isinstance(value, Html):
        return value
    if isinstance(value, float | np.floating):
        value = None if math.isnan(value) else f"{value:.4g}"
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


def as_table(rows: Sequence[Mapping[str, Any]]) -> Html:
    """A table whose columns are the names in the first row; nothing without rows. Numbers, and text that starts with a
    digit or a sign, have the class "number"."""

    def line(tag: str, row: Mapping[str, Any], **attributes: Any) -> Html:
        cells = (element(tag, name if attributes else row[name], class_=_look(row[name]), **attributes) for name in row)
        return element("tr", *cells)

    head = element("thead", *(line("th", row, scope="col") for row in rows[:1]))
    return element("table", head, element("tbody", *(line("td", row) for row in rows))) if rows else Html()


def _look(value: Any) -> str | None:
    numeric = not isinstance(value, Html) and str(value).lstrip("+-−")[:1].isdigit()
    return "number" if numeric else None
