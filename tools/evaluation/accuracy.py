"""Every method on every task of a source: parameters chosen without its test images, then one test accuracy a task."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from iosr_fast.methods import METHODS, unavailable_reason
from iosr_fast.methods.tuning.tune import Tuned, tune
from iosr_fast.scoring.plan import ScoringPlan
from iosr_fast.scoring.reducers import fit_reducer
from iosr_fast.scoring.score import score
from tools.evaluation.tasks import Source, Task

AUTO = "auto"
Tune = Literal["validation", "loo"]
TUNED_ON = {
    "validation": "validation images",
    "loo": "leave-one-out on the support set",
    "one-shot": "nothing: one image a class, a rule of thumb",
    "none": "nothing to choose",
}


@dataclass(frozen=True)
class Draw:
    """One task's outcome. `images` and `classes` are its test's; `accuracy` is on them."""

    seed: int
    accuracy: float
    images: int
    classes: int
    tuned: Tuned
    fit_seconds: float


@dataclass(frozen=True)
class Result:
    """One row: a method and a reducer at one number of shots, over all draws of a source."""

    source: str
    method: str
    reducer: str
    shots: int
    draws: tuple[Draw, ...] = field(repr=False)

    @property
    def name(self) -> str:
        return label(self.method, self.reducer)

    @property
    def told(self) -> str:
        return f"{self.name}, shots {self.shots}: {100 * self.mean:.1f} ± {100 * self.spread:.1f}"

    @property
    def mean(self) -> float:
        return float(np.mean([draw.accuracy for draw in self.draws]))

    @property
    def std(self) -> float | None:
        """Over seeds; None for a single draw."""
        return float(np.std([draw.accuracy for draw in self.draws], ddof=1)) if len(self.draws) > 1 else None

    @property
    def se(self) -> float | None:
        """The binomial standard error of a single draw's accuracy; None for several draws, which have a std."""
        if len(self.draws) > 1:
            return None
        return math.sqrt(self.mean * (1 - self.mean) / self.draws[0].images)

    @property
    def spread(self) -> float:
        found = self.se if self.std is None else self.std
        assert found is not None
        return found

    @property
    def protocol(self) -> str:
        """What the parameters were chosen on (TUNED_ON); every draw of a row has the same."""
        return "none" if self.method == "zero-shot" else self.draws[0].tuned.protocol

    def row(self) -> dict[str, Any]:
        """JSON-ready; what lies in lists has an entry a seed."""
        return {
            "bench": "accuracy",
            "data": self.source,
            "method": self.method,
            "reducer": self.reducer,
            "shots": self.shots,
            "mean": self.mean,
            "std": self.std,
            "se": self.se,
            "accuracies": [draw.accuracy for draw in self.draws],
            "test_images": [draw.images for draw in self.draws],
            "classes": [draw.classes for draw in self.draws],
            "seeds": [draw.seed for draw in self.draws],
            "tuned_on": self.protocol,
            "tuned_images": [draw.tuned.scored for draw in self.draws],
            "tuned_accuracy": [finite(draw.tuned.accuracy) for draw in self.draws],
            "chosen": [label(draw.tuned.method, draw.tuned.reducer) for draw in self.draws],
            "parameters": [draw.tuned.parameters for draw in self.draws],
            "tune_seconds": [round(draw.tuned.seconds, 4) for draw in self.draws],
            "fit_seconds": [round(draw.fit_seconds, 4) for draw in self.draws],
        }


def label(method: str, reducer: str) -> str:
    return method if reducer in ("none", AUTO) else f"{method}, {reducer}"


def finite(value: float) -> float | None:
    """JSON has no NaN."""
    return float(value) if math.isfinite(value) else None


def choose_rows(methods: Sequence[str], reducers: Sequence[str], task: Task) -> tuple[list[tuple[str, str]], list[str]]:
    """(method, reducer) of every row, and why methods were left out. "all" stands for every method and auto.

    auto chooses its reducer, so that it has one row, with the reducer "auto"; zero-shot has none to choose.

    Raises ValueError for an unknown method or reducer, or where the data allows none.
    """
    names = list(dict.fromkeys([*METHODS, AUTO] if "all" in methods else methods))
    if unknown := [name for name in names if name != AUTO and name not in METHODS]:
        raise ValueError(f"expected methods of all, {AUTO}, {', '.join(METHODS)}, got {', '.join(unknown)}")
    for reducer in reducers:
        fit_reducer(reducer, task.support.embeddings.plain)
    told = {name: unavailable_reason(name, task.support) for name in names if name != AUTO}
    rows = [
        (name, reducer)
        for name in names
        if told.get(name) is None
        for reducer in ([AUTO] if name == AUTO else reducers if METHODS[name].needs_support else ["none"])
    ]
    left_out = [why for why in told.values() if why is not None]
    if not rows:
        raise ValueError(f"expected a method that the data allows, got none: {'; '.join(left_out)}")
    return list(dict.fromkeys(rows)), left_out


def default_tuning(task: Task, asked: Tune | None) -> Tune:
    """`asked`, or validation where there is a validation set, or else leave-one-out."""
    if asked == "validation" and task.validation is None:
        raise ValueError("expected data with a validation set for --tune validation, got none; use --tune loo")
    return asked or ("loo" if task.validation is None else "validation")


def choose(task: Task, method: str, reducer: str, tune_on: Tune) -> Tuned:
    """Parameters by what the task has for fitting; "auto" sees the support set alone."""
    if tune_on == "validation" and method != AUTO:
        assert task.validation is not None
        return tune(method, task.support, *task.validation, reducer=reducer)
    return tune(method, task.support, reducer=reducer)


def accuracy_of(plan: ScoringPlan, task: Task) -> float:
    """The share of the task's queries whose label is the first of the highest logits."""
    return float((score(plan, task.queries).argmax(1) == task.labels).mean())


def evaluate_draw(task: Task, method: str, reducer: str, tune_on: Tune, seed: int) -> Draw:
    tuned = choose(task, method, reducer, tune_on)
    started = time.perf_counter()
    plan = tuned.compile(task.support)
    fit_seconds = time.perf_counter() - started
    return Draw(seed, accuracy_of(plan, task), len(task.queries), task.support.n_classes, tuned, fit_seconds)


def evaluate(
    source: Source,
    rows: Iterable[tuple[str, str]],
    tune_on: Tune,
    report: Callable[[Result], None] | None = None,
) -> list[Result]:
    """A Result for each (method, reducer) and number of shots; `report` is told of each as it comes."""
    made = []
    for method, reducer in rows:
        for shots in source.shots:
            draws = tuple(
                evaluate_draw(source.draw(shots, seed), method, reducer, tune_on, seed) for seed in source.seeds
            )
            made.append(Result(source.name, method, reducer, shots, draws))
            if report is not None:
                report(made[-1])
    return made
