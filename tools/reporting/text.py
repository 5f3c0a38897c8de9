"""Numbers, Markdown tables and the line that says where a table's rows come from. Rounding is fixed: 4 digits."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

from tools.reporting.load import Row

DIGITS = 4
# Tables longer than this are folded; everything is there, a click away.
FOLD = 24
# Of so many cases at most each has a table of its own, where one table would be folded.
CASES = 6


def number(value: float | int | None, most: int | None = None) -> str:
    """Four significant digits, never an exponent: 0.1823, 29.01, 2,212, 96,250,000. An integer as it is.

    `most` is the most decimal places, where the row itself was rounded to so many.
    """
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if value == 0:
        return "0"
    value = float(f"{value:.{DIGITS - 1}e}")  # 9.9999 is 10.00 then, not 10.000
    places = max(0, DIGITS - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{places if most is None else min(places, most)}f}"


def short(value: float) -> str:
    """Three digits, for labels in figures: 0.182, 29.0, 2,212."""
    places = max(0, 2 - math.floor(math.log10(abs(value)))) if value else 0
    return f"{value:,.{places}f}"


def percent(value: float | None, spread: float | None = None) -> str:
    if value is None:
        return ""
    return f"{100 * value:.2f}" + (f" ± {100 * spread:.2f}" if spread is not None else "")


def plain(value: Any) -> str:
    """Whatever a row holds, as a cell or in a sentence: 45 for 45.0, and long lists by their length."""
    if isinstance(value, float):
        told = number(value)
        return told.rstrip("0").rstrip(".") if "." in told else told
    if value is None or isinstance(value, bool | int):
        return number(value)
    if isinstance(value, dict):
        return ", ".join(f"{name} {'none' if found is None else plain(found)}" for name, found in value.items())
    if isinstance(value, list):
        return " ".join(plain(found) for found in value) if len(value) <= 6 else f"{len(value)} values, in the file"
    return " ".join(str(value).split())


def natural(text: str) -> list[tuple[int, int, str]]:
    """A sort key by which k1600 comes before k16000 and b8 before b64."""
    return [(1, int(part), "") if part.isdigit() else (0, 0, part) for part in re.split(r"(\d+)", text)]


def words(name: str) -> str:
    """A field's name as a heading: peak_memory_mb is peak memory MB."""
    units = {"mb": "MB", "ms": "ms", "rps": "per s", "s": "s", "gb": "GB"}
    return " ".join(units.get(part, part) for part in name.split("_"))


def table(heads: Sequence[str], cells: Sequence[Sequence[str]], texts: int = 1) -> list[str]:
    """A Markdown table's lines; columns after the first `texts` are set to the right, empty ones left out."""
    kept = [i for i in range(len(heads)) if i < texts or any(row[i] for row in cells)]
    lines = [[heads[i] for i in kept], ["---" if i < texts else "---:" for i in kept]]
    lines += [[row[i] for i in kept] for row in cells]
    return ["| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in line) + " |" for line in lines]


def folded(lines: list[str], summary: str, rows: int) -> list[str]:
    """The lines, behind a click where the table has more rows than FOLD."""
    if rows <= FOLD:
        return lines
    return [f"<details><summary>{summary}: {rows} rows</summary>", "", *lines, "", "</details>"]


def provenance(rows: Sequence[Row], name: str, link: str, cases: Iterable[str] = ()) -> str:
    """The file, the cases, device, threads, versions and commit of a table's rows, which same() has made agree.

    Threads are left to a column of the table where rows differ in them, and where rows say none.
    """
    row, shown = rows[0], list(cases)
    told = [f"[{name}]({link})"]
    if 0 < len(shown) <= CASES:
        told.append(("case " if len(shown) == 1 else "cases ") + ", ".join(f"`{case}`" for case in shown))
    elif shown:
        told.append(f"the {len(shown)} cases that the table names")
    told.append(str(row.get("device", "device not told")))
    threads = row.get("threads")
    if threads is not None and not differ(rows, "threads"):
        told.append(f"{threads} thread{'' if threads == 1 else 's'}")
    versions = row.get("versions") or {}
    told.append(", ".join(f"{package} {found}" for package, found in sorted(versions.items())) or "versions not told")
    told.append(f"commit {row['commit']}" if row.get("commit") else "commit not told")
    return "Rows: " + "; ".join(told) + "."


def differ(rows: Sequence[Row], key: str) -> bool:
    return any(row.get(key) != rows[0].get(key) for row in rows)


def same(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows in groups of one device, commit and set of versions, in a fixed order."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        key = json.dumps([row.get(part) for part in ("device", "commit", "versions")], sort_keys=True)
        groups.setdefault(key, []).append(row)
    return [groups[key] for key in sorted(groups)]
