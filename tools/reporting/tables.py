"""Tables of what is not a timing row: serving under load, accuracy, overlap, the adapter's place, compiled kernels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tools.reporting.load import Row
from tools.reporting.text import folded, natural, number, percent, plain, provenance, same, table, words

RUN = ("load", "ok", "refused", "errors", "late", "wrong", "p50_ms", "p99_ms", "p999_ms", "refusal_p99_ms", "ok_rps")
# What of a serving file stands in its tables; all else that is one number or word stands below them.
PARTS = ("runs", "goals", "churn", "throughput", "memory")


def serving_tables(name: str, link: str, facts: Row) -> list[str]:
    """Runs and goals as tables; what else was measured as a line each."""
    heads = ["load, of capacity" if key == "load" else words(key) for key in RUN]
    runs = sorted(facts["runs"], key=lambda run: run["load"])
    lines = ["", *table(heads, [[plain(run.get(key)) for key in RUN] for run in runs])]
    lines += [
        "",
        provenance([facts], name, link),
        "",
        _sentence("Settings and capacity", facts, (*PARTS, "device", "commit", "versions")),
    ]
    for part in ("throughput", "churn", "memory"):
        if isinstance(facts.get(part), Mapping):
            lines += ["", _sentence(words(part).capitalize(), facts[part], ())]
    goals = facts.get("goals") or []
    if goals:
        cells = [[str(goal["goal"]), *(plain(goal.get(key)) for key in ("limit", "measured", "met"))] for goal in goals]
        lines += ["", *folded(table(("goal", "limit", "measured", "met"), cells), f"goals of {name}", len(cells))]
    return lines


def _sentence(title: str, facts: Row, without: Sequence[str]) -> str:
    told = [
        f"{words(key)} {plain(value)}"
        for key, value in facts.items()
        if key not in without and value not in (None, {}, [])
    ]
    return f"{title}: {'; '.join(told)}."


def evaluation_tables(name: str, link: str, rows: Mapping[str, Sequence[Row]]) -> list[str]:
    lines: list[str] = []
    for bench, make in (("accuracy", accuracy_table), ("overlap", overlap_table), ("block-sweep", sweep_table)):
        for group in same(rows.get(bench, [])):
            for data in sorted({str(row.get("data", "")) for row in group}):
                chosen = [row for row in group if str(row.get("data", "")) == data]
                lines += [
                    "",
                    *make(name, chosen),
                    "",
                    " ".join(part for part in (_what(chosen), provenance(chosen, name, link)) if part),
                ]
    return lines


def _what(rows: Sequence[Row]) -> str:
    """The data, how many images, classes and seeds; what ± is."""
    first = rows[0]
    if first["bench"] == "block-sweep":
        return "Demo; accuracy on test concepts."
    told = [f"Data: {first['data']}"]
    for key, what in (("test_images", "test images"), ("images", "images"), ("classes", "classes")):
        found = sorted({n for row in rows for n in _several(row.get(key))})
        if found:
            told.append(f"{number(found[0])}{f' to {number(found[-1])}' if len(found) > 1 else ''} {what}")
    if first["bench"] == "accuracy":
        seeds = len(_several(first.get("seeds")))
        std = any(row.get("std") is not None for row in rows)
        told.append(f"± std over {seeds} seeds" if std else "± binomial standard error of one draw")
    return "; ".join(told) + "."


def _several(value: Any) -> list[int]:
    return value if isinstance(value, list) else [] if value is None else [value]


def spread(row: Row) -> float | None:
    return row["std"] if row.get("std") is not None else row.get("se")


def accuracy_table(name: str, rows: Sequence[Row]) -> list[str]:
    """Accuracy in %, a line a method and reducer, a column a number of shots."""
    shots = sorted({row["shots"] for row in rows})
    named = len({row.get("adapter") for row in rows}) > 1
    cells: dict[tuple[str, ...], dict[int, str]] = {}
    tuned: dict[tuple[str, ...], set[str]] = {}
    for row in rows:
        key = (row["method"], row["reducer"], *([row.get("adapter") or "the package's"] if named else []))
        cells.setdefault(key, {})[row["shots"]] = percent(row["mean"], spread(row))
        tuned.setdefault(key, set()).add(str(row.get("tuned_on", "")))
    heads = ("method", "reducer", *(["adapter"] if named else []), "tuned on")
    lines = [
        [*key, ", ".join(sorted(tuned[key])), *(cells[key].get(k, "") for k in shots)] for key in sorted(cells, key=str)
    ]
    made = table([*heads, *(f"{k} shot{'' if k == 1 else 's'}, %" for k in shots)], lines, len(heads))
    return folded(made, f"accuracy in {name}", len(lines))


def overlap_table(name: str, rows: Sequence[Row]) -> list[str]:
    keys = ("overlap_area", "auroc", "feature_variance")
    named = len({row.get("adapter") for row in rows}) > 1
    cells = sorted(
        [
            row["embeddings"],
            *([row.get("adapter") or "the package's"] if named else []),
            *(number(row[key]) for key in keys),
        ]
        for row in rows
    )
    heads = ["embeddings", *(["adapter"] if named else []), "overlap area", "AUROC", "feature variance"]
    return folded(table(heads, cells, 1 + named), f"overlap in {name}", len(cells))


def sweep_table(name: str, rows: Sequence[Row]) -> list[str]:
    """A line a place and width of the adapter: what it costs, what it gives at the most shots that were tested."""
    methods = sorted({method for row in rows for method in row["test_accuracy"]})
    shots = max(int(k) for row in rows for by_shots in row["test_accuracy"].values() for k in by_shots)
    keys = ("cost", "cost_arithmetic", "ms_per_image", "overlap_area", "auroc")
    heads = [
        "first adapted block",
        "bottleneck",
        "epochs",
        *map(words, keys),
        *(f"{method}, {shots} shots, %" for method in methods),
    ]
    cells = []
    for row in sorted(
        rows, key=lambda row: (row["bottleneck"] or 0, natural(str(row["first_adapted_block"])), str(row.get("epochs")))
    ):
        found = [row["test_accuracy"].get(method, {}).get(str(shots)) for method in methods]
        place = "no adapter" if row["first_adapted_block"] is None else str(row["first_adapted_block"])
        accuracies = ["" if cell is None else percent(cell["mean"], spread(cell)) for cell in found]
        about = [place, plain(row["bottleneck"]), plain(row.get("epochs"))]
        cells.append([*about, *(number(row.get(key)) for key in keys), *accuracies])
    return folded(table(heads, cells), f"block-sweep in {name}", len(cells))


def compiled_table(files: Sequence[tuple[str, str, Sequence[Row]]]) -> list[str]:
    """Kernels compiled ahead of time, a line a file: a summary, all rows are in the file."""
    cells = []
    for name, link, rows in files:
        registers, shared = (
            [row[key] for row in rows if row.get(key) is not None] for key in ("registers", "shared_bytes")
        )
        spills = sum(bool(row["spills"]) for row in rows)
        span = [f"{number(min(found))} to {number(max(found))}" if found else "" for found in (registers, shared)]
        architectures = ", ".join(str(arch) for arch in sorted({row["arch"] for row in rows}))
        kernels = len({(row["kernel"], row.get("precision")) for row in rows})
        cells.append([f"[{name}]({link})", architectures, number(kernels), number(len(rows)), *span, number(spills)])
    heads = ("file", "sm", "kernels", "rows", "registers a thread", "shared bytes", "rows that spill")
    return ["", *table(heads, cells, 2), "", "Compiled, not run; these rows name no device or commit."]
