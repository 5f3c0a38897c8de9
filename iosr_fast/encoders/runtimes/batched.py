"""The common part of all runtimes: checking pixels, splitting large batches, padding batches on a GPU."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from typing import Any

import numpy as np

from iosr_fast.encoders.encoder import Array, Embeddings, Encoder
from iosr_fast.exceptions import IosrFastError
from iosr_fast.images.geometry import Geometry


def powers_of_two(largest: int) -> tuple[int, ...]:
    """1, 2, 4, ... and `largest`: every batch fills at least half of its bucket."""
    return tuple(sorted({1 << power for power in range(largest.bit_length())} | {largest}))


class BatchedEncoder(Encoder):
    """An Encoder over `_run`, which executes at most `max_batch` pictures.

    On a GPU it executes batches of powers of two (`buckets`), each of which is prepared and recorded once; on a CPU,
    where padding only costs time, any.
    """

    def __init__(self, manifest: dict[str, Any], runtime: str, adapted: bool = True, on_gpu: bool = False) -> None:
        self.runtime = runtime
        self.model: str = manifest["model"]
        self._geometry = Geometry.from_facts(manifest)
        self.image_size = self._geometry.size
        self.width: int = manifest["width"]
        self.fingerprint: str = manifest["fingerprint"]
        self.max_batch: int = manifest["max_batch"]
        self.adapted = adapted and manifest["first_adapted_block"] is not None
        self.buckets = powers_of_two(self.max_batch) if on_gpu else None

    @property
    def geometry(self) -> Geometry:
        return self._geometry

    @property
    def largest(self) -> tuple[int, int, int, int]:
        """The shape of the pixels of the largest batch."""
        return self.max_batch, self.image_size, self.image_size, 3

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the outputs of a run."""
        return ("plain", "adapted") if self.adapted else ("plain",)

    def encode(self, pixels: np.ndarray) -> Embeddings:
        """Encode uint8 RGB pixels (B, image_size, image_size, 3), B >= 1; more than `max_batch` take several runs.

        Returns float32 (B, width), L2-normalised; `adapted` is None where the encoder has none. Raises
        IosrFastError for another type, dtype or shape.
        """
        return self.encode_on_device(pixels).to_numpy()

    def encode_on_device(self, pixels: np.ndarray) -> Embeddings:
        """As `encode`; on a GPU the embeddings are tensors there, ready on the caller's current stream."""
        self._check(pixels)
        parts = (pixels[start : start + self.max_batch] for start in range(0, len(pixels), self.max_batch))
        return Embeddings.concatenate(
            [Embeddings(*self._run(np.ascontiguousarray(part), self._size(len(part)))) for part in parts]
        )

    def warm(self, sizes: Iterable[int] | None = None) -> None:
        """Prepare and run each batch size once, so that no request pays for a first run.

        On a CPU a first run allocates memory and starts threads; on a GPU it also chooses kernels and records a CUDA
        graph. `sizes`: None for the buckets, or 1 without buckets. Raises ValueError for sizes not in 1..`max_batch`.
        """
        sizes = list(self.buckets or (1,)) if sizes is None else list(sizes)
        if wrong := [size for size in sizes if not 1 <= size <= self.max_batch]:
            raise IosrFastError(
                f"expected batch sizes of 1 to {self.max_batch}, the largest of this engine, got {wrong}"
            )
        executed = sorted({self._size(size) for size in sizes})
        for size in executed:
            self._prepare(size)
        super().warm(executed)

    def _check(self, pixels: np.ndarray) -> None:
        expected = f"(B, {self.image_size}, {self.image_size}, 3) with B >= 1"
        known = isinstance(pixels, np.ndarray)
        if not known or pixels.dtype != np.uint8:
            raise IosrFastError(
                f"expected pixels as a uint8 array {expected}, got {pixels.dtype if known else type(pixels).__name__}; "
                "the engine scales and normalises pixels itself, so pass them as bytes"
            )
        if pixels.ndim != 4 or len(pixels) == 0 or pixels.shape[1:] != self.largest[1:]:
            raise IosrFastError(
                f"expected pixels of shape {expected}, got {tuple(pixels.shape)}; iosr_fast.images.preprocess resizes "
                "pictures"
            )

    def _size(self, pictures: int) -> int:
        """The batch size that is executed for so many pictures."""
        return pictures if self.buckets is None else next(size for size in self.buckets if size >= pictures)

    @abstractmethod
    def _run(self, pixels: np.ndarray, size: int) -> tuple[Array, ...]:
        """Execute uint8 pixels of n <= max_batch pictures, C-contiguous, as a batch of `size` >= n.

        Returns one float32 array (n, D) for each of `outputs`, or a tensor on the GPU that later runs don't overwrite.
        Without buckets, size is n.
        """

    def _prepare(self, size: int) -> None:
        """Do the work that a batch size needs once, before its first run."""
