"""What every runtime offers: uint8 pictures in, both embeddings out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np

# A NumPy array, a torch tensor on any device, or an object with __dlpack__. Encoders return NumPy arrays.
Array: TypeAlias = Any


@dataclass(frozen=True)
class Embeddings:
    """L2-normalised image embeddings of one batch.

    `plain` (B, D) float32 meets text; `adapted` (B, D) float32, from the encoder with the adapter, meets other images.
    `adapted` is None where the encoder has no adapter. Both are NumPy arrays, or both torch tensors on one device
    (which `score` leaves there; there float16 and bfloat16 do as well), or both other objects with `__dlpack__`.
    """

    plain: Array
    adapted: Array | None = None

    def __len__(self) -> int:
        return len(self.plain)

    def __getitem__(self, rows: slice | np.ndarray) -> Embeddings:
        return Embeddings(self.plain[rows], None if self.adapted is None else self.adapted[rows])


class Encoder(Protocol):
    """A compiled (or eager) image encoder.

    `fingerprint` names the exact export it was built from, so that a cache of keys is never used with another encoder's
    queries; `runtime` names what executes it ("onnxruntime", "torch", "tensorrt", "tensorrt_rtx"); `adapted` says
    whether it gives adapted embeddings.
    """

    image_size: int
    width: int
    fingerprint: str
    runtime: str
    adapted: bool

    def encode(self, pixels: np.ndarray) -> Embeddings:
        """Encode uint8 pixels (B, image_size, image_size, 3), RGB; B >= 1."""
        ...
