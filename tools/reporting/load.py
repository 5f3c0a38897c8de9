"""Read the files of rows, classify each, and name what is broken in one."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]

# Kinds of timing rows and their headings, in the order of the page.
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
    "fit": "Fitting a classifier",
    "classifier": "The classifier, picture to label",
    "cold-start": "Starting",
}
# Fields that rows without times need: tools/evaluate.py's, the sweep of the adapter's place, compiled kernels.
NEEDED = {
    "accuracy": ("data", "method", "reducer", "shots", "mean"),
    "overlap": ("data", "embeddings", "overlap_area", "auroc", "feature_variance"),
    "summary": ("data", "method", "reducer", "at", "mean", "gap_mean", "gap_worst", "log_loss", "auto_ahead_worst"),
    "joint": ("data", "method", "reducer", "shots", "alone", "joint", "gain", "few_gain", "refused", "few_refused"),
    "labels": ("data", "method", "shots", "map", "map_std"),
    "audit": ("data", "method", "shots", "auroc", "precision", "listed", "found", "false_alarms"),
    "suggest": ("data", "method", "start", "shots", "random", "suggested", "gain"),
    "unknown": ("data", "method", "shots", "auroc", "best_auroc", "kept", "kept_left_out", "coverage_left_out"),
    "block-sweep": ("first_adapted_block", "bottleneck", "cost", "test_accuracy"),
    "aot": ("kernel", "arch", "registers", "spills"),
}
EVALUATIONS = ("accuracy", "summary", "joint", "labels", "audit", "suggest", "unknown", "overlap", "block-sweep")
NUMBERS = ("rate", "ceiling", "share_of_ceiling", "accuracy", "accuracy_std", "min_cosine")


class BrokenResults(ValueError):
    """A file that can't be rendered; the message names the file and the place."""


@dataclass(frozen=True)
class Results:
    """One file. `kind` is rows, serving, peers or gpu; `rows` are grouped by bench; `facts` is that of the others."""

    name: str
    kind: str
    rows: Mapping[str, list[Row]] = field(default_factory=dict)
    facts: Row = field(default_factory=dict)


def read_results(folder: Path) -> list[Results]:
    """Every *.json of a folder, by name. BrokenResults names a broken file, or a folder without any."""
    results = [read_file(path) for path in sorted(folder.glob("*.json"))]
    if not results:
        raise BrokenResults(
            f"expected a folder with JSON files, found none in {folder}; tools/benchmark.py all makes them"
        )
    return results


def read_file(path: Path) -> Results:
    try:
        content = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are both
        raise BrokenResults(
            f"{path}: expected JSON, can't be read as such ({error}); make it again or remove it"
        ) from error
    if isinstance(content, list) and content:
        return Results(path.name, "rows", rows=_by_bench(path, content))
    if not isinstance(content, dict):
        what = "an empty one" if content == [] else type(content).__name__
        raise BrokenResults(f"{path}: expected a list of rows or a dictionary, got {what}")
    if "runs" in content and "capacity_rps" in content:
        for i, run in enumerate(content["runs"]):
            _check_fields(path, i, run, ("load", "ok", "p50_ms", "p99_ms"))
        return Results(path.name, "serving", facts=content)
    if content.get("kind") == "serving-peers":
        for i, row in enumerate(content.get("servers") or []):
            _check_fields(path, i, row, ("server", "pictures_per_s", "pictures_per_s_spread", "lone_ms", "runs"))
        return Results(path.name, "peers", facts=content)
    if content.get("kind") == "gpu-check":
        return Results(path.name, "gpu", rows=_by_bench(path, content.get("rows") or []), facts=content)
    keys = ", ".join(sorted(content)[:6]) or "nothing"
    raise BrokenResults(f"{path}: expected a file of load_test.py or of gpu-check, got a dictionary of {keys}")


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def _by_bench(path: Path, content: Sequence[Any]) -> dict[str, list[Row]]:
    rows: dict[str, list[Row]] = {}
    for i, row in enumerate(content):
        if not isinstance(row, dict):
            raise BrokenResults(f"{path}: expected dictionaries, and row {i} is {type(row).__name__}")
        bench = row.get("bench", "aot" if "arch" in row and "kernel" in row else None)
        if not isinstance(bench, str):
            raise BrokenResults(f"{path}: expected row {i} to have a word as its bench, got {bench!r}")
        if bench in NEEDED:
            _check_fields(path, i, row, NEEDED[bench])
        else:
            _check_timing(path, i, row)
        rows.setdefault(bench, []).append(row)
    return rows


def _check_fields(path: Path, i: int, row: Row, names: Sequence[str]) -> None:
    if missing := [name for name in names if name not in row]:
        raise BrokenResults(f"{path}: expected row {i} to have {', '.join(names)}; {', '.join(missing)} missing")


def _check_timing(path: Path, i: int, row: Row) -> None:
    _check_fields(path, i, row, ("case", "impl", "runtime_ms"))
    if not (_is_number(row["runtime_ms"]) and row["runtime_ms"] > 0):
        raise BrokenResults(f"{path}: expected row {i} to have a runtime_ms above 0, got {row['runtime_ms']!r}")
    ratios, spread = row.get("ratios") or {}, row.get("runtime_ms_spread") or []
    valid = {name: row.get(name) is None or _is_number(row[name]) for name in NUMBERS}
    valid["runtime_ms_spread"] = isinstance(spread, list) and all(map(_is_number, spread))
    valid["ratios"] = isinstance(ratios, dict) and all(map(_is_number, ratios.values()))
    valid["versions"] = isinstance(row.get("versions") or {}, dict)
    if wrong := [name for name, good in valid.items() if not good]:
        raise BrokenResults(f"{path}: expected numbers in row {i}, got {wrong[0]} {row[wrong[0]]!r}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
