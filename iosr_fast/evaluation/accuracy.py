"""Every method on every task of a source: parameters chosen without its test images, then one test accuracy a task."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from iosr_fast.evaluation.calibration import measure
from iosr_fast.evaluation.rivals import RIVALS, fit_rival, score_rival
from iosr_fast.evaluation.selection import TuneOn, why_unavailable
from iosr_fast.evaluation.tasks import Source, Task
from iosr_fast.methods import METHODS
from iosr_fast.methods.tuning.tune import AUTO, tune
from iosr_fast.methods.tuning.tuned import Tuned
from iosr_fast.scoring.score import score

TUNED_ON = {
    "validation": "validation images",
    "loo": "leave-one-out on the support set",
    "one-shot": "nothing: one image a class, a rule of thumb",
    "cross-validation": "cross-validation on the support set (scikit-learn's)",
    "none": "nothing to choose",
}


@dataclass(frozen=True)
class Figure:
    """A published accuracy in percent. `note` names known differences from the protocol here."""

    value: float
    paper: str
    url: str
    where: str
    note: str = ""


@dataclass(frozen=True)
class Draw:
    """One task's outcome. `images` and `classes` are its test's; the scores are on them (calibration.Scores).

    `log_loss` and `calibration_error` are NaN for a classifier without probabilities.
    """

    seed: int
    accuracy: float
    images: int
    classes: int
    tuned: Tuned
    fit_seconds: float
    log_loss: float = math.nan
    calibration_error: float = math.nan


@dataclass(frozen=True)
class Result:
    """One row: a method and a reducer at one number of shots, over all draws of a source.

    `published` are the comparable figures; None where none are looked for.
    """

    source: str
    method: str
    reducer: str
    shots: int
    draws: tuple[Draw, ...] = field(repr=False)
    published: tuple[Figure, ...] | None = None

    @property
    def summary(self) -> str:
        accuracy = f"{100 * self.mean:.1f} ± {100 * self.spread:.1f}"
        return f"{label(self.method, self.reducer)}, shots {self.shots}: {accuracy}"

    @property
    def mean(self) -> float:
        return float(np.mean([draw.accuracy for draw in self.draws]))

    @property
    def log_loss(self) -> float:
        return float(np.mean([draw.log_loss for draw in self.draws]))

    @property
    def calibration_error(self) -> float:
        return float(np.mean([draw.calibration_error for draw in self.draws]))

    @property
    def tune_seconds(self) -> float:
        return float(np.mean([draw.tuned.seconds for draw in self.draws]))

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
        spread = self.se if self.std is None else self.std
        assert spread is not None
        return spread

    @property
    def protocol(self) -> str:
        """A key of TUNED_ON; every draw of a row has the same."""
        entry = METHODS.get(self.method)
        return self.draws[0].tuned.protocol if entry is None or entry.needs_support else "none"

    @property
    def compared(self) -> list[tuple[Figure, float]]:
        """The published figures, and by how many points the mean exceeds each."""
        return [(figure, 100 * self.mean - figure.value) for figure in self.published or ()]

    def row(self) -> dict[str, Any]:
        """JSON-ready; a list has an entry a seed."""
        published = [{**vars(figure), "difference": round(points, 3)} for figure, points in self.compared]
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
            "log_loss": finite(self.log_loss),
            "log_losses": [finite(draw.log_loss) for draw in self.draws],
            "calibration_error": finite(self.calibration_error),
            "calibration_errors": [finite(draw.calibration_error) for draw in self.draws],
            "test_images": [draw.images for draw in self.draws],
            "classes": [draw.classes for draw in self.draws],
            "seeds": [draw.seed for draw in self.draws],
            "tuned_on": self.protocol,
            "tuned_images": [draw.tuned.scored for draw in self.draws],
            "tuned_accuracy": [finite(draw.tuned.accuracy) for draw in self.draws],
            "chosen": [label(draw.tuned.method, draw.tuned.reducer) for draw in self.draws],
            "parameters": [draw.tuned.parameters for draw in self.draws],
            "shares": [dict(draw.tuned.shares) for draw in self.draws],
            "factors": [draw.tuned.factor for draw in self.draws],
            "tune_seconds": [round(draw.tuned.seconds, 4) for draw in self.draws],
            "fit_seconds": [round(draw.fit_seconds, 4) for draw in self.draws],
            **({} if self.published is None else {"published": published}),
        }


def label(method: str, reducer: str) -> str:
    return method if reducer in ("none", AUTO) else f"{method}, {reducer}"


def finite(value: float) -> float | None:
    """JSON has no NaN."""
    return float(value) if math.isfinite(value) else None


def evaluate_draw(task: Task, method: str, reducer: str, tune_on: TuneOn, seed: int) -> Draw:
    """Parameters by what the task has for fitting ("auto" sees the support set alone), then the scores on its test."""
    fit_seconds = 0.0
    if method in RIVALS:
        estimator, tuned = fit_rival(method, task.support, seed)
        scores = score_rival(method, estimator, task.queries, task.labels)
    else:
        tuned = tune_draw(task, method, reducer, tune_on)
        started = time.perf_counter()
        plan = tuned.compile(task.support)
        fit_seconds = time.perf_counter() - started
        scores = measure(score(plan, task.queries), task.labels)
    images, classes = len(task.queries), task.support.n_classes
    losses = (scores.log_loss, scores.calibration_error)
    return Draw(seed, scores.accuracy, images, classes, tuned, fit_seconds, *losses)


def tune_draw(task: Task, method: str, reducer: str, tune_on: TuneOn) -> Tuned:
    """The method's parameters; "auto" sees the support set alone."""
    validated = tune_on == "validation" and method != AUTO
    queries, labels = task.validation if validated and task.validation is not None else (None, None)
    return tune(method, task.support, queries, labels, reducer)


def evaluate(
    source: Source,
    rows: Iterable[tuple[str, str]],
    tune_on: TuneOn,
    report: Callable[[Result], None] = lambda _: None,
) -> list[Result]:
    """A Result for each (method, reducer) and number of shots; `report` is called with each as soon as it is known.

    scikit-learn's classifiers have none for shots that they can't be fitted on.
    """
    results = []
    for method, reducer in rows:
        for shots in source.shots:
            tasks = [source.draw(shots, seed) for seed in source.seeds]
            if method in RIVALS and any(why_unavailable(method, task) for task in tasks):
                continue
            draws = tuple(
                evaluate_draw(task, method, reducer, tune_on, seed)
                for task, seed in zip(tasks, source.seeds, strict=True)
            )
            results.append(Result(source.name, method, reducer, shots, draws))
            report(results[-1])
    return results
