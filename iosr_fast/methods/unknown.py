"""A score for pictures of unknown classes, fitted by leaving classes of the support set out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.exceptions import IosrFastError
from iosr_fast.methods.conformal import CALIBRATION, LEFT_OUT, images_needed, threshold
from iosr_fast.methods.folds import Folds, unit_weights
from iosr_fast.methods.ood_scores import NEAREST_KEY, REGRESSION, TEXT_SCORES, OodScores, score_names
from iosr_fast.methods.support_set import SupportSet
from iosr_fast.utils.numbers import check_share
from iosr_fast.utils.ranking import auroc
from iosr_fast.utils.short_repr import short_repr

KEEP = 0.95
# Images are left out fold by fold until there are this many: a share of 5% then has a standard error of half a point.
_MOST = 2000
# Halves of the classes that play the known ones, each in turn with the other half; for each, images of two folds.
HALVES = 6
HALF_FOLDS = 2
# Of the discriminant that combines scores, in units of their mean variance; of that which adds UNKNOWN_KEY, chosen on
# validation images of two data sets between 0.03 and 0.3, which differ by up to a point with three unknown pictures.
RIDGE = 0.03
UNKNOWN_RIDGE = 0.3
# The score that stands alone where nothing can be left out, another where that one is too expensive, and that of texts.
ALONE = (REGRESSION, NEAREST_KEY, TEXT_SCORES[1])
Group = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True, eq=False)
class Unknown:
    """How unlike the known classes a picture is, as fitted by `fit_unknown`.

    support    by all images of which queries are scored
    names      of the K scores (OodScores)
    weights    (K,) float64: familiarity = scores @ weights + bias, in standard deviations of left-out support images
    left_out   (V,) float64, the familiarity of support images, each by models without its fold, or of other images of
               the classes, if these are the `basis` of promises (conformal.CALIBRATION)
    counted    (V,) float64, what each of them counts (folds.unit_weights)
    auroc      of classes that were left out against left-out images of the others, by weights fitted on other halves
               of the classes; NaN where there are too few classes
    unscored   how many classes have no image in `left_out` (`count_unscored`)
    unknown_images  embeddings of pictures of none of the classes, if there are any

    >>> from iosr_fast import Embeddings
    >>> from iosr_fast.methods.folds import make_folds
    >>> from iosr_fast.methods.support_set import make_support_set
    >>> rows = np.eye(4).repeat(5, 0) + 0.1 * np.random.default_rng(0).standard_normal((20, 4))
    >>> rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    >>> support = make_support_set(Embeddings(rows), np.arange(4).repeat(5), text=None, tau=100.0, n_classes=4)
    >>> unknown = fit_unknown(support, make_folds(support))
    >>> unknown.summary(keep=0.99)
    '20 left-out support images are too few to promise that 0.99 of known pictures stay'
    >>> unknown.rejects(Embeddings(np.float32([[1, 0, 0, 0], [-0.5, -0.5, -0.5, -0.5]])))
    array([False,  True])
    """

    support: SupportSet = field(repr=False)
    names: tuple[str, ...]
    weights: np.ndarray
    bias: float
    left_out: np.ndarray
    counted: np.ndarray
    auroc: float
    unscored: int
    unknown_images: Embeddings | None = field(default=None, repr=False)
    basis: str = LEFT_OUT
    __repr__ = short_repr

    @cached_property
    def scorer(self) -> OodScores:
        return OodScores(self.support, self.names, self.unknown_images)

    def score(self, queries: Embeddings) -> np.ndarray:
        """(B,) float64, higher for a picture that is less like the known classes; of left-out support images the mean
        is 0 and the standard deviation 1."""
        return -(self.scorer(queries) @ self.weights + self.bias)

    def threshold(self, keep: float = KEEP) -> float:
        """A picture with a higher score is rejected; a share `keep` of known pictures is not. Raises IosrFastError
        where there are too few support images for that promise (conformal.threshold)."""
        return -threshold(self.left_out, check_share("keep", keep), self.basis, self.counted)

    def can_promise(self, keep: float) -> bool:
        """Whether there are enough images for `threshold`."""
        return bool(self.counted.sum() >= images_needed(keep) - 1e-6)

    def calibrated_on(self, images: Embeddings, units: np.ndarray) -> Unknown:
        """The same scores, whose promises rest on these images of the classes; `units` as of folds.Folds."""
        familiarity = -self.score(images)
        made = replace(self, left_out=familiarity, counted=unit_weights(units), basis=CALIBRATION)
        return made._scored_by(self.scorer)

    def _scored_by(self, scorer: OodScores) -> Unknown:
        """The same, with a scorer that is fitted already."""
        vars(self)["scorer"] = scorer
        return self

    def rejects(self, queries: Embeddings, keep: float = KEEP) -> np.ndarray:
        """(B,) bool, the pictures that are rejected. Raises IosrFastError as `threshold`, before anything is scored."""
        limit = self.threshold(keep)
        return self.score(queries) > limit

    def summary(self, keep: float = KEEP) -> str:
        """One sentence: what is kept, how well classes that were left out are found, or why nothing can be promised."""
        keep = check_share("keep", keep)
        images = f"{len(self.left_out)} {self.basis}"
        if not self.can_promise(keep):
            return f"{images} are too few to promise that {keep:.4g} of known pictures stay"
        sentence = f"{keep:.4g} of known pictures stay, by {images}"
        if self.basis == LEFT_OUT and self.unscored:
            sentence += f" (none of {self.unscored} classes, whose pictures are rejected more often)"
        if not np.isnan(self.auroc):
            sentence += f"; classes that are left out are told apart with an AUROC of {self.auroc:.3f}"
        return sentence


def fit_unknown(support: SupportSet, folds: Folds, adapted: bool = False, unknown: Embeddings | None = None) -> Unknown:
    """Combine the scores of OodScores so that unknown pictures have a low one. `folds` say which images are left out
    together, `adapted` includes the scores of adapted embeddings.

    No picture of an unknown class is needed: HALVES random halves of the classes play the known ones. Left-out images
    of a half, and images of the other one as unknown, are scored by a model of the rest of the half. The scores are
    standardised by the left-out known images, and combined by a linear discriminant over all halves:

        weights = (S_known + S_unknown + RIDGE tr / K I)^-1 (mean_known - mean_unknown)

    with S the covariance of the standardised scores (K, K) and tr the trace of both. In use they are standardised by
    left-out images of all classes, whose combined scores also give the threshold.

    `unknown` are pictures of none of the classes, from two on: minus the largest cosine to one of them is another score
    (UNKNOWN_KEY), for unknown pictures themselves to another one. The same discriminant of two scores, the combined one
    and this, weighs it by left-out images and these pictures; it is left out where either weight is not above 0.

    Where each class has one image or there are two classes, no weights can be fitted: the regression's score
    stands alone, and without left-out images nothing can be promised. Time: one regression of N^3 operations, and for
    each of 16 folds and 12 halves and folds a precision of min(N, D)^3. Same support set, same result.
    """
    names = score_names(support, adapted)
    all_names = score_names(support, adapted, unknown)
    first = folds.first(_MOST)
    unscored = count_unscored(support, folds)
    if not len(first.rows):
        none = np.zeros(0)
        return Unknown(support, all_names, _alone(all_names), 0.0, none, none, float("nan"), unscored, unknown)
    scorer = OodScores(support, all_names, unknown)
    values = scorer.without(first)
    groups = list(_halves(support, folds, names))
    weights = (_weights(groups) if groups else _alone(names)) / _deviations(values)
    familiarity = values @ weights
    if unknown is not None and all_names != names:
        weights, familiarity = _with_unknown(scorer, weights, familiarity, support.as_queries[first.rows], unknown)
    deviation = float(familiarity.std()) or 1.0
    bias = -float(familiarity.mean()) / deviation
    made = Unknown(
        support,
        all_names,
        weights / deviation,
        bias,
        left_out=familiarity / deviation + bias,
        counted=unit_weights(first.units[first.rows]),
        auroc=_held_out_auroc(groups),
        unscored=unscored,
        unknown_images=unknown,
    )
    return made._scored_by(scorer.kept())


def _with_unknown(
    scorer: OodScores, weights: np.ndarray, familiarity: np.ndarray, left_out: Embeddings, unknown: Embeddings
) -> tuple[np.ndarray, np.ndarray]:
    """The weights (K + 1,) with UNKNOWN_KEY, the last score of `scorer`, and the combined scores (V,) of left-out
    images, from `weights` (K,) and `familiarity` (V,) without it."""
    assert scorer.unknown_keys is not None
    cosines = scorer.unknown_keys @ scorer.unknown_keys.T
    cosines[np.diag_indices(len(cosines))] = -np.inf
    pairs = np.stack([familiarity, scorer.unlike_unknown(left_out)], 1)
    group = _standardised(pairs, np.stack([scorer(unknown)[:, :-1] @ weights, -cosines.max(1)], 1))
    both = _weights([group], UNKNOWN_RIDGE) / _deviations(pairs)
    if both.min() <= 0:
        both = np.array([1.0, 0.0])
    return np.append(both[0] * weights, both[1]), pairs @ both


def count_unscored(support: SupportSet, folds: Folds) -> int:
    """How many classes have support images, but none that `folds` score."""
    scored = np.bincount(support.labels[folds.rows], minlength=support.n_classes)
    return int(((support.counts > 0) & (scored == 0)).sum())


def check_unknown_images(count: int) -> None:
    """Raise IosrFastError for a single picture of none of the classes, which `fit_unknown` can't use."""
    if count == 1:
        raise IosrFastError("expected two or more unknown images, which are compared with each other, got one")


