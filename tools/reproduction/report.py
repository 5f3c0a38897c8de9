"""Tables of a run: methods x shots for each data set and on average, beside what was published."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from tools.evaluation import table
from tools.evaluation.accuracy import Draw, Result
from tools.reproduction.problems import DEMO, Problem
from tools.reproduction.published import ARXIV, PAPER, Figure, Published, comparable
from tools.reproduction.run import Group

PACKAGES = ("torch", "open_clip_torch", "onnxruntime")
MEAN = "mean"


@dataclass(frozen=True)
class Sheet:
    """One table: its name and results, what stands above it, and the figures to compare each result with."""

    name: str
    results: tuple[Result, ...]
    told: tuple[str, ...]
    figures: tuple[tuple[Figure, ...], ...]

    @property
    def shots(self) -> list[int]:
        return sorted({result.shots for result in self.results})


@dataclass(frozen=True)
class Weights:
    """The CLIP as it was asked for: published figures are of a model and of a tag, never of a file's weights."""

    model: str
    pretrained: str | None


def sheets(groups: Sequence[Group], found: Mapping[str, Draw], published: Published, weights: Weights) -> list[Sheet]:
    """A sheet for each problem, and their mean where several are not shifted. Shifted sets are left out of it."""
    problems = list(dict.fromkeys(group.problem for group in groups))
    made, averaged = [], []
    for problem in problems:
        results = _results([group for group in groups if group.problem is problem], found)
        figures = tuple(
            comparable(published, r.source, r.method, r.reducer, r.shots, weights.model, weights.pretrained)
            for r in results
        )
        told = (table.header(problem, results), *_notes(problem, max(result.shots for result in results)))
        made.append(Sheet(problem.name, results, told, figures))
        if not problem.shifted:
            averaged.append(made[-1])
    return [*made, _mean(averaged)] if len(averaged) > 1 else made


def _results(groups: Sequence[Group], found: Mapping[str, Draw]) -> tuple[Result, ...]:
    draws: dict[tuple[str, str, int], list[Draw]] = {}
    for group in groups:
        for cell in group.cells:
            draws.setdefault((cell.method, cell.reducer, cell.shots), []).append(found[cell.key])
    return tuple(
        Result(groups[0].problem.name, method, reducer, shots, tuple(made))
        for (method, reducer, shots), made in draws.items()
    )


def _notes(problem: Problem, most: int) -> list[str]:
    layout = getattr(problem.target, "layout", "")
    notes = [f"split: {layout}"] if layout else []
    if problem.shifted:
        notes.append(
            f"a shift of domain: support from {problem.source.name}, {len(problem.classes)} of its "
            f"{len(problem.source.class_names)} classes"
        )
    few = int((problem.available < most).sum())
    if few:
        notes.append(
            f"{few} of {len(problem.classes)} classes have fewer than {most} images to draw from "
            f"({problem.available.min()} and more) and give all that they have"
        )
    if not problem.validated:
        notes.append(
            f"{problem.source.name} has no validation split: leave-one-out on the support set in its place"
            + (" (the papers' public code chooses on the test images)" if problem.source.name == "imagenet" else "")
        )
    return notes


def _mean(made: Sequence[Sheet]) -> Sheet:
    """Of each seed the mean over the sets, so that the spread is that of a mean; sets count alike."""
    results, figures = [], []
    for several in zip(*(sheet.results for sheet in made), strict=True):
        draws = tuple(
            replace(first, accuracy=float(np.mean([draw.accuracy for draw in (first, *others)])))
            for first, *others in zip(*(result.draws for result in several), strict=True)
        )
        results.append(replace(several[0], source=MEAN, draws=draws))
    for cells in zip(*(sheet.figures for sheet in made), strict=True):
        figures.append(_mean_figures(cells))
    names = ", ".join(sheet.name for sheet in made)
    return Sheet(MEAN, tuple(results), (f"mean over {len(made)} data sets ({names}), in %",), tuple(figures))


