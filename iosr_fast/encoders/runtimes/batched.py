"""The common part of all runtimes: checking pixels and splitting large batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from iosr_fast.encoders.encoder import Embeddings, Encoder
from iosr_fast.encoders.runtimes.gpu import GpuRuns
from iosr_fast.exceptions import IosrFastError
from iosr_fast.images.geometry import Geometry


class BatchedEncoder(Encoder):
    """An Encoder over `_run`, which executes at most `max_batch` pictures: any number of them on a CPU, where padding
    only costs time, and by `_gpu` on a GPU."""

    _gpu: GpuRuns | None = None

    def __init__(self, manifest: dict[str, Any], runtime: str, adapted: bool = True) -> None:
        self.runtime = runtime
        self._geometry = Geometry.from_facts(manifest)
        self.image_size = self._geometry.size
        self.width: int = manifest["width"]
        self.fingerprint: str = manifest["fingerprint"]
        self.max_batch: int = manifest["max_batch"]
        self.adapted = adapted and manifest["first_adapted_block"] is not None
        self.outputs = ("plain", "adapted") if self.adapted else ("plain",)  # of a run, by name

    def use_gpu(self, launch: Callable[[Any], Any]) -> None:
        """Run by `launch`, of which GpuRuns says what it takes and returns."""
        self._gpu = GpuRuns(launch, (self.max_batch, self.image_size, self.image_size, 3))
        self.buckets = self._gpu.buckets

    @property
    def geometry(self) -> Geometry:
        return self._geometry

    def encode(self, pixels: np.ndarray) -> Embeddings:
        """As Encoder.encode; raises ValueError for pixels of another type, dtype or shape."""
        return self.encode_on_device(pixels).to_numpy()

    def encode_on_device(self, pixels: np.ndarray) -> Embeddings:
        """As `encode`; on a GPU the embeddings are tensors there, ready on the caller's current stream."""
        size, known = self.image_size, isinstance(pixels, np.ndarray)
        if not (known and pixels.dtype == np.uint8 and pixels.shape[1:] == (size, size, 3) and len(pixels)):
            raise IosrFastError(
                f"expected pixels as a uint8 array (B, {size}, {size}, 3) with B >= 1, got "
                f"{f'{pixels.dtype} of shape {pixels.shape}' if known else type(pixels).__name__}; "
                "iosr_fast.images.preprocess resizes pictures, and the engine scales and normalises them"
            )
        run = self._run if self._gpu is None else self._gpu.run
        starts = range(0, len(pixels), self.max_batch)
        parts = [Embeddings(*run(np.ascontiguousarray(pixels[at : at + self.max_batch]))) for at in starts]
        return parts[0] if len(parts) == 1 else Embeddings.concatenate(parts)

    def warm(self, sizes: Iterable[int] | None = None) -> None:
        """As Encoder.warm; on a GPU each size is recorded as a CUDA graph, too. Raises ValueError for sizes not in
        1..`max_batch`."""
        sizes = list(self.buckets or (1,)) if sizes is None else list(sizes)
        if wrong := [size for size in sizes if not 1 <= size <= self.max_batch]:
            raise IosrFastError(f"expected batch sizes of 1 to {self.max_batch}, got {wrong}")
        if self._gpu is not None:
            for size in sizes:
                self._gpu.record(size)
        super().warm(sizes)

    def _run(self, pixels: np.ndarray) -> tuple[np.ndarray, ...]:
        """Execute uint8 pixels of n <= max_batch pictures, C-contiguous, on a CPU: one float32 array (n, D) for each of
        `outputs`."""
        raise NotImplementedError
