"""Results as tables on the terminal and in Markdown, and as rows."""

from __future__ import annotations

import math
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from iosr_fast.evaluation.accuracy import AUTO, TUNED_ON, Result
from iosr_fast.evaluation.calibration import BINS
from iosr_fast.utils.machine import package_version
from iosr_fast.utils.provenance import commit, cpu_description

WIDTH = 170
MEAN = "mean"
PACKAGES = ("torch", "open_clip_torch", "onnxruntime")
OVERLAP = ("overlap_area", "auroc", "feature_variance")
CALIBRATION = f"log-loss in nats / expected calibration error in % ({BINS} bins of equal width); 0 is the best for both"
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Sheet:
    """One table, methods x shots: `notes` stand above it."""

    name: str
    results: tuple[Result, ...]
    notes: tuple[str, ...]

    def lines(self) -> tuple[list[str], list[list[str]]]:
        """Heads and rows; a method with published figures has a second row with them and the difference in points."""
        rows: list[list[str]] = []
        for name, at in self._by_row().items():
            rows.append([*name, *(self._cell(at[k]) if k in at else "" for k in self._shots)])
            if any(result.published for result in at.values()):
                figures = [
                    " / ".join(f"{f.value:.1f} ({points:+.1f})" for f, points in at[k].compared) for k in self._shots
                ]
                rows.append(["  published", "", *(cell or "not at hand" for cell in figures)])
        return self._heads, rows

    def calibration(self) -> tuple[list[str], list[list[str]]]:
        """Heads and rows of log-loss and calibration error; without methods that give no probabilities."""
        rows = []
        for name, at in self._by_row().items():
            cells = [calibration_cell(at[k]) if k in at else "" for k in self._shots]
            if any(cells):
                rows.append([*name, *cells])
        return self._heads, rows

    @property
    def _shots(self) -> list[int]:
        return sorted({result.shots for result in self.results})

    @property
    def _heads(self) -> list[str]:
        return ["method", "reducer", *(f"{k} shot{'' if k == 1 else 's'}" for k in self._shots)]

    def _by_row(self) -> dict[tuple[str, str], dict[int, Result]]:
        """The results by shots, for each (method, reducer)."""
        rows: dict[tuple[str, str], dict[int, Result]] = {}
        for result in self.results:
            rows.setdefault((result.method, result.reducer), {})[result.shots] = result
        return rows

    def _cell(self, result: Result) -> str:
        # A binomial standard error is that of one set's images: a mean over sets has none.
        if self.name == MEAN and result.std is None:
            return f"{100 * result.mean:.1f}"
        return percent(result.mean, result.spread)


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


def header(name: str, results: Sequence[Result]) -> str:
    """What a table's numbers mean: data, test images, classes, draws, the spread, the tuning."""
    draws = results[0].draws
    images, classes = (_range([getattr(draw, field) for draw in draws]) for field in ("images", "classes"))
    if len(draws) > 1:
        spread = f"mean ± standard deviation (std) over {len(draws)} seeds"
    else:
        spread = "one draw ± its binomial standard error (se)"
    protocols = {result.protocol for result in results if result.method != AUTO} - {"none"}
    scored = max((r.draws[0].tuned.scored for r in results if r.protocol == "validation"), default=0)
    texts = {**TUNED_ON, "validation": f"{scored} {TUNED_ON['validation']}"}
    chosen = [text for name, text in texts.items() if name in protocols]
    if any(result.method == AUTO for result in results):
        chosen.append(f"{AUTO}: the support set alone")
    return (
        f"{name}: accuracy in % on {images} test images of {classes} classes, {spread}; "
        f"parameters chosen on: {'; '.join(chosen) or TUNED_ON['none']}"
    )


def print_table(out: Console, heads: Sequence[str], rows: Iterable[Sequence[str]], left: int) -> None:
    """The first `left` columns are flush left, the others right."""
    table = Table()
    for i, head in enumerate(heads):
        table.add_column(head, justify="left" if i < left else "right")
    for row in rows:
        table.add_row(*row)
    out.print(table)


def print_sheets(out: Console, sheets: Sequence[Sheet], footer: Sequence[str] = ()) -> None:
    for sheet in sheets:
        for note in sheet.notes:
            out.print(note, soft_wrap=True)
        print_table(out, *sheet.lines(), left=2)
        if sheet.calibration()[1]:
            out.print(f"{sheet.name}: {CALIBRATION}", soft_wrap=True)
            print_table(out, *sheet.calibration(), left=2)
    for line in footer:
        out.print(line, soft_wrap=True)


def print_overlap(out: Console, rows: Sequence[Row]) -> None:
    first = rows[0]
    out.print(
        f"{first['data']}: cosines of all pairs of {first['images']} images of {first['classes']} classes; reducers "
        "fitted on the support set"
    )
    cells = [[row["embeddings"], *(f"{row[name]:.3f}" for name in OVERLAP)] for row in rows]
    print_table(out, ("embeddings", "overlap area", "AUROC", "feature variance"), cells, left=4)


def cell(value: float | None, form: str, factor: float = 1.0) -> str:
    """A number times `factor` in this format; empty where it is unknown."""
    return "" if value is None else format(factor * value, form)


def calibration_cell(result: Result) -> str:
    """Empty if a classifier gives no probabilities."""
    if math.isnan(result.log_loss):
        return ""
    return f"{result.log_loss:.3f} / {100 * result.calibration_error:.1f}"


def percent(mean: float, spread: float) -> str:
    return f"{100 * mean:.1f} ± {100 * spread:.1f}"


def rows_of(sheets: Sequence[Sheet]) -> list[dict[str, Any]]:
    """One row a data set, method, reducer and shots, JSON-ready."""
    return [result.row() for sheet in sheets if sheet.name != MEAN for result in sheet.results]


def write_markdown(path: Path, sheets: Sequence[Sheet], common: Row, footer: Sequence[str]) -> None:
    """The tables as they are printed, below the run's settings and versions."""
    settings = {name: value for name, value in common.items() if name not in ("device", "versions", "commit")}
    described = "; ".join(f"{name} {value}" for name, value in {**settings, **common["versions"]}.items())
    text = [f"{common['device']}; {described}; {common['commit']}"]
    for sheet in sheets:
        text += ["", f"## {sheet.name}", "", *sheet.notes, "", *_markdown(*sheet.lines())]
        if sheet.calibration()[1]:
            text += ["", f"{sheet.name}: {CALIBRATION}", "", *_markdown(*sheet.calibration())]
    text += ["", *(f"- {line}" for line in footer)]
    path.write_text("\n".join(text) + "\n", encoding="utf-8")


def _markdown(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(line) + " |" for line in (heads, ["---"] * len(heads), *rows)]


def _range(values: Sequence[int]) -> str:
    """12, or 12 to 20."""
    return str(values[0]) if len(set(values)) == 1 else f"{min(values)} to {max(values)}"
