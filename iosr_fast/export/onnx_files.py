"""ONNX models as two files: a small graph, and the weights beside it, which runtimes map into memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from iosr_fast.encoders.runtimes.onnxruntime import WEIGHTS_SUFFIX
from iosr_fast.utils.require import require

_LARGE = 1024  # bytes; smaller tensors stay in the graph, where shape inference and constant folding see them


def save_onnx(model: Any, path: Path) -> None:
    """Write an onnx.ModelProto: its graph to `path`, tensors of 1 KiB or more to `path`.with_suffix(".weights").

    Whoever opens `path` finds the weights by their name beside it (onnx.load, ONNX Runtime, OpenVINO, TensorRT), so
    both files move together. Replaces what is there.
    """
    onnx = require("onnx", "train")
    weights = path.with_suffix(WEIGHTS_SUFFIX)
    weights.unlink(missing_ok=True)  # onnx appends
    onnx.save_model(model, str(path), save_as_external_data=True, location=weights.name, size_threshold=_LARGE)
    if weights.exists():  # a graph may have no large tensor
        weights.chmod(0o644)  # onnx makes it for its owner only
