"""Numbers as text, Markdown tables, and the line that names the origin of a table. Numbers are rounded to 4 digits."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tools.reporting.load import Row

DIGITS = 4
# Longer tables are folded: everything is there, one click away.
FOLD = 24
# At most this many cases are listed in the line of origin, or get a table each where one table would be folded.
CASES = 6


def number(value: float | int | None, most: int | None = None) -> str:
    """Four significant digits without an exponent: 0.1823, 29.01, 2,212, 96,250,000. Integers as they are.

    `most` limits the decimal places, for rows that were rounded when they were written.
    """
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if value == 0:
        return "0"
    value = float(f"{value:.{DIGITS - 1}e}")  # so that 9.9999 becomes 10.00, not 10.000
    places = max(0, DIGITS - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{places if most is None else min(places, most)}f}"


def percent(value: float | None, spread: float | None = None) -> str:
    if value is None:
        return ""
    return f"{100 * value:.2f}" + (f" ± {100 * spread:.2f}" if spread is not None else "")


def plain(value: Any) -> str:
    """Any JSON value as a cell or in a sentence: 45 for 45.0; a long list by its length."""
    if isinstance(value, float):
        text = number(value)
        return text.rstrip("0").rstrip(".") if "." in text else text
    if value is None or isinstance(value, bool | int):
        return number(value)
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {'none' if part is None else plain(part)}" for name, part in value.items())
    if isinstance(value, list):
        return " ".join(map(plain, value)) if len(value) <= 6 else f"{len(value)} values, in the file"
    return " ".join(str(value).split())


def natural(text: str) -> list[tuple[int, int, str]]:
    """A sort key: k1600 before k16000, b8 before b64."""
    return [(1, int(part), "") if part.isdigit() else (0, 0, part) for part in re.split(r"(\d+)", text)]


def words(name: str) -> str:
    """The name of a field as a heading: peak_memory_mb becomes peak memory MB."""
    units = {"mb": "MB", "rps": "per s", "gb": "GB"}
    return " ".join(units.get(part, part) for part in name.split("_"))


def title(name: str) -> str:
    text = words(name.replace("-", "_"))
    return text[:1].upper() + text[1:]


def sentence(heading: str, facts: Row, without: Iterable[str] = ()) -> str:
    parts = [f"{words(k)} {plain(v)}" for k, v in facts.items() if k not in without and v not in (None, {}, [], "")]
    return f"{heading}: {'; '.join(parts)}."


def table(columns: Mapping[str, Sequence[str]], summary: str, texts: int = 1) -> list[str]:
    """The lines of a Markdown table of `columns`, heading to cells. Long tables are folded under `summary`.

    The columns after the first `texts` are aligned to the right and left out if all their cells are empty.
    """
    shown = {head: cells for i, (head, cells) in enumerate(columns.items()) if i < texts or any(cells)}
    aligned = ["---" if head in list(columns)[:texts] else "---:" for head in shown]
    rows = list(zip(*shown.values(), strict=True))
    lines = [
        "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in line) + " |"
        for line in (list(shown), aligned, *rows)
    ]
    if len(rows) <= FOLD:
        return lines
    return [f"<details><summary>{summary}: {len(rows)} rows</summary>", "", *lines, "", "</details>"]


def origin(rows: Sequence[Row], name: str, link: str, cases: Sequence[str] = ()) -> str:
    """File, cases, device, threads, versions and commit of rows that `by_origin` has grouped.

    Threads are left out if rows differ in them or have none.
    """
    row = rows[0]
    parts = [f"[{name}]({link})"]
    if 0 < len(cases) <= CASES:
        parts.append(("case " if len(cases) == 1 else "cases ") + ", ".join(f"`{case}`" for case in cases))
    elif cases:
        parts.append(f"the {len(cases)} cases that the table names")
    parts.append(str(row.get("device", "device not given")))
    threads = {row.get("threads") for row in rows}
    if len(threads) == 1 and None not in threads:
        parts.append(f"{row['threads']} thread{'s' * (row['threads'] != 1)}")
    versions = row.get("versions") or {}
    parts.append(", ".join(f"{k} {v}" for k, v in sorted(versions.items())) or "versions not given")
    parts.append(f"commit {row['commit']}" if row.get("commit") else "commit not given")
    return f"Rows: {'; '.join(parts)}."


def by_origin(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows in groups of one device, commit and set of versions, in a fixed order."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        key = json.dumps([row.get(part) for part in ("device", "commit", "versions")], sort_keys=True)
        groups.setdefault(key, []).append(row)
    return [groups[key] for key in sorted(groups)]
