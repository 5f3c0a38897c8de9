"""One loop for the tasks of `iosr-fast evaluate` that scikit-learn's classifiers have no part in."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from iosr_fast.evaluation.accuracy import label
from iosr_fast.evaluation.selection import Options, TuneOn, select_own
from iosr_fast.evaluation.table import Row, print_table
from iosr_fast.evaluation.tasks import Source


@dataclass(frozen=True)
class OwnTable:
    """A table for each data set.

    task           its name in --task; `methods` are those of a call without --methods
    rows           of a source, method, reducer, number of shots and TuneOn, JSON-ready
    title          of a source, its rows and TuneOn: what the figures are
    heads, cells   of the columns, of which the first `left` are flush left, and of a row
    result         of a row in a few words, reported as soon as it is known
    rivals, notes  of a source, further rows; of its rows, the lines below the table
    """

    task: str
    rows: Callable[[Source, str, str, int, TuneOn], Iterable[dict[str, Any]]]
    title: Callable[[Source, Sequence[Row], TuneOn], str]
    heads: Sequence[str]
    cells: Callable[[Row], list[str]]
    result: Callable[[Row], str]
    methods: Sequence[str] = ("auto",)
    left: int = 1
    rivals: Callable[[Source], Iterable[dict[str, Any]]] = lambda _: ()
    notes: Callable[[Sequence[Row]], Iterable[str]] = lambda _: ()

    def run(self, sources: Sequence[Source], options: Options, out: Console) -> list[dict[str, Any]]:
        """Print the tables, and return their rows."""
        selected = select_own(sources, options, self.methods, self.task)
        every: list[dict[str, Any]] = []
        for source, chosen in zip(sources, selected, strict=True):
            rows = []
            for method, reducer in chosen.rows:
                for shots in source.shots:
                    for row in self.rows(source, method, reducer, shots, chosen.tune_on):
                        rows.append(row)
                        options.report(f"{source.name}: {label(method, reducer)}, shots {shots}: {self.result(row)}")
            rows += self.rivals(source)
            for line in (self.title(source, rows, chosen.tune_on), *source.notes):
                out.print(line, soft_wrap=True)
            print_table(out, self.heads, map(self.cells, rows), self.left)
            for line in (*self.notes(rows), *(f"  left out: {reason}" for reason in chosen.left_out.values())):
                out.print(line, soft_wrap=True)
            every += rows
        return every
