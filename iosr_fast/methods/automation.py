"""What may be automated: labels that are accepted without a look, with a promise about their errors."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from iosr_fast.exceptions import IosrFastError
from iosr_fast.methods.conformal import LEFT_OUT, Judged, counted_as
from iosr_fast.methods.log_loss import sigmoid
from iosr_fast.utils.result import Result

CONFIDENCE = 0.95
PROMISES = (0.005, 0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2)
_STEPS = 40
_ROUNDING = 1e-12  # of a chance
_FRACTION = 1e-6  # by which a sum of weights may miss a whole number
_LEAST_ERROR = 1e-15  # of a promise: no number of images is enough for a smaller one


@dataclass(frozen=True, eq=False, repr=False)
class Automation(Result):
    """What may be automated, by V labelled images that the classifier has not seen.

    images      V
    count       what they count as (conformal.Judged)
    smallest    the smallest error that V images could promise, if all were right: 1 - 0.05^(1 / V)
    least_error the same with their errors: 1 - 0.05^(1 / m), where m images are surer than the surest wrong one
    max_errors  (P,) the promises: of the pictures whose label is accepted at most this share is wrong
    thresholds  (P,) the least probability of a label that is accepted; NaN where no promise can be kept
    shares      (P,) the share of images whose label is accepted: of the V images, or of others (`automation`), as they
                count
    errors      (P,) the share of these whose label is wrong; NaN if none is accepted
    level_shares, level_errors  (P, L) of the answers at each level of a tree: 0 for classes, 1 for the deepest nodes,
                and so on; `shares` and `errors` are of all answers together
    basis       what the V images are, as of conformal.Reliability
    notes       what speaks against promises, and what to do, a sentence each

    >>> rng = np.random.default_rng(0)
    >>> odds = rng.normal(3.0, 2.0, 500)
    >>> right = rng.random(500) < sigmoid(odds)
    >>> left_out = Judged(odds, odds[:, None], right[:, None], np.zeros(500), np.zeros(500, int))
    >>> print(automation(left_out))
    500 left-out support images can promise errors of 1.8% and more with 95% confidence (0.6% if all were right)
    promised errors  least probability  accepted  wrong
               0.5%                  -      0.0%      -
               1.0%                  -      0.0%      -
               2.0%              0.980     31.6%   0.0%
               3.0%              0.887     66.0%   1.2%
               5.0%              0.856     71.4%   2.5%
               7.0%              0.793     79.4%   4.0%
              10.0%              0.695     85.8%   7.5%
              15.0%              0.291     97.6%  10.2%
              20.0%              0.008    100.0%  12.4%
    >>> from iosr_fast.methods.conformal import of_logits
    >>> from iosr_fast.methods.tree import Tree
    >>> logits = np.repeat([[4.0, 3.5, 0.0], [0.0, 0.0, 9.0]], 50, axis=0)  # sure of a cat, not of which
    >>> labels = np.repeat([0, 1, 2], [25, 25, 50])
    >>> found = automation(of_logits(logits, labels, tree=Tree((("cat",), ("cat",), ()))))
    >>> found.level_shares[6].tolist(), found.level_errors[6].tolist()  # where 10% are promised
    ([0.5, 0.5], [0.0, 0.0])
    """

    images: int
    count: float
    smallest: float
    least_error: float
    max_errors: np.ndarray
    thresholds: np.ndarray
    shares: np.ndarray
    errors: np.ndarray
    level_shares: np.ndarray
    level_errors: np.ndarray
    basis: str = LEFT_OUT
    notes: tuple[str, ...] = ()

    @property
    def can(self) -> str:
        """What V images can promise, in words."""
        promised = "nothing"
        if self.least_error < 1:
            promised = f"errors of {self.least_error:.1%} and more with {CONFIDENCE:.0%} confidence"
        if_right = f" ({self.smallest:.1%} if all were right)" if self.smallest < self.least_error else ""
        return f"{counted_as(self.images, self.count, self.basis)} can promise {promised}{if_right}"

    @property
    def columns(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """The shares and errors (P,) that the table has, by their title: with a tree of each level, then of all."""
        levels = list(zip(self.level_shares.T, self.level_errors.T, strict=True))
        of_levels = {f"level {level}": pair for level, pair in enumerate(levels) if len(levels) > 1}
        return of_levels | {"accepted": (self.shares, self.errors)}

    def summary(self) -> str:
        """What V images can promise, and what speaks against promises, a line each."""
        return "\n".join([self.can, *self.notes])

    def _columns(self) -> dict[str, np.ndarray]:
        columns = {"max_error": self.max_errors, "threshold": self.thresholds}
        for title, (shares, errors) in self.columns.items():
            columns |= {title: shares, f"wrong of {title}": errors}
        return columns

    def __str__(self) -> str:
        titles = "".join(f"  {title:>8}  wrong" for title in self.columns)
        lines = [self.can, f"promised errors  least probability{titles}"]
        for row, promised in enumerate(self.max_errors.tolist()):
            least = "-" if math.isnan(self.errors[row]) else f"{self.thresholds[row]:.3f}"
            cells = [f"  {shares[row]:8.1%}  {_percent(errors[row]):>5}" for shares, errors in self.columns.values()]
            lines.append(f"{promised:15.1%}  {least:>17}{''.join(cells)}")
        return "\n".join([*lines, *self.notes])


def automation(left_out: Judged, images: Judged | None = None, notes: tuple[str, ...] = ()) -> Automation:
    """The curve of `least_odds` at PROMISES; shares and errors are those of `images`, None for the left-out ones."""
    images = left_out if images is None else images
    count = left_out.count
    odds, right = left_out.odds, left_out.right
    surest_wrong = odds[~right].max(initial=-math.inf)
    least = np.array([least_odds(left_out, promised) for promised in PROMISES])
    counts = np.array([_counts(images, threshold) for threshold in least.tolist()])
    n_accepted, n_wrong = counts.sum(1).T
    with np.errstate(invalid="ignore"):
        level_errors, errors = counts[:, :, 1] / counts[:, :, 0], n_wrong / n_accepted
    n_images = float(images.counted.sum()) or 1.0
    thresholds = np.where(np.isfinite(least), sigmoid(least), np.nan)
    surer = left_out.effective(odds[:, -1] > surest_wrong)
    smallest, least_error = _promised_by(count), _promised_by(surer)
    curve = np.array(PROMISES), thresholds, n_accepted / n_images, errors, counts[:, :, 0] / n_images, level_errors
    return Automation(len(left_out.labels), count, smallest, least_error, *curve, left_out.basis, notes)


def _percent(share: float) -> str:
    return "-" if math.isnan(share) else f"{share:.1%}"


def _counts(images: Judged, least: float) -> np.ndarray:
    """(L, 2) float64: of each level how many images it answers, and how many of these answers are wrong, as they
    count."""
    level, *chosen = images.answered(least)
    return np.stack([np.bincount(level[rows], images.counted[rows], images.odds.shape[1]) for rows in chosen], 1)


def check_promise(left_out: Judged, max_error: float) -> None:
    """Raise IosrFastError where even V right labels are too few to promise `max_error`."""
    if left_out.count < (needed := images_needed_for(max_error)) - _FRACTION:
        counted = counted_as(len(left_out.labels), left_out.count, of=left_out.basis)
        raise IosrFastError(
            f"a promise of at most {max_error:.4g} wrong labels needs at least {needed} "
            f"{left_out.basis}, got {counted}: give more pictures of each "
            "class, at least two, or promise less"
        )


def least_odds(left_out: Judged, max_error: float) -> float:
    """The least log p / (1 - p) of a label that is accepted, p being the largest probability of its picture: of new
    pictures whose label is accepted, at most a share `max_error` is wrong, with 95% confidence over the draw of the V
    images. This is exact for independent images of calibrate_on, drawn as new ones are; of left-out images it holds to
    first order, as each is judged by a classifier without its fold; of bursts it is measured
    (benchmarks/claims/automation.py). Infinite if none is accepted, as by too few images. With a tree it is one number
    for all levels (tree.finest), and of all answers together at most `max_error` are wrong: the picture's class is not
    below the node.

    Thresholds are tried in a fixed order from the strictest that V images could let pass, at which n images are
    accepted, to all of them, in 40 steps of what the coarsest level accepts, and of what each finer one does; each is
    taken while k wrong labels or fewer, of n that are accepted, have a chance P(K <= k) of at most 5% under
    K ~ Binomial(n, max_error), which is where the Clopper-Pearson bound of the error is at most `max_error`. As the
    first that fails ends the test, no correction for many thresholds is needed; a threshold for each level would.

    A burst counts once (Judged.weights): n and k are sums of weights (Korn & Graubard, Survey Methodology 1998).
    n is rounded down, and the chance of a k between two whole numbers is interpolated. Weights do not depend on what is
    right, so each chance rises with every answer that is wrong instead of right: no promise is loosened by one.

    Source: fixed-sequence testing in Learn then Test (Angelopoulos et al., arXiv 2110.01052).
    """
    needed = images_needed_for(max_error)
    if left_out.count < needed - _FRACTION:
        return math.inf
    odds = left_out.odds
    tried = [_odds_of_counts(column, left_out.counted, 1) for column in odds.T[:-1]]
    tried.append(_odds_of_counts(odds[:, -1], left_out.counted, needed))
    least = math.inf
    for threshold in np.unique(np.concatenate(tried))[::-1].tolist():
        number, k = left_out.accepted_and_wrong(threshold)
        n = int(number + _FRACTION)
        if n < needed:
            continue
        chances = binomial_cdf(n, max_error, min(math.ceil(k), n))
        if np.interp(k, np.arange(len(chances)), chances) > 1.0 - CONFIDENCE + _ROUNDING:
            break
        least = threshold
    return least


def _odds_of_counts(odds: np.ndarray, weights: np.ndarray, first: int) -> np.ndarray:
    """The odds (V,) that images of `first`, ... to all in 40 equal steps reach, as many as their `weights` (V,) say."""
    order = np.argsort(-odds, kind="stable")
    reaching = np.cumsum(weights[order])
    counts = np.unique(np.linspace(first, reaching[-1], _STEPS + 1).round())
    last = np.minimum(np.searchsorted(reaching, counts - _FRACTION), len(odds) - 1)
    return odds[order][last]


def images_needed_for(max_error: float) -> int:
    """The least number of left-out images, all of them right, with which `least_odds` can promise `max_error`.

    >>> images_needed_for(0.01), images_needed_for(0.1)
    (299, 29)
    """
    return math.ceil(math.log(1.0 - CONFIDENCE) / math.log1p(-max(max_error, _LEAST_ERROR)) - 1e-9)


def _promised_by(right: float) -> float:
    """The least error that so many images can promise, all of them right: the e with (1 - e)^right = 5%."""
    return 1.0 - (1.0 - CONFIDENCE) ** (1.0 / right) if right else 1.0


def explained_by_chance(images: int, max_error: float, level: float = 1.0 - CONFIDENCE) -> int:
    """The most wrong labels of `images` that are compatible with a share `max_error` of wrong ones, by a one-sided test
    at `level`: the least k with P(K > k) <= level under K ~ Binomial(images, max_error).

    >>> explained_by_chance(596, 0.01), explained_by_chance(596, 0.01, level=0.05 / 9)
    (10, 13)
    """
    return int(np.searchsorted(binomial_cdf(images, max_error, images), 1.0 - level - _ROUNDING))


def binomial_cdf(n: int, p: float, most: int) -> np.ndarray:
    """P(K <= k) under K ~ Binomial(n, p) for k = 0 .. most, (most + 1,) float64; 0 <= most <= n and 0 < p < 1.

    P(K = k) = P(K = k - 1) (n - k + 1) / k p / (1 - p), summed as logarithms from P(K = 0) = (1 - p)^n.

    >>> binomial_cdf(2, 0.5, 2).round(2).tolist()
    [0.25, 0.75, 1.0]
    """
    k = np.arange(1, most + 1)
    ratios = np.log((n - k + 1) / k) + math.log(p) - math.log1p(-p)
    chances: np.ndarray = np.exp(n * math.log1p(-p) + np.append(0.0, np.cumsum(ratios))).cumsum()
    return chances
