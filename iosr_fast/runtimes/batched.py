"""What every runtime does alike: check the pixels, split large batches, put the parts together."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np

from iosr_fast.encoder import Embeddings


class BatchedEncoder(ABC):
    """An Encoder over `_run`, which takes at most `max_batch` pictures at a time."""

    def __init__(self, manifest: dict[str, Any], runtime: str) -> None:
        self.runtime = runtime
        self.model: str = manifest["model"]
        self.image_size: int = manifest["image_size"]
        self.width: int = manifest["width"]
        self.fingerprint: str = manifest["fingerprint"]
        self.max_batch: int = manifest["max_batch"]
        self.adapted = manifest["first_adapted_block"] is not None

    def encode(self, pixels: np.ndarray) -> Embeddings:
        """Encode uint8 pixels (B, image_size, image_size, 3), RGB; B >= 1; more than `max_batch` go in several runs.

        Returns float32 (B, width), L2-normalised; `adapted` is None where the engine has no adapter. Raises TypeError
        for another dtype, ValueError for another shape.
        """
        expected = f"(B, {self.image_size}, {self.image_size}, 3) with B >= 1"
        if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8:
            got = pixels.dtype if isinstance(pixels, np.ndarray) else type(pixels).__name__
            raise TypeError(
                f"expected pixels as a uint8 array {expected}, got {got}; the engine scales and "
                "normalises by itself, so give it the picture's bytes"
            )
        if pixels.ndim != 4 or len(pixels) == 0 or pixels.shape[1:] != (self.image_size, self.image_size, 3):
            raise ValueError(
                f"expected pixels of shape {expected}, got {pixels.shape}; iosr_fast.preprocess brings pictures to size"
            )
        starts = range(0, len(pixels), self.max_batch)
        parts = [self._run(np.ascontiguousarray(pixels[start : start + self.max_batch])) for start in starts]
        plain, *adapted = (np.concatenate(outputs) for outputs in zip(*parts, strict=True))
        return Embeddings(plain, adapted[0] if adapted else None)

    @property
    def outputs(self) -> tuple[str, ...]:
        return ("plain", "adapted") if self.adapted else ("plain",)

    @abstractmethod
    def _run(self, pixels: np.ndarray) -> tuple[np.ndarray, ...]:
        """C-contiguous uint8 pixels of at most max_batch pictures -> float32 arrays, one for each of `outputs`."""
