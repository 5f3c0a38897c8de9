"""Every method over all data sets and numbers of shots of a call: means, and how far it is from the best."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from rich.console import Console

from iosr_fast.evaluation.accuracy import AUTO, Result, finite, label
from iosr_fast.evaluation.table import Row, cell, print_table
from iosr_fast.methods import METHODS

EXPLANATION = (
    "A cell is a data set at one number of shots. Gap: points below the cell's most accurate single method on the test "
    "images (neither auto nor the stack nor scikit-learn's), mean and largest. Log-loss in nats: mean, and mean and "
    "largest difference to that method's. Calibration error in %: mean and largest. auto ahead: points of auto above "
    "the method, mean and least."
)
HEADS = (
    *("method", "cells", "accuracy", "gap", "largest gap", "in", "log-loss", "to the best's", "largest"),
    *("calibration", "largest", "auto ahead", "least"),
)


def is_single(method: str) -> bool:
    """Neither auto nor a stack, which is made of other methods, nor one of scikit-learn's."""
    return method in METHODS and not METHODS[method].weighted


def summary_rows(results: Iterable[Result]) -> list[dict[str, Any]]:
    """A row for each (method, reducer), JSON-ready, the smallest mean gap first; accuracies in 0..1, gaps in points.

    Its lists have an entry for each cell, as `at`. A gap is None in a cell without a single method.
    """
    cells: dict[tuple[str, int], dict[tuple[str, str], Result]] = {}
    for result in results:
        cells.setdefault((result.source, result.shots), {})[result.method, result.reducer] = result
    # Of equally accurate methods the one with the least log-loss.
    best = {
        place: max(single, key=lambda r: (r.mean, -r.log_loss))
        for place, of_cell in cells.items()
        if (single := [result for result in of_cell.values() if is_single(result.method)])
    }
    names = dict.fromkeys(name for of_cell in cells.values() for name in of_cell)
    rows = [_row(*name, cells, best) for name in names]
    data = ", ".join(dict.fromkeys(data for data, _ in cells))
    rows = [{"bench": "summary", "data": data, **row} for row in rows]
    return sorted(rows, key=lambda row: np.inf if row["gap_mean"] is None else row["gap_mean"])


def _row(
    method: str,
    reducer: str,
    cells: dict[tuple[str, int], dict[tuple[str, str], Result]],
    best: dict[tuple[str, int], Result],
) -> dict[str, Any]:
    at = {place: of_cell[method, reducer] for place, of_cell in cells.items() if (method, reducer) in of_cell}
    gaps = [100 * (best[place].mean - one.mean) if place in best else np.nan for place, one in at.items()]
    losses = [one.log_loss - best[place].log_loss if place in best else np.nan for place, one in at.items()]
    ahead = [
        100 * (cells[place][AUTO, AUTO].mean - one.mean) if (AUTO, AUTO) in cells[place] else np.nan
        for place, one in at.items()
    ]
    errors = [one.calibration_error for one in at.values()]
    return {
        "method": method,
        "reducer": reducer,
        "at": [list(place) for place in at],
        "means": [one.mean for one in at.values()],
        "mean": float(np.mean([one.mean for one in at.values()])),
        **_over_cells("gap", gaps, max),
        "best": [label(best[place].method, best[place].reducer) if place in best else None for place in at],
        "log_loss": finite(float(np.mean([one.log_loss for one in at.values()]))),
        **_over_cells("log_loss_gap", losses, max),
        **_over_cells("calibration_error", errors, max),
        **_over_cells("auto_ahead", ahead, min),
    }


def _over_cells(name: str, values: Sequence[float], worst: Any) -> dict[str, Any]:
    """The values of all cells, and the mean and the worst of those that are known."""
    known = [float(value) for value in values if np.isfinite(value)]
    mean, extreme = (float(np.mean(known)), worst(known)) if known else (None, None)
    return {f"{name}s": [finite(value) for value in values], f"{name}_mean": mean, f"{name}_worst": extreme}


def print_summary(out: Console, rows: Sequence[Row]) -> None:
    out.print(f"summary over {rows[0]['data']}. {EXPLANATION}", soft_wrap=True)
    print_table(out, HEADS, [_cells(row) for row in rows], left=1)


def _cells(row: Row) -> list[str]:
    place = ""
    if row["gap_worst"] is not None:
        data, shots = row["at"][row["gaps"].index(row["gap_worst"])]
        place = f"{data.removesuffix('.npz')}, {shots}"
    return [
        *(label(row["method"], row["reducer"]), str(len(row["at"])), f"{100 * row['mean']:.1f}"),
        *(cell(row["gap_mean"], "+.2f"), cell(row["gap_worst"], "+.2f"), place),
        *(cell(row["log_loss"], ".3f"), cell(row["log_loss_gap_mean"], "+.3f")),
        cell(row["log_loss_gap_worst"], "+.3f"),
        *(cell(row[f"calibration_error_{name}"], ".1f", 100) for name in ("mean", "worst")),
        *(cell(row[f"auto_ahead_{name}"], "+.2f") for name in ("mean", "worst")),
    ]
