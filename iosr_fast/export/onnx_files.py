"""ONNX models as two files, and their sessions, without torch."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

from iosr_fast.encoders.runtimes.onnxruntime import WEIGHTS_SUFFIX
from iosr_fast.utils.require import require

EXTERNAL = 1024  # bytes; smaller tensors stay in the graph, for shape inference and constant folding


def save_onnx(model: Any, path: Path) -> None:
    """Write an onnx.ModelProto: its graph to `path`, tensors of 1 KiB or more to `path`.with_suffix(".weights").

    The graph names the weights file beside it, so both files move together. Replaces existing files.
    """
    onnx = require("onnx", "cpu")
    weights = path.with_suffix(WEIGHTS_SUFFIX)
    weights.unlink(missing_ok=True)  # onnx appends
    onnx.save_model(model, str(path), save_as_external_data=True, location=weights.name, size_threshold=EXTERNAL)
    if weights.exists():  # a graph may have no large tensor
        weights.chmod(0o644)  # onnx makes it readable for its owner only


def open_session(model: Any, folder: Path | None = None) -> Any:
    """An ONNX Runtime session of a ModelProto on the CPU; `folder` has the file of the weights, if there is one. The
    model's large constants are then moved out of it."""
    ort = require("onnxruntime", "cpu")
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if folder is None:
        return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    # Beside the weights, which the graph names by a relative path. New constants have a file, too: protobuf's limit is
    # 2 GB.
    path = folder / f"{uuid.uuid4().hex}.onnx"
    try:
        save_onnx(model, path)
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    finally:
        for file in (path, path.with_suffix(WEIGHTS_SUFFIX)):
            file.unlink(missing_ok=True)
