"""Methods on the tasks of a data set: parameters chosen without its test images, then one test accuracy a task."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from iosr_fast.evaluation.rivals import DEFAULT_RIVALS, RIVALS, fit_rival, rival_unavailable_reason, score_rival
from iosr_fast.evaluation.tasks import Task, TaskSource
from iosr_fast.exceptions import IosrFastError
from iosr_fast.methods import METHODS
from iosr_fast.methods.config import AUTO, Config, Evidence
from iosr_fast.methods.conformal import of_logits
from iosr_fast.methods.tune import tune
from iosr_fast.scoring.reducers import check_reducer
from iosr_fast.scoring.score import score

# Words of --methods that stand for several.
GROUPS = {"all": (*METHODS, AUTO, *DEFAULT_RIVALS), "scikit-learn": tuple(RIVALS)}
TUNED_ON = {
    "validation": "validation images",
    "loo": "leave-one-out on the support set",
    "one-shot": "no image where a class has one (a rule of thumb)",
    "cross-validation": "cross-validation on the support set (scikit-learn's)",
    "none": "nothing to choose",
}
Pair = tuple[str, str]  # method and reducer


@dataclass(frozen=True)
class Draw:
    """One task's outcome. `images` and `classes` are its test's; the scores are on them (conformal.Reliability).

    `log_loss` and `calibration_error` are None for a classifier without probabilities.
    """

    seed: int
    accuracy: float
    images: int
    classes: int
    config: Config
    fit_seconds: float
    log_loss: float | None = None
    calibration_error: float | None = None

    @property
    def evidence(self) -> Evidence:
        """What was known of the config without the test; empty where nothing was searched."""
        return self.config.evidence or Evidence()


@dataclass(frozen=True)
class Result:
    """One row: a method and a reducer at one number of shots, over all draws of a source."""

    source: str
    method: str
    reducer: str
    shots: int
    draws: tuple[Draw, ...] = field(repr=False)

    def average(self, name: str) -> float | None:
        """The mean of a field of the draws; None where a draw has none."""
        values = [getattr(draw, name) for draw in self.draws]
        return None if None in values else float(np.mean(values))

    @property
    def mean(self) -> float:
        return float(np.mean([draw.accuracy for draw in self.draws]))

    @property
    def spread(self) -> float:
        """The standard deviation (std) over seeds, or of a single draw the binomial standard error (se)."""
        if len(self.draws) > 1:
            return float(np.std([draw.accuracy for draw in self.draws], ddof=1))
        return math.sqrt(self.mean * (1 - self.mean) / self.draws[0].images)

    @property
    def protocol(self) -> str:
        """A key of TUNED_ON; every draw of a row has the same."""
        entry = METHODS.get(self.method)
        return self.draws[0].evidence.protocol if entry is None or entry.needs_support else "none"

    def row(self) -> dict[str, Any]:
        """JSON-ready; a list has an entry a seed."""
        several = len(self.draws) > 1
        return {
            "bench": "accuracy",
            "data": self.source,
            "method": self.method,
            "reducer": self.reducer,
            "shots": self.shots,
            "mean": self.mean,
            "std": self.spread if several else None,
            "se": None if several else self.spread,
            "accuracies": [draw.accuracy for draw in self.draws],
            "log_loss": self.average("log_loss"),
            "log_losses": [draw.log_loss for draw in self.draws],
            "calibration_error": self.average("calibration_error"),
            "calibration_errors": [draw.calibration_error for draw in self.draws],
            "test_images": [draw.images for draw in self.draws],
            "classes": [draw.classes for draw in self.draws],
            "seeds": [draw.seed for draw in self.draws],
            "tuned_on": self.protocol,
            "tuned_images": [draw.evidence.scored for draw in self.draws],
            "tuned_accuracy": [draw.evidence.accuracy for draw in self.draws],
            "chosen": [label(draw.config.method, draw.config.reducer) for draw in self.draws],
            "parameters": [draw.config.parameters for draw in self.draws],
            "shares": [dict(draw.evidence.shares) for draw in self.draws],
            "factors": [draw.config.factor for draw in self.draws],
            "tune_seconds": [round(draw.evidence.seconds, 4) for draw in self.draws],
            "fit_seconds": [round(draw.fit_seconds, 4) for draw in self.draws],
        }


@dataclass(frozen=True)
class Comparison:
    """The results of a source, and why methods are not among them."""

    source: TaskSource
    results: tuple[Result, ...]
    left_out: tuple[str, ...]


class Cells(Protocol):
    """Draws of an earlier run, and where new ones are kept (paper/cells.py)."""

    def read(self, source: str, method: str, shots: int, seed: int) -> Draw | None: ...

    def write(self, source: str, method: str, shots: int, draw: Draw) -> None: ...


def compare(
    source: TaskSource,
    pairs: Sequence[Pair],
    report: Callable[[str], None] = lambda _: None,
    cells: Cells | None = None,
) -> Comparison:
    """A Result for each pair of method and reducer and each number of shots that they are possible at.

    `report` gets a line for each result as soon as it is known. Draws that are in `cells` are not made again. Raises
    IosrFastError if the source allows none of the methods.
    """
    left_out: dict[str, dict[int, str]] = {}
    results: dict[tuple[Pair, int], Result] = {}
    for shots in source.shots:
        draws: dict[Pair, list[Draw]] = {}
        for seed in source.seeds:
            task = None
            for method, reducer in pairs:
                draw = None if cells is None else cells.read(source.name, method, shots, seed)
                if draw is None:
                    task = source.draw(shots, seed) if task is None else task
                    if (reason := why_unavailable(method, task)) is not None:
                        left_out.setdefault(method, {})[shots] = reason
                        continue
                    draw = evaluate_draw(task, method, reducer, seed)
                    if cells is not None:
                        cells.write(source.name, method, shots, draw)
                draws.setdefault((method, reducer), []).append(draw)
        for pair, of_pair in draws.items():
            if len(of_pair) == len(source.seeds):
                result = results[pair, shots] = Result(source.name, *pair, shots, tuple(of_pair))
                accuracy = f"{100 * result.mean:.1f} ± {100 * result.spread:.1f}"
                report(f"{source.name}: {label(*pair)}, shots {shots}: {accuracy}")
    ordered = [results[pair, shots] for pair in pairs for shots in source.shots if (pair, shots) in results]
    reasons = [
        next(iter(at.values())) + ("" if len(at) == len(source.shots) else f" (at {', '.join(map(str, at))} shots)")
        for at in left_out.values()
    ]
    if not ordered:
        raise IosrFastError(f"{source.name}: expected a method that the data allows, got none: {'; '.join(reasons)}")
    return Comparison(source, tuple(ordered), tuple(reasons))


def evaluate_draw(task: Task, method: str, reducer: str, seed: int) -> Draw:
    """Parameters by the validation images or, without any and for "auto", the support set; then the scores on the
    test."""
    images, classes, fit_seconds = len(task.queries), task.support.n_classes, 0.0
    if method in RIVALS:
        estimator, config = fit_rival(method, task.support, seed)
        scores = score_rival(method, estimator, task.queries, task.labels)
    else:
        queries, labels = (None, None) if method == AUTO or task.validation is None else task.validation
        asked = Config(method=method, reducer="none" if reducer == AUTO else reducer)
        config, *_ = tune(asked, task.support, queries, labels)
        started = time.perf_counter()
        plan = config.compile(task.support)
        fit_seconds = time.perf_counter() - started
        found = of_logits(score(plan, task.queries), task.labels).reliability
        scores = found.accuracy, found.log_loss, found.error
    accuracy, *others = scores
    return Draw(seed, accuracy, images, classes, config, fit_seconds, *others)


def why_unavailable(method: str, task: Task) -> str | None:
    """Why the task does not allow the method; None if it does."""
    if method in RIVALS:
        return rival_unavailable_reason(method, task.support)
    return Config(method=method).unavailable_reason(task.support)


def method_names(words: Sequence[str], groups: dict[str, tuple[str, ...]] = GROUPS) -> list[str]:
    """The methods of --methods, each once; a word may be a group of them. Raises IosrFastError for an unknown name."""
    names = list(dict.fromkeys(name for word in words for name in groups.get(word, (word,))))
    known = [*groups, AUTO, *METHODS, *RIVALS]
    if unknown := [name for name in names if name not in known]:
        raise IosrFastError(f"expected --methods of {', '.join(known)}; got {', '.join(unknown)}")
    return names


def pairs_of(methods: Iterable[str], reducers: Sequence[str]) -> list[Pair]:
    """(method, reducer) of every row: auto (AUTO) and a method without support images ("none") take no reducer. Raises
    IosrFastError for an unknown reducer."""
    for reducer in reducers:
        check_reducer(reducer)
    pairs: list[Pair] = []
    for name in methods:
        reducible = name in METHODS and METHODS[name].takes_reducer
        pairs += [(name, reducer) for reducer in ([AUTO] if name == AUTO else reducers if reducible else ["none"])]
    return list(dict.fromkeys(pairs))


def label(method: str, reducer: str) -> str:
    return method if reducer in ("none", AUTO) else f"{method}, {reducer}"