def _halves(support: SupportSet, folds: Folds, names: tuple[str, ...]) -> Iterator[Group]:
    """Groups of standardised scores: left-out images of one half of the classes, and images of the other half. There
    are HALVES random halves, each followed by the other half where that has two classes."""
    queries, labels = support.as_queries, support.labels
    rng = np.random.default_rng(0)
    present = np.flatnonzero(support.counts)
    size = max(2, len(present) // 2)
    for _ in range(HALVES // 2 if len(present) > 2 else 0):
        shuffled = rng.permutation(present)
        for half in (shuffled[:size], shuffled[size:]):
            of_half = np.isin(np.arange(support.n_classes), half)
            for fold in range(min(HALF_FOLDS, folds.number) if len(half) > 1 else 0):
                out = folds.fold == fold
                left = of_half[labels] & out & folds.scored
                unknown = ~of_half[labels] & (folds.fold % HALF_FOLDS == fold)
                unknown &= ~np.isin(folds.units, folds.units[of_half[labels] & ~out])
                others = support.only(~out).of_classes(of_half)
                if left.any() and unknown.any() and np.count_nonzero(others.counts) > 1:
                    scorer = OodScores(others, names)
                    yield _standardised(scorer(queries[left]), scorer(queries[unknown]))


def _standardised(known: np.ndarray, unknown: np.ndarray) -> Group:
    mean = known.mean(0)
    deviations = _deviations(known)
    return (known - mean) / deviations, (unknown - mean) / deviations


def _deviations(scores: np.ndarray) -> np.ndarray:
    """(K,) standard deviations; 1 where that is mere rounding."""
    deviations = scores.std(0)
    return np.where(deviations > 1e-9 * np.maximum(np.abs(scores).max(0), 1e-9), deviations, 1.0)


def _weights(groups: Sequence[Group], ridge: float = RIDGE) -> np.ndarray:
    """The linear discriminant of `fit_unknown`, (K,), in which all groups count the same."""
    means = []
    covariance = np.zeros((groups[0][0].shape[1],) * 2)
    for side in (0, 1):
        mean = np.mean([group[side].mean(0) for group in groups], axis=0)
        for group in groups:
            centred = group[side] - mean
            covariance += (centred.T @ centred) / len(centred) / len(groups)
        means.append(mean)
    covariance[np.diag_indices(len(covariance))] += ridge * (np.trace(covariance) / len(covariance) or 1.0)
    return np.linalg.solve(covariance, means[0] - means[1])


def _held_out_auroc(groups: Sequence[Group]) -> float:
    """The mean over groups of the AUROC, each by the weights of the groups of other halves."""
    if len(groups) < 2 * HALF_FOLDS:
        return float("nan")
    values = []
    for k, (known, unknown) in enumerate(groups):
        others = [group for j, group in enumerate(groups) if j // HALF_FOLDS != k // HALF_FOLDS]
        weights = _weights(others)
        values.append(auroc(known @ weights, unknown @ weights))
    return float(np.mean(values))


def _alone(names: tuple[str, ...]) -> np.ndarray:
    """The weights (K,) where none can be fitted: one score, by the images of adapted embeddings where there are any."""
    name = next(name for alone in ALONE for name in reversed(names) if name in (alone, f"{alone}, adapted"))
    return np.eye(len(names))[names.index(name)]
