"""The work of Classifier.evaluate: labelled images, each encoded once."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from iosr_fast.exceptions import BadImageError, IosrFastError
from iosr_fast.files.stream import Reader
from iosr_fast.head.calibration import compare_with_support
from iosr_fast.head.predictions import predict
from iosr_fast.head.quality import MISTAKES, Evaluation
from iosr_fast.head.quality_parts import Mistake, SetCoverage, UnknownResult
from iosr_fast.head.verdict import judge, unknown_scores
from iosr_fast.images.crop import path_of
from iosr_fast.methods.automation import PROMISES, automation, least_odds
from iosr_fast.methods.conformal import COVERAGE, Judged, of_answers, of_logits
from iosr_fast.methods.folds import unit_weights
from iosr_fast.methods.judgement import PromiseResult, accuracy_at, judge_promises
from iosr_fast.methods.unknown import KEEP
from iosr_fast.utils.numbers import check_share
from iosr_fast.utils.progress import progress
from iosr_fast.utils.ranking import auroc, mean_average_precision

if TYPE_CHECKING:
    from iosr_fast.delivery.fitted import FittedClassifier
    from iosr_fast.encoders.encoder import Embeddings
    from iosr_fast.head.head import Head

Labels = Sequence[tuple[str | None, float]]  # of mistakes, with their probabilities
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
    head, listed = fit.head, reader.listed(images)
    class_ids = fit.read_labels(listed, labels)
    others = [] if unknown_images is None else reader.listed(unknown_images)
    if len(others) or (coverage, keep) != (COVERAGE, KEEP):
        head.require_single_label("evaluate with unknown_images, keep or coverage", "leave these out")
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
    labels, left_out = class_ids[rows], head.judged
    beside = compare_with_support(head.support, embeddings, labels, None, head.config.look_alikes)
    if head.is_multi_label:
        outcome, fields = _of_answers(head, embeddings, labels, beside.units, names)
    else:
        outcome, fields = _of_images(head, embeddings, labels, beside.units, names, coverage)
        fields["unknown"] = _measure_unknown(head, embeddings, unknown, other_names, keep)
    return Evaluation(
        images=names,
        classes=head.class_names,
        labels=labels,
        count=outcome.count,
        reliability=outcome.reliability,
        expected=left_out.reliability.accuracy,
        expected_images=round(left_out.count),
        expected_at_sizes=accuracy_at(left_out, np.bincount(outcome.labels, outcome.counted, len(head.class_names))),
        basis=left_out.basis,
        copies=int(beside.near.sum()),
        siblings=int(beside.siblings.sum()),
        warnings=beside.warning,
        promises=_judge_promises(left_out, outcome),
        automation=automation(left_out, outcome),
        expected_automation=automation(left_out),
        errors=tuple(errors),
        **fields,
    )


def _of_images(
    head: Head, embeddings: Embeddings, labels: np.ndarray, units: np.ndarray, images: Sequence[Any], coverage: float
) -> tuple[Judged, dict[str, Any]]:
    """What is said of B images with a label each, by their embeddings (B, D), the positions of their classes (B,),
    their units (B,) and names; and the fields of the Evaluation that are measured so."""
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
    outcome = Judged(odds, level_odds, right > 0, log_loss, labels, weights=unit_weights(units))
    wrong = np.flatnonzero(~outcome.right[:, 0])
    worst = wrong[np.argsort(-outcome.odds[:, 0][wrong], kind="stable")][:MISTAKES]
    truths = [(head.class_names[labels[row]], math.exp(-log_loss[row])) for row in worst]
    shares = (math.nan,) * 3 if reason else (float(covered.mean()), float(sizes.mean()), float((sizes == 0).mean()))
    return outcome, {
        "predicted": predicted.astype(np.int64),
        "confidence": outcome.confidence,
        "mistakes": _mistakes(head, embeddings, worst, images, truths),
        "sets": SetCoverage(coverage, *shares, reason),
    }


def _of_answers(
    head: Head, embeddings: Embeddings, labels: np.ndarray, units: np.ndarray, images: Sequence[Any]
) -> tuple[Judged, dict[str, Any]]:
    """As _of_images, of images that may have several labels, an indicator (B, C); what is said is of each answer."""
    blocks = range(0, len(labels), _BLOCK)
    logits = np.concatenate([judge(head, embeddings[start : start + _BLOCK]).logits for start in blocks])
    predicted, probabilities = head.link.decide(logits), head.probabilities(logits)
    # The surest mistake first: a wrong label by its logit, a missed one by what it is below 0.
    rows, classes = np.nonzero(predicted != labels)
    given = predicted[rows, classes]
    order = np.argsort(np.where(given, -1, 1) * logits[rows, classes], kind="stable")[:MISTAKES]
    missed, wrong = list[tuple[str | None, float]](), list[tuple[str | None, float]]()
    for row, c, is_given in zip(*(one[order].tolist() for one in (rows, classes, given)), strict=True):
        both = [(None, 0.0), (head.class_names[c], float(probabilities[row, c]))]
        missed.append(both[not is_given])
        wrong.append(both[is_given])
    return of_answers(logits, labels, predicted, units), {
        "predicted": predicted,
        "confidence": probabilities,
        "mistakes": _mistakes(head, embeddings, rows[order], images, missed, wrong),
        "sets": None,
        "unknown": None,
        "average_precision": mean_average_precision(labels, logits),
    }


def _judge_promises(left_out: Judged, images: Judged) -> tuple[PromiseResult, ...]:
    """What these images say of automation.PROMISES that rest on left-out ones."""
    least = [least_odds(left_out, promised) for promised in PROMISES]
    accepted = np.array([np.sum(images.answered(one)[1:], axis=1) for one in least])
    return judge_promises(PROMISES, accepted, np.array([images.accepted_and_wrong(one) for one in least]))


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
    head: Head,
    embeddings: Embeddings,
    rows: np.ndarray,
    images: Sequence[Any],
    truths: Labels,
    answers: Labels | None = None,
) -> tuple[Mistake, ...]:
    """The images of `rows` with their labels and the answers to them, None for those of the most likely classes."""
    predictions = predict(head, embeddings[rows], 1, _NEAREST) if len(rows) else []
    answers = [one.pairs[0] for one in predictions] if answers is None else answers
    return tuple(
        Mistake(images[row], *truth, *answer, one.nearest)
        for row, truth, answer, one in zip(rows.tolist(), truths, answers, predictions, strict=True)
    )


def _refusal(promise: Callable[[float], Any], share: float) -> str:
    """Why `share` can't be promised, or ""."""
    try:
        promise(share)
    except IosrFastError as error:
        return str(error)
    return ""
