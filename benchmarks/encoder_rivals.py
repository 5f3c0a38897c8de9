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
from iosr_fast.clip.adapter import Adapter
from iosr_fast.clip.dual_encoder import DualEncoder
from iosr_fast.clip.load import LoadedClip
from iosr_fast.clip.tower_open_clip import OpenClipBlock
from iosr_fast.clip.two_pass import TwoPasses
from iosr_fast.clip.vision_tower import vision_tower
from iosr_fast.encoders.runtimes.openvino import openvino_core
from iosr_fast.export.onnx import export_onnx, save_onnx, to_onnx

Embed = Callable[[Any], tuple[Any, ...]]  # uint8 pixels (B, S, S, 3) -> (plain, adapted) or (plain,)


class Pass(nn.Module):
    """One literal pass: uint8 (B, S, S, 3) -> (B, D), L2-normalised, nothing shared or left out. What is exported.

    Preprocessing is open_clip's. Its attention is written with scaled_dot_product_attention, because
    nn.MultiheadAttention exports a fixed batch; the rest is open_clip's or timm's own.
    """

    def __init__(self, clip: LoadedClip, adapter: Adapter | None) -> None:
        super().__init__()
        self.visual, self.image_size = clip.model.visual, clip.image_size
        self.tower = vision_tower(self.visual, clip.name)
        self.adapters = {} if adapter is None else dict(adapter.blocks.items())
        self.mean, self.std = (torch.tensor(value).view(1, 3, 1, 1) for value in (clip.mean, clip.std))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        x = self.tower.embed((pixels.float().permute(0, 3, 1, 2) / 255 - self.mean) / self.std)
        for i, block in enumerate(self.tower.blocks):
            x = self._attend(block, x) if isinstance(block, OpenClipBlock) else block.attend(x)
            update = block.mlp(x)
            x = x + (update + self.adapters[str(i)](x) if str(i) in self.adapters else update)
        return nn.functional.normalize(self.tower.pool(x), dim=-1)

    @staticmethod
    def _attend(block: OpenClipBlock, x: torch.Tensor) -> torch.Tensor:
        own = block.block
        attended: torch.Tensor = x + own.ls_1(Pass._attention(own.attn, own.ln_1(x)))
        return attended

    @staticmethod
    def _attention(attn: Any, x: torch.Tensor) -> torch.Tensor:
        length, width = x.shape[1:]
        parts = nn.functional.linear(x, attn.in_proj_weight, attn.in_proj_bias).chunk(3, dim=-1)
        q, k, v = (part.reshape(-1, length, attn.num_heads, width // attn.num_heads).transpose(1, 2) for part in parts)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        return attn.out_proj(mixed.transpose(1, 2).reshape(-1, length, width))


def write(module: nn.Module, path: Path) -> None:
    """`module`, a Pass or a fused encoder, as ONNX."""
    if isinstance(module, DualEncoder):
        export_onnx(module, path)
        return
    assert isinstance(module, Pass)
    pixels = torch.zeros(2, module.image_size, module.image_size, 3, dtype=torch.uint8)
    save_onnx(to_onnx(module.eval(), pixels, "pixels", ["embedding"], {0: torch.export.Dim("batch", min=1)}), path)


def literal_passes(clip: LoadedClip, adapter: Adapter | None, precision: str) -> nn.Module:
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


def in_onnxruntime(path: Path, threads: int, spin: bool = True) -> Embed:
    """Without `spin` idle threads of the session sleep: where two sessions take turns, the threads of one would spin on
    the cores of the other."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    if not spin:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda pixels: tuple(session.run(None, {"pixels": pixels}))


def in_openvino(path: Path, threads: int, precision: str = "f32") -> Embed:
    """In `precision`, "f32" or "bf16": OpenVINO would choose bf16 by itself where the processor has it."""
    options = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY"}
    request = openvino_core().compile_model(path, "CPU", options).create_infer_request()

    def embed(pixels: np.ndarray) -> tuple[np.ndarray, ...]:
        outputs = request.infer([pixels])
        return tuple(np.array(outputs[output]) for output in outputs)

    return embed


def in_turn(passes: Sequence[Embed]) -> Embed:
    """Several passes as one."""
    return lambda pixels: tuple(embedding for one in passes for embedding in one(pixels))
