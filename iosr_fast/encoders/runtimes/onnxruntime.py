"""ONNX Runtime on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from iosr_fast.encoders.engine_folder import ONNX_FILE, PLAIN_FILE
from iosr_fast.encoders.runtimes.batched import BatchedEncoder
from iosr_fast.exceptions import UnavailableError
from iosr_fast.utils.require import require


class OnnxRuntimeEncoder(BatchedEncoder):
    """Executes encoder.onnx, or plain.onnx without `adapted`; `threads` of one run (None: one per core). Any number of
    threads may share it; for `runs` of them the session has enough threads."""

    parallel = True

    def __init__(
        self, folder: Path, manifest: dict[str, Any], threads: int | None = None, runs: int = 1, adapted: bool = True
    ) -> None:
        super().__init__(manifest, "onnxruntime", adapted)
        self.threads, self.runs = threads, runs
        self._session = open_session(folder / (ONNX_FILE if adapted else PLAIN_FILE), threads, runs)

    def _run(self, pixels: np.ndarray) -> tuple[np.ndarray, ...]:
        return tuple(self._session.run(list(self.outputs), {"pixels": pixels}))


def open_session(
    model: Path | bytes,
    threads: int | None = None,
    runs: int = 1,
    *,
    spinning: bool = True,
    fix: str = "build the engine again",
) -> Any:
    """The InferenceSession of an ONNX file, or of its bytes, on the CPU: for `runs` calls at once, each by `threads`,
    which wait for work by `spinning` on their cores. Raises UnavailableError, with how to `fix` it, for a model that
    ONNX Runtime can't load."""
    ort = require("onnxruntime", "cpu")
    options = ort.SessionOptions()
    # Each run adds its calling thread to the session's, and ONNX Runtime counts one caller.
    options.intra_op_num_threads = 0 if threads is None else runs * (threads - 1) + 1
    options.log_severity_level = 3
    if not spinning:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's exceptions share no public base class
        what = f"{model.name} in {model.parent}" if isinstance(model, Path) else "the model"
        raise UnavailableError(f"ONNX Runtime can't load {what}: {error}; {fix}") from error
