"""PyTorch without open_clip, on the GPU if there is one, else on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from iosr_fast.encoders.encoder import Array
from iosr_fast.encoders.engine_folder import TORCH_FILE
from iosr_fast.encoders.runtimes.batched import BatchedEncoder
from iosr_fast.encoders.runtimes.gpu import GpuRuns
from iosr_fast.exceptions import IosrFastError
from iosr_fast.utils.require import require


class TorchEncoder(BatchedEncoder):
    """Executes encoder.safetensors, without `adapted` leaving the adapter out.

    On a GPU in a few batch sizes, which `warm` records as CUDA graphs (gpu.GpuRuns). On the CPU one run at a time, in
    `runs` times `threads` threads (None: PyTorch's choice), which is PyTorch's number in the whole process meanwhile.
    """

    def __init__(
        self, folder: Path, manifest: dict[str, Any], threads: int | None = None, runs: int = 1, adapted: bool = True
    ) -> None:
        self._torch = torch = require("torch", "cpu")
        on_gpu = torch.cuda.is_available()
        super().__init__(manifest, "torch", adapted, on_gpu)
        from safetensors.torch import load_file

        from iosr_fast.clip.dual_encoder import DualEncoder, is_adapter_weight

        config, weights = manifest["dual_encoder"], load_file(folder / TORCH_FILE)
        if not adapted:
            config = {**config, "first_adapted_block": None, "bottleneck": None}
            weights = {name: w for name, w in weights.items() if not is_adapter_weight(name)}
        self._encoder = DualEncoder.from_config(config)
        try:
            self._encoder.load_state_dict(weights)
        except RuntimeError as error:
            raise IosrFastError(
                f"{TORCH_FILE} in {folder} does not fit its manifest: {error}; build the engine again"
            ) from error
        self.threads = None if threads is None else threads * runs
        self._gpu = GpuRuns(self._encoder.cuda(), self.largest) if on_gpu else None

    def _run(self, pixels: np.ndarray, size: int) -> tuple[Array, ...]:
        if self._gpu is not None:
            return self._gpu.run(pixels, size)
        # PyTorch warns of read-only arrays.
        batch = self._torch.from_numpy(pixels if pixels.flags.writeable else pixels.copy())
        with self._torch.inference_mode(), self._process_threads():
            return tuple(output.numpy() for output in self._encoder(batch))

    def _prepare(self, size: int) -> None:
        if self._gpu is not None:
            self._gpu.record(size)

    @contextmanager
    def _process_threads(self) -> Iterator[None]:
        """Set PyTorch's number of threads to `threads` within the block."""
        before = self._torch.get_num_threads()
        if self.threads in (None, before):
            yield
            return
        self._torch.set_num_threads(self.threads)
        try:
            yield
        finally:
            self._torch.set_num_threads(before)
