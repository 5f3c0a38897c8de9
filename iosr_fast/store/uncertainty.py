"""What left-out support images say of a classifier: unknown pictures, sets of labels, calibration, wrong labels."""

from __future__ import annotations

from typing import Any

import numpy as np

from iosr_fast.head.fit import Fit
from iosr_fast.head.ids import example_id
from iosr_fast.head.names import check_unknown_label
from iosr_fast.methods.conformal import COVERAGE, Reliability, sets_of_labels
from iosr_fast.methods.promise import check_share
from iosr_fast.methods.support_audit import SupportAudit
from iosr_fast.methods.unknown import Unknown, without_rejected
from iosr_fast.store.updates import LiveUpdates


class Uncertainty(LiveUpdates):
    """The part of Classifier that answers by left-out support images. All of it is fitted at the first use, and again
    at the first use after a change of classes, examples or parameters."""

    @property
    def unknown_(self) -> Unknown:
        """How unknown pictures are recognised; `unknown_.promise()` says in words what can be promised."""
        return self.snapshot().one_label("unknown_").unknown

    def unknown_score(self, images: Any) -> np.ndarray:
        """How unlike all classes each image is, (B,) float64: of left-out support images the mean is 0 and the
        standard deviation 1. `unknown_.threshold(0.95)` is the score that 95% of known pictures do not exceed.

        Ten scores (cosines to texts, Gaussians of the classes, distance to support images and a regression) are
        combined as classes that are left out teach: methods.unknown.fit_unknown. Raises BadImageError.
        """
        fit = self._fitted()
        fit.head.one_label("unknown_score")
        parts = [fit.head.unknown.score(fit.encoder.encode(pixels)) for pixels in self._chunks(fit, images)]
        return np.concatenate(parts) if parts else np.zeros(0)

    def predict_sets(self, images: Any, coverage: float = COVERAGE, per_class: bool = False) -> list[np.ndarray]:
        """For each image the labels that it may have, the most likely first: a share `coverage` of the sets has the
        image's label (conformal prediction by left-out support images, methods.conformal). A set is empty where no
        label is likely enough. With `per_class` the share holds for the images of each class, however often the classes
        occur among new images: each has its own threshold (class-conditional or Mondrian conformal prediction).

        Raises IosrFastError where there are too few support images for that promise: 0.9 takes 9 that can be left out,
        with `per_class` 9 of each class; BadImageError for an image that can't be read.
        """
        fit = self._fitted()
        fit.head.one_label("predict_sets")
        share = check_share("coverage", coverage)
        left_out, labels = fit.head.left_out_labels, fit.labels()
        classes = labels if per_class else None
        left_out.thresholds(share, classes)  # too few support images: before anything is encoded
        sets: list[np.ndarray] = []
        for pixels in self._chunks(fit, images):
            logits = fit.head.score(fit.encoder.encode(pixels))
            sets += sets_of_labels(labels, logits, left_out.sets(logits, share, classes))
        return sets

    def calibration(self) -> Reliability:
        """How right the probabilities of left-out support images are, by bins of the probability, with the expected
        calibration error; print it for a table."""
        return self.snapshot().one_label("calibration").left_out_labels.reliability

    def audit(self) -> SupportAudit:
        """What is wrong with the support images, by those that are left out of the fit: labels that are likely wrong
        with the label that they should have and the neighbours that say so, near duplicates within and across classes,
        classes that are confused or have too few or too alike images, and what twice as many images would bring.

        Images are named by their ids (`examples`, `picture`, `remove_examples`). Rules: methods.support_audit.
        """
        fit = self._fitted()
        head, images = fit.head.one_label("audit"), [example_id(number) for number in fit.head.examples.ids]
        return head.audit(np.array(images, str), fit.labels())

    def _labels_or_rejected(self, fit: Fit, images: Any, keep: float, word: str | None) -> np.ndarray:
        """The labels (B,) of images, `word` for those that are rejected."""
        check_unknown_label(word, fit.labels())
        fit.head.unknown.threshold(keep)  # too few support images: before anything is encoded
        classes, rejected = [np.zeros(0, np.int64)], [np.zeros(0, bool)]
        for pixels in self._chunks(fit, images):
            queries = fit.encoder.encode(pixels)
            classes.append(fit.head.score(queries).argmax(1))
            rejected.append(fit.head.unknown.rejects(queries, keep))
        return without_rejected(fit.labels(np.concatenate(classes)), np.concatenate(rejected), word)
