"""Joint prediction: all images of a folder are classified together, and learn from each other."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.methods import gda
from iosr_fast.methods.gaussian_mixture import WEIGHT, Unlabelled, blocks, estimate, softmax_in_place
from iosr_fast.methods.left_out import Compile
from iosr_fast.methods.promise import left_out_folds
from iosr_fast.methods.support_set import SupportSet, image_rows
from iosr_fast.methods.tuning.log_loss import fit_factor
from iosr_fast.methods.tuning.parameter_search import is_level
from iosr_fast.scoring.inputs import scoring_inputs
from iosr_fast.scoring.plan import ScoringPlan, Which
from iosr_fast.scoring.score import score
from iosr_fast.scoring.scorer import Scorer

# The check leaves images out fold by fold until this number is reached: its standard error is then about 1 point ...
_LEFT_OUT = 2000
# ... or this number of logits, each fold having those of the whole folder.
_CHECK_LOGITS = 1 << 26


@dataclass(frozen=True, eq=False)
class JointPrediction:
    """The result of `predict_jointly` for B images and C classes.

    probabilities   (B, C) float32
    classes         (C,) what the columns stand for; `labels` takes them from here
    refused         why `probabilities` are those of the plan alone, a sentence; "" if images were classified together
    left_out        the number of support images that were left out for the check; 0 if there was none
    left_out_alone, left_out_joint  the shares of them that are right without and with the folder; NaN without a check
    which           the embeddings that the Gaussians describe
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
    which: Which = "plain"
    rounds: int = 0
    seconds: float = 0.0

    @property
    def labels(self) -> np.ndarray:
        """(B,) the class of the largest probability, of equal ones the first."""
        labels: np.ndarray = self.classes[self.probabilities.argmax(1)]
        return labels

    def summary(self) -> str:
        """One sentence for the user: whether images were classified together, and why."""
        if self.refused:
            return f"each image is classified alone: {self.refused}"
        return (
            f"{len(self.probabilities)} images are classified together: of {self.left_out} left-out support images "
            f"{self.left_out_joint:.1%} are right, {self.left_out_alone:.1%} alone"
        )


def predict_jointly(
    support: SupportSet,
    plan_of: Compile,
    queries: Embeddings,
    *,
    plan: ScoringPlan | None = None,
    check: bool = True,
) -> JointPrediction:
    """Probabilities of B images that are classified together, started from those of a plan.

    `plan_of` makes the plan of a support set: MethodConfig.compile, Tuned.compile, or one of yours. `plan` is that of
    `support`, if it exists already; its probabilities, softmax of its logits, should be calibrated. One Gaussian a
    class with a shared covariance is estimated on support images and `queries` (gaussian_mixture.estimate), of plain
    or adapted embeddings, whichever classify left-out support images better by GDA.

    One image of each class at a time is left out of the support set and hidden among the queries, with all together
    no more weight than these. If fewer of them are right than by a plan compiled without them, or not more beyond the
    noise (is_level) while their log-loss is higher, the plan's own probabilities are returned and `refused` says why;
    so they are if the check is impossible, because each class has a single support image, or a class has none. At most
    16 folds; fewer for more than 2,000 support images or many queries. The factor of the logits that gives left-out
    images the least log-loss scales those of `queries`.

    Time per fold and for the result, for D channels: at most 10 rounds of two products of (B, D) and (D, C). Memory:
    the result, (B, C) float32, and blocks of 16 MiB. The order of the queries changes rounding only.

    `check=False` skips the check of the queries' finiteness and norms, never of shapes. Raises IosrFastError for
    queries that don't fit the plan.

    Sources: TransCLIP (Zanella et al., NeurIPS 2024), StatA (Zanella et al., CVPR 2025).

    >>> import numpy as np
    >>> from iosr_fast import Embeddings
    >>> from iosr_fast.methods.support_set import make_support_set
    >>> from iosr_fast.methods.tuning.tune import tune
    >>> rng = np.random.default_rng(0)
    >>> def draw(n):  # n images of each of 5 classes
    ...     rows = 2.0 * np.eye(5, 16).repeat(n, 0) + 0.4 * rng.standard_normal((5 * n, 16))
    ...     rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    ...     return Embeddings(rows.astype(np.float32)), np.arange(5).repeat(n)
    >>> support = make_support_set(*draw(3), text=None, tau=100.0, n_classes=5)
    >>> folder, labels = draw(40)
    >>> joint = predict_jointly(support, tune("gda", support).compile, folder)
    >>> joint.probabilities.shape, joint.left_out, joint.refused
    ((200, 5), 15, '')
    >>> bool((joint.labels == labels).mean() > 0.95)
    True
    """
    started = time.perf_counter()
    plan = plan_of(support) if plan is None else plan
    queries = scoring_inputs(plan, queries, check).embeddings
    refused = _unavailable_reason(support, queries)
    result = JointPrediction(np.zeros(0), np.arange(support.n_classes), refused)
    factor = 1.0
    if not refused:
        which = _which(support, queries)
        result, factor = _left_out(support, plan_of, queries, replace(result, which=which))
    probabilities = _log_probabilities(plan, queries)
    if result.refused:
        np.exp(probabilities, out=probabilities)
    else:
        images = Unlabelled(image_rows(queries, result.which, None), probabilities)
        rows = image_rows(support.embeddings, result.which, None)
        gaussians, rounds = estimate(rows, support.class_offsets, [images])
        result = replace(result, rounds=rounds)
        for block in images.blocks():
            logits = gaussians.logits(images, block)
            logits *= np.float32(factor)
            softmax_in_place(logits)
            probabilities[block] = logits
    return replace(result, probabilities=probabilities, seconds=time.perf_counter() - started)


