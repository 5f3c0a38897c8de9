"""Tables of timing rows, which iosr_fast/benchmarks/harness.py writes, whatever their bench."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from tools.reporting.load import Row
from tools.reporting.text import CASES, FOLD, by_origin, natural, number, origin, percent, plain, table, title, words

# Fields with a place of their own in a table or in the line of origin.
PLACED = {"bench", "case", "impl", "precision", "runtime_ms", "runtime_ms_spread", "ratios", "rate", "rate_unit"}
PLACED |= {"share_of_ceiling", "threads", "device", "versions", "commit", "accuracy_std"}
# Decimal places of milliseconds and ratios in the rows: more digits would be made up.
MS_PLACES, RATIO_PLACES = 4, 3
# Results always get a column. Other fields move below the table if all rows agree.
RESULTS = ("accuracy", "min_cosine", "images_per_s", "peak_memory_mb", "extra_memory_mb")


def timing_tables(name: str, link: str, rows: Sequence[Row]) -> list[str]:
    """The rows of one bench in one file: a table for each device, commit and set of versions.

    Cases are in natural order, the fastest row of each first, whatever the order of the file.
    """
    lines: list[str] = []
    for group in by_origin(rows):
        ordered = sorted(group, key=_order)
        cases = list(dict.fromkeys(str(row["case"]) for row in ordered))
        split = len(ordered) > FOLD and len(cases) <= CASES
        parts = [[row for row in ordered if str(row["case"]) == case] for case in cases] if split else [ordered]
        for part in parts:
            lines += _one_table(name, link, part)
    return lines


def _order(row: Row) -> Any:
    return natural(str(row["case"])), row["runtime_ms"], str(row["impl"]), json.dumps(row, sort_keys=True)


def _one_table(name: str, link: str, rows: list[Row]) -> list[str]:
    cases = list(dict.fromkeys(str(row["case"]) for row in rows))
    columns = {"impl": [plain(row["impl"]) for row in rows]}
    if len(cases) > 1:
        columns["case"] = [f"`{row['case']}`" for row in rows]
    columns["precision"] = [plain(row.get("precision")) for row in rows]
    if len({row.get("threads") for row in rows}) > 1:
        columns["threads"] = [plain(row.get("threads")) for row in rows]
    texts = len(columns)
    columns["ms"] = [number(float(row["runtime_ms"]), MS_PLACES) for row in rows]
    columns["p10 to p90"] = [
        " to ".join(number(float(value), MS_PLACES) for value in row.get("runtime_ms_spread") or ()) for row in rows
    ]
    for rival in sorted({rival for row in rows for rival in row.get("ratios") or {}}, key=natural):
        columns[f"{rival} / this"] = [number((row.get("ratios") or {}).get(rival), RATIO_PLACES) for row in rows]
    for unit in sorted({row.get("rate_unit") or "rate" for row in rows}):
        columns[unit] = [number(row.get("rate")) if unit == (row.get("rate_unit") or "rate") else "" for row in rows]
    shares = [row.get("share_of_ceiling") for row in rows]
    columns["of ceiling %"] = ["" if share is None else f"{100 * share:.2f}" for share in shares]
    notes = []
    for key in sorted({key for row in rows for key in row} - PLACED, key=_extra_order):
        if note := _note(key, rows):
            notes.append(note)
        else:
            columns["accuracy %" if key == "accuracy" else words(key)] = [_extra(row, key) for row in rows]
    summary = f"{rows[0].get('bench', 'rows')} in {name}"
    return ["", *table(columns, summary, texts), "", " ".join([origin(rows, name, link, cases), *notes])]


def _extra_order(key: str) -> tuple[int, str]:
    return (RESULTS.index(key) if key in RESULTS else len(RESULTS), key)


def _note(key: str, rows: list[Row]) -> str:
    """A sentence on a field for which all rows that have it agree, empty if it needs a column."""
    having = [row for row in rows if row.get(key) is not None]
    if key in RESULTS or not having or any(row[key] != having[0][key] for row in having):
        return ""
    which = "" if len(having) == len(rows) else f" ({', '.join(sorted({str(row['impl']) for row in having}))})"
    unit = f" {having[0].get('rate_unit') or ''}".rstrip() if key == "ceiling" else ""
    return f"{title(key)}{which}: {plain(having[0][key])}{unit}."


def _extra(row: Row, key: str) -> str:
    if key == "accuracy":
        return percent(row.get(key), row.get("accuracy_std"))
    if "cosine" in key and isinstance(row.get(key), float):
        return f"{row[key]:.6f}"  # four digits would round to 1
    return plain(row.get(key))
