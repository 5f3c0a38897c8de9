"""Fit: a head and the encoder that belongs to it, and their answers to images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from iosr_fast.encoders.encoder import Embeddings, Encoder
from iosr_fast.encoders.opened_clip import OpenedClip
from iosr_fast.exceptions import BadImageError
from iosr_fast.head import predictions
from iosr_fast.head.engine_choice import EngineChoice
from iosr_fast.head.ids import example_id
from iosr_fast.head.multi_label_predictions import AnyHead
from iosr_fast.head.names import check_unknown_label
from iosr_fast.head.support_images import SupportViews
from iosr_fast.images.preprocess import as_array, as_image_list, to_pixels
from iosr_fast.methods.conformal import check_share, sets_of_labels
from iosr_fast.methods.joint import JointPrediction
from iosr_fast.methods.support_audit import SupportAudit
from iosr_fast.methods.unknown import without_rejected
from iosr_fast.utils.numbers import check_integer

_CHUNK = 256  # images whose pixels are in memory


@dataclass(frozen=True, eq=False)
class Fit:
    """A fitted classifier: `head` and what it was computed with. Immutable.

    `skipped` has the errors of unreadable images that were left out, `engine_choice` the candidates for the engine,
    where it was chosen. With `integer_labels`, the label of a class is its uid: its position in the class names of the
    fit, which no later change moves.

    Methods that take images have the arguments, the result and the errors of the Classifier's method of that name. What
    a head has no answer to (MultiLabelHead), or too few support images for, is refused before an image is encoded.
    """

    clip: OpenedClip
    head: AnyHead
    views: SupportViews
    skipped: tuple[BadImageError, ...] = ()
    integer_labels: bool = False
    engine_choice: EngineChoice | None = None

    @property
    def encoder(self) -> Encoder:
        """The encoder of queries: it gives the embeddings that the method compares, and no others where it can."""
        return self.clip.encoder_for(self.head.needs_adapted)

    def labels(self, classes: np.ndarray | None = None) -> np.ndarray:
        """The labels of the classes at these positions, or of all: names (str), or uids (int64)."""
        values, dtype = (self.head.uids, np.int64) if self.integer_labels else (self.head.class_names, np.str_)
        return np.array(values if classes is None else [values[c] for c in classes], dtype)

    def read_labels(self, images: Sequence[Any], labels: Any) -> np.ndarray:
        """The classes of labelled images, as the head reads labels."""
        return self.head.read_labels(images, labels, self.integer_labels)

    def chunks(self, images: Any) -> Iterator[np.ndarray]:
        """Pixels (B, S, S, 3) of the images in their order, a few hundred at a time."""
        # A batch array stays one: pixels of the right size reach the encoder without a copy.
        array = as_array(images)
        listed = array if array is not None and array.ndim == 4 else as_image_list(images)
        for start in range(0, len(listed), _CHUNK):
            try:
                yield to_pixels(listed[start : start + _CHUNK], self.clip.encoder.geometry, self.views.exif_orientation)
            except BadImageError as error:
                raise error.moved(start) from error.__cause__

    def logits(self, images: Any, impl: str = "auto") -> np.ndarray:
        """(B, C) float32."""
        parts = [self.head.score(self.encoder.encode_on_device(pixels), impl) for pixels in self.chunks(images)]
        return np.concatenate(parts) if parts else np.zeros((0, len(self.head.uids)), np.float32)

    def predict_or_reject(self, images: Any, keep: float, unknown_label: str | None) -> np.ndarray:
        """The labels (B,) of images, `unknown_label` for pictures of none of the classes."""
        head = self.head.one_label("predict(unknown='reject')", "a picture of none of the classes gets no label")
        check_unknown_label(unknown_label, self.labels())
        head.unknown.threshold(keep)
        classes, rejected = [np.zeros(0, np.int64)], [np.zeros(0, bool)]
        for pixels in self.chunks(images):
            queries = self.encoder.encode(pixels)
            classes.append(head.score(queries).argmax(1))
            rejected.append(head.unknown.rejects(queries, keep))
        return without_rejected(self.labels(np.concatenate(classes)), np.concatenate(rejected), unknown_label)

    def predict_jointly(self, images: Any) -> JointPrediction:
        head = self.head.one_label("predict_jointly")
        parts = [self.encoder.encode(pixels) for pixels in self.chunks(images)]
        queries = Embeddings.concatenate(parts) if parts else head.examples.embeddings[:0]
        return replace(predictions.predict_jointly(head, queries), classes=self.labels())

    def explain(self, images: Any, top: int, nearest: int, keep: float | None) -> list[predictions.Prediction]:
        top, nearest = check_integer("top", top, 1), check_integer("nearest", nearest, 0)
        head = self.head.one_label("explain", "predict_proba gives the probability of each class")
        if keep is not None:
            head.unknown.threshold(keep)
        rows = (self.encoder.encode_on_device(pixels) for pixels in self.chunks(images))
        return [one for chunk in rows for one in predictions.predict(head, chunk, top, nearest, keep)]

    def unknown_score(self, images: Any) -> np.ndarray:
        unknown = self.head.one_label("unknown_score").unknown
        parts = [unknown.score(self.encoder.encode(pixels)) for pixels in self.chunks(images)]
        return np.concatenate(parts) if parts else np.zeros(0)

    def predict_sets(self, images: Any, coverage: float, per_class: bool) -> list[np.ndarray]:
        head = self.head.one_label("predict_sets")
        share, labels = check_share("coverage", coverage), self.labels()
        left_out, classes = head.left_out_labels, labels if per_class else None
        left_out.thresholds(share, classes)
        sets: list[np.ndarray] = []
        for pixels in self.chunks(images):
            logits = head.score(self.encoder.encode(pixels))
            sets += sets_of_labels(labels, logits, left_out.sets(logits, share, classes))
        return sets

    def audit(self) -> SupportAudit:
        head = self.head.one_label("audit")
        return head.audit(np.array([example_id(number) for number in head.examples.ids], str), self.labels())