def _unavailable_reason(support: SupportSet, queries: Embeddings) -> str:
    counts = support.counts
    if not len(queries):
        return "there are no images to classify"
    if not counts.all():
        return f"{int((counts == 0).sum())} of {len(counts)} classes have no support image to estimate their mean from"
    if not left_out_folds(support)[1].any():
        return "each class has one support image, so none can be left out to check that the folder helps"
    return ""


def _folds(support: SupportSet, logits_each: int) -> Iterator[tuple[np.ndarray, SupportSet]]:
    """The rows of images that are left out together, and the support set without them (left_out_folds).

    `logits_each` logits are computed for a fold; all folds, or as many as give what a check needs.
    """
    folds, scored = left_out_folds(support)
    found = logits = 0
    for fold in range(folds.max() + 1):
        if fold and (found >= _LEFT_OUT or logits + logits_each > _CHECK_LOGITS):
            return
        chosen = np.flatnonzero((folds == fold) & scored)
        yield chosen, support.only(folds != fold)
        found, logits = found + len(chosen), logits + logits_each


def _which(support: SupportSet, queries: Embeddings) -> Which:
    """The embeddings by which GDA without texts classifies more left-out support images, plain ones if equal."""
    if support.embeddings.adapted is None or queries.adapted is None:
        return "plain"
    alone = replace(support, text=None)
    own = alone.as_queries
    right: dict[Which, int] = {"plain": 0, "adapted": 0}
    for chosen, others in _folds(alone, 0):
        for which in right:
            logits = score(gda.gda(others, which, alpha=1.0), own[chosen])
            right[which] += int((logits.argmax(1) == alone.labels[chosen]).sum())
    return "adapted" if right["adapted"] > right["plain"] else "plain"


def _left_out(
    support: SupportSet, plan_of: Compile, queries: Embeddings, result: JointPrediction
) -> tuple[JointPrediction, float]:
    """The check: `result` with its accuracies and, if images are classified worse together, the reason for refusal;
    and the factor of the logits."""
    own = support.as_queries
    folds, labels = [], []
    for chosen, others in _folds(support, len(queries) * support.n_classes):
        folds.append(_fold(others, plan_of(others), own[chosen], queries, result.which))
        labels.append(support.labels[chosen])
    alone, joint = (np.concatenate(logits) for logits in zip(*folds, strict=True))
    expected = np.concatenate(labels)
    right = [logits.argmax(1) == expected for logits in (alone, joint)]
    shares = [float(one.mean()) for one in right]
    fits = [fit_factor(logits, np.zeros_like(logits), expected, 0.0) for logits in (alone, joint)]
    result = replace(result, left_out=len(expected), left_out_alone=shares[0], left_out_joint=shares[1])
    refused = (
        f"of {len(expected)} left-out support images hidden among the {len(queries)} images, {shares[1]:.1%} are right "
        f"together, {shares[0]:.1%} alone"
    )
    if shares[1] < shares[0]:
        return replace(result, refused=refused), 1.0
    if is_level(*right) and fits[1].loss > fits[0].loss:
        refused += f", no more than noise, and their log-loss is {fits[1].loss:.3f} instead of {fits[0].loss:.3f}"
        return replace(result, refused=refused), 1.0
    return result, fits[1].factor


def _fold(
    support: SupportSet, plan: ScoringPlan, own: Embeddings, queries: Embeddings, which: Which
) -> tuple[np.ndarray, np.ndarray]:
    """Logits of the left-out images `own`, alone and hidden among the queries."""
    alone = _log_probabilities(plan, own)
    hidden = Unlabelled(image_rows(own, which, None), alone, WEIGHT * min(1.0, len(queries) / len(own)))
    folder = Unlabelled(image_rows(queries, which, None), _log_probabilities(plan, queries))
    rows = image_rows(support.embeddings, which, None)
    gaussians, _ = estimate(rows, support.class_offsets, [hidden, folder])
    return alone, gaussians.logits(hidden, slice(None))


def _log_probabilities(plan: ScoringPlan, queries: Embeddings) -> np.ndarray:
    """log softmax of the plan's logits, (B, C) float32."""
    scorer = Scorer(plan)
    result = np.empty((len(queries), plan.n_classes), np.float32)
    for block in blocks(*result.shape):
        logits = scorer(queries[block], check=False)
        logits = logits - logits.max(1, keepdims=True)
        logits -= np.log(np.exp(logits).sum(1, keepdims=True))
        result[block] = logits
    return result
