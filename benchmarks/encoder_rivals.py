"""The rivals of the fused encoder, and the runtimes that execute either.

eager-two-pass          the public way: open_clip's own forward, then the forward with the adapter, in eager PyTorch
torch-compile-two-pass  the same by torch.compile, on a CPU with its weights frozen
onnxruntime-two-pass    the two passes, each exported, in the same ONNX Runtime as the fused encoder
openvino-two-pass       the same two files in OpenVINO
...-one-pass            the plain pass alone
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.devices import Device
from iosr_fast.backbones.adapter import Adapter, adapted_pass
from iosr_fast.backbones.load import LoadedModel
from iosr_fast.backbones.plain_encoder import PlainEncoder
from iosr_fast.backbones.two_pass import TwoPasses
from iosr_fast.encoders.runtimes.onnxruntime import open_session
from iosr_fast.encoders.runtimes.openvino import openvino_core
from iosr_fast.export.onnx import export_onnx

Embed = Callable[[Any], tuple[Any, ...]]  # uint8 pixels (B, S, S, 3) -> (plain, adapted) or (plain,)


class AdaptedPass(PlainEncoder):
    """The second pass as a module that can be exported, as PlainEncoder is the first: nothing is shared or left out."""

    outputs = ("adapted",)

    def __init__(self, clip: LoadedModel, adapter: Adapter) -> None:
        super().__init__(clip)
        self.adapter = adapter

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x = (pixels.float().permute(0, 3, 1, 2) / 255 - self.mean) / self.std
        return (nn.functional.normalize(adapted_pass(self.visual, self.adapter, x), dim=-1),)


def export_pass(clip: LoadedModel, adapter: Adapter | None, path: Path) -> None:
    export_onnx(PlainEncoder(clip) if adapter is None else AdaptedPass(clip, adapter), path)


def literal_passes(clip: LoadedModel, adapter: Adapter | None, precision: str) -> nn.Module:
    """open_clip's own forward, and with an adapter a second one with it; in fp16 a copy, mean and std in float32."""
    module = TwoPasses(clip, adapter).eval()
    if precision == "fp16":
        module = copy.deepcopy(module)
        for part in (module.visual, module.adapter):
            if part is not None:
                part.half()
    return module


def in_torch(module: nn.Module, device: Device, compiled: bool = False) -> Embed:
    """In PyTorch on `device`, which takes the module along: eager, or `compiled` for each shape of pixels that comes;
    code that would stay eager is an error then. Pixels are an array, or a tensor on the device."""
    module = module.to(device.name)
    forward: Callable[[torch.Tensor], Any] = module
    if compiled:
        options: dict[str, Any] = {} if device.is_gpu else {"freezing": True}
        forward = torch.compile(module, fullgraph=True, dynamic=False, options=options)

    @torch.no_grad()
    def embed(pixels: Any) -> tuple[torch.Tensor, ...]:
        return tuple(forward(torch.as_tensor(pixels, device=device.name)))

    return embed


def in_onnxruntime(files: Sequence[Path], threads: int) -> Embed:
    """One file or pass after the other. Idle threads of several sessions sleep: those of one would spin on the cores of
    the other."""
    sessions = [open_session(path, threads, spinning=len(files) == 1) for path in files]
    return lambda pixels: tuple(rows for session in sessions for rows in session.run(None, {"pixels": pixels}))


def in_openvino(files: Sequence[Path], threads: int, precision: str = "f32") -> Embed:
    """In `precision`, "f32" or "bf16": OpenVINO would choose bf16 by itself where the processor has it."""
    options = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY"}
    requests = [openvino_core().compile_model(path, "CPU", options).create_infer_request() for path in files]

    def embed(pixels: np.ndarray) -> tuple[np.ndarray, ...]:
        return tuple(np.array(rows) for request in requests for rows in request.infer([pixels]).values())

    return embed


RUNTIMES: dict[str, Callable[..., Embed]] = {"onnxruntime": in_onnxruntime, "openvino": in_openvino}
