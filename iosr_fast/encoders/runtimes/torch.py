"""PyTorch without open_clip, on the GPU if there is one, else on the CPU.

IOSR_FAST_TORCH_COMPILE=1 compiles the encoder on a GPU (torch.compile), which takes a minute at the first start;
PyTorch keeps what it has compiled.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from iosr_fast.encoders.encoder import Array
from iosr_fast.encoders.runtimes.batched import BatchedEncoder, powers_of_two
from iosr_fast.encoders.runtimes.cuda_graphs import Recorder
from iosr_fast.encoders.runtimes.upload import Upload
from iosr_fast.exceptions import IosrFastError
from iosr_fast.utils.require import require

FILE = "encoder.safetensors"
COMPILE = "IOSR_FAST_TORCH_COMPILE"
log = logging.getLogger(__name__)


class TorchEncoder(BatchedEncoder):
    """Executes encoder.safetensors; on a GPU in a few batch sizes, which `warm` records as CUDA graphs, eagerly or
    compiled.

    On the CPU any batch size is executed; while it encodes, PyTorch uses `threads` in the whole process. The graphs
    have not been run on a GPU yet.
    """

    def __init__(
        self,
        folder: Path,
        manifest: dict[str, Any],
        threads: int | None = None,
        device: str | None = None,
        buckets: Iterable[int] | None = None,
        adapted: bool = True,
    ) -> None:
        """`buckets`: batch sizes on a GPU, None for powers of two. Without `adapted` the adapter is left out."""
        torch = require("torch", "cpu")
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        on_gpu = self.device.startswith("cuda")
        sizes = powers_of_two(manifest["max_batch"]) if buckets is None else buckets
        super().__init__(manifest, "torch", sizes if on_gpu else None, adapted)
        from safetensors.torch import load_file

        from iosr_fast.clip.dual_encoder import DualEncoder, is_adapter_weight

        config, weights = manifest["dual_encoder"], load_file(folder / FILE)
        if not adapted:
            config = {**config, "first_adapted_block": None, "bottleneck": None}
            weights = {name: w for name, w in weights.items() if not is_adapter_weight(name)}
        encoder = DualEncoder.from_config(config)
        try:
            encoder.load_state_dict(weights)
        except RuntimeError as error:
            raise IosrFastError(
                f"{FILE} in {folder} does not fit its manifest: {error}; build the engine again"
            ) from error
        self._torch = torch
        self._encoder = encoder.to(self.device)
        self._executed: Callable[[Any], tuple[Any, ...]] = self._encoder
        self.threads = threads
        self._compile = os.environ.get(COMPILE, "") not in ("", "0")
        if on_gpu:
            self._use_buckets(Recorder(device=self.device))

    def _use_buckets(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._replay: dict[int, Callable[[], tuple[Any, ...]]] = {}
        if self._compile:
            # One compilation serves all batch sizes above 1.
            self._executed = self._torch.compile(self._encoder, fullgraph=True, dynamic=True)
        shape = (self.max_batch, self.image_size, self.image_size, 3)
        with self._torch.inference_mode():
            self._pixels = self._torch.zeros(shape, dtype=self._torch.uint8, device=self.device)
            self._upload = Upload(self._pixels)

    def _run(self, pixels: np.ndarray, size: int) -> tuple[Array, ...]:
        if self.buckets is None:
            # PyTorch warns of read-only arrays.
            batch = self._torch.from_numpy(pixels if pixels.flags.writeable else pixels.copy())
            with self._torch.inference_mode(), self._process_threads():
                return tuple(output.cpu().numpy() for output in self._encoder(batch.to(self.device)))
        with self._torch.inference_mode(), self._recorder.turn():
            self._upload(pixels)  # later rows hold older pictures; their outputs are cut off
            outputs = self._replay[size]() if size in self._replay else self._executed(self._pixels[:size])
            return tuple(output[: len(pixels)].clone() for output in outputs)  # the next replay overwrites them

    def _prepare(self, size: int) -> None:
        if self.buckets is None or size in self._replay:
            return
        try:
            with self._torch.inference_mode(), self._recorder.turn():
                self._replay[size] = self._recorder.record(lambda: self._executed(self._pixels[:size]))
        except RuntimeError as error:
            log.warning("batches of %d run without a CUDA graph, which can't be recorded: %s", size, error)

    @contextmanager
    def _process_threads(self) -> Iterator[None]:
        """Set PyTorch's number of threads to `threads` within the block."""
        before = self._torch.get_num_threads()
        if self.threads is None or self.threads == before:
            yield
            return
        self._torch.set_num_threads(self.threads)
        try:
            yield
        finally:
            self._torch.set_num_threads(before)
