"""Choosing alpha exactly, and a method's other parameters around it, on labelled images that are held out.

For fixed beta and gamma a sample is right on one interval of alphas, so the alpha that makes most samples right is
found by sorting the intervals' ends (search.sweep): no grid of alphas, and nothing between its points is missed. The
other parameters are tried on the public grid's values and then, more finely, around the best.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Literal

import numpy as np

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.methods import METHODS, compile_method, unavailable_reason
from iosr_fast.methods.support_set import SupportSet, image_rows
from iosr_fast.methods.tuning.held_out import (
    HeldOutSet,
    Setting,
    in_order_of_folds,
    intervals_of,
    leave_out,
    logits_of,
    validation,
)
from iosr_fast.methods.tuning.log_loss import MOST, fit_alpha, fit_factor, spread
from iosr_fast.methods.tuning.one_shot import one_shot_parameters
from iosr_fast.methods.tuning.plan_check import one_label, right_by_plan, weighing
from iosr_fast.methods.tuning.search import EMPTY, LOWER_OPEN, UPPER_OPEN, Intervals, step_curve, sweep
from iosr_fast.scoring.plan import ScoringPlan
from iosr_fast.scoring.reducers import Reducer, fit_reducer

Protocol = Literal["loo", "loo-single", "validation", "one-shot", "none"]
# Standard errors of the difference up to which two candidates are level; log-loss then decides.
LEVEL = 2.0
_SHORTLIST = 20
_ROUNDS = 2


@dataclass(frozen=True, eq=False)
class Tuned:
    """What a search chose, and on what grounds.

    parameters    all of the method's, alpha included
    accuracy      on `scored` held-out images, at these parameters: of the compiled plans (plan_check.right_by_plan)
    alpha_range   the widest plateau of best alphas for these other parameters; by leave-one-out alpha may lie beside it
    log_loss      on them, in nats, with logits multiplied by `factor` (None where it was not looked at)
    curve         (edges, right): samples right on each open segment between alphas, for these other parameters
    right         (scored,) bool, which of the held-out images are right
    protocol      "validation", "loo" (one image of each class left out at a time), "loo-single", "one-shot" (nothing
                  can be left out: one_shot.py), "none"
    settings      combinations of the other parameters that were tried, with every alpha for each
    note          what a user has to know of the choice: texts or images that count for nothing; else empty
    """

    method: str
    reducer: str
    parameters: dict[str, float]
    accuracy: float
    scored: int
    protocol: Protocol
    alpha_range: tuple[float, float] | None = None
    log_loss: float | None = None
    factor: float = 1.0
    settings: int = 0
    seconds: float = 0.0
    note: str = ""
    curve: tuple[np.ndarray, np.ndarray] | None = field(default=None, repr=False)
    right: np.ndarray | None = field(default=None, repr=False)

    def compile(self, support: SupportSet) -> ScoringPlan:
        """The plan with these parameters. Logits are scaled by `factor`, which makes probabilities honest."""
        return compile_method(self.method, support, reducer=self.reducer, **self.parameters).scaled(self.factor)


def tune(
    method: str,
    support: SupportSet,
    queries: Embeddings | None = None,
    labels: np.ndarray | None = None,
    protocol: Literal["loo", "loo-single"] = "loo",
    reducer: str = "none",
) -> Tuned:
    """The best parameters of `method` on a validation set, or without one by leave-one-out on the support set.

    On a validation set (`queries`, `labels`) the highest accuracy wins, then the widest plateau of alphas. By
    leave-one-out the images are few, so that what can't be told from the best (is_level) counts as level, and the
    lowest log-loss wins among it ("loo"; held_out.leave_out says what is left out). "loo-single" leaves out one image
    alone, in closed form, and takes the highest accuracy; APE and Tip-X have no such form and fall back on "loo".
    Alphas from 0 to log_loss.MOST are looked at.
    Where each class has one image nothing can be left out, and one_shot.one_shot_parameters decides.

    Raises ValueError for an unknown method, reducer or protocol, labels that don't fit, or where the support set lacks
    what the method needs; RuntimeError where the compiled plan doesn't do as the search says (plan_check).
    """
    started = time.perf_counter()
    if method not in METHODS:
        raise ValueError(f"expected a method of {', '.join(METHODS)}, got {method!r}")
    if protocol not in ("loo", "loo-single"):
        raise ValueError(f"expected protocol 'loo' or 'loo-single', got {protocol!r}")
    told = unavailable_reason(method, support)
    if told is not None:
        raise ValueError(told)
    made = METHODS[method]
    fitted = fit_reducer(reducer, image_rows(support.embeddings, made.which, None)) if made.needs_support else None
    used: Protocol = "validation"
    if queries is not None:
        held = validation(support, queries, np.asarray(labels))
    else:
        single = protocol == "loo-single" and not method.startswith(("ape", "tip-x"))
        used, held = ("loo-single" if single else "loo"), leave_out(support, single)
    if not made.needs_support:
        return _without_parameters(method, held, used, started)
    if not held.scored.any():
        parameters = one_shot_parameters(method, support, fitted)
        return Tuned(method, reducer, parameters, float("nan"), 0, "one-shot", seconds=time.perf_counter() - started)
    search = _Search(held, method, fitted)
    for settings in search.schedule():
        search.add(settings)
    candidate = search.level_with_least_loss() if used == "loo" else search.most_right()
    parameters = {"alpha": candidate.alpha, **candidate.setting}
    right = candidate.right_at(candidate.alpha)
    right = right_by_plan(held, method, fitted, parameters, candidate.factor, right)
    base, slope = candidate.spreads or search.spreads(candidate.setting)
    tuned = Tuned(
        method,
        reducer,
        parameters,
        float(right.mean()),
        search.scored,
        used,
        candidate.alpha_range,
        candidate.log_loss,
        candidate.factor,
        len(search.tried),
        time.perf_counter() - started,
        weighing(base, slope, candidate.alpha, support.text is not None),
        candidate.curve,
        right,
    )
    alike = one_label(tuned.compile(support), support, held.labels[search.rows][right])
    return replace(tuned, note="; ".join(filter(None, (tuned.note, alike))))


@dataclass(frozen=True, eq=False)
class _Candidate:
    setting: Setting
    alpha: float
    alpha_range: tuple[float, float]
    accuracy: float
    found: Intervals
    row: int
    log_loss: float | None = None
    factor: float = 1.0
    right: np.ndarray | None = None  # at alpha, where it was looked at
    spreads: tuple[float, float] | None = None  # of base and slope, likewise

    @property
    def curve(self) -> tuple[np.ndarray, np.ndarray]:
        edges, right = step_curve(self.found, self.row)
        return edges, right

    @property
    def width(self) -> float:
        return self.alpha_range[1] - self.alpha_range[0]

    def right_at(self, alpha: float) -> np.ndarray:
        """(V,) bool: the held-out images, in the order of folds, that are right at this alpha."""
        lower, upper, flags = self.found.lower[self.row], self.found.upper[self.row], self.found.flags[self.row]
        after = (lower < alpha) | ((lower == alpha) & (flags & LOWER_OPEN == 0))
        before = (alpha < upper) | ((alpha == upper) & (flags & UPPER_OPEN == 0))
        right: np.ndarray = after & before & (flags & EMPTY == 0)
        return right


class _Search:
    """Every setting that was tried, each with its best alpha."""

    def __init__(self, held: HeldOutSet, method: str, reducer: Reducer | None) -> None:
        self.held, self.method, self.reducer = held, method, reducer
        self.axes = METHODS[method].axes
        self.rows = in_order_of_folds(held)
        self.scored = len(self.rows)
        self.tried: list[_Candidate] = []

    def schedule(self) -> Iterator[list[Setting]]:
        """All combinations of the axes' values; then, twice, finer ones around the best."""
        values = {name: list(axis) for name, axis in self.axes.items()}
        yield _combinations(values)
        for _ in range(_ROUNDS if values else 0):
            best = self.most_right().setting
            values = {name: _between(axis, best[name]) for name, axis in values.items()}
            yield _combinations(values)

    def add(self, settings: list[Setting]) -> None:
        found = _up_to(MOST, intervals_of(self.held, self.method, self.reducer, settings))
        best = sweep(found)
        for row, setting in enumerate(settings):
            plateau = (float(best.low[row]), float(best.high[row]))
            accuracy = float(best.right[row]) / self.scored
            self.tried.append(_Candidate(setting, float(best.alpha[row]), plateau, accuracy, found, row))

    def logits(self, setting: Setting) -> tuple[np.ndarray, np.ndarray]:
        """base, slope (V, C) of the scored images, in the order of folds."""
        base, slope = logits_of(self.held, self.method, self.reducer, setting)
        return base[self.rows], slope[self.rows]

    def spreads(self, setting: Setting) -> tuple[float, float]:
        base, slope = self.logits(setting)
        return spread(base), spread(slope)

    def most_right(self) -> _Candidate:
        """The highest accuracy; of equals the one whose alphas may be moved most, in proportion; then the first."""
        return max(self.tried, key=lambda c: (c.accuracy, c.width / max(c.alpha, 1e-30)))

    def level_with_least_loss(self) -> _Candidate:
        """Of the candidates that are level with the best, each at its best alpha and at that of least loss, the one of
        least loss."""
        best = self.most_right().accuracy
        error = float(np.sqrt(best * (1 - best) / self.scored))
        near = sorted((c for c in self.tried if c.accuracy >= best - 3 * error), key=lambda c: -c.accuracy)
        measured: list[_Candidate] = []
        labels = self.held.labels[self.rows]
        for candidate in near[:: -(-len(near) // _SHORTLIST)]:
            base, slope = self.logits(candidate.setting)
            for fit in (fit_factor(base, slope, labels, candidate.alpha), fit_alpha(base, slope, labels)):
                right = candidate.right_at(fit.alpha)
                measured.append(
                    replace(
                        candidate,
                        alpha=fit.alpha,
                        accuracy=float(right.mean()),
                        log_loss=fit.loss,
                        factor=fit.factor,
                        right=right,
                        spreads=(spread(base), spread(slope)),
                    )
                )
        top = max(measured, key=lambda c: c.accuracy)
        return min(
            (c for c in measured if is_level(c.right, top.right)),
            key=lambda c: c.log_loss if c.log_loss is not None else np.inf,
        )


def _up_to(most: float, found: Intervals) -> Intervals:
    """The intervals as they are from 0 to `most`: what ends beyond it has no end, what begins beyond it isn't there."""
    upper = np.where(found.upper > most, np.inf, found.upper)
    flags = np.where(found.lower > most, np.uint8(EMPTY), found.flags)
    return replace(found, upper=upper, flags=flags)


def is_level(right: np.ndarray | None, best: np.ndarray | None) -> bool:
    """Whether two candidates, each with the images that it gets right (V,) bool, can't be told apart: the images that
    only `best` gets right exceed those that only the other does by no more than LEVEL standard errors, sqrt(both)."""
    assert right is not None and best is not None
    lost, won = int((best & ~right).sum()), int((right & ~best).sum())
    return lost - won <= LEVEL * float(np.sqrt(lost + won))


def _combinations(values: Mapping[str, Sequence[float]]) -> list[Setting]:
    return [dict(zip(values, point, strict=True)) for point in product(*values.values())]


def _between(axis: Sequence[float], value: float) -> list[float]:
    """`value` and the points halfway to its neighbours on the axis."""
    at = axis.index(value)
    neighbours = (axis[max(at - 1, 0)], value, axis[min(at + 1, len(axis) - 1)])
    return sorted({(value + neighbour) / 2 for neighbour in neighbours})


def _without_parameters(method: str, held: HeldOutSet, used: Protocol, started: float) -> Tuned:
    """Zero-shot: nothing to choose."""
    base, _ = logits_of(held, method, None, {})
    fit = fit_factor(base, np.zeros_like(base), held.labels, 0.0)
    right = (base.argmax(1) == held.labels)[in_order_of_folds(held)]
    right = right_by_plan(held, method, None, {}, fit.factor, right)
    seconds = time.perf_counter() - started
    return Tuned(
        method,
        "none",
        {},
        float(right.mean()) if len(right) else float("nan"),
        len(right),
        used,
        log_loss=fit.loss,
        factor=fit.factor,
        settings=1,
        seconds=seconds,
        right=right,
    )
