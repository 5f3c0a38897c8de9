"""PyTorch without open_clip, on the GPU if there is one, else on the CPU."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np

from iosr_fast.encoders.engine_folder import TORCH_FILE
from iosr_fast.encoders.runtimes.batched import BatchedEncoder
from iosr_fast.exceptions import IosrFastError
from iosr_fast.utils.require import require

_running = threading.Lock()  # PyTorch's number of threads is the process's: of two runs, one would keep the other's


class TorchEncoder(BatchedEncoder):
    """Executes encoder.safetensors, without `adapted` leaving the adapter out.

    On a GPU in a few batch sizes, which `warm` records as CUDA graphs (gpu.GpuRuns). On the CPU one run of a
    process at a time, in `runs` times `threads` threads (None: PyTorch's choice), which is PyTorch's number meanwhile.
    """

    def __init__(
        self, folder: Path, manifest: dict[str, Any], threads: int | None = None, runs: int = 1, adapted: bool = True
    ) -> None:
        self._torch = torch = require("torch", "cpu")
        super().__init__(manifest, "torch", adapted)
        from safetensors.torch import load_file

        from iosr_fast.backbones.dual_encoder import DualEncoder, is_adapter_weight

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
        if torch.cuda.is_available():
            self.use_gpu(self._encoder.for_gpu().cuda())

    def _run(self, pixels: np.ndarray) -> tuple[np.ndarray, ...]:
        torch = self._torch
        batch = torch.from_numpy(pixels if pixels.flags.writeable else pixels.copy())  # it warns of read-only arrays
        with _running, torch.inference_mode():
            before = torch.get_num_threads()
            torch.set_num_threads(self.threads or before)
            try:
                return tuple(output.numpy() for output in self._encoder(batch))
            finally:
                torch.set_num_threads(before)
