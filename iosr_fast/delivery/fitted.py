"""FittedClassifier: a head, and the encoder that belongs to it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from iosr_fast.delivery.engine_choice import EngineChoice
from iosr_fast.encoders.encoder import Embeddings, Encoder
from iosr_fast.encoders.opened_model import OpenedModel
from iosr_fast.encoders.rows import Rows
from iosr_fast.exceptions import BadImageError
from iosr_fast.head.head import Head
from iosr_fast.head.support_images import SupportSettings, encode_remembered
from iosr_fast.images.crop import Sharing
from iosr_fast.images.preprocess import as_array, as_image_list, to_pixels

_CHUNK = 256  # images whose pixels are in memory


@dataclass(frozen=True)
class SavedEstimator:
    """What FewShotHead has beside a FittedClassifier on rows of embeddings.

    estimator   the parameters of its constructor but `text`, as they were given
    labels      the dtype of `classes_`, whose values are the class names: "str", "object" (texts) or one of numbers
    indicator   the dtype of the indicators that `predict` gives, where the fit was given one
    columns     the names that the columns of X had
    """

    estimator: dict[str, Any]
    labels: str
    indicator: str | None
    columns: list[str] | None

    def classes(self, names: Sequence[str]) -> np.ndarray:
        """`classes_`, (C,). Raises ValueError or OverflowError where a class name is no such label."""
        texts = np.array(names)
        return texts == "True" if self.labels == "bool" else texts.astype(self.labels)


@dataclass(frozen=True, eq=False)
class FittedClassifier:
    """A fitted classifier: `head` and what it was computed with, `clip`, whose encoder takes images or rows of
    embeddings (encoders.rows). Immutable.

    `skipped` has the errors of unreadable images that were left out, `engine_choice` the candidates for the engine,
    where it was chosen. With `integer_labels`, the label of a class is its uid, which no later change moves: its
    position in the class names of the fit, or the label itself where no names were given. A FewShotHead has an
    `estimator`, and its `classes` (C,) as they were in y, as no change moves them. `memory` keeps the embeddings
    of queries (support_images.encode_remembered). `token` is the same object in all that changes make of a fit, as long
    as new images can be encoded for any of them: another fit and another encoder have another token.
    """

    clip: OpenedModel
    head: Head
    settings: SupportSettings
    skipped: tuple[BadImageError, ...] = ()
    integer_labels: bool = False
    engine_choice: EngineChoice | None = None
    memory: Any = None
    estimator: SavedEstimator | None = None
    classes: np.ndarray | None = None
    token: object = field(default_factory=object, repr=False)

    @cached_property
    def encoder(self) -> Encoder:
        """The encoder of queries: it gives the embeddings that the method compares, and no others where it can."""
        return self.clip.encoder_for(self.head.needs_adapted)

    @cached_property
    def labels(self) -> np.ndarray:
        """(C,) what answers call the classes: their names, or their uids (int64), or `classes`."""
        head = self.head
        if self.classes is not None:
            return self.classes
        return np.array(head.uids, np.int64) if self.integer_labels else np.array(head.class_names, str)

    def listed(self, images: Any) -> Sequence[Any]:
        """One image or many as a sequence; rows of embeddings where the encoder takes these."""
        encoder = self.clip.encoder
        return list(encoder.read(images)) if isinstance(encoder, Rows) else as_image_list(images)

    def read_labels(self, images: Sequence[Any], labels: Any) -> np.ndarray:
        """The classes of labelled images, as the head reads labels."""
        return self.head.read_labels(images, labels, self.integer_labels)

    def queries(self, images: Any) -> Iterator[Embeddings]:
        """The embeddings of images in their order, a few hundred at a time, each encoded when it is taken."""
        if self.memory is None:
            return map(self.encoder.encode_on_device, self.chunks(images))
        return (encode_remembered(self.encoder, pixels, self.memory) for pixels in self.chunks(images))

    def chunks(self, images: Any) -> Iterator[np.ndarray]:
        """Pixels (B, S, S, 3) of images in their order, or rows (B, width), a few hundred at a time."""
        if isinstance(self.clip.encoder, Rows):
            rows = self.clip.encoder.read(images)
            yield from (rows[start : start + _CHUNK] for start in range(0, len(rows), _CHUNK))
            return
        # A batch array stays one: pixels of the right size reach the encoder without a copy.
        array = as_array(images)
        listed: Any = array
        if array is None or array.ndim != 4:
            listed = list(Sharing(self.settings.margin)(as_image_list(images)))
        for start in range(0, len(listed), _CHUNK):
            try:
                yield to_pixels(
                    listed[start : start + _CHUNK], self.clip.encoder.geometry, self.settings.exif_orientation
                )
            except BadImageError as error:
                raise error.moved(start) from error.__cause__
