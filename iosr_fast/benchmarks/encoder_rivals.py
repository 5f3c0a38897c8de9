"""The rivals of the fused encoder, and the runtimes that execute either.

eager-two-pass          the public way: open_clip's own forward, then the forward with the adapter, in eager PyTorch
torch-compile-two-pass  the two passes, each compiled by torch.compile with its weights frozen
onnxruntime-two-pass    the two passes, each exported, in the same ONNX Runtime as the fused encoder
openvino-two-pass       the same two files in OpenVINO
open-clip-one-pass      open_clip's own single pass in eager PyTorch, without an adapted embedding
onnxruntime-one-pass, openvino-one-pass    the exported plain pass alone
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from iosr_fast.clip.adapter import Adapter
from iosr_fast.clip.dual_encoder import DualEncoder
from iosr_fast.clip.load import LoadedClip
from iosr_fast.clip.tower_open_clip import OpenClipBlock
from iosr_fast.clip.two_pass import TwoPasses
from iosr_fast.clip.vision_tower import vision_tower
from iosr_fast.encoders.runtimes.openvino import openvino_core
from iosr_fast.export.onnx_export import export_onnx, to_onnx
from iosr_fast.export.onnx_files import save_onnx

COMPILED = ("torch-compile", "onnxruntime", "openvino")
Embed = Callable[[], tuple[np.ndarray, ...]]


class Pass(nn.Module):
    """One literal pass: uint8 (B, S, S, 3) -> (B, D), L2-normalised, nothing shared or left out. What rivals compile.

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
        x = self.tower.embed((pixels.permute(0, 3, 1, 2).float() / 255 - self.mean) / self.std)
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


def write(module: nn.Module, path: Path) -> Path:
    """`module`, a Pass or a fused encoder, as ONNX."""
    if isinstance(module, DualEncoder):
        export_onnx(module, path)
        return path
    assert isinstance(module, Pass)
    pixels = torch.zeros(2, module.image_size, module.image_size, 3, dtype=torch.uint8)
    save_onnx(to_onnx(module, pixels, "pixels", ["embedding"], {0: torch.export.Dim("batch", min=1)}), path)
    return path


def write_passes(clip: LoadedClip, adapter: Adapter, folder: Path) -> tuple[Path, Path]:
    """The plain and the adapted pass as ONNX, written unless they exist."""
    paths = folder / "plain.onnx", folder / "adapted.onnx"
    for path, part in zip(paths, (None, adapter), strict=True):
        if not path.exists():
            write(Pass(clip, part).eval(), path)
    return paths


def open_session(path: Path, threads: int, spin: bool = True) -> Any:
    """Without `spin` idle threads of the session sleep: where two sessions take turns, the threads of one would spin on
    the cores of the other."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    if not spin:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def in_onnxruntime(path: Path, pixels: np.ndarray, threads: int, spin: bool = True) -> Embed:
    session = open_session(path, threads, spin)
    return lambda: tuple(session.run(None, {"pixels": pixels}))


def in_openvino(path: Path, pixels: np.ndarray, threads: int, precision: str = "f32") -> Embed:
    """In `precision`, "f32" or "bf16": OpenVINO would choose bf16 by itself where the processor has it."""
    options = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY"}
    request = openvino_core().compile_model(path, "CPU", options).create_infer_request()

    def call() -> tuple[np.ndarray, ...]:
        outputs = request.infer([pixels])
        return tuple(np.array(outputs[output]) for output in outputs)

    return call


def in_torch_compile(module: nn.Module, pixels: np.ndarray) -> Embed:
    """`module` compiled for the shape of `pixels` by the first call; code that would stay eager is an error."""
    batch = torch.from_numpy(pixels)
    compiled = torch.compile(module, fullgraph=True, dynamic=False, options={"freezing": True})

    def call() -> tuple[np.ndarray, ...]:
        with torch.no_grad():
            return (compiled(batch).numpy(),)

    return call


def eagerly(clip: LoadedClip, adapter: Adapter | None, pixels: np.ndarray) -> Embed:
    """open_clip's own forward, and, with an adapter, a second one with it."""
    module, batch = TwoPasses(clip, adapter), torch.from_numpy(pixels.copy())

    @torch.inference_mode()
    def call() -> tuple[np.ndarray, ...]:
        return tuple(embedding.numpy() for embedding in module(batch))

    return call


def both(first: Embed, second: Embed) -> Embed:
    return lambda: (*first(), *second())
