"""The common part of all runtimes: checking pixels, splitting large batches, padding batches to a bucket."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from iosr_fast.encoders.encoder import Array, Embeddings, Encoder
from iosr_fast.exceptions import IosrFastError
from iosr_fast.images.geometry import Geometry


def powers_of_two(largest: int) -> tuple[int, ...]:
    """1, 2, 4, ... and `largest`: every batch fills at least half of its bucket."""
    return tuple(sorted({1 << power for power in range(largest.bit_length())} | {largest}))


def check_buckets(buckets: Iterable[int], largest: int) -> tuple[int, ...]:
    """Sorted buckets, with `largest` so that every batch fits. Raises ValueError for sizes not in 1..`largest`."""
    sizes = list(buckets)
    if wrong := [size for size in sizes if not 1 <= size <= largest]:
        raise IosrFastError(f"expected batch sizes of 1 to {largest}, the largest of this engine, got {wrong}")
    return tuple(sorted({*sizes, largest}))


def bucket_of(size: int, buckets: Sequence[int]) -> int:
    """The smallest of the sorted `buckets` that holds `size`."""
    return next(bucket for bucket in buckets if bucket >= size)


class BatchedEncoder(Encoder):
    """An Encoder over `_run`, which executes at most `max_batch` pictures.

    `buckets` limit the executed batch sizes on a GPU, where each size is prepared and recorded once. They are None on a
    CPU, where padding only costs time.
    """

    def __init__(
        self, manifest: dict[str, Any], runtime: str, buckets: Iterable[int] | None = None, adapted: bool = True
    ) -> None:
        self.runtime = runtime
        self.model: str = manifest["model"]
        self._geometry = Geometry.from_facts(manifest)
        self.image_size = self._geometry.size
        self.width: int = manifest["width"]
        self.fingerprint: str = manifest["fingerprint"]
        self.max_batch: int = manifest["max_batch"]
        self.adapted = adapted and manifest["first_adapted_block"] is not None
        self.buckets = None if buckets is None else check_buckets(buckets, self.max_batch)

    @property
    def geometry(self) -> Geometry:
        return self._geometry

    def encode(self, pixels: np.ndarray) -> Embeddings:
        """Encode uint8 RGB pixels (B, image_size, image_size, 3), B >= 1; more than `max_batch` take several runs.

        Returns float32 (B, width), L2-normalised; `adapted` is None where the encoder has none. Raises
        IosrFastError for another type, dtype or shape.
        """
        return self.encode_on_device(pixels).to_numpy()

    def encode_on_device(self, pixels: np.ndarray) -> Embeddings:
        """As `encode`; on a GPU the embeddings are tensors there, ready on the caller's current stream."""
        self._check(pixels)
        starts = range(0, len(pixels), self.max_batch)
        parts = [self._part(pixels[start : start + self.max_batch]) for start in starts]
        plain, *adapted = (_concatenate(outputs) for outputs in zip(*parts, strict=True))
        return Embeddings(plain, adapted[0] if adapted else None)

    def warm(self, sizes: Iterable[int] | None = None) -> None:
        """Prepare and run each batch size once, so that no request pays for a first run.

        On a CPU a first run allocates memory and starts threads; on a GPU it also chooses kernels and records a CUDA
        graph. `sizes`: None for the buckets, or 1 without buckets. Raises ValueError for sizes not in 1..`max_batch`.
        """
        sizes = list(self.buckets or (1,)) if sizes is None else list(sizes)
        check_buckets(sizes, self.max_batch)
        for size in sorted({self._size(size) for size in sizes}):
            self._prepare(size)
            self._part(np.zeros((size, self.image_size, self.image_size, 3), np.uint8))

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the outputs of a run."""
        return ("plain", "adapted") if self.adapted else ("plain",)

    def _check(self, pixels: np.ndarray) -> None:
        expected = f"(B, {self.image_size}, {self.image_size}, 3) with B >= 1"
        known = isinstance(pixels, np.ndarray)
        if not known or pixels.dtype != np.uint8:
            raise IosrFastError(
                f"expected pixels as a uint8 array {expected}, got {pixels.dtype if known else type(pixels).__name__}; "
                "the engine scales and normalises pixels itself, so pass them as bytes"
            )
        if pixels.ndim != 4 or len(pixels) == 0 or pixels.shape[1:] != (self.image_size, self.image_size, 3):
            raise IosrFastError(
                f"expected pixels of shape {expected}, got {tuple(pixels.shape)}; iosr_fast.images.preprocess resizes "
                "pictures"
            )

    def _size(self, pictures: int) -> int:
        return pictures if self.buckets is None else bucket_of(pictures, self.buckets)

    def _part(self, pixels: np.ndarray) -> tuple[Array, ...]:
        pixels = np.ascontiguousarray(pixels)
        return tuple(output[: len(pixels)] for output in self._run(pixels, self._size(len(pixels))))

    @abstractmethod
    def _run(self, pixels: np.ndarray, size: int) -> tuple[Array, ...]:
        """Execute uint8 pixels of n <= max_batch pictures, C-contiguous, as a batch of `size` >= n.

        Returns one float32 array of at least n rows for each of `outputs`, or a tensor on the GPU that later runs don't
        overwrite. Without buckets, size is n.
        """

    def _prepare(self, size: int) -> None:
        """Do the work that a batch size needs once, before its first run."""


def _concatenate(parts: Sequence[Array]) -> Array:
    if len(parts) == 1 or isinstance(parts[0], np.ndarray):
        return np.concatenate(parts) if isinstance(parts[0], np.ndarray) else parts[0]
    import torch

    return torch.cat(list(parts))
