"""Cells of a run: listed with all that they depend on, computed where they are missing, one task for all its methods.

The protocol (Kravets & Namboodiri, BMVC 2024, and Tip-Adapter's, whose code theirs starts from): support is `shots`
random training images of each class (problems.Problem.support); a key is the mean of `views` random views of its image;
queries are all test images, in one view. Parameters are chosen on the validation split where there is one, else by
leave-one-out on the support, whose images are then asked in one view. No test image or label has a part in that.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.methods.support_set import make_support_set
from iosr_fast.utils.machine import package_version
from tools.evaluation.accuracy import Draw, Tune, evaluate_draw
from tools.evaluation.tasks import Task
from tools.reproduction import cells as cells_module
from tools.reproduction.cells import Cell, Cells
from tools.reproduction.problems import Problem
from tools.reproduction.store import Store, Wanted

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
    cells: tuple[Cell, ...]

    @property
    def tune_on(self) -> Tune:
        return tune_on(self.problem)

    def keys(self) -> list[Wanted]:
        """Of the support's images, by how many of their class were drawn before them."""
        return self._support(self.views.count, self.views.mirror)

    def asked(self) -> list[Wanted]:
        """The same in one view, which leave-one-out asks; none where it isn't needed, or keys are one view as well."""
        if self.tune_on != "loo" or self.views.count == 1:
            return []
        return self._support(1, False)

    def queries(self) -> Wanted:
        return Wanted(self.problem.target, "test", self._asked_rows)

    def validation(self) -> Wanted | None:
        if not self.problem.validated:
            return None
        labels = self.problem.labels_of(self.problem.source.splits["val"].labels)
        return Wanted(self.problem.source, "val", np.flatnonzero(labels >= 0))

    def wanted(self) -> list[Wanted]:
        validation = self.validation()
        return [*self.keys(), *self.asked(), self.queries(), *([] if validation is None else [validation])]

    def _support(self, views: int, mirror: bool) -> list[Wanted]:
        return [Wanted(self.problem.source, "train", rows, views, mirror, self.seed) for rows in self._drawn]

    @cached_property
    def _drawn(self) -> list[np.ndarray]:
        return self.problem.support(self.shots, self.seed)

    @cached_property
    def _asked_rows(self) -> np.ndarray:
        return self.problem.queries(self.seed)


def tune_on(problem: Problem) -> Tune:
    return "validation" if problem.validated else "loo"


def plan(
    problems: Sequence[Problem], rows: Rows, shots: Sequence[int], seeds: Sequence[int], views: Views, store: Store
) -> list[Group]:
    """Every cell, by problem, seed and shots. Nothing is encoded: keys follow from what embeddings depend on."""
    return [
        _group(problem, rows, k, seed, views, store) for problem in problems for seed in seeds for k in sorted(shots)
    ]


def _group(problem: Problem, rows: Rows, shots: int, seed: int, views: Views, store: Store) -> Group:
    bare = Group(problem, shots, seed, views, ())
    validation = bare.validation()
    facts = {
        "version": cells_module.VERSION,
        "iosr_fast": package_version("iosr_fast"),
        "keys": _facts(problem, bare.keys(), store),
        "asked": _facts(problem, bare.asked(), store),
        "queries": _facts(problem, [bare.queries()], store),
        "validation": None if validation is None else _facts(problem, [validation], store),
        "text": store.text_key(problem.target),
        "tau": store.model.clip.logit_scale,
        "tune": bare.tune_on,
    }
    made = tuple(Cell(problem.name, method, reducer, shots, seed, facts) for method, reducer in rows)
    return Group(problem, shots, seed, views, made)


def _facts(problem: Problem, wanted: Sequence[Wanted], store: Store) -> list[Any]:
    """The parts' keys, and a hash of the labels that go with them."""
    labels = [_labels(problem, one) for one in wanted]
    told = hashlib.sha256(b" ".join(part.astype("<i8").tobytes() for part in labels)).hexdigest()
    return [*(key for one in wanted for key in store.keys(one)), told]


def _labels(problem: Problem, wanted: Wanted) -> np.ndarray:
    labels = np.asarray(wanted.data.splits[wanted.split].labels)[wanted.rows]
    return labels if wanted.split == "test" else problem.labels_of(labels)


def make_task(group: Group, store: Store) -> Task:
    """Read or encode what the group's cells need."""
    problem, validation = group.problem, group.validation()
    keys, labels = _gather(problem, group.keys(), store)
    asked = _gather(problem, group.asked(), store)[0] if group.asked() else None
    queries, query_labels = _gather(problem, [group.queries()], store)
    text = store.text(problem.target)
    support = make_support_set(keys, labels, text, store.model.clip.logit_scale, queries=asked)
    held = None if validation is None else _gather(problem, [validation], store)
    return Task(support, queries, query_labels, held)


def _gather(problem: Problem, wanted: Sequence[Wanted], store: Store) -> tuple[Embeddings, np.ndarray]:
    """Embeddings and labels, without images of classes that are not asked about."""
    parts = [store.embeddings(one) for one in wanted]
    labels = np.concatenate([_labels(problem, one) for one in wanted])
    adapted = [part.adapted for part in parts if part.adapted is not None]
    whole = Embeddings(np.concatenate([p.plain for p in parts]), np.concatenate(adapted) if adapted else None)
    kept = labels >= 0
    return whole[kept], labels[kept]


def to_encode(groups: Sequence[Group], store: Store) -> int:
    """Views still to be encoded."""
    found: dict[str, int] = {}
    for group in groups:
        for wanted in group.wanted():
            for part in wanted.parts():
                found[store.keys(part)[0]] = store.missing(part) * part.views
    return sum(found.values())


def compute(
    groups: Sequence[Group], store: Store, cells: Cells, done: Callable[[Cell, Draw], None] = lambda *_: None
) -> dict[str, Draw]:
    """The outcome of every cell by its key: read where it is there, else computed and written at once."""
    found: dict[str, Draw] = {}
    last: Problem | None = None
    for group in groups:
        if last is not None and group.problem is not last:
            store.forget()
        last, task = group.problem, None
        for cell in group.cells:
            draw = cells.read(cell)
            if draw is None:
                task = make_task(group, store) if task is None else task
                draw = evaluate_draw(task, cell.method, cell.reducer, group.tune_on, cell.seed)
                cells.write(cell, draw)
            found[cell.key] = draw
            done(cell, draw)
    return found
