"""Cells of a run: listed with all that they depend on, computed if they are missing, one task for all its methods.

The protocol (Kravets & Namboodiri, BMVC 2024, and Tip-Adapter's, whose code theirs starts from): support is `shots`
random training images of each class (Problem.support); a key is the mean of `views` random views of its image; queries
are all test images, in one view. Parameters are chosen on the validation split or, without one, by leave-one-out on the
support, whose images are then queried in one view. No test image or label has a part in that.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from typing import Any

import numpy as np

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.evaluation.accuracy import Draw, TuneOn, evaluate_draw
from iosr_fast.evaluation.paper import cells as cells_module
from iosr_fast.evaluation.paper.cells import Cell, Cells
from iosr_fast.evaluation.paper.problems import Problem
from iosr_fast.evaluation.paper.store import Store, Wanted
from iosr_fast.evaluation.rivals import RIVALS
from iosr_fast.evaluation.tasks import Task
from iosr_fast.methods.support_set import make_support_set
from iosr_fast.utils.machine import package_version

Rows = Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Views:
    """How an image becomes a key."""

    count: int = 10
    mirror: bool = True


@dataclass(frozen=True, eq=False)
class Group:
    """The cells of one problem, number of shots and seed: they share a task."""

    problem: Problem
    shots: int
    seed: int
    views: Views
    cells: tuple[Cell, ...] = ()

    @property
    def tune_on(self) -> TuneOn:
        return "validation" if self.problem.validated else "loo"

    @cached_property
    def keys(self) -> list[Wanted]:
        """The support images in several views, by the number of images of their class drawn before them."""
        return self._support(self.views.count, self.views.mirror)

    @cached_property
    def single_views(self) -> list[Wanted]:
        """The support images in one view, for leave-one-out; empty if it isn't used, or keys are one view as well."""
        return self._support(1, False) if self.tune_on == "loo" and self.views.count > 1 else []

    @cached_property
    def queries(self) -> list[Wanted]:
        return [Wanted(self.problem.target, "test", self.problem.queries(self.seed))]

    @cached_property
    def validation(self) -> list[Wanted]:
        if not self.problem.validated:
            return []
        labels = self.problem.labels_of(self.problem.source.splits["val"].labels)
        return [Wanted(self.problem.source, "val", np.flatnonzero(labels >= 0))]

    @property
    def wanted(self) -> list[Wanted]:
        return [*self.keys, *self.single_views, *self.queries, *self.validation]

    def _support(self, views: int, mirror: bool) -> list[Wanted]:
        drawn = self.problem.support(self.shots, self.seed)
        return [Wanted(self.problem.source, "train", rows, views, mirror, self.seed) for rows in drawn]


def plan(
    problems: Sequence[Problem], rows: Rows, shots: Sequence[int], seeds: Sequence[int], views: Views, store: Store
) -> list[Group]:
    """Every cell, by problem, seed and shots. Nothing is encoded: keys follow from what embeddings depend on."""
    groups = []
    for problem, seed, k in product(problems, seeds, sorted(shots)):
        group = Group(problem, k, seed, views)
        facts = {
            "version": cells_module.VERSION,
            "iosr_fast": package_version("iosr_fast"),
            "keys": _facts(problem, group.keys, store),
            "asked": _facts(problem, group.single_views, store),
            "queries": _facts(problem, group.queries, store),
            "validation": _facts(problem, group.validation, store) if group.validation else None,
            "text": store.text_key(problem.target),
            "tau": store.model.clip.logit_scale,
            "tune": group.tune_on,
        }
        rival_facts = {**facts, "scikit-learn": package_version("scikit-learn")}
        cells = tuple(
            Cell(problem.name, method, reducer, k, seed, rival_facts if method in RIVALS else facts)
            for method, reducer in rows
        )
        groups.append(replace(group, cells=cells))
    return groups


def _facts(problem: Problem, wanted: Sequence[Wanted], store: Store) -> list[Any]:
    """The parts' keys, and a hash of the labels that belong to them."""
    labels = b" ".join(_labels(problem, one).astype("<i8").tobytes() for one in wanted)
    return [*(key for one in wanted for key in store.keys(one)), hashlib.sha256(labels).hexdigest()]


def _labels(problem: Problem, wanted: Wanted) -> np.ndarray:
    labels = np.asarray(wanted.data.splits[wanted.split].labels)[wanted.rows]
    return labels if wanted.split == "test" else problem.labels_of(labels)


def make_task(group: Group, store: Store) -> Task:
    """Read or encode what the group's cells need."""
    problem = group.problem

    def gather(wanted: Sequence[Wanted]) -> tuple[Embeddings, np.ndarray]:
        """Embeddings and labels, without images of classes that the target has not."""
        embeddings = Embeddings.concatenate([store.embeddings(one) for one in wanted])
        labels = np.concatenate([_labels(problem, one) for one in wanted])
        return embeddings[labels >= 0], labels[labels >= 0]

    keys, labels = gather(group.keys)
    queries = gather(group.single_views)[0] if group.single_views else None
    text = store.text(problem.target)
    support = make_support_set(keys, labels, text, store.model.clip.logit_scale, queries=queries)
    return Task(support, *gather(group.queries), gather(group.validation) if group.validation else None)


def to_encode(groups: Sequence[Group], store: Store) -> int:
    """Views still to be encoded."""
    views: dict[str, int] = {}
    for group in groups:
        for wanted in group.wanted:
            for part in wanted.parts():
                views[store.keys(part)[0]] = store.missing(part) * part.views
    return sum(views.values())


def compute(
    groups: Sequence[Group], store: Store, cells: Cells, done: Callable[[Cell], None] = lambda _: None
) -> dict[str, Draw]:
    """The outcome of every cell by its key: read if it is stored, else computed and written at once."""
    draws: dict[str, Draw] = {}
    for group in groups:
        task = None
        for cell in group.cells:
            draw = cells.read(cell)
            if draw is None:
                task = make_task(group, store) if task is None else task
                draw = evaluate_draw(task, cell.method, cell.reducer, group.tune_on, cell.seed)
                cells.write(cell, draw)
            draws[cell.key] = draw
            done(cell)
    return draws
