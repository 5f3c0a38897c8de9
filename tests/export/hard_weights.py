"""The same function with weights that are hard to quantise: stand-ins for the outliers of trained CLIPs.

Trained CLIPs have a few channels whose values are 30 to 100 times larger than the others, and a few tokens with very
large values in the MLP. `harden` gives any CLIP and adapter such outliers without changing its embeddings in exact
arithmetic. Factors are powers of two, so that most of it is exact in floats too:

    LayerNorms       gain and bias of some channels * f, the columns of the weights behind them / f
    values, out_proj some rows of v_proj * f, the columns of out_proj / f; likewise queries and keys within a head
    adapters         some rows of down_proj * f, the columns of up_proj / f (ReLU is positively homogeneous)
    MLP              in every fourth block pairs of additional hidden units, copies of one unit * 4 f, that c_proj
                     subtracts from each other: a few tokens get activations far above all others (GELU(f x) is not
                     f GELU(x), so existing hidden units can't be scaled)
    residual stream  a constant on all channels, which each LayerNorm subtracts, and the bias of down_proj makes up for
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from iosr_fast.clip.adapter import Adapter
from iosr_fast.clip.load import LoadedClip
from iosr_fast.clip.tower_open_clip import OpenClipTower
from iosr_fast.clip.vision_tower import vision_tower
from iosr_fast.exceptions import IosrFastError

CHANNELS = 4  # of each kind and block
PERIOD, UNITS = 4, 4.0  # hidden units with outliers: in every fourth block, of 4 times the factor
MULTIPLE = 16  # hidden units are added in multiples that vector instructions divide by


@torch.no_grad()
def harden(
    clip: LoadedClip, adapter: Adapter, factor: float = 64.0, offset: float = 16.0, seed: int = 0
) -> tuple[LoadedClip, Adapter]:
    """`clip` and `adapter` with outliers; the arguments stay unchanged.

    `factor` is that of the outliers, a power of two; `offset` the constant of the residual stream. Embeddings agree
    with those of the arguments to about 1e-5. The fingerprint is that of `clip`. Raises ValueError for an encoder that
    is not open_clip's own VisionTransformer: inner norms and rotated pairs forbid some of these factors.
    """
    if not isinstance(vision_tower(clip.model.visual, clip.name), OpenClipTower):
        raise IosrFastError(f"expected open_clip's own VisionTransformer to give outliers, got {clip.name} of timm")
    generator = torch.Generator().manual_seed(seed)
    model, adapter = copy.deepcopy(clip.model), copy.deepcopy(adapter)
    visual = model.visual
    part: Any
    for i, block in enumerate(visual.transformer.resblocks):
        width = block.ln_1.normalized_shape[0]
        attn, mlp = block.attn, block.mlp
        query, key, value = attn.in_proj_weight.view(3, width, width)
        query_bias, key_bias, value_bias = attn.in_proj_bias.view(3, width)
        for norm, weight in ((block.ln_1, attn.in_proj_weight), (block.ln_2, mlp.c_fc.weight)):
            chosen = _some(width, generator)
            _scale((norm.weight, norm.bias), weight, chosen, factor)
        _scale((value, value_bias), attn.out_proj.weight, _some(width, generator), factor)
        chosen = _some(width, generator)
        _scale((query, query_bias), key.T, chosen, factor)
        key_bias[chosen] /= factor
        outliers = UNITS * factor if i % PERIOD == 1 else 0.0  # all blocks of an encoder have the same width
        mlp.c_fc, mlp.c_proj = _with_cancelling_units(mlp.c_fc, mlp.c_proj, outliers, generator)
        if str(i) in adapter.blocks:
            part = adapter.blocks[str(i)]
            chosen = _some(len(part.down_proj.bias), generator)
            _scale((part.down_proj.weight, part.down_proj.bias), part.up_proj.weight, chosen, factor)
    if isinstance(visual.ln_pre, nn.LayerNorm):
        visual.ln_pre.bias.add_(offset)
        for part in adapter.blocks.values():
            part.down_proj.bias -= offset * part.down_proj.weight.double().sum(1).float()
    return replace(clip, model=model), adapter


def _some(channels: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randperm(channels, generator=generator)[:CHANNELS]


def _scale(up: tuple[torch.Tensor, ...], down: torch.Tensor, channels: torch.Tensor, factor: float) -> None:
    """Multiply rows of `up`, divide columns of `down`."""
    for tensor in up:
        tensor[channels] *= factor
    down[:, channels] /= factor


def _with_cancelling_units(
    c_fc: nn.Linear, c_proj: nn.Linear, factor: float, generator: torch.Generator
) -> tuple[nn.Linear, nn.Linear]:
    """Both layers with MULTIPLE more hidden units: pairs of copies of one unit * factor, with opposite weights."""
    hidden, width = c_fc.weight.shape
    chosen = torch.randperm(hidden, generator=generator)[: MULTIPLE // 2].repeat(2)
    signs = torch.ones(MULTIPLE)
    signs[MULTIPLE // 2 :] = -1
    wider, narrower = nn.Linear(width, hidden + MULTIPLE), nn.Linear(hidden + MULTIPLE, width)
    wider.weight.copy_(torch.cat([c_fc.weight, factor * c_fc.weight[chosen]]))
    wider.bias.copy_(torch.cat([c_fc.bias, factor * c_fc.bias[chosen]]))
    narrower.weight.copy_(torch.cat([c_proj.weight, signs * c_proj.weight[:, chosen]], dim=1))
    narrower.bias.copy_(c_proj.bias)
    return wider.requires_grad_(False), narrower.requires_grad_(False)
