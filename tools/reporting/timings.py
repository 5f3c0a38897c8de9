"""Tables of timing rows, whatever their bench: what tools/bench/harness.py writes, and what older files lack."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from tools.reporting.load import Row
from tools.reporting.text import (
    CASES,
    FOLD,
    differ,
    folded,
    natural,
    number,
    percent,
    plain,
    provenance,
    same,
    table,
    words,
)

KNOWN = {
    *(
        "bench",
        "case",
        "impl",
        "precision",
        "runtime_ms",
        "runtime_ms_spread",
        "repeats",
        "ratios",
        "rate",
        "rate_unit",
    ),
    *("ceiling", "share_of_ceiling", "threads", "device", "versions", "commit"),
}
# Places to which tools/bench/harness.py rounds: more digits would be made up.
MS_PLACES, RATIO_PLACES = 4, 3
# Further fields that are results: a column each, even where all rows agree. Others move above the table if they agree.
MEASURED = ("accuracy", "accuracy_std", "min_cosine", "images_per_s", "peak_memory_mb", "extra_memory_mb")


def timing_tables(name: str, link: str, rows: Sequence[Row]) -> list[str]:
    """The rows of one bench in one file: a table for each device, commit and set of versions.

    Cases are in natural order, the fastest row of each first, so that the order of the file changes nothing.
    """
    lines: list[str] = []
    for group in same(rows):
        ordered = sorted(group, key=_order)
        cases = list(dict.fromkeys(str(row["case"]) for row in ordered))
        apart = len(ordered) > FOLD and len(cases) <= CASES
        parts = [[row for row in ordered if str(row["case"]) == case] for case in cases] if apart else [ordered]
        lines += [line for part in parts for line in _one_table(name, link, part)]
    return lines


def _order(row: Row) -> Any:
    return natural(str(row["case"])), row["runtime_ms"], str(row["impl"]), json.dumps(row, sort_keys=True)


def _one_table(name: str, link: str, rows: list[Row]) -> list[str]:
    cases = list(dict.fromkeys(str(row["case"]) for row in rows))
    rivals = sorted({rival for row in rows for rival in row.get("ratios") or {}}, key=natural)
    units = sorted({row["rate_unit"] for row in rows if row.get("rate") is not None and row.get("rate_unit")})
    ceilings = {row.get("ceiling") for row in rows} - {None}
    extras = sorted({key for row in rows for key in row} - KNOWN, key=_extra_order)
    notes = [note for key in extras if (note := _note(key, rows))]
    columns = [key for key in extras if _note(key, rows) is None and key != "accuracy_std"]
    texts = ["impl", *(["case"] if len(cases) > 1 else []), "precision"]
    texts += ["threads"] if differ(rows, "threads") else []
    heads = [*texts, "ms", "p10 to p90", *(f"{rival} / this" for rival in rivals)]
    heads += [units[0] if len(units) == 1 else "rate", "of ceiling %", *(["ceiling"] if len(ceilings) > 1 else [])]
    heads += ["accuracy %" if key == "accuracy" else words(key) for key in columns]
    cells = [
        [
            *(f"`{row[text]}`" if text == "case" else plain(row.get(text)) for text in texts),
            number(float(row["runtime_ms"]), MS_PLACES),
            " to ".join(number(float(value), MS_PLACES) for value in row.get("runtime_ms_spread") or ()),
            *(number((row.get("ratios") or {}).get(rival), RATIO_PLACES) for rival in rivals),
            _rate(row, len(units) > 1),
            "" if row.get("share_of_ceiling") is None else f"{100 * row['share_of_ceiling']:.2f}",
            *([number(row.get("ceiling"))] if len(ceilings) > 1 else []),
            *(_extra(row, key) for key in columns),
        ]
        for row in rows
    ]
    said = [provenance(rows, name, link, cases)]
    repeats = sorted({row["repeats"] for row in rows if row.get("repeats") is not None})
    said += [f"Repeats: {', '.join(map(str, repeats))}."] if repeats else []
    if len(ceilings) == 1:
        said.append(f"Ceiling: {' '.join([number(next(iter(ceilings))), *units[:1]])}.")
    said += [". ".join(notes) + "."] if notes else []
    shown = folded(table(heads, cells, len(texts)), f"{rows[0].get('bench', 'rows')} in {name}", len(rows))
    return ["", *shown, "", " ".join(said)]


def _extra_order(key: str) -> tuple[int, str]:
    return (MEASURED.index(key) if key in MEASURED else len(MEASURED), key)


def _note(key: str, rows: list[Row]) -> str | None:
    """What is said below a table of a field in which its rows agree or are silent; None where it needs a column."""
    values = [(str(row["impl"]), row[key]) for row in rows if row.get(key) is not None]
    if not values:
        return ""
    if key in MEASURED or any(value != values[0][1] for _, value in values):
        return None
    who = "" if len(values) == len(rows) else f" ({', '.join(sorted({impl for impl, _ in values}))})"
    return f"{words(key)[0].upper()}{words(key)[1:]}{who}: {plain(values[0][1])}"


def _rate(row: Row, with_unit: bool) -> str:
    value = number(row.get("rate"))
    return f"{value} {row['rate_unit']}" if value and with_unit and row.get("rate_unit") else value


def _extra(row: Row, key: str) -> str:
    if key == "accuracy":
        return percent(row.get(key), row.get("accuracy_std"))
    if "cosine" in key and isinstance(row.get(key), float):
        return f"{row[key]:.6f}"  # four digits would make 1 of what is not
    return plain(row.get(key))
