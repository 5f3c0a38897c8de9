"""How right a fitted classifier is on labelled images that it has not seen, and on pictures of none of its classes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from iosr_fast.exceptions import BadImageError
from iosr_fast.head.predictions import Neighbour
from iosr_fast.methods.automation import Automation
from iosr_fast.methods.config import wilson
from iosr_fast.methods.conformal import BINS, LEFT_OUT, Reliability, counted_as
from iosr_fast.methods.judgement import PromiseResult, difference_of_shares, once
from iosr_fast.utils.json_values import json_values
from iosr_fast.utils.result import Result

MISTAKES = 100  # that are explained; the arrays of an Evaluation have all
MATRIX = 30  # classes up to which a confusion matrix is shown and stored


@dataclass(frozen=True)
class ClassResult:
    """A class: of the `images` with its label, `right` were given it; `predicted` images were given it in all."""

    label: str
    images: int
    right: int
    predicted: int

    @property
    def recall(self) -> float:
        """The share of its images that are right; NaN without images."""
        return self.right / self.images if self.images else math.nan

    @property
    def precision(self) -> float:
        """The share of images given this label that have it; NaN if none was given it."""
        return self.right / self.predicted if self.predicted else math.nan


@dataclass(frozen=True)
class Mixup:
    """Of the `images` with `label`, `mistaken` were taken for `other`."""

    label: str
    other: str
    images: int
    mistaken: int


@dataclass(frozen=True)
class Mistake:
    """An image that is `label` (None: of no class) and was taken for `predicted`, with the probability of both, and the
    support images that are nearest to it, nearest first."""

    image: Any
    label: str | None
    label_probability: float
    predicted: str
    probability: float
    nearest: tuple[Neighbour, ...]


@dataclass(frozen=True)
class SetCoverage:
    """Sets of labels (predict_sets): a share `covered` has the image's label where `promised` is the promise; `size`
    labels on the mean; a share `empty` has none. NaN where nothing can be promised, for the `reason`."""

    promised: float
    covered: float = math.nan
    size: float = math.nan
    empty: float = math.nan
    reason: str = ""


@dataclass(frozen=True)
class UnknownResult:
    """predict(unknown="reject", keep=promised): the share of images of the classes that is `kept`, and of `images` of
    no class the share that is `rejected`; NaN where nothing can be promised, for the `reason`, or without `images`.

    auroc     how well scores tell both apart, whatever the threshold: 1 at best, 0.5 by chance
    accepted  images of no class that keep a label, the one that looks most like a class first
    """

    promised: float
    kept: float = math.nan
    images: int = 0
    rejected: float = math.nan
    auroc: float = math.nan
    accepted: tuple[Mistake, ...] = ()
    reason: str = ""


@dataclass(frozen=True, eq=False, repr=False)
class Evaluation(Result):
    """The result of `evaluate` for B images and C classes; the most probable mistakes come first in `to_frame`.

    images            (B,) what names an image: its path or its position
    classes           the C class names
    labels, predicted (B,) int64, positions of classes
    confidence        (B,) float64, the probability of `predicted`
    count             what the images count as: a burst counts once (conformal.Judged.count)
    reliability       accuracy, log-loss and calibration of the images as they count (conformal.Reliability)
    expected          the accuracy of left-out support images, or of other images if these are the `basis` of promises
                      (conformal.CALIBRATION); NaN without any
    expected_images   how many these are
    expected_at_sizes judgement.accuracy_at for the class sizes of the B images: with it their accuracy is compared
    mistakes          the most probable wrong images first, at most MISTAKES
    copies, siblings  how many images are near duplicates or siblings of support images (calibration.Beside), and say
                      little about new ones; `warnings` has a sentence where siblings are too many
    sets, unknown     what promises are worth on these images
    promises          a PromiseResult for each promise by which labels of these images are accepted, the strictest first
    automation        what promises of predict(max_error=) are worth: the curve of promises with the shares and errors
                      of these images, with a tree by level, too; expected_automation has those of
                      left-out support images
    errors            a BadImageError for each unreadable image, which counts nowhere

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
    sets: SetCoverage
    unknown: UnknownResult
    promises: tuple[PromiseResult, ...]
    automation: Automation
    expected_automation: Automation
    errors: tuple[BadImageError, ...] = ()
    basis: str = LEFT_OUT

    @property
    def accuracy(self) -> float:
        """The share of the B images that is right; that of images as they count is `reliability.accuracy`."""
        return float((self.labels == self.predicted).mean())

    @property
    def interval(self) -> tuple[float, float]:
        """The 95% interval of the accuracy of images as they count (config.wilson)."""
        return wilson(self.reliability.accuracy, self.count)

    @property
    def difference(self) -> tuple[float, float]:
        """The 95% interval of accuracy - expected, of images as they count and at their class sizes
        (`difference_of_shares`); NaN where nothing is expected."""
        expected, images = self.expected_at_sizes
        if math.isnan(expected):
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
        return int((self.labels != self.predicted).sum())

    @property
    def confusion(self) -> np.ndarray:
        """(C, C) int64: images with the label of a row that were given the label of a column."""
        count = len(self.classes)
        pairs = np.bincount(self.labels * count + self.predicted, minlength=count**2)
        return pairs.reshape(count, count)

    @property
    def class_results(self) -> list[ClassResult]:
        """All classes, in their order."""
        count = len(self.classes)
        right = self.labels[self.labels == self.predicted]
        columns = (np.bincount(rows, minlength=count).tolist() for rows in (self.labels, right, self.predicted))
        return [ClassResult(*row) for row in zip(self.classes, *columns, strict=True)]

    @property
    def mixups(self) -> list[Mixup]:
        """Pairs of classes of which one was taken for the other, the most frequent first."""
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
        (low, high), sets, unknown = self.interval, self.sets, self.unknown
        covered = f"{sets.covered:.1%} have the right label ({sets.promised:.4g} promised), {sets.empty:.1%} are empty"
        kept = f"{unknown.kept:.1%} of these images keep their label ({unknown.promised:.4g} promised)"
        rejected = "" if unknown.reason else f"{unknown.rejected:.1%} rejected, "
        shares = [(one.promised, one.accepted / len(self.labels), one.share) for one in self.promises]
        accepted = [f"{share:.1%} ({error:.1%}) with max_error {100 * most:.3g}%" for most, share, error in shares]
        levels = [" + ".join(f"{part:.1%} ({bad:.1%})" if part else "0%" for part, bad in row) for row in self.by_level]
        levels = [f"{words} for {100 * one.promised:.3g}%" for words, one in zip(levels, self.promises, strict=False)]
        images, counting = counted_as(len(self.labels), self.count, "images"), once(len(self.labels), self.count)
        as_counted = counting and f", {self.reliability.accuracy:.1%}{counting}"
        lines = [
            f"{self.accuracy:.1%} of {images} are right{as_counted} (95%: {low:.1%} to {high:.1%})",
            self.against_expected,
            ": ".join(self.promise_verdict),
            self.advice,
            *self.warnings,
            f"log-loss {self.reliability.log_loss:.3f}, expected calibration error {self.reliability.error:.1%}",
            self.copies and f"near duplicates of support images, which say little about new ones: {self.copies:,}",
            self.errors and f"unreadable and left out: {len(self.errors)}",
            f"sets of labels: {sets.reason or f'{covered}, {sets.size:.2f} labels on average'}",
            levels and f"accepted at level 0 + 1 + ... (of them wrong): {', '.join(levels[:4])}",
            accepted and f"accepted labels (of them wrong): {', '.join(accepted[:4])}",
            f"rejection of unknown images: {unknown.reason or kept}",
            unknown.images and f"{unknown.images:,} images of no class: {rejected}AUROC {unknown.auroc:.3f}",
        ]
        return "\n".join(str(line) for line in lines if line)

    def _columns(self) -> dict[str, Any]:
        right, names = self.labels == self.predicted, np.array(self.classes, object)
        order = np.lexsort([-self.confidence, right])
        images = [one if isinstance(one := self.images[i], int) else str(one) for i in order.tolist()]
        columns = {"label": names[self.labels], "predicted": names[self.predicted], "probability": self.confidence}
        return {"image": images} | {name: values[order] for name, values in (columns | {"right": right}).items()}

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; null for NaN. The confusion matrix is included up to MATRIX classes."""
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
        values: dict[str, Any] = json_values(facts)
        return values
