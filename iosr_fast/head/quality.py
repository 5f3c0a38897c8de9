"""How right a fitted classifier is on labelled images that it has not seen, and on pictures of none of its classes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from iosr_fast.exceptions import BadImageError
from iosr_fast.head.quality_parts import ClassResult, Mistake, Mixup, SetCoverage, UnknownResult
from iosr_fast.methods.automation import Automation
from iosr_fast.methods.config import wilson
from iosr_fast.methods.conformal import BINS, LEFT_OUT, Reliability, counted_as
from iosr_fast.methods.judgement import PromiseResult, difference_of_shares, once
from iosr_fast.utils.json_values import json_values
from iosr_fast.utils.result import Result

MISTAKES = 100  # that are explained; the arrays of an Evaluation have all
MATRIX = 30  # classes up to which a confusion matrix is shown and stored


@dataclass(frozen=True, eq=False, repr=False)
class Evaluation(Result):
    """The result of `evaluate` for B images and C classes; the most probable mistakes come first in `to_frame`.

    It is about answers, pairs of an image and a label that it was given: where images have one label each, one an
    image; where they may have several, any number. `confusion`, `sets` and `unknown` are then None.

    images            (B,) what names an image: its path or its position
    classes           the C class names
    labels, predicted (B,) int64, positions of classes; (B, C) bool where images may have several labels
    confidence        (B,) float64, the probability of `predicted`; (B, C), of each class
    count             what the answers count as: a burst counts once, labels of one image less than those of several
                      (conformal.Judged.count)
    reliability       accuracy, log-loss and calibration of the answers as they count (conformal.Reliability)
    expected          the accuracy of left-out support images, or of other images if these are the `basis` of promises
                      (conformal.CALIBRATION); NaN without any
    expected_images   how many these are
    expected_at_sizes judgement.accuracy_at for the class sizes of the answers: with it their accuracy is compared
    mistakes          the most probable wrong answers first, at most MISTAKES, and where images may have several labels
                      also missed ones: those that it was surest not to give
    copies, siblings  how many images are near duplicates or siblings of support images (calibration.Beside), and say
                      little about new ones; `warnings` has a sentence where siblings are too many
    sets, unknown     what promises are worth on these images
    promises          a PromiseResult for each promise by which labels of these images are accepted, the strictest first
    automation        what promises of predict(max_error=) are worth: the curve of promises with the shares and errors
                      of these images, with a tree by level, too; expected_automation has those of
                      left-out support images
    errors            a BadImageError for each unreadable image, which counts nowhere
    average_precision the mean over the classes (utils.ranking), where images may have several labels; else None

    >>> from iosr_fast import Classifier, labelled_images
    >>> classifier = Classifier("demo").fit_folder("support")
    >>> images, labels, *_ = labelled_images("validation")
    >>> evaluation = classifier.evaluate(images, labels)
    >>> evaluation.accuracy == classifier.score(images, labels)
    True
    >>> len(evaluation.mistakes) == evaluation.wrong, int(evaluation.confusion.sum()), len(evaluation.class_results)
    (True, 10, 10)
    >>> evaluation.to_frame().columns.tolist()
    ['image', 'label', 'predicted', 'probability', 'right']
    """

    images: Sequence[Any]
    classes: tuple[str, ...]
    labels: np.ndarray
    predicted: np.ndarray
    confidence: np.ndarray
    count: float
    reliability: Reliability
    expected: float
    expected_images: int
    expected_at_sizes: tuple[float, float]
    mistakes: tuple[Mistake, ...]
    copies: int
    siblings: int
    warnings: tuple[str, ...]
    sets: SetCoverage | None
    unknown: UnknownResult | None
    promises: tuple[PromiseResult, ...]
    automation: Automation
    expected_automation: Automation
    errors: tuple[BadImageError, ...] = ()
    basis: str = LEFT_OUT
    average_precision: float | None = None

    @property
    def is_multi_label(self) -> bool:
        """Whether images may have several labels, or none."""
        return self.labels.ndim == 2

    @property
    def answers(self) -> int:
        """How many answers there are: B, or where images may have several labels as many as they were given."""
        return len(_classes(self.predicted))

    @property
    def accuracy(self) -> float:
        """The share of the answers that is right: of the B images or, the precision, of all labels that they were
        given; that of answers as they count is `reliability.accuracy`. NaN without any."""
        return len(self._right) / self.answers if self.answers else math.nan

    @property
    def found(self) -> float:
        """The share of all labels that images have which they were given, the recall: of one label each `accuracy`. NaN
        without any."""
        return len(self._right) / number if (number := len(_classes(self.labels))) else math.nan

    @property
    def promises_found(self) -> list[float]:
        """Of each of `promises` the share of all labels that images have which are given and accepted."""
        number = len(_classes(self.labels)) or math.nan
        return [(one.accepted - one.wrong) / number for one in self.promises]

    @property
    def interval(self) -> tuple[float, float]:
        """The 95% interval of the accuracy of answers as they count (config.wilson); NaN without any."""
        return wilson(self.reliability.accuracy, self.count) if self.count else (math.nan, math.nan)

    @property
    def difference(self) -> tuple[float, float]:
        """The 95% interval of accuracy - expected, of answers as they count and at their class sizes
        (`difference_of_shares`); NaN where nothing is expected, or answered."""
        expected, images = self.expected_at_sizes
        if math.isnan(expected) or not self.count:
            return math.nan, math.nan
        return difference_of_shares(self.reliability.accuracy, self.count, expected, images)

    @property
    def accuracy_judgement(self) -> str:
        """Whether the accuracy is "below" or "above" what was expected, beyond chance, or "as expected"; "" where
        nothing was expected."""
        low, high = self.difference
        if math.isnan(low):
            return ""
        if low <= 0 <= high:
            return "as expected"
        return "below" if high < 0 else "above"

    @property
    def by_level(self) -> list[list[tuple[float, float]]]:
        """Of each of `promises` the share of images that each level answers, and of these the share that is wrong;
        empty without a tree."""
        one = self.automation
        if one.level_shares.shape[1] == 1:
            return []
        pairs = np.stack([one.level_shares, one.level_errors], 2)[one.shares > 0]
        return [[(share, wrong) for share, wrong in row] for row in pairs.tolist()]

    @property
    def wrong(self) -> int:
        """How many answers are wrong."""
        return self.answers - len(self._right)

    @property
    def missed(self) -> int:
        """How many labels of images they were not given."""
        return len(_classes(self.labels)) - len(self._right)

    @property
    def mistaken(self) -> int:
        """How many mistakes there are: wrong answers, and where images may have several labels also missed ones."""
        return self.wrong + self.missed * self.is_multi_label

    @property
    def wrong_confidence(self) -> np.ndarray:
        """The probability of each wrong answer."""
        return self.confidence[self.predicted & ~self.labels if self.is_multi_label else self.labels != self.predicted]

    @property
    def _right(self) -> np.ndarray:
        """The classes of the answers that are right."""
        if self.is_multi_label:
            return _classes(self.labels & self.predicted)
        right: np.ndarray = self.labels[self.labels == self.predicted]
        return right

    @property
    def confusion(self) -> np.ndarray | None:
        """(C, C) int64: images with the label of a row that were given the label of a column."""
        if self.is_multi_label:
            return None
        count = len(self.classes)
        pairs = np.bincount(self.labels * count + self.predicted, minlength=count**2)
        return pairs.reshape(count, count)

    @property
    def class_results(self) -> list[ClassResult]:
        """All classes, in their order."""
        count = len(self.classes)
        of_labels = _classes(self.labels), self._right, _classes(self.predicted)
        columns = (np.bincount(rows, minlength=count).tolist() for rows in of_labels)
        return [ClassResult(*row) for row in zip(self.classes, *columns, strict=True)]

    @property
    def mixups(self) -> list[Mixup]:
        """Pairs of classes of which one was taken for the other, the most frequent first; none of several labels."""
        if self.is_multi_label:
            return []
        wrong = self.labels != self.predicted
        images = np.bincount(self.labels, minlength=len(self.classes))
        pairs, counts = np.unique(np.stack([self.labels, self.predicted])[:, wrong], axis=1, return_counts=True)
        order = np.argsort(-counts, kind="stable")
        return [
            Mixup(self.classes[label], self.classes[other], int(images[label]), int(count))
            for label, other, count in zip(*pairs[:, order], counts[order], strict=True)
        ]

    @property
    def against_expected(self) -> str:
        """The accuracy that was expected, and whether these images differ from it beyond chance; "" without any."""
        at_sizes, _ = self.expected_at_sizes
        points = f"{100 * abs(self.reliability.accuracy - at_sizes):.1f} points"
        judged = {
            "below": f"{points} more than are right, beyond chance",
            "above": f"{points} less than are right, beyond chance",
            "as expected": "the difference is small enough to be chance",
        }
        expected = f"{self.expected:.1%} were expected from {self.expected_images:,} {self.basis}"
        if at_sizes != self.expected:
            expected += f", {at_sizes:.1%} at the class sizes of these pictures"
        return f"{expected}: {judged[judgement]}" if (judgement := self.accuracy_judgement) else ""

    @property
    def promise_verdict(self) -> tuple[str, str]:
        """What promises are worth here, and by which counts: those of the strictest that broke, or else is not refuted,
        or else held."""
        verbs = {"broke": "broke", "not refuted": "is not refuted", "held": "held", "too few": "cannot be judged"}
        for judgement, verb in verbs.items():
            if rows := [one for one in self.promises if one.judgement == judgement]:
                first, *others = (f"{100 * one.promised:.3g}%" for one in rows)
                also = f"; the same goes for {', '.join(others)}" if others else ""
                return f"the promise of {first} {verb}", f"{rows[0]}{also}"
        return "no label is accepted", self.automation.can

    @property
    def advice(self) -> str:
        """What to do where less is right than was expected, or a promise broke; else ""."""
        if self.accuracy_judgement != "below" and all(one.judgement != "broke" for one in self.promises):
            return ""
        return (
            f"these pictures differ from the {self.basis} (bursts, other places): give groups and more varied pictures "
            "to the fit, or pictures from production to calibrate_on (iosr-fast fit --calibrate-on)"
        )

    def summary(self) -> str:
        """What was measured, a line each; first what expectation and promises were worth."""
        of_all = [f"; {share:.1%}" if self.is_multi_label else "" for share in self.promises_found]
        accepted = [
            f"{one.accepted / self.answers:.1%} ({one.share:.1%}{found}) with max_error {100 * one.promised:.3g}%"
            for one, found in zip(self.promises, of_all, strict=True)
        ]
        levels = [" + ".join(f"{part:.1%} ({bad:.1%})" if part else "0%" for part, bad in row) for row in self.by_level]
        levels = [f"{words} for {100 * one.promised:.3g}%" for words, one in zip(levels, self.promises, strict=False)]
        also = "; of all labels found" if self.is_multi_label else ""
        lines = [
            self._accuracy,
            self.against_expected,
            ": ".join(self.promise_verdict),
            self.advice,
            *self.warnings,
            f"log-loss {self.reliability.log_loss:.3f}, expected calibration error {self.reliability.error:.1%}",
            self.copies and f"near duplicates of support images, which say little about new ones: {self.copies:,}",
            self.errors and f"unreadable and left out: {len(self.errors)}",
            self.sets and f"sets of labels: {self.sets}",
            levels and f"accepted at level 0 + 1 + ... (of them wrong): {', '.join(levels[:4])}",
            accepted and f"accepted labels (of them wrong{also}): {', '.join(accepted[:4])}",
            self.unknown,
        ]
        return "\n".join(str(line) for line in lines if line)

    @property
    def _accuracy(self) -> str:
        low, high = self.interval
        if self.is_multi_label:
            labels, given = len(_classes(self.labels)), counted_as(self.answers, self.count, "labels given")
            right = f"{self.accuracy:.1%} of {given} are right (95%: {low:.1%} to {high:.1%})"
            return (
                f"several labels a picture, {len(self.labels):,} images: {right if self.answers else 'none is given'}, "
                f"{self.found:.1%} of all {labels:,} labels found, mean average precision {self.average_precision:.3f}"
            )
        images, counting = counted_as(len(self.labels), self.count, "images"), once(len(self.labels), self.count)
        as_counted = counting and f", {self.reliability.accuracy:.1%}{counting}"
        return f"{self.accuracy:.1%} of {images} are right{as_counted} (95%: {low:.1%} to {high:.1%})"

    def _columns(self) -> dict[str, Any]:
        right, names = self.labels == self.predicted, np.array(self.classes, object)
        surest, probability = self.confidence, self.confidence
        if self.is_multi_label:
            surest = np.where(right, 0.0, np.where(self.predicted, surest, 1.0 - surest)).max(1)
            label, predicted, probability = (np.empty(len(right), object) for _ in range(3))
            label[:], predicted[:] = ([frozenset(names[row]) for row in one] for one in (self.labels, self.predicted))
            given = zip(self.predicted, self.confidence, strict=True)
            probability[:] = [dict(zip(names[row], shares[row].tolist(), strict=True)) for row, shares in given]
            right = right.all(1)
        else:
            label, predicted = names[self.labels], names[self.predicted]
        order = np.lexsort([-surest, right])
        images = [one if isinstance(one := self.images[i], int) else str(one) for i in order.tolist()]
        columns = {"label": label, "predicted": predicted, "probability": probability}
        return {"image": images} | {name: values[order] for name, values in (columns | {"right": right}).items()}

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; null for NaN. The confusion matrix is included up to MATRIX classes. "labels" counts all."""
        reliability = self.reliability
        of_bins = ("counts", "confidence", "right")
        facts = {
            "images": len(self.labels),
            "unreadable": len(self.errors),
            "copies": self.copies,
            "siblings": self.siblings,
            "warnings": self.warnings,
            "accuracy": self.accuracy,
            "effective_images": self.count,
            "accuracy_interval": self.interval,
            "expected_accuracy": self.expected,
            "expected_images": self.expected_images,
            "expected_accuracy_at_class_sizes": self.expected_at_sizes[0],
            "accuracy_difference": self.difference,
            "accuracy_judgement": self.accuracy_judgement,
            "promises": self.promises,
            "advice": self.advice,
            "log_loss": reliability.log_loss,
            "calibration_error": reliability.error,
            "calibration": {"bins": BINS, **{name: getattr(reliability, name) for name in of_bins}},
            "sets": self.sets,
            "unknown": self.unknown,
            "automation": self.automation,
            "expected_automation": self.expected_automation,
            "classes": [{**vars(one), "recall": one.recall, "precision": one.precision} for one in self.class_results],
            "mixups": self.mixups,
            "confusion": self.confusion if len(self.classes) <= MATRIX else None,
            "wrong": self.wrong,
            "mistakes": self.mistakes,
        }
        if self.is_multi_label:
            facts |= {"answers": self.answers, "labels": len(_classes(self.labels)), "missed": self.missed}
            facts |= {name: getattr(self, name) for name in ("found", "promises_found", "average_precision")}
        values: dict[str, Any] = json_values(facts)
        return values


def _classes(labels: np.ndarray) -> np.ndarray:
    """The class of each label: labels (B,) as they are, of an indicator (B, C) those that are set."""
    return labels if labels.ndim == 1 else np.nonzero(labels)[1]
