"""The precisions of an engine: which runtimes compute in them, and what a quantised one depends on."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from iosr_fast.clip.dual_encoder import Precision
from iosr_fast.encoders.runtimes import choose_runtime
from iosr_fast.encoders.runtimes.tensorrt import EXTRAS

if TYPE_CHECKING:
    from iosr_fast.clip.load import LoadedClip

# Which runtimes execute an engine of a precision; in bf16 it is OpenVINO that rounds, the graph stays fp32.
RUNTIMES_OF = {
    "fp32": ("onnxruntime", "openvino", "torch", "tensorrt", "tensorrt_rtx"),
    "fp16": ("onnxruntime", "openvino", "torch", "tensorrt", "tensorrt_rtx"),
    "bf16": ("openvino",),
    "int8": ("onnxruntime", "openvino", "tensorrt", "tensorrt_rtx"),
    "fp8": ("tensorrt", "tensorrt_rtx"),
}
QUANTISED: dict[str, Literal["int8", "fp8"]] = {"int8": "int8", "fp8": "fp8"}


def choose_builder(runtime: str, precision: str) -> str:
    """The runtime that an engine is built for: one by its name, or the best here for "auto".

    Raises ValueError for an unknown precision, and one that the runtime doesn't compute in.
    """
    if precision not in RUNTIMES_OF:
        raise ValueError(f"expected a precision of {list(RUNTIMES_OF)}, got {precision!r}")
    able = RUNTIMES_OF[precision]
    runtime = choose_runtime(runtime, able if runtime == "auto" else None)
    if runtime not in able:
        raise ValueError(f"expected one of {list(able)}, which compute in {precision}, got the runtime {runtime!r}")
    return runtime


def graph_precision(precision: str, runtime: str) -> Precision:
    """What the graph is exported in: around TensorRT's quantised products all else is fp16, on a CPU fp32."""
    return "fp16" if precision == "fp16" or (precision in QUANTISED and runtime in EXTRAS) else "fp32"


def quantised_by(
    clip: LoadedClip, runtime: str, precision: str, calibration: np.ndarray | None
) -> dict[str, Any] | None:
    """What the embeddings of a quantised engine depend on beside its weights, JSON-ready; None for other precisions.

    Raises ValueError where calibration pictures are missing or of another shape or dtype.
    """
    if precision not in QUANTISED:
        return None
    size = clip.image_size
    expected = f"calibration pictures as uint8 (N, {size}, {size}, 3)"
    if calibration is None:
        raise ValueError(f"expected {expected} for {precision}, got none; offline.calibration gathers them")
    if calibration.dtype != np.uint8 or calibration.ndim != 4 or calibration.shape[1:] != (size, size, 3):
        raise ValueError(f"expected {expected}, got {calibration.dtype} {calibration.shape}; to_pixels brings to size")
    digest = hashlib.sha256(calibration.tobytes()).hexdigest()
    return {"scheme": "tensorrt" if runtime in EXTRAS else "cpu", "calibration_sha256": digest}
