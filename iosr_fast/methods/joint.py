"""Joint prediction: all images of a folder are classified together, and learn from each other."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.methods.log_loss import fit_factor, log_softmax
from iosr_fast.methods.models.gaussian import (
    CHANNELS,
    GaussianModel,
    Gaussians,
    Moments,
    discriminant,
    shrunk_precision,
)
from iosr_fast.methods.out_of_fold import OutOfFold
from iosr_fast.methods.paired_tests import is_level
from iosr_fast.methods.support_set import SupportSet, blocks, image_rows
from iosr_fast.scoring.inputs import checked_inputs
from iosr_fast.scoring.plan import ScoringPlan, Which
from iosr_fast.scoring.reference import softmax
from iosr_fast.scoring.score import score
from iosr_fast.utils.short_repr import short_repr

# The exponent of an image's first probabilities, lambda of TransCLIP with support images.
ANCHOR = 0.5
# First probabilities below exp(FLOOR) count as this much, so that images can correct a plan that is far too sure.
FLOOR = np.float32(-7.0)
# The weight of an unlabelled image in means and covariance; 1 is that of a support image. Chosen on validation images:
# with 1, errors of absent classes add up in folders of a tenth of the classes; below 0.1 little is learnt.
WEIGHT = 0.3
MAX_ROUNDS = 10
_SETTLED = 1e-3  # a round that changes at most this share of the labels is the last
_LEAST = np.float32(-60.0)  # products with denormal probabilities take 100 times as long
_BLOCK = 1 << 22  # logits in memory at a time, 16 MiB
_LEFT_OUT = 2000  # images for the check: its standard error is then about 1 point


@dataclass(frozen=True, eq=False)
class JointPrediction:
    """The result of `predict_jointly` for B images and C classes.

    probabilities   (B, C) float32
    classes         (C,) what the columns stand for; `labels` takes them from here
    refused         why `probabilities` are those of the plan alone, a sentence; "" if images were classified together
    left_out        the number of support images that were left out for the check; 0 if there was none
    left_out_alone, left_out_joint  the shares of them that are right without and with the folder; NaN without a check
    rounds          of the estimation, 0 if it was refused

    >>> import numpy as np
    >>> JointPrediction(np.array([[0.2, 0.8]], np.float32), classes=np.array(["apple", "pear"])).labels.tolist()
    ['pear']
    """

    probabilities: np.ndarray
    classes: np.ndarray
    refused: str = ""
    left_out: int = 0
    left_out_alone: float = float("nan")
    left_out_joint: float = float("nan")
    rounds: int = 0
    seconds: float = 0.0
    __repr__ = short_repr

    @property
    def labels(self) -> np.ndarray:
        """(B,) the class of the largest probability, of equal ones the first."""
        return self.classes[self.probabilities.argmax(1)]

    def summary(self) -> str:
        """One sentence for the user: whether images were classified together, and why."""
        if self.refused:
            return f"each image is classified alone: {self.refused}"
        return (
            f"{len(self.probabilities)} images are classified together: of {self.left_out} left-out support images "
            f"{self.left_out_joint:.1%} are right, {self.left_out_alone:.1%} alone"
        )


@dataclass(frozen=True, eq=False)
class Unlabelled:
    """n images: `rows` (n, D) float32, their first log-probabilities `start` (n, C) float32, and their `weight`."""

    rows: np.ndarray
    start: np.ndarray
    weight: float = WEIGHT

    def blocks(self) -> Iterator[Unlabelled]:
        """Views of a few images at a time, so that memory stays bounded."""
        for rows in blocks(len(self.rows), _BLOCK // self.start.shape[1]):
            yield replace(self, rows=self.rows[rows], start=self.start[rows])

    def logits(self, gaussians: Gaussians) -> np.ndarray:
        """G(x, c) + ANCHOR * max(start, FLOOR), (n, C) float32."""
        return gaussians.scores(self.rows) + np.float32(ANCHOR) * np.maximum(self.start, FLOOR)


def predict_jointly(
    support: SupportSet,
    plan: ScoringPlan,
    alone: OutOfFold,
    queries: Embeddings,
    which: Which = "plain",
    check: bool = True,
) -> JointPrediction:
    """Probabilities of B images that are classified together, started from softmax of the logits of a plan.

    `plan` is that of `support`, `alone` are the out-of-fold logits of its method, and `which` the embeddings that it
    compares. One Gaussian a class with a shared covariance is estimated on support images and `queries` (`estimate`).

    One image of each class at a time is left out of the support set and hidden among the queries, with all together
    no more weight than these. If fewer of them are right than alone, or not more beyond the noise (is_level) while
    their log-loss is higher, the plan's own probabilities are returned and `refused` says why; so they are if the check
    is impossible, because each class has a single support image, or a class has none. At most 16 folds; fewer for more
    than 2,000 support images. The factor that gives left-out images the least log-loss scales the logits.

    Time per fold and for the result, for D channels: at most 10 rounds of two products of (B, D) and (D, C). Memory:
    the result, (B, C) float32, and blocks of 16 MiB. The order of the queries changes rounding only. `check=False`
    skips the check of the queries' finiteness and norms. Raises IosrFastError for queries that don't fit the plan.
    """
    started = time.perf_counter()
    queries = checked_inputs(plan, queries, check).embeddings
    start = np.empty((len(queries), plan.n_classes), np.float32)
    for block in blocks(len(start), _BLOCK // plan.n_classes):
        start[block] = log_softmax(score(plan, queries[block], check=False))
    folder = Unlabelled(image_rows(queries, which, None), start)
    result = JointPrediction(start, np.arange(support.n_classes), _unchecked(support, alone, folder))
    model = ChannelModel(support, which)
    factor = 1.0
    if not result.refused:
        result, factor = _checked(result, model, alone, folder)
    if result.refused:
        return replace(result, probabilities=np.exp(start, out=start), seconds=time.perf_counter() - started)
    gaussians, rounds = estimate(model.moments, [folder])
    for part in folder.blocks():
        part.start[:] = _softmax(np.float32(factor) * part.logits(gaussians))
    return replace(result, rounds=rounds, seconds=time.perf_counter() - started)


class ChannelModel(GaussianModel):
    """Its moments are those of channels: images of the folder, outside the span of the support images, add to them."""

    span = CHANNELS


def _unchecked(support: SupportSet, alone: OutOfFold, folder: Unlabelled) -> str:
    """Why it can't be checked that the folder helps, or ""."""
    if not len(folder.rows):
        return "there are no images to classify"
    if absent := int((support.counts == 0).sum()):
        return f"{absent} of {support.n_classes} classes have no support image to estimate their mean from"
    if not len(alone.labels):
        return "each class has one support image, so none can be left out to check that the folder helps"
    return ""


