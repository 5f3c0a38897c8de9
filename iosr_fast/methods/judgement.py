"""Whether labelled images bear out what left-out ones had let expect: an accuracy, and promises of accepted labels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from iosr_fast.methods.automation import CONFIDENCE, explained_by_chance, images_needed_for
from iosr_fast.methods.config import wilson
from iosr_fast.methods.conformal import Judged, counted_as

_ROUNDING = 1e-6  # by which a sum of weights may miss a whole number


@dataclass(frozen=True)
class PromiseResult:
    """A promise that at most a share `promised` of accepted labels is wrong: of `accepted` labels `wrong` are.

    count      what the accepted labels count as (conformal.Judged.count): a burst counts once
    share      the share of them that is wrong, as they count
    explained  the most wrong labels that are compatible with the promise (`judge_promises`)
    judgement  "broke" where more are wrong; else "too few" where these labels, were all right, would not confirm the
               promise (automation.images_needed_for); else "held", or "not refuted" where `share` is above `promised`
    """

    promised: float
    accepted: int
    wrong: int
    count: float
    share: float
    explained: int
    judgement: str

    def __str__(self) -> str:
        counts = f"{self.wrong:,} of {counted_as(self.accepted, self.count, 'accepted labels')} are wrong"
        if self.judgement == "too few":
            return f"{counts}; a judgement needs {images_needed_for(self.promised):,} accepted labels"
        weighed = abs(self.share * self.accepted - self.wrong) > _ROUNDING
        share = f"{self.share:.1%}{once(self.accepted, self.count) if weighed else ''}"
        agrees = f"up to {self.explained:,} wrong would still agree with the promise of {100 * self.promised:.3g}%"
        return f"{counts} ({share}); {agrees}"


def once(images: int, count: float) -> str:
    """How a share of so many images counts them, in words; "" where each counts 1."""
    return " if a burst counts once" if count < images - 0.5 else ""


def judge_promises(promised: Sequence[float], pictures: np.ndarray, counted: np.ndarray) -> tuple[PromiseResult, ...]:
    """The promises that accept a label. `pictures` (P, 2) int64 has how many labels each accepts, and how many of these
    are wrong; `counted` (P, 2) what both count as, n and k.

    A promise p broke if P(K >= k) <= 5% / m under K ~ Binomial(n, p), n and k rounded down, where m promises did not
    break: Holm's step-down procedure (Scandinavian Journal of Statistics 6, 1979). If all promises hold, one of them is
    called broken with a chance of at most 5%, however they depend on one another.

    >>> counts = np.array([[596, 10], [700, 60], [12, 0]])
    >>> [one.judgement for one in judge_promises([0.01, 0.02, 0.05], counts, counts)]
    ['not refuted', 'broke', 'too few']
    """
    accepting = pictures[:, 0] > 0
    promises, counts = np.array(promised)[accepting].tolist(), counted[accepting].tolist()
    kept, before = len(promises), -1
    while kept != before:
        level = (1.0 - CONFIDENCE) / max(kept, 1)
        most = [explained_by_chance(int(n + _ROUNDING), p, level) for p, (n, _) in zip(promises, counts, strict=True)]
        before, kept = kept, sum(k < limit + 1 - _ROUNDING for (_, k), limit in zip(counts, most, strict=True))
    results = []
    columns = promises, pictures[accepting].tolist(), counts, most
    for p, (accepted, wrong), (n, k), limit in zip(*columns, strict=True):
        few = n < images_needed_for(p) - _ROUNDING
        unbroken = "too few" if few else "held" if k <= p * n + _ROUNDING else "not refuted"
        judgement = "broke" if k >= limit + 1 - _ROUNDING else unbroken
        explained = int(limit * accepted / n + _ROUNDING)
        results.append(PromiseResult(p, accepted, wrong, n, k / n, explained, judgement))
    return tuple(results)


def accuracy_at(left_out: Judged, sizes: np.ndarray) -> tuple[float, float]:
    """The accuracy that left-out images let expect at class `sizes` (C,), and their effective number: those of all
    images, unless the accuracy differs by more than half a point.

    With q_c the size, W_c the sum of weights and a_c the accuracy of class c: sum q_c a_c / sum q_c over classes with
    left-out images, and (sum q_c)^2 / sum (q_c^2 / W_c) (Kish, Survey Sampling, 1965); of answers (Judged.units) times
    what they count as over their number.

    >>> right, zeros = np.array([[True], [True], [False], [True]]), np.zeros(4)
    >>> accuracy_at(Judged(zeros, zeros[:, None], right, zeros, np.array([0, 0, 1, 1])), np.array([3, 1]))
    (0.875, 3.2)
    """
    expected, labels, counted = left_out.reliability.accuracy, left_out.labels, left_out.counted
    factors = sizes[labels] / np.bincount(labels, counted, len(sizes))[labels]
    total = float(counted @ factors)
    at_sizes = float(counted @ (factors * left_out.right[:, 0])) / total if total else math.nan
    if abs(at_sizes - expected) > 0.005:
        return at_sizes, total**2 / float(counted @ factors**2) * left_out.count / float(counted.sum())
    return expected, left_out.count


def difference_of_shares(share: float, count: float, other: float, other_count: float) -> tuple[float, float]:
    """The 95% interval of the difference share - other of two shares of independent images, (-1, 1); they differ beyond
    chance where it leaves 0 out.

    With the intervals (l, u) of `share` and (l', u') of `other` (config.wilson), from d - sqrt((share - l)^2 +
    (u' - other)^2) to d + sqrt((u - share)^2 + (other - l')^2), d = share - other (Newcombe, Statistics in Medicine 17,
    1998, method 10): sound for small counts and for shares of 0 and 1.

    >>> [round(end, 3) for end in difference_of_shares(56 / 70, 70, 48 / 80, 80)]
    [0.052, 0.334]
    """
    (low, high), (other_low, other_high) = wilson(share, count), wilson(other, other_count)
    difference = share - other
    below = math.hypot(share - low, other_high - other)
    return difference - below, difference + math.hypot(high - share, other - other_low)
