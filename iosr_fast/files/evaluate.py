"""The work of Classifier.evaluate: labelled images, each encoded once."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from iosr_fast.exceptions import BadImageError, IosrFastError
from iosr_fast.files.stream import Reader
from iosr_fast.head.calibration import compare_with_support
from iosr_fast.head.predictions import predict
from iosr_fast.head.quality import MISTAKES, Evaluation, Mistake, SetCoverage, UnknownResult
from iosr_fast.head.verdict import judge, unknown_scores
from iosr_fast.images.crop import path_of
from iosr_fast.methods.automation import PROMISES, automation, least_odds
from iosr_fast.methods.conformal import Judged, of_logits
from iosr_fast.methods.folds import unit_weights
from iosr_fast.methods.judgement import PromiseResult, accuracy_at, judge_promises
from iosr_fast.utils.numbers import check_share
from iosr_fast.utils.progress import progress
from iosr_fast.utils.ranking import auroc

if TYPE_CHECKING:
    from iosr_fast.delivery.fitted import FittedClassifier
    from iosr_fast.encoders.encoder import Embeddings
    from iosr_fast.head.head import Head

Truth: TypeAlias = tuple[str | None, float]  # the label of a mistake, and its probability
_NEAREST = 3  # support images of a mistake
_BLOCK = 1024  # images whose logits are in memory


def evaluate_images(
    fit: FittedClassifier,
    reader: Reader,
    images: Any,
    labels: Any,
    unknown_images: Any,
    coverage: float,
    keep: float,
    shown: bool,
) -> Evaluation:
    """As Classifier.evaluate. `shown` is whether to show bars."""
    coverage, keep = check_share("coverage", coverage), check_share("keep", keep)
    head = fit.head.require_single_label("evaluate", "score gives the mean average precision")
    listed = reader.listed(images)
    class_ids = fit.read_labels(listed, labels)
    others = [] if unknown_images is None else reader.listed(unknown_images)
    errors: list[BadImageError] = []

    def encoded(sources: Sequence[Any]) -> tuple[list[int], list[Any], Embeddings | None]:
        """Positions and names of the readable images, and their embeddings."""
        rows, unread, embeddings = reader.embed(sources, advance)
        errors.extend(unread)
        shown = [source if isinstance(source := sources[i], str | Path) else path_of(source) or i for i in rows]
        return rows, shown, embeddings

    with progress("encode", len(listed) + len(others), shown=shown) as advance:
        rows, names, embeddings = encoded(listed)
        if embeddings is None:
            raise IosrFastError(f"expected images to evaluate on, got {len(listed)}, none of which can be read")
        _, other_names, unknown = encoded(others) if len(others) else ([], [], None)
    result = _measure_unknown(head, embeddings, unknown, other_names, keep)
    return _measure(head, embeddings, class_ids[rows], names, coverage, unknown=result, errors=tuple(errors))


def _measure(
    head: Head, embeddings: Embeddings, labels: np.ndarray, images: Sequence[Any], coverage: float, **others: Any
) -> Evaluation:
    """The Evaluation of B images by their embeddings (B, D), the positions of their classes (B,) and their names;
    `others` are the fields that are measured already."""
    left_out = head.judged
    reason = _refusal(left_out.thresholds, coverage)

    def judged(rows: slice) -> np.ndarray:
        verdict, of_rows = judge(head, embeddings[rows]), labels[rows]
        logits = head.calibrated(verdict.logits)
        members = np.zeros(logits.shape, bool) if reason else left_out.sets(logits, coverage)
        one, covered = of_logits(logits, of_rows, tree=head.tree), members[np.arange(len(of_rows)), of_rows]
        columns = [one.label_odds, one.log_loss, verdict.labels, members.sum(1), covered]
        return np.concatenate([columns, one.odds.T, one.right.T])

    blocks = [judged(slice(start, start + _BLOCK)) for start in range(0, len(labels), _BLOCK)]
    odds, log_loss, predicted, sizes, covered, *levels = np.concatenate(blocks, axis=1)
    level_odds, right = np.split(np.stack(levels, 1), 2, axis=1)
    beside = compare_with_support(head.support, embeddings, labels, None, head.config.look_alikes)
    weights = unit_weights(beside.units)
    outcome = Judged(odds, level_odds, right > 0, log_loss, labels, weights=weights)
    wrong = np.flatnonzero(~outcome.right[:, 0])
    worst = wrong[np.argsort(-outcome.odds[:, 0][wrong], kind="stable")][:MISTAKES]
    truths = [(head.class_names[labels[row]], math.exp(-log_loss[row])) for row in worst]
    shares = (math.nan,) * 3 if reason else (float(covered.mean()), float(sizes.mean()), float((sizes == 0).mean()))
    return Evaluation(
        images=images,
        classes=head.class_names,
        labels=labels,
        predicted=predicted.astype(np.int64),
        confidence=outcome.confidence,
        count=outcome.count,
        reliability=outcome.reliability,
        expected=left_out.reliability.accuracy,
        expected_images=round(left_out.count),
        expected_at_sizes=accuracy_at(left_out, np.bincount(labels, weights, len(head.class_names))),
        basis=left_out.basis,
        mistakes=_mistakes(head, embeddings, worst, images, truths),
        copies=int(beside.near.sum()),
        siblings=int(beside.siblings.sum()),
        warnings=beside.warning,
        sets=SetCoverage(coverage, *shares, reason),
        promises=_judge_promises(left_out, outcome),
        automation=automation(left_out, outcome),
        expected_automation=automation(left_out),
        **others,
    )


def _judge_promises(left_out: Judged, images: Judged) -> tuple[PromiseResult, ...]:
    """What these images say of automation.PROMISES that rest on left-out ones."""
    chosen = []
    for promised in PROMISES:
        _, *counts = images.answered(least_odds(left_out, promised))
        chosen.append(counts)
    return judge_promises(PROMISES, np.sum(chosen, axis=2), np.array(chosen) @ images.counted)


def _measure_unknown(
    head: Head, embeddings: Embeddings, unknown: Embeddings | None, images: Sequence[Any], keep: float
) -> UnknownResult:
    """What predict(unknown="reject", keep=keep) does with embeddings of the classes, and with those of none."""
    if not len(head.examples):
        return UnknownResult(keep, reason="there are no support images")
    reason = _refusal(head.unknown.threshold, keep)
    promised = None if reason else keep
    scores, rejected = unknown_scores(head, embeddings, promised)
    kept = math.nan if reason else float((~rejected).mean())
    if unknown is None:
        return UnknownResult(keep, kept, reason=reason)
    others, others_rejected = unknown_scores(head, unknown, promised)
    accepted = np.argsort(others, kind="stable")[: 0 if reason else np.count_nonzero(~others_rejected)][:MISTAKES]
    mistakes = _mistakes(head, unknown, accepted, images, [(None, 0.0)] * len(accepted))
    share = math.nan if reason else float(others_rejected.mean())
    return UnknownResult(keep, kept, len(others), share, auroc(others, scores), mistakes, reason)


def _mistakes(
    head: Head, embeddings: Embeddings, rows: np.ndarray, images: Sequence[Any], truths: Sequence[Truth]
) -> tuple[Mistake, ...]:
    predictions = predict(head, embeddings[rows], 1, _NEAREST) if len(rows) else []
    return tuple(
        Mistake(images[row], *truth, one.top[0].label, one.top[0].probability, one.nearest)
        for row, truth, one in zip(rows.tolist(), truths, predictions, strict=True)
    )


def _refusal(promise: Callable[[float], Any], share: float) -> str:
    """Why `share` can't be promised, or ""."""
    try:
        promise(share)
    except IosrFastError as error:
        return str(error)
    return ""