def _mean_figures(cells: Sequence[tuple[Figure, ...]]) -> tuple[Figure, ...]:
    """A source's mean, where it has a figure for every set."""
    by_source = [{(figure.paper, figure.where): figure for figure in cell} for cell in cells]
    common = [source for source in by_source[0] if all(source in found for found in by_source)]
    return tuple(
        replace(by_source[0][source], value=float(np.mean([found[source].value for found in by_source])))
        for source in common
    )


def difference(result: Result, figure: Figure) -> float:
    """In points: above 0 where the result is the higher one."""
    return 100 * result.mean - figure.value


def lines(sheet: Sheet) -> tuple[list[str], list[list[str]]]:
    """Heads and rows; a method that figures are known of has a second row with them and the difference in points."""
    heads = ["method", "reducer", *(f"{k} shot{'' if k == 1 else 's'}" for k in sheet.shots)]
    rows: list[list[str]] = []
    for name in dict.fromkeys((result.method, result.reducer) for result in sheet.results):
        cells = {
            result.shots: (result, figures)
            for result, figures in zip(sheet.results, sheet.figures, strict=True)
            if (result.method, result.reducer) == name
        }
        rows.append([*name, *(_percent(cells[k][0], sheet) for k in sheet.shots)])
        if any(figures for _, figures in cells.values()):
            told = [" / ".join(f"{f.value:.1f} ({difference(r, f):+.1f})" for f in fs) for r, fs in cells.values()]
            rows.append(["  published", "", *(cell or "not at hand" for cell in told)])
    return heads, rows


def _percent(result: Result, sheet: Sheet) -> str:
    # A binomial standard error is that of one set's images: the mean over sets has none.
    if sheet.name == MEAN and result.std is None:
        return f"{100 * result.mean:.1f}"
    return table.percent(result.mean, result.spread)


def about_published(made: Sequence[Sheet], weights: Weights) -> list[str]:
    """What was compared with what, source by source, and what was not at hand."""
    used = dict.fromkeys((f.paper, f.where, f.url, f.note) for s in made for figures in s.figures for f in figures)
    told = [f"published: {paper}, {where}{f'; {note}' if note else ''}: {url}" for paper, where, url, note in used]
    if used:
        told.append("Splits, prompts and draws may differ from the papers'. In parentheses: points above them.")
    if weights.model == DEMO:
        return [*told, "No paper has figures of the demo's CLIP."]
    if not any(ARXIV in f"{paper} {url}" for paper, _, url, _ in used):
        told.append(f"The figures of {PAPER} are not at hand; --published FILE adds some.")
    if weights.pretrained is None or Path(weights.pretrained).suffix:
        told.append("Weights of a file are compared with no published figure: only a tag says which they are.")
    return told


def print_sheets(out: Console, made: Sequence[Sheet], weights: Weights) -> None:
    for sheet in made:
        for told in sheet.told:
            out.print(told, soft_wrap=True)
        heads, rows = lines(sheet)
        drawn = Table(*heads)
        for column in drawn.columns[2:]:
            column.justify = "right"
        for row in rows:
            drawn.add_row(*row)
        out.print(drawn)
    for told in about_published(made, weights):
        out.print(told, soft_wrap=True)


def rows_of(made: Sequence[Sheet], facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row a data set, method, reducer and shots, JSON-ready, as tools/evaluate.py's, with the figures beside it."""
    common = table.facts(PACKAGES)
    rows = []
    for sheet in made:
        if sheet.name == MEAN:
            continue
        for result, figures in zip(sheet.results, sheet.figures, strict=True):
            compared = [{**vars(figure), "difference": round(difference(result, figure), 3)} for figure in figures]
            rows.append({**result.row(), "published": compared, **facts, **common})
    return rows


def write_markdown(path: Path, made: Sequence[Sheet], weights: Weights, facts: Mapping[str, Any]) -> None:
    """The tables as they are printed."""
    common = table.facts(PACKAGES)
    told = "; ".join(f"{name} {value}" for name, value in {**facts, **common["versions"]}.items())
    text = [f"{common['device']}; {told}; {common['commit']}"]
    for sheet in made:
        text += ["", f"## {sheet.name}", "", *sheet.told, "", *table.markdown(*lines(sheet))]
    text += ["", *(f"- {line}" for line in about_published(made, weights))]
    path.write_text("\n".join(text) + "\n", encoding="utf-8")
