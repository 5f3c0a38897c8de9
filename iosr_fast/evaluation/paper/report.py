"""The sheets of a run: one for each data set and one for their mean, beside what was published."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from iosr_fast.evaluation.accuracy import Draw, Result
from iosr_fast.evaluation.paper.cells import LOSSES
from iosr_fast.evaluation.paper.problems import DEMO, Problem
from iosr_fast.evaluation.paper.published import ARXIV, PAPER, Figure, Published, comparable
from iosr_fast.evaluation.paper.run import Group
from iosr_fast.evaluation.table import MEAN, Sheet, header


class Weights(NamedTuple):
    """The CLIP by model and tag, to which published figures belong; a file's weights have none."""

    model: str
    pretrained: str | None


def sheets(groups: Sequence[Group], draws: Mapping[str, Draw], published: Published, weights: Weights) -> list[Sheet]:
    """A sheet for each problem, and their mean if several are not shifted. Shifted sets are left out of it."""
    by_problem, averaged = [], []
    for problem in dict.fromkeys(group.problem for group in groups):
        by_row: dict[tuple[str, str, int], list[Draw]] = {}
        for cell in (cell for group in groups if group.problem is problem for cell in group.cells):
            by_row.setdefault((cell.method, cell.reducer, cell.shots), []).append(draws[cell.key])
        results = tuple(
            Result(problem.name, *row, tuple(of_row), comparable(published, problem.name, *row, *weights))
            for row, of_row in by_row.items()
        )
        notes = (header(problem.name, results), *_notes(problem, max(result.shots for result in results)))
        by_problem.append(Sheet(problem.name, results, notes))
        if not problem.shifted:
            averaged.append(by_problem[-1])
    return [*by_problem, _mean(averaged)] if len(averaged) > 1 else by_problem


def _notes(problem: Problem, most: int) -> list[str]:
    notes = [f"split: {problem.target.layout}"] if problem.target.layout else []
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


def _mean(sheets: Sequence[Sheet]) -> Sheet:
    """For each seed the mean over the sets, so that the spread is that of a mean; every set has the same weight."""
    results = []
    for several in zip(*(sheet.results for sheet in sheets), strict=True):
        draws = tuple(
            replace(
                of_seed[0],
                **{name: float(np.mean([getattr(draw, name) for draw in of_seed])) for name in ("accuracy", *LOSSES)},
            )
            for of_seed in zip(*(result.draws for result in several), strict=True)
        )
        figures = _mean_figures([result.published or () for result in several])
        results.append(replace(several[0], source=MEAN, draws=draws, published=figures))
    names = ", ".join(sheet.name for sheet in sheets)
    return Sheet(MEAN, tuple(results), (f"mean over {len(sheets)} data sets ({names}), in %",))


def _mean_figures(cells: Sequence[tuple[Figure, ...]]) -> tuple[Figure, ...]:
    """The mean of each source that has a figure for every set."""
    by_source = [{(figure.paper, figure.where): figure for figure in cell} for cell in cells]
    common = [source for source in by_source[0] if all(source in figures for figures in by_source)]
    return tuple(
        replace(by_source[0][source], value=float(np.mean([figures[source].value for figures in by_source])))
        for source in common
    )


def footer(sheets: Sequence[Sheet], weights: Weights) -> list[str]:
    """The sources of the published figures, and which were not at hand."""
    used = dict.fromkeys(
        (f.paper, f.where, f.url, f.note) for s in sheets for r in s.results for f in r.published or ()
    )
    lines = [f"published: {paper}, {where}{f'; {note}' if note else ''}: {url}" for paper, where, url, note in used]
    if used:
        lines.append("Splits, prompts and draws may differ from the papers'. In parentheses: points above them.")
    if weights.model == DEMO:
        return [*lines, "No paper has figures of the demo's CLIP."]
    if not any(ARXIV in f"{paper} {url}" for paper, _, url, _ in used):
        lines.append(f"The figures of {PAPER} are not at hand; --published FILE adds some.")
    if weights.pretrained is None or Path(weights.pretrained).suffix:
        lines.append("Weights of a file are compared with no published figure: only a tag says which they are.")
    return lines
