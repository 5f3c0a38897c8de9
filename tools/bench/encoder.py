"""Both embeddings of a batch: fused in one pass, against the two passes of the papers' code.

    onnxruntime     the dual encoder, fused
    two-pass        the plain and the adapted encoder exported each for itself, in the same ONNX Runtime
    eager-two-pass  the public way in PyTorch: open_clip's own forward, then the forward with the adapter
    one-pass        the plain encoder alone: what no adapted embedding at all costs

Weights are random: they change no speed. Everything is checked against the eager two passes before it is timed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from iosr_fast.info import usable_threads
from iosr_fast.offline.adapter import Adapter, encode_adapted, encode_plain
from iosr_fast.offline.clip import LoadedClip, load_clip
from iosr_fast.offline.dual_encoder import DualEncoder, DualEncoderConfig, build_dual_encoder
from iosr_fast.offline.export import export_onnx, quiet_exporter, random_adapter
from tools.bench import harness

RIVALS = ("two-pass", "eager-two-pass", "one-pass")
TOLERANCE = 1e-4
Embed = Callable[[], tuple[np.ndarray, ...]]


class Pass(nn.Module):
    """One whole pass, nothing shared or left out: uint8 (B, S, S, 3) -> (B, D), L2-normalised. The rival's module.

    Preprocessing is as in open_clip. Attention is written with scaled_dot_product_attention, because
    nn.MultiheadAttention exports a fixed batch; the rest is open_clip's own.
    """

    def __init__(self, clip: LoadedClip, adapter: Adapter | None) -> None:
        super().__init__()
        self.visual = clip.model.visual
        self.adapters = {} if adapter is None else dict(adapter.blocks.items())
        self.mean, self.std = (torch.tensor(value).view(1, 3, 1, 1) for value in (clip.mean, clip.std))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        x = self.visual._embeds((pixels.permute(0, 3, 1, 2).float() / 255 - self.mean) / self.std)
        for i, block in enumerate(self.visual.transformer.resblocks):
            x = x + self._attention(block.attn, block.ln_1(x))
            update = block.mlp(block.ln_2(x))
            x = x + (update + self.adapters[str(i)](x) if str(i) in self.adapters else update)
        pooled, _ = self.visual._pool(x)
        return nn.functional.normalize(pooled @ self.visual.proj, dim=-1)

    @staticmethod
    def _attention(attn: Any, x: torch.Tensor) -> torch.Tensor:
        length, width = x.shape[1:]
        parts = nn.functional.linear(x, attn.in_proj_weight, attn.in_proj_bias).chunk(3, dim=-1)
        q, k, v = (part.reshape(-1, length, attn.num_heads, width // attn.num_heads).transpose(1, 2) for part in parts)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        return attn.out_proj(mixed.transpose(1, 2).reshape(-1, length, width))


def fused_flops(config: DualEncoderConfig, batch: int) -> float:
    """FLOP of the GEMMs that the fused encoder does, attention included."""
    tokens, width, hidden = config.patches_per_side**2 + 1, config.width, config.mlp_width
    first = config.blocks if config.first_adapted_block is None else config.first_adapted_block
    adapter = 2 * width * (config.bottleneck or 0)
    macs = 3.0 * config.patch_size**2 * width * (tokens - 1)
    for i in range(config.blocks):
        streams = 2 if i > first else 1
        adapted = adapter if i >= first else 0
        if i < config.blocks - 1:
            block = 4 * tokens * width**2 + 2 * tokens**2 * width + 2 * tokens * width * hidden
            macs += streams * block + adapted * tokens
        else:  # the CLS token only: q, W_k' q, scores, mix, W_v, out-projection, MLP
            macs += streams * (4 * width**2 + 2 * config.heads * tokens * width + 2 * width * hidden) + adapted
    macs += (2 if first < config.blocks else 1) * width * config.embedding_width
    return 2.0 * macs * batch


def session(module: nn.Module, folder: Path, name: str, threads: int, pixels: np.ndarray) -> Any:
    """`module` in ONNX Runtime on the CPU."""
    import onnxruntime as ort

    path = folder / f"{name}.onnx"
    if isinstance(module, DualEncoder):
        export_onnx(module, path)
    else:
        dynamic = {"pixels": {0: torch.export.Dim("batch", min=1)}}
        example = (torch.from_numpy(pixels[:1]).repeat(2, 1, 1, 1),)
        with quiet_exporter():
            torch.onnx.export(
                module, example, path, dynamo=True, verbose=False, external_data=False, dynamic_shapes=dynamic
            )
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def candidates(clip: LoadedClip, adapter: Adapter, pixels: np.ndarray, threads: int, folder: Path) -> dict[str, Embed]:
    """What is timed; each returns (plain, adapted), one-pass (plain,)."""
    fused = session(build_dual_encoder(clip, adapter), folder, "fused", threads, pixels)
    plain = session(Pass(clip, None).eval(), folder, "plain", threads, pixels)
    adapted = session(Pass(clip, adapter).eval(), folder, "adapted", threads, pixels)

    def one(compiled: Any) -> np.ndarray:
        result: np.ndarray = compiled.run(None, {compiled.get_inputs()[0].name: pixels})[0]
        return result

    @torch.inference_mode()
    def eager() -> tuple[np.ndarray, ...]:
        mean, std = (torch.tensor(value).view(1, 3, 1, 1) for value in (clip.mean, clip.std))
        x = (torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255 - mean) / std
        features = (encode_plain(clip, x), encode_adapted(clip, adapter, x))
        return tuple(nn.functional.normalize(feature, dim=-1).numpy() for feature in features)

    return {
        "onnxruntime": lambda: tuple(fused.run(["plain", "adapted"], {"pixels": pixels})),
        "two-pass": lambda: (one(plain), one(adapted)),
        "eager-two-pass": eager,
        "one-pass": lambda: (one(plain),),
    }


def verify(runs: dict[str, Embed]) -> None:
    """Raise ArithmeticError unless every candidate agrees with the eager two passes."""
    truth = runs["eager-two-pass"]()
    for name, run in runs.items():
        got = run()
        error = max(float(np.abs(a - b).max()) for a, b in zip(got, truth, strict=name != "one-pass"))
        if not error <= TOLERANCE:
            raise ArithmeticError(f"{name} is off by {error:.2g} (allowed: {TOLERANCE}); not timed")


def run(
    model: str = "ViT-B-16",
    batch: int = 8,
    first_adapted_block: int = 8,
    threads: int | None = None,
    repeats: int = 7,
) -> list[dict[str, Any]]:
    """Verify and time one case, interleaved; one row an implementation."""
    threads = threads or usable_threads()
    clip = load_clip(model, None if model == "demo" else "none")
    adapter = random_adapter(clip, first_adapted_block)
    config = build_dual_encoder(clip, adapter).shapes
    shape = (batch, clip.image_size, clip.image_size, 3)
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    with tempfile.TemporaryDirectory() as folder, harness.torch_threads(threads):
        runs = candidates(clip, adapter, pixels, threads, Path(folder))
        verify(runs)
        ceiling = harness.gemm_ceiling_flops(threads)
        runtimes_ms = harness.measure(runs, repeats)
        # Minutes lie between; a ceiling taken in a slow spell alone would be passed.
        ceiling = max(ceiling, harness.gemm_ceiling_flops(threads))
    return harness.rows(
        "encoder",
        f"{model.lower()}-b{batch}-s{first_adapted_block}",
        runtimes_ms,
        rivals=RIVALS,
        threads=threads,
        flops={"onnxruntime": fused_flops(config, batch)},
        ceiling_flops=ceiling,
        packages=("onnxruntime", "torch", "open_clip_torch"),
    )
