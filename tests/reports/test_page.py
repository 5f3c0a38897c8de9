"""The parts of a report: nothing of what a user names becomes markup, and the file loads nothing."""

from __future__ import annotations

import html
import math
import re
import sys
from typing import Any

import numpy as np
import pytest

from iosr_fast.exceptions import IosrFastError
from iosr_fast.reports.page import (
    Html,
    bar,
    cards,
    details,
    document,
    element,
    facts,
    label_field,
    matrix,
    note,
    photo,
    picture,
    save_labels,
    section,
    table,
)
from iosr_fast.utils.result import Result

ATTACK = "<script>alert(1)</script>\"'&\r"  # a browser would read the last one as a line feed


def test_text_of_users_never_becomes_markup() -> None:
    parts = [
        table([{ATTACK: ATTACK}] * 25),
        matrix([ATTACK, "two"], [[1, 2], [0, 0]]),
        picture(None, ATTACK),
        photo(np.zeros((3, 4, 3), np.uint8), ATTACK),
        bar(0.5, ATTACK),
        cards([element("p", ATTACK, title=ATTACK)] * 2, shown=1),
        facts({ATTACK: ATTACK}),
        note(ATTACK),
        details(ATTACK, ATTACK),
        section(ATTACK, ATTACK),
        label_field(ATTACK, ATTACK),
        save_labels([ATTACK], [ATTACK]),
    ]
    written = document(ATTACK, *parts, lead=ATTACK)
    assert "\r" not in written and "<script" not in written
    assert written.count(html.escape(ATTACK[:-1]) + "&#13;") >= 36 and written.count("<summary>1 more</summary>") == 2


def test_a_notebook_shows_the_first_rows_and_pandas_has_all(monkeypatch: pytest.MonkeyPatch) -> None:
    class Found(Result):
        def _columns(self) -> dict[str, Any]:
            return {ATTACK: [ATTACK, math.nan, *range(20)], "share": np.full(22, 0.123456, np.float32)}

    shown = Found()._repr_html_()
    assert "<script" not in shown and shown.count(html.escape(ATTACK[:-1])) == 2 and "style" not in shown
    assert shown.count("<tr>") == 21 and shown.count(">0.1235<") == 20 and "<td></td>" in shown
    assert shown.endswith("</table><p>and 2 more</p></div>") and Found().to_frame().shape == (22, 2)
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(IosrFastError, match="pip install pandas brings it"):
        Found().to_frame()


def test_a_page_names_nothing_to_load_and_allows_only_its_own_scripts() -> None:
    written = document("title", note("text"), scripts=("labels.js",))
    assert not re.search(r"<(link|iframe|object)|<\w[^>]* (src|href)=|url\(|@import", written)
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]+)"', written)
    assert "default-src 'none'" in policy and policy.count("sha256-") == 2 and "connect" not in policy
    assert "script-src 'none'" in document("title")
    style = written.partition("<style>")[2].partition("</style>")[0]
    assert set(re.findall(r"var\((--[\w-]+)", style)) <= set(re.findall(r"(--[\w-]+):", style)) | {
        "--share",
        "--tint",
        "--least",
    }


def test_values() -> None:
    assert table([{"a": value} for value in (3, "+1.5", "cat", Html("<b>4</b>"))]).count('class="number"') == 3
    assert table([]) == "" and cards([]) == ""
    assert "width:0.0%" in bar(float("nan")) and "width:100.0%" in bar(7.0)
    assert element("input", required=True, value=None) == "<input required>"
