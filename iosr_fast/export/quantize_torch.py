"""FP8 encoders for the torch runtime: the products of all blocks but the last in E4M3 (clip.fp8_linear)."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
import torch
from torch import nn

from iosr_fast.clip.dual_blocks import Block, LastBlock
from iosr_fast.clip.dual_encoder import DualEncoder
from iosr_fast.clip.fp8_linear import MULTIPLE, Fp8Linear
from iosr_fast.exceptions import IosrFastError
from iosr_fast.export.calibration import evenly
from iosr_fast.export.quantize import LARGEST_ERROR, MIN_PICTURES, RANGE_PIXELS

# Those of one group become one product, so they share a scale.
GROUPS = (("q_proj", "k_proj", "v_proj"), ("out_proj",), ("c_fc",), ("c_gate",), ("c_proj",))
BATCH, ROWS = 8, 64  # pictures of a run, and rows of each run on which errors are measured


@torch.no_grad()
def quantize_blocks(encoder: DualEncoder, pictures: np.ndarray) -> dict[str, Any]:
    """Replace linear layers of `encoder`, in fp16, by Fp8Linear, with ranges measured on `pictures` uint8 (N, S, S, 3).

    A group whose squared error exceeds 5% of the variance of its outputs stays in fp16, as do layers whose sizes are no
    multiples of 16, adapters, the last block of the CLS token, and what is outside of the blocks.

    Returns JSON values: kind, calibration_pictures, products (number quantised) and kept ({name: reason}). Raises
    ValueError for fewer than 8 pictures.
    """
    if len(pictures) < MIN_PICTURES:
        raise IosrFastError(f"expected at least {MIN_PICTURES} calibration pictures, got {len(pictures)}")
    groups = [
        [f"blocks.{i}.{name}" for name in names]
        for i, block in enumerate(encoder.blocks)
        if isinstance(block, Block) and not isinstance(block, LastBlock)
        for names in GROUPS
        if hasattr(block, names[0])
    ]
    side = pictures.shape[1]
    largest, rows = _inputs(encoder, [group[0] for group in groups], evenly(pictures, max(8, RANGE_PIXELS // side**2)))
    kept: dict[str, str] = {}
    products = 0
    for group in groups:
        linears = [_linear(encoder, name) for name in group]
        if any(size % MULTIPLE for linear in linears for size in linear.weight.shape):
            kept |= dict.fromkeys(group, f"its sizes are no multiples of {MULTIPLE}")
            continue
        largest_weight = max(float(linear.weight.abs().max()) for linear in linears)
        layers = [Fp8Linear.quantised(linear, largest[group[0]], largest_weight) for linear in linears]
        error = _error(linears, layers, torch.cat(rows.pop(group[0])))
        if not error <= LARGEST_ERROR:
            reason = f"its squared error would be {error:.1%} of its square (at most {LARGEST_ERROR:.0%})"
            kept |= dict.fromkeys(group, reason)
            continue
        products += len(group)
        for name, layer in zip(group, layers, strict=True):
            encoder.set_submodule(name, layer)
    return {"kind": "fp8", "calibration_pictures": len(pictures), "products": products, "kept": kept}


def _linear(encoder: DualEncoder, name: str) -> nn.Linear:
    linear = encoder.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    return linear


def _inputs(
    encoder: DualEncoder, names: list[str], pictures: np.ndarray
) -> tuple[dict[str, float], dict[str, list[torch.Tensor]]]:
    """The largest absolute input of each layer, and some of its input rows in fp32."""
    largest: dict[str, float] = defaultdict(float)
    rows: dict[str, list[torch.Tensor]] = defaultdict(list)

    def watch(name: str) -> Any:
        def hook(_module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            x = inputs[0].reshape(-1, inputs[0].shape[-1])
            largest[name] = max(largest[name], float(x.abs().max()))
            rows[name].append(x[torch.linspace(0, len(x) - 1, ROWS).long()].float())

        return _linear(encoder, name).register_forward_pre_hook(hook)

    hooks = [watch(name) for name in names]
    try:
        for start in range(0, len(pictures), BATCH):
            encoder(torch.from_numpy(pictures[start : start + BATCH].copy()))
    finally:
        for hook in hooks:
            hook.remove()
    return largest, rows


def _error(linears: list[nn.Linear], layers: list[Fp8Linear], rows: torch.Tensor) -> float:
    """The squared error of a group's outputs over their squared distance from the mean, as quantize measures it."""
    exact = torch.cat([nn.functional.linear(rows, one.weight.float(), one.bias.float()) for one in linears], dim=1)
    off = (torch.cat([layer.dequantised(rows) for layer in layers], dim=1) - exact).square().sum(1)
    energy = (exact - exact.mean(0)).square().sum(1)
    return float((off / energy.clamp_min(max(float(energy.median()), 1e-30))).mean())
