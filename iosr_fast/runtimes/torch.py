"""PyTorch, on the GPU where it sees one and on the CPU otherwise; without open_clip."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from iosr_fast._require import require
from iosr_fast.runtimes.batched import BatchedEncoder

FILE = "encoder.safetensors"


class TorchEncoder(BatchedEncoder):
    """Executes encoder.safetensors eagerly. While it encodes, PyTorch uses `threads` in the whole process."""

    def __init__(
        self, folder: Path, manifest: dict[str, Any], threads: int | None = None, device: str | None = None
    ) -> None:
        super().__init__(manifest, "torch")
        torch = require("torch", "train")
        from safetensors.torch import load_file

        from iosr_fast.offline.dual_encoder import DualEncoder

        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        encoder = DualEncoder.from_config(manifest["dual_encoder"])
        try:
            encoder.load_state_dict(load_file(folder / FILE))
        except RuntimeError as error:
            raise ValueError(
                f"{FILE} in {folder} does not fit its manifest: {error}; build the engine again"
            ) from error
        self._encoder = encoder.to(self.device)
        self._threads = threads

    def _run(self, pixels: np.ndarray) -> tuple[np.ndarray, ...]:
        torch = require("torch", "train")
        # PyTorch has no read-only tensors and warns of a read-only array.
        batch = torch.from_numpy(pixels if pixels.flags.writeable else pixels.copy())
        with torch.inference_mode(), self._chosen_threads():
            return tuple(output.cpu().numpy() for output in self._encoder(batch.to(self.device)))

    @contextmanager
    def _chosen_threads(self) -> Iterator[None]:
        torch = require("torch", "train")
        before = torch.get_num_threads()
        if self._threads is None or self._threads == before:
            yield
            return
        torch.set_num_threads(self._threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)
