"""Whether a promise about accepted labels holds in production: an alarm by labels that somebody checked, and without
labels a note that pictures have become stranger."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any

import numpy as np

from iosr_fast.exceptions import IosrFastError
from iosr_fast.methods.automation import CONFIDENCE, binomial_cdf
from iosr_fast.methods.conformal import Judged
from iosr_fast.utils.numbers import check_share

FALSE_ALARMS = 0.05  # at most, however often one looks
_ODDS = np.array([1.25, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0])  # of a wrong label, over those that are promised

STRANGE = 0.1  # the largest share of pictures like the left-out ones that is strange, by definition
_ROUNDING = 1e-6  # by which a sum of weights may miss a whole number
_MOST_STRANGE = 0.15  # of new pictures, without a note: left-out images are no exact sample of new ones
_STRANGE_RATES = np.array([_MOST_STRANGE, 0.2, 0.25, 0.35, 0.5, 0.8])
_START = np.full(len(_STRANGE_RATES), 1.0 / len(_STRANGE_RATES))  # sums to 1
_NOTE_AT = 100.0
_JUMP = 0.01
WINDOW = 400  # pictures that a note counts
_FEWEST = 40  # of them: fewer may be those of one person


@dataclass(frozen=True)
class CheckedPromise:
    """What checked labels say of the promise that at most a share `max_error` of accepted ones is wrong.

    checks   accepted labels that were checked
    wrong    how many of them are wrong
    e_value  the largest value so far of the e-process (`checked`), which starts at 1
    at       (checks, wrong) when it had that value
    """

    max_error: float
    checks: int
    wrong: int
    e_value: float
    at: tuple[int, int]

    @property
    def refuted(self) -> bool:
        """Whether more than `max_error` are wrong: if not, this is said with a chance of at most 5%, ever."""
        return self.e_value >= 1.0 / FALSE_ALARMS

    def __str__(self) -> str:
        checks, wrong = self.at if self.refuted else (self.checks, self.wrong)
        labels, were = "label" if checks == 1 else "labels", "was" if wrong == 1 else "were"
        counts = f"of {checks} accepted {labels} that you checked {wrong} {were} wrong"
        promised = f"more than {100 * self.max_error:.4g}% are"
        if self.refuted:
            return f"{counts}: {promised}; calibrate on these (calibrate_on)"
        return f"{counts}: no sign that {promised}"


def check(
    answers: Sequence[Any] | np.ndarray,
    labels: Sequence[Any] | np.ndarray,
    max_error: float,
    above: Mapping[Any, Sequence[str]] | None = None,
) -> CheckedPromise:
    """What right `labels` (B,) of pictures say of `answers` (B,), which `predict(pictures, max_error=max_error)` gave:
    whether more than a share `max_error` of the labels that it accepted is wrong. Answers are labels, or sets of them;
    pictures without an answer (None) say nothing. An answer that is a node of a tree above the label is right; `above`
    has the names of the nodes above each label.

    Give a random sample of what was accepted, each picture once, in the order in which they were checked, with all that
    were checked before: one may look after each check, and stop whenever one likes. What somebody corrects because it
    looks wrong is no such sample. Raises IosrFastError for answers and labels of different number.

    >>> answers, labels = ["cat"] * 42 + [None], ["cat"] * 30 + ["dog"] * 13
    >>> print(check(answers, labels, 0.05))
    of 42 accepted labels that you checked 12 were wrong: more than 5% are; calibrate on these (calibrate_on)
    >>> check(["cat"], ["siamese"], 0.05, {"siamese": ("animal", "cat")}).wrong
    0
    """
    if len(answers) != len(labels):
        raise IosrFastError(f"expected a label for each answer, got {len(labels)} labels and {len(answers)} answers")
    nodes, wrong = above or {}, []
    for answer, label in zip(answers, labels, strict=True):
        if isinstance(answer, AbstractSet):
            wrong.append([tag not in label for tag in answer])
        elif answer is not None:
            wrong.append([answer != label and answer not in nodes.get(label, ())])
    return checked(wrong, max_error)


def checked(wrong: Sequence[Sequence[bool]], max_error: float) -> CheckedPromise:
    """`wrong`: of each checked picture, in the order of checking, whether each of its accepted labels is wrong: of one,
    or where a picture may have several of any number.

    After n pictures, of which shares x[i] of the accepted labels were wrong, and with m = max_error, the e-process is
    the mean over odds ratios f of

        prod over i of (1 + (f - 1) x[i]) / (1 + (f - 1) m),

    with one label a picture the likelihood ratio of "a share r is wrong", r / (1 - r) = f m / (1 - m), and "a share m
    is wrong". If x[i] is at most m on the mean, whatever came before, a check multiplies each term by at most 1 on the
    mean: the process is a supermartingale, and reaches 1 / d with a chance of at most d, ever (Ville's inequality). So
    an alarm at 20 is false with a chance of at most 5%, however often one looks.

    Sources: Ville, Etude critique de la notion de collectif, 1939; test martingales: Shafer et al., Statistical Science
    2011, arXiv 0912.4269; e-processes: Ramdas et al., Statistical Science 2023, arXiv 2210.01948.

    >>> checked([[True], [True]], 0.05).e_value > checked([[True], [False]], 0.05).e_value > 1
    True
    """
    max_error = check_share("max_error", max_error, like=0.01)
    pictures = [one for one in wrong if one]
    shares = np.array([0.0, *(sum(one) / len(one) for one in pictures)])[:, None]
    checks, counts = (np.cumsum([0, *map(of, pictures)]).tolist() for of in (len, sum))
    ratios = np.cumsum(np.log1p((_ODDS - 1.0) * shares), axis=0)
    ratios -= np.outer(np.arange(len(shares)), np.log1p((_ODDS - 1.0) * max_error))
    values = ratios.max(1) + np.log(np.exp(ratios - ratios.max(1, keepdims=True)).mean(1))
    best = int(values.argmax())
    e_value = math.exp(min(float(values[best]), 700.0))  # the largest that float64 holds
    return CheckedPromise(max_error, checks[-1], counts[-1], e_value, (checks[best], counts[best]))


def strange_odds(left_out: Judged) -> float:
    """The log p / (1 - p) of its label at which a picture is strange: a lower 95% confidence bound of the 10% quantile
    of left-out images.

    It is the k-th smallest of n images, for the largest k with P(K <= k - 1) <= 5% under K ~ Binomial(n, 0.1), where n
    and k are sums of weights (Judged.weights): at most 10% of new pictures have as small odds, with 95%
    confidence over the draw of the n images (David & Nagaraja, Order Statistics, 2003, section 7.1). With fewer than 29
    there is no such k, and no picture is strange: -inf.

    >>> odds = np.arange(100.0)
    >>> strange_odds(Judged(odds, odds[:, None], odds[:, None] > 9, np.zeros(100), np.zeros(100, int)))
    4.0
    """
    n = int(left_out.count + _ROUNDING)
    k = int((binomial_cdf(n, STRANGE, n) <= 1.0 - CONFIDENCE).sum())
    odds = left_out.odds[:, 0]
    order = np.argsort(odds, kind="stable")
    rank = int(np.searchsorted(np.cumsum(left_out.counted[order]), k + _ROUNDING, side="right"))
    return float(odds[order[rank - 1]]) if k else -math.inf


class Strangers:
    """Counts strange pictures (`strange_odds`) as they come, and notes when they are more than they should be.

    The process is the mean over rates r of the products of r / 0.15 for a strange picture and (1 - r) / 0.85 for
    another one; before each picture 1% of all is shared out anew, so that it finds a late change. While at most 15% are
    strange, it reaches 100 with a chance of at most 1%, ever (Ville's inequality); then it starts again. The band from
    10 to 15% pays for left-out images, which are no exact sample of new ones. There is a note from when it reaches 100
    until at most 15% of the last pictures are strange.

    Simulated without a change, with 12 to 1,000 left-out images drawn anew each time, at most 0.3% of streams of 2,000
    pictures have a note.

    Source: the simple jumper of Vovk et al., Retrain or not retrain, COPA 2021, arXiv 2102.10439.

    It is a note, and no alarm of a promise: pictures may be strange and their labels right, and look-alikes from
    elsewhere are not strange while their labels are wrong.

    >>> strangers = Strangers()
    >>> for i in range(400):
    ...     strangers.add(i % 3 == 0)
    >>> strangers.note
    '34% of the last 400 pictures are stranger than 90% of your examples'
    """

    def __init__(self) -> None:
        self.last: deque[bool] = deque(maxlen=WINDOW)
        self.noted = False
        self._values = _START

    def add(self, strange: bool) -> None:
        self.last.append(strange)
        shared = (1.0 - _JUMP) * self._values + _JUMP * self._values.mean()
        self._values = shared * (
            _STRANGE_RATES / _MOST_STRANGE if strange else (1.0 - _STRANGE_RATES) / (1.0 - _MOST_STRANGE)
        )
        if self._values.sum() >= _NOTE_AT and len(self.last) >= _FEWEST:
            self.noted, self._values = True, _START
        self.noted = self.noted and self.share > _MOST_STRANGE

    @property
    def share(self) -> float:
        """Of the last pictures, at most WINDOW, the share that is strange; NaN before the first."""
        return sum(self.last) / len(self.last) if self.last else math.nan

    @property
    def note(self) -> str:
        """In words; "" where there is nothing to note."""
        if not self.noted:
            return ""
        return f"{self.share:.0%} of the last {len(self.last)} pictures are stranger than 90% of your examples"
