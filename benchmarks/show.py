"""Rows of benchmarks/results as tables.

`python tools/benchmark.py show SUBJECT` prints all of a subject. In the docs a block of YAML prints some of them:

    ```rows
    subject: accuracy-embeddings
    where: {data: flowers102.npz, shots: [1, 4]}
    line: "{method}"
    column: "{shots} a class"
    cell: "{mean:.1%} ± {spread:.1%}"
    ```

where     fields with the values that are taken, in the order of these; all rows where it is missing
line      what a line is called; format strings see the fields of a row, and `spread`, its `std` or else its `se`
column    what the column of a row's cell is called; instead `columns` name columns and the format of each
names     other names of lines and columns
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
Row = Mapping[str, Any]
TIMED: Mapping[str, Any] = {"line": "{impl}", "column": "{case}", "cell": "{runtime_ms:.4g} ({low:.4g} to {high:.4g})"}
ACCURACY: Mapping[str, Any] = {
    "line": "{method} {reducer}",
    "column": "{shots} shots",
    "cell": "{mean:.1%} ± {spread:.1%}",
}
NAMES = ("case", "impl", "server", "load", "method", "of", "shots")  # of a row, where it has them
FACTS = ("bench", "device", "data", "seeds", "versions", "commit", "test_images")  # of a table


def rows_of(subject: str, folder: Path = RESULTS) -> list[Row]:
    """Raises ValueError for an unknown subject."""
    files = {path.stem: path for path in folder.glob("*.json")}
    if subject not in files:
        raise ValueError(f"expected one of the subjects {', '.join(sorted(files))}, got {subject}")
    rows: list[Row] = json.loads(files[subject].read_text(encoding="utf-8"))
    return rows


def page(subject: str) -> str:
    """All rows of a subject, a table for each bench, machine and data set, with what it was measured on."""
    groups: dict[str, list[Row]] = {}
    for row in rows_of(subject):
        key = [str(row.get(fact)) for fact in ("bench", "device", "data", "seeds")]
        groups.setdefault("; ".join(key), []).append(row)
    return "\n\n".join("\n".join([*lines_of(rows), "", origin(subject, rows)]) for rows in groups.values())


def block(spec: Mapping[str, Any], folder: Path = RESULTS) -> list[str]:
    """The table of a block of the docs. Raises ValueError where it has no rows, or a line without figures."""
    taken = rows_of(spec["subject"], folder)
    for field, wanted in reversed(spec.get("where", {}).items()):
        values = wanted if isinstance(wanted, list) else [wanted]
        taken = sorted((row for row in taken if row.get(field) in values), key=lambda row: values.index(row.get(field)))
    lines = pivot(
        taken, **{name: spec[name] for name in ("line", "column", "columns", "cell", "names") if name in spec}
    )
    if len(lines) < 3 or not all(any(map(str.strip, line.split("|")[2:])) for line in lines):
        raise ValueError(f"expected rows with figures for each line of {dict(spec)}, got {lines}")
    return lines


def lines_of(rows: Sequence[Row]) -> list[str]:
    """Times by implementation and case, accuracies by method and shots, of others a line of all figures for each."""
    if "runtime_ms" in rows[0]:
        return pivot(rows, **TIMED)
    if "mean" in rows[0]:
        return pivot(rows, **ACCURACY)
    flat = [{**row, **part} for row in rows for part in row.get("servers") or row.get("runs") or [row]]
    return [f"{named(row)}: {', '.join(figures(row))}" for row in flat]


def named(row: Row) -> str:
    return ", ".join(f"{row[name]} {name}" if name == "shots" else str(row[name]) for name in NAMES if row.get(name))


def figures(row: Row) -> list[str]:
    """Name and number of each figure, with four digits."""
    numbers = {name: value for name, value in row.items() if name not in NAMES and name not in FACTS}
    return [f"{name} {value:.4g}" for name, value in numbers.items() if isinstance(value, int | float)]


def pivot(
    rows: Sequence[Row],
    line: str,
    cell: str = "",
    column: str = "",
    columns: Mapping[str, str] | None = None,
    names: Mapping[str, str] | None = None,
) -> list[str]:
    """A table with a line for each name that rows give; cells of one place are of the last row."""
    names, formats, cells = names or {}, columns or {column: cell}, {}
    for row in rows:
        for head, form in formats.items():
            place = filled(row, line).strip(), filled(row, head)
            cells[tuple(names.get(name, name) for name in place)] = filled(row, form)
    heads, lines = (list(dict.fromkeys(place[axis] for place in cells)) for axis in (1, 0))
    return table(["", *heads], [[name, *(cells.get((name, head), "") for head in heads)] for name in lines])


def filled(row: Row, form: str) -> str:
    """The format with the row's fields; nothing where it lacks one."""
    low, high = row.get("runtime_ms_spread") or (None, None)
    spread = row.get("std") if row.get("std") is not None else row.get("se")
    try:
        return form.format_map({"low": low, "high": high, **row, "spread": spread})
    except (KeyError, TypeError):
        return ""


def table(heads: Sequence[str], lines: Iterable[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(line) + " |" for line in (heads, ["---"] * len(heads), *lines)]


def origin(subject: str, rows: Sequence[Row]) -> str:
    """What a table was measured on: data, test images and draws, machine and commits."""
    facts = [subject, *(f"{rows[0][name]}" for name in ("data",) if name in rows[0])]
    for name in ("test_images", "seeds"):
        if found := sorted({str(row[name]) for row in rows if name in row}):
            facts.append(f"{name.replace('_', ' ')}: {' or '.join(found)}")
    return "; ".join([*facts, rows[0]["device"], ", ".join(sorted({row["commit"] for row in rows}))])