def estimate(support: Moments, images: Sequence[Unlabelled]) -> tuple[Gaussians, int]:
    """The Gaussians of C classes, float32, and the number of rounds. Repeats, at most MAX_ROUNDS times,

        mu_c = (sum of class c's support rows + sum_i w_i z_ic x_i) / (n_c + sum_i w_i z_ic)
        Sigma = (sum over support rows of x x' + sum_i w_i x_i x_i' - sum_c m_c mu_c mu_c') / (sum_c m_c - 1)
        z_i = softmax over c of (log N(x_i; mu_c, Sigma) + ANCHOR * max(start_ic, FLOOR)),    first z_i = exp(start_i)

    with w_i an image's weight and m_c the denominator of mu_c; Sigma is shrunk (gaussian.shrunk_precision). `support`
    are the moments of the support images, at least one of each class. Classes have no proportions, and one that is
    absent keeps the mean of its support images, so an image of any class is found in any folder.

    Sources: TransCLIP (Zanella et al., NeurIPS 2024, arXiv 2406.01837) without its neighbours and with a full Sigma;
    support images anchor mu_c as the texts of StatA do (Zanella et al., CVPR 2025, arXiv 2501.03729).
    """
    parts = [part for one in images for part in one.blocks()]
    second = support.second.copy()
    gaussians = None
    for part in parts:
        second += part.weight * (part.rows.T @ part.rows).astype(np.float64)
    labels = [np.full(len(part.rows), -1, np.int32) for part in parts]
    allowed = _SETTLED * sum(map(len, labels))
    for done in range(MAX_ROUNDS):
        mass = support.counts.copy()
        sums = support.sums.copy()
        changed = 0
        for part, before in zip(parts, labels, strict=True):
            shares = _softmax(part.start if gaussians is None else part.logits(gaussians))
            changed += int((shares.argmax(1) != before).sum())
            before[:] = shares.argmax(1)
            mass += part.weight * shares.sum(0, dtype=np.float64)
            sums += part.weight * (shares.T @ part.rows).astype(np.float64)
        if gaussians is not None and changed <= allowed:
            return gaussians, done
        moments = Moments(mass, sums, second)
        fitted = discriminant(moments.means, shrunk_precision(moments.scatter, float(mass.sum())))
        # A softmax does not see what all classes share, and float32 has more digits for the rest without it.
        linear, bias = (part.astype(np.float32) for part in fitted.centred)
        gaussians = Gaussians(linear, bias, fitted.precision)
    assert gaussians is not None
    return gaussians, MAX_ROUNDS


def _checked(
    result: JointPrediction, model: ChannelModel, alone: OutOfFold, folder: Unlabelled
) -> tuple[JointPrediction, float]:
    """`result` with its accuracies and, if images are classified worse together, the reason for refusal; and the factor
    of the logits."""
    n_folder = len(folder.rows)
    joint = list[np.ndarray]()
    queries = image_rows(model.support.as_queries, model.which, None)
    folds = alone.folds.first(_LEFT_OUT)
    logits = alone.by_image()
    for chosen, out in folds.splits:
        weight = WEIGHT * min(1.0, n_folder / len(chosen))
        hidden = Unlabelled(queries[chosen], log_softmax(logits[chosen]), weight)
        gaussians, _ = estimate(model.moments_without(out), [hidden, folder])
        joint.append(hidden.logits(gaussians))
    chosen = np.concatenate([rows for rows, _ in folds.splits])
    both = (logits[chosen], np.concatenate(joint))
    expected = model.support.labels[chosen]
    right = [one.argmax(1) == expected for one in both]
    shares = [float(one.mean()) for one in right]
    fits = [fit_factor(one, expected) for one in both]
    result = replace(result, left_out=len(expected), left_out_alone=shares[0], left_out_joint=shares[1])
    refused = (
        f"of {len(expected)} left-out support images hidden among the {n_folder} images, {shares[1]:.1%} are right "
        f"together, {shares[0]:.1%} alone"
    )
    if shares[1] < shares[0]:
        return replace(result, refused=refused), 1.0
    if is_level(*right) and fits[1][1] > fits[0][1]:
        refused += f", no more than noise, and their log-loss is {fits[1][1]:.3f} instead of {fits[0][1]:.3f}"
        return replace(result, refused=refused), 1.0
    return result, fits[1][0]


def _softmax(logits: np.ndarray) -> np.ndarray:
    """softmax, of logits that are not below the largest by more than -_LEAST."""
    return softmax(np.maximum(logits - logits.max(1, keepdims=True), _LEAST))
