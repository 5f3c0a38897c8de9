"""The search for the parameters of a named method, whose logits are base + alpha * images.

For fixed beta and gamma a sample is right on one interval of alphas, so the alpha that makes most samples right is
found by sorting the intervals' ends (`alpha`): no grid of alphas is needed. The other parameters are tried on the
public grid's values and then, more finely, around the best.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
from msgspec import structs

from iosr_fast.methods.alpha import Intervals, Plateau, intervals
from iosr_fast.methods.config import Config, Evidence
from iosr_fast.methods.log_loss import MAX_ALPHA, fit_alpha, fit_factor, spread
from iosr_fast.methods.out_of_fold import HeldOut
from iosr_fast.methods.paired_tests import is_level
from iosr_fast.scoring.reducers import Reducer
from iosr_fast.scoring.score import score

# A term whose spread over classes is below this share of the other term's affects only ties.
_NEGLIGIBLE = 1e-4
_SHORTLIST = 20
_ROUNDS = 2
Setting = Mapping[str, float]  # a method's parameters but alpha


@dataclass(frozen=True, eq=False)
class _Candidate:
    """A setting with the alphas at which each held-out image is right, and its best ones."""

    setting: Setting
    intervals: Intervals
    plateau: Plateau

    @property
    def rank(self) -> tuple[int, float]:
        """The most images right come first, then the widest plateau relative to alpha."""
        return self.plateau.right, (self.plateau.high - self.plateau.low) / max(self.plateau.alpha, 1e-30)

    def on(self, rows: np.ndarray) -> _Candidate:
        """With the best alphas of the images `rows` (V,) bool; the intervals stay those of all."""
        return replace(self, plateau=self.intervals.only(rows).best())


# A candidate at an alpha, with its log-loss and which of n images are right, (n,) bool.
_Measured = tuple[_Candidate, float, float, np.ndarray]


class ParameterSearch:
    """Every setting that was tried of the method of a config, base + alpha * images, each with its best alphas: all
    combinations of the values of its axes; then, twice, finer ones around the best."""

    def __init__(self, config: Config, held_out: HeldOut, reducer: Reducer | None) -> None:
        self.config = config
        self.method = config.entry
        self.held_out = held_out
        self.reducer = reducer
        self.labels = held_out.labels
        self.tried: list[_Candidate] = []
        values = {name: list(axis) for name, axis in self.method.axes.items()}
        self._try(values)
        for _ in range(_ROUNDS if values else 0):
            best = max(self.tried, key=lambda one: one.rank).setting
            values = {name: _between(axis, best[name]) for name, axis in values.items()}
            self._try(values)

    def _try(self, values: Mapping[str, Sequence[float]]) -> None:
        for point in product(*values.values()):
            setting = dict(zip(values, point, strict=True))
            right = intervals(*self._logits(setting), self.labels)
            self.tried.append(_Candidate(setting, right, right.best()))

    def _logits(self, setting: Setting) -> tuple[np.ndarray, np.ndarray]:
        """base, slope (V, C): the logits at alpha are base + alpha * slope. The models without a fold give them as they
        are, without the spread in use: with more images a sum over them grows, and deserves more weight."""
        terms = self.method.terms(self.held_out.support, self.reducer, {"alpha": 1.0, **setting})
        parts = [weight * self.held_out.left_out(model) for weight, model in terms]
        return np.sum(parts[:-1], axis=0), parts[-1]

    def result(self) -> Config:
        """The config with the candidate and the alpha that all images choose; each half of them (HeldOut.halves) is
        judged at those that the other half chooses."""
        halves = self.held_out.halves
        (best, alpha), *others = self._choose([np.ones(len(self.labels), bool), *(~half for half in halves)])
        judged = best.intervals.right_at(alpha)
        for half, (candidate, of_other) in zip(halves, others, strict=True):
            judged[half] = candidate.intervals.right_at(of_other)[half]
        parameters = {"alpha": alpha, **best.setting}
        logits = self.held_out.logits(self.method.terms(self.held_out.support, self.reducer, parameters))
        factor, loss = fit_factor(logits, self.labels)
        evidence = Evidence(
            accuracy=float(judged.mean()),
            scored=len(judged),
            protocol=self.held_out.protocol,
            log_loss=loss,
            settings=len(self.tried),
            note="; ".join(self._notes(best.setting, alpha)),
        )
        return structs.replace(self.config, parameters=parameters, factor=factor, evidence=evidence)

    def _choose(self, subsets: Sequence[np.ndarray]) -> list[tuple[_Candidate, float]]:
        """The candidate and the alpha that the images of each subset (V,) bool choose. By leave-one-out the least
        log-loss chooses among the candidates that are level with the best, each tried at its best alpha and at its
        alpha of least log-loss; on a validation set the most right."""
        tried = [[candidate.on(rows) for candidate in self.tried] for rows in subsets]
        if self.held_out.folds is None:
            tops = [max(candidates, key=lambda one: one.rank) for candidates in tried]
            return [(top, top.plateau.alpha) for top in tops]
        shortlists = [_near_the_best(one, int(rows.sum())) for one, rows in zip(tried, subsets, strict=True)]
        measured = dict[tuple[int, int], list[_Measured]]()
        for number in sorted(set().union(*shortlists)):
            base, slope = self._logits(self.tried[number].setting)
            for k, rows in enumerate(subsets):
                if number in shortlists[k]:
                    one = tried[k][number]
                    measured[k, number] = _measure(one, base[rows], slope[rows], self.labels[rows], rows)
        return [_choice([measured[k, number] for number in shortlist]) for k, shortlist in enumerate(shortlists)]

    def _notes(self, setting: Setting, alpha: float) -> Iterator[str]:
        """What a user has to know: a term without effect, by the spreads of texts and of images, or images that the
        encoder does not distinguish."""
        support = self.held_out.support
        base, slope = self._logits(setting)
        text, images = spread(base), alpha * spread(slope)
        if support.text is not None and text <= _NEGLIGIBLE * images:
            yield f"alpha {alpha:.3g}: the texts have no effect"
        elif images <= _NEGLIGIBLE * text:
            yield f"alpha {alpha:.3g}: similarity to support images has no effect"
        plan = self.method.compile(support, self.reducer, {"alpha": alpha, **setting})
        labels = np.unique(score(plan, support.as_queries).argmax(1))
        right = (base + alpha * slope).argmax(1) == self.labels
        if len(labels) == 1 and len(np.unique(self.labels[right])) > 1:
            yield (
                f"all {len(support.labels)} support images get the label of class {labels[0]}: the encoder does not "
                "distinguish them"
            )


def _near_the_best(tried: Sequence[_Candidate], n_samples: int) -> list[int]:
    """The positions of some candidates within three standard errors of the best."""
    right = np.array([one.plateau.right for one in tried])
    best = right.max() / n_samples
    error = float(np.sqrt(best * (1 - best) / n_samples))
    order = np.argsort(-right, kind="stable")
    near: list[int] = order[right[order] / n_samples >= best - 3 * error].tolist()
    return near[:: -(-len(near) // _SHORTLIST)]


def _measure(
    one: _Candidate, base: np.ndarray, slope: np.ndarray, labels: np.ndarray, rows: np.ndarray
) -> list[_Measured]:
    """A candidate at its best alpha and at its alpha of least log-loss, by the logits of the images `rows`."""
    best = one.plateau.alpha
    _, loss = fit_factor(base + best * slope, labels, MAX_ALPHA / max(1.0, best))
    alpha, _, least = fit_alpha(base, slope, labels)
    return [(one, at, its_loss, one.intervals.right_at(at)[rows]) for at, its_loss in ((best, loss), (alpha, least))]


def _choice(of_candidates: Sequence[Sequence[_Measured]]) -> tuple[_Candidate, float]:
    """The least log-loss of those that are level with the most right."""
    measured = [one for of_candidate in of_candidates for one in of_candidate]
    top = max(measured, key=lambda one: one[3].sum())[3]
    candidate, alpha, *_ = min((one for one in measured if is_level(one[3], top)), key=lambda one: one[2])
    return candidate, alpha


def _between(axis: Sequence[float], value: float) -> list[float]:
    """`value` and the points halfway to its neighbours on the axis."""
    at = axis.index(value)
    neighbours = (axis[max(at - 1, 0)], value, axis[min(at + 1, len(axis) - 1)])
    return sorted({(value + neighbour) / 2 for neighbour in neighbours})
