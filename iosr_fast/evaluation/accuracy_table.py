"""The tables of `iosr-fast evaluate`: every method on every data set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console

from iosr_fast.evaluation import overlap, table
from iosr_fast.evaluation.accuracy import AUTO, Result, evaluate
from iosr_fast.evaluation.selection import Options, select
from iosr_fast.evaluation.summary import print_summary, summary_rows
from iosr_fast.evaluation.tasks import Source

REDUCERS = ("none", "centre", "pca")


def run(sources: Sequence[Source], options: Options, out: Console) -> list[dict[str, Any]]:
    """Print the tables of accuracy, of calibration, of overlap and their summary; return their rows."""
    selected = [select(source, options, ("all",), REDUCERS) for source in sources]  # before any work
    sheets, overlaps, last = [], [], None
    for source, chosen in zip(sources, selected, strict=True):
        results = evaluate(
            source, chosen.rows, chosen.tune_on, lambda result: options.report(f"{result.source}: {result.summary}")
        )
        notes = (table.header(source.name, results), *source.notes)
        sheets.append(table.Sheet(source.name, tuple(results), notes))
        footer = [f"  left out: {reason}" for reason in chosen.left_out.values()]
        table.print_sheets(out, sheets[-1:], [*_seconds(results), *footer])
        if source.images is not last:  # a shift of styles has the same images
            rows = overlap.overlap_rows(source.name.partition(",")[0], *overlap.representations(source))
            table.print_overlap(out, rows)
            overlaps += rows
        last = source.images
    summary = summary_rows(result for sheet in sheets for result in sheet.results)
    if len({(result.source, result.shots) for sheet in sheets for result in sheet.results}) > 1:
        print_summary(out, summary)
    return [*table.rows_of(sheets), *overlaps, *summary]


def _seconds(results: Sequence[Result]) -> list[str]:
    """What the choice of `auto` took."""
    auto = {result.shots: result.tune_seconds for result in results if result.method == AUTO}
    parts = [f"{seconds:.2f} at {shots}" for shots, seconds in auto.items()]
    return [f"  auto chose in seconds: {', '.join(parts)} shots"] if parts else []
