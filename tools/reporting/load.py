"""Read the files of rows, say what each is, and refuse what is broken by name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]

# Kinds of timing rows, in the order of the page: what it is called, and the command that makes it.
TIMINGS = {
    "encoder": "Both embeddings of a batch",
    "precision": "The encoder in fewer bits",
    "scaling-encoder": "The encoder at other batch sizes",
    "score": "Scoring",
    "scaling-score": "Scoring with more classes, keys and queries",
    "search": "Choosing parameters",
    "train": "Training an adapter",
    "updates": "Changing a running classifier",
    "pipeline": "Folders of pictures",
    "classifier": "The classifier, picture to label",
    "cold-start": "Starting",
}
# Rows of tools/evaluate.py and of the sweep of the adapter's place.
EVALUATIONS = ("accuracy", "overlap", "block-sweep")
NEEDED = {
    "accuracy": ("data", "method", "reducer", "shots", "mean"),
    "overlap": ("data", "embeddings", "overlap_area", "auroc", "feature_variance"),
    "block-sweep": ("first_adapted_block", "bottleneck", "cost", "test_accuracy"),
    "aot": ("kernel", "arch", "registers", "spills"),
}
NUMBERS = ("rate", "ceiling", "share_of_ceiling", "accuracy", "accuracy_std", "min_cosine")
TIMING_NEEDED = ("case", "impl", "runtime_ms")


class BrokenResults(ValueError):
    """A file that can't be rendered; the message names it, and what in it."""


@dataclass(frozen=True)
class Results:
    """One file: its rows by bench, or `facts` where it is one dictionary; `unknown` counts what has no table."""

    name: str
    kind: str  # rows, serving, gpu, aot or unknown
    rows: Mapping[str, list[Row]] = field(default_factory=dict)
    facts: Row = field(default_factory=dict)
    unknown: Mapping[str, int] = field(default_factory=dict)


def read_results(folder: Path) -> list[Results]:
    """Every *.json of a folder, by name.

    BrokenResults names a file that is not JSON, a row that lacks a field, and a folder without any.
    """
    if not folder.is_dir():
        raise BrokenResults(f"expected a folder of JSON files, and {folder} is none; tools/benchmark.py all makes one")
    found = [read_file(path) for path in sorted(folder.glob("*.json"))]
    if not found:
        raise BrokenResults(f"expected JSON files in {folder}, found none; tools/benchmark.py all makes them")
    return found


def read_file(path: Path) -> Results:
    try:
        made = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are both
        raise BrokenResults(
            f"{path}: expected JSON, got what can't be read as it ({error}); make it again or remove it"
        ) from error
    if isinstance(made, list):
        return _rows(path, made)
    if isinstance(made, dict):
        return _one_dictionary(path, made)
    raise BrokenResults(f"{path}: expected a list of rows or a dictionary, got {type(made).__name__}")


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def _rows(path: Path, made: list[Any]) -> Results:
    rows: dict[str, list[Row]] = {}
    unknown: dict[str, int] = {}
    for i, row in enumerate(made):
        if not isinstance(row, dict):
            raise BrokenResults(f"{path}: expected dictionaries, and row {i} is {type(row).__name__}")
        bench = row.get("bench", "aot" if "arch" in row and "kernel" in row else None)
        if bench is not None and not isinstance(bench, str):
            raise BrokenResults(f"{path}: expected row {i} to have a word as its bench, got {bench!r}")
        if bench in NEEDED:
            _check(path, i, row, NEEDED[bench])
        elif bench in TIMINGS or (bench is not None and "runtime_ms" in row):
            _check_timing(path, i, row)
        else:
            name = "rows without a bench" if bench is None else str(bench)
            unknown[name] = unknown.get(name, 0) + 1
            continue
        rows.setdefault(str(bench), []).append(row)
    kind = "rows" if rows or not made else "unknown"
    return Results(path.name, "aot" if set(rows) == {"aot"} else kind, rows=rows, unknown=unknown)


def _one_dictionary(path: Path, made: dict[str, Any]) -> Results:
    if "runs" in made and "capacity_rps" in made:
        for i, run in enumerate(made["runs"]):
            _check(path, i, run, ("load", "ok", "p50_ms", "p99_ms"))
        return Results(path.name, "serving", facts=made)
    if made.get("kind") == "gpu-check" or {"device", "torch", "missing"} <= set(made):
        rows: dict[str, list[Row]] = {}
        for section, value in made.items():
            if is_timing(value):
                for i, row in enumerate(value):
                    _check_timing(path, i, row, f"{section}: ")
                rows[section] = value
        return Results(path.name, "gpu", rows=rows, facts=made)
    keys = ", ".join(sorted(made)[:6]) or "nothing"
    return Results(path.name, "unknown", unknown={f"a dictionary of {keys}": 1})


def is_timing(value: object) -> bool:
    """Whether a section of a GPU's file is a list of rows with times."""
    return isinstance(value, list) and bool(value) and all(isinstance(row, dict) and "impl" in row for row in value)


def _check(path: Path, i: int, row: Any, names: tuple[str, ...], section: str = "") -> None:
    missing = [name for name in names if name not in row]
    if missing:
        raise BrokenResults(
            f"{path}: expected {section}row {i} to have {', '.join(names)}; {', '.join(missing)} missing"
        )


def _check_timing(path: Path, i: int, row: Row, section: str = "") -> None:
    _check(path, i, row, TIMING_NEEDED, section)
    if not (_is_number(row["runtime_ms"]) and row["runtime_ms"] > 0):
        raise BrokenResults(
            f"{path}: expected {section}row {i} to have a runtime_ms above 0, got {row['runtime_ms']!r}"
        )
    wrong = [name for name in NUMBERS if row.get(name) is not None and not _is_number(row[name])]
    spread, ratios, versions = row.get("runtime_ms_spread") or [], row.get("ratios") or {}, row.get("versions") or {}
    wrong += ["runtime_ms_spread"] * (not isinstance(spread, list) or not all(map(_is_number, spread)))
    wrong += ["ratios"] * (not isinstance(ratios, dict) or not all(map(_is_number, ratios.values())))
    wrong += ["versions"] * (not isinstance(versions, dict))
    if wrong:
        raise BrokenResults(f"{path}: expected numbers in {section}row {i}, got {wrong[0]} {row[wrong[0]]!r}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
