"""Results as tables on the terminal."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from iosr_fast.evaluation.comparison import AUTO, TUNED_ON, Comparison, Result
from iosr_fast.evaluation.provenance import commit, cpu_description
from iosr_fast.methods.conformal import BINS
from iosr_fast.utils.machine import package_version

WIDTH = 170
CALIBRATION = f"log-loss in nats / expected calibration error in % ({BINS} bins of equal width); 0 is the best for both"
Place = tuple[str, str, int]  # method, reducer, shots
Cells = Mapping[Place, str]


def console() -> Console:
    """As wide as the terminal; WIDTH without one."""
    return Console(width=None if Console().is_terminal else WIDTH)


def facts(packages: Iterable[str] = ()) -> dict[str, Any]:
    """The device, the versions and the commit, for every row."""
    names = ("iosr_fast", "numpy", *packages)
    return {
        "device": cpu_description(),
        "versions": {"python": platform.python_version(), **{name: package_version(name) for name in names}},
        "commit": commit(),
    }


def print_comparison(out: Console, comparison: Comparison, published: Cells | None = None) -> None:
    """The tables of accuracy and of calibration, and what was left out."""
    source, results = comparison.source, comparison.results
    for line in (_header(source.name, results), *source.notes):
        out.print(line, soft_wrap=True)
    accuracies = {place(result): f"{100 * result.mean:.1f} ± {100 * result.spread:.1f}" for result in results}
    _print_cells(out, accuracies, published or {})
    calibration: dict[Place, str] = {}
    for result in results:
        log_loss, error = result.average("log_loss"), result.average("calibration_error")
        if log_loss is not None and error is not None:
            calibration[place(result)] = f"{log_loss:.3f} / {100 * error:.1f}"
    if calibration:
        out.print(f"{source.name}: {CALIBRATION}", soft_wrap=True)
        _print_cells(out, calibration)
    auto = [result for result in results if result.method == AUTO]
    if auto:
        seconds = ", ".join(
            f"{np.mean([draw.evidence.seconds for draw in result.draws]):.2f} s at {result.shots}" for result in auto
        )
        out.print(f"  auto took {seconds} shots to choose", soft_wrap=True)
    for reason in comparison.left_out:
        out.print(f"  left out: {reason}", soft_wrap=True)


def print_means(out: Console, comparisons: Sequence[Comparison]) -> None:
    """The mean over the data sets of each row that all of them have; every set has the same weight."""
    by_place: dict[Place, list[float]] = {}
    for result in (result for comparison in comparisons for result in comparison.results):
        by_place.setdefault(place(result), []).append(result.mean)
    means = {key: 100 * float(np.mean(few)) for key, few in by_place.items() if len(few) == len(comparisons)}
    if len(comparisons) > 1 and means:
        names = ", ".join(comparison.source.name for comparison in comparisons)
        out.print(f"mean accuracy in % over {len(comparisons)} data sets ({names})", soft_wrap=True)
        _print_cells(out, {key: f"{mean:.1f}" for key, mean in means.items()})


def place(result: Result) -> Place:
    return result.method, result.reducer, result.shots


def _print_cells(out: Console, cells: Cells, published: Cells | None = None) -> None:
    """A line for each method and reducer, and one for what is published of it, a column for each number of shots."""
    shots, table = sorted({k for *_, k in cells}), Table("method", "reducer")
    for k in shots:
        table.add_column(f"{k} shot{'' if k == 1 else 's'}", justify="right")
    for pair in dict.fromkeys((method, reducer) for method, reducer, _ in cells):
        table.add_row(*pair, *(cells.get((*pair, k), "") for k in shots))
        figures = [(published or {}).get((*pair, k), "") for k in shots]
        if any(figures):
            table.add_row("  published", "", *figures)
    out.print(table)


def _header(name: str, results: Sequence[Result]) -> str:
    """What a table's numbers mean: data, test images, classes, draws, the spread, the tuning."""
    draws = results[0].draws
    images, classes = (_range([getattr(draw, field) for draw in draws]) for field in ("images", "classes"))
    if len(draws) > 1:
        spread = f"mean ± standard deviation (std) over {len(draws)} seeds"
    else:
        spread = "one draw ± its binomial standard error (se)"
    protocols = {result.protocol for result in results if result.method != AUTO} - {"none"}
    scored = max((r.draws[0].evidence.scored for r in results if r.protocol == "validation"), default=0)
    texts = {**TUNED_ON, "validation": f"{scored} {TUNED_ON['validation']}"}
    chosen = [text for name, text in texts.items() if name in protocols]
    if any(result.method == AUTO for result in results):
        chosen.append(f"{AUTO}: the support set alone")
    return (
        f"{name}: accuracy in % on {images} test images of {classes} classes, {spread}; "
        f"parameters chosen on: {'; '.join(chosen) or TUNED_ON['none']}"
    )


def _range(values: Sequence[int]) -> str:
    """12, or 12 to 20."""
    return str(values[0]) if len(set(values)) == 1 else f"{min(values)} to {max(values)}"
