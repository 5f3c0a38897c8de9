"""A head without an encoder in the place of a Classifier, and rows of embeddings in that of pixels.

So they pass the same queue, with its limits, deadlines and turns; there is nothing to decode.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from iosr_fast.encoders.encoder import Embeddings, Encoder
from iosr_fast.store.head_bundle import SavedHead


class Rows(Encoder):
    """Takes rows of `width` numbers, and scales them to unit length."""

    image_size, fingerprint, runtime = 1, "none", "none"

    def __init__(self, width: int, adapted: bool) -> None:
        self.width, self.adapted = width, adapted

    def accepts(self, image: Any) -> bool:
        return isinstance(image, np.ndarray) and image.shape == (self.width,)

    def blank(self, count: int) -> np.ndarray:
        return np.ones((count, self.width))

    def encode(self, pixels: np.ndarray) -> Embeddings:
        return Embeddings.of_rows(pixels, self.adapted)


class ServedHead:
    """What the server asks a Classifier for, of a head that FewShotHead.save wrote. It takes no changes."""

    exif_orientation_, log_failure = True, ""

    def __init__(self, saved: SavedHead) -> None:
        self.encoder, self._head = Rows(saved.width, saved.adapted), saved.head
        self.classes_, self.version, self.method_ = saved.classes, saved.head.version, saved.head.config.method
        self.picture = saved.head.picture

    def snapshot(self) -> Any:
        return self._head
