"""What the modules of timm's transformers hold, as the parts of a tower, and whether the parts describe all of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from iosr_fast.backbones.tower import Affine, MlpParts, affine

_ATTENTIONS = {"Attention", "EvaAttention", "AttentionRope"}


def unless_identity(module: nn.Module) -> nn.Module | None:
    return None if isinstance(module, nn.Identity) else module


def split_rows(weight: torch.Tensor, bias: torch.Tensor | None, parts: int) -> list[Affine]:
    """The rows of a layer that computes several outputs at once."""
    biases = [None] * parts if bias is None else bias.chunk(parts)
    return [Affine(rows, part) for rows, part in zip(weight.chunk(parts), biases, strict=True)]


def projections(attn: Any) -> list[Affine]:
    """Query, key and value; biases may be parameters of their own, or be missing."""
    if attn.qkv is None:
        return [affine(attn.q_proj), affine(attn.k_proj), affine(attn.v_proj)]
    query, key, value = split_rows(attn.qkv.weight, attn.qkv.bias, 3)
    if getattr(attn, "q_bias", None) is None:
        return [query, key, value]
    return [Affine(query.weight, attn.q_bias), key, Affine(value.weight, attn.v_bias)]


def mlp_parts(mlp: Any) -> MlpParts:
    gate = None
    if type(mlp).__name__ == "SwiGLU":
        gate, expand = affine(mlp.fc1_g), affine(mlp.fc1_x)
    elif type(mlp).__name__ == "GluMlp":
        gate, expand = split_rows(mlp.fc1.weight, mlp.fc1.bias, 2)
    else:
        expand = affine(mlp.fc1)
    return MlpParts(expand, gate, mlp.act, unless_identity(mlp.norm), affine(mlp.fc2))


def stem(embed: Any) -> list[Affine]:
    """The patch embedding's convolutions, batch norms folded in."""
    if not hasattr(embed, "backbone"):
        return [affine(embed.proj)]
    layers = []
    for layer in embed.backbone:
        weight, bias = layer.conv.weight.double(), layer.conv.bias
        if isinstance(layer.bn, nn.BatchNorm2d):
            norm = layer.bn
            assert norm.running_var is not None and norm.running_mean is not None
            scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
            shift = -norm.running_mean.double() if bias is None else bias.double() - norm.running_mean.double()
            weight, bias = weight * scale[:, None, None, None], norm.bias.double() + shift * scale
        layers.append(Affine(weight, bias))
    return layers


def is_patches(embed: Any) -> bool:
    """Whether an embedding is what `stem` reads: convolutions whose windows don't overlap, with GELU between."""
    if type(embed).__name__ == "PatchEmbed":
        return isinstance(embed.norm, nn.Identity)
    backbone = getattr(embed, "backbone", None)
    layers = list(backbone) if isinstance(backbone, nn.Sequential) else []
    if not layers or not isinstance(embed.proj, nn.Identity) or not all(hasattr(layer, "conv") for layer in layers):
        return False
    convolutions = [layer.conv for layer in layers]
    return all(
        type(conv) is nn.Conv2d and conv.kernel_size == conv.stride and conv.padding == (0, 0) and conv.groups == 1
        for conv in convolutions
    ) and all(isinstance(getattr(layer.bn, "act", None), nn.GELU) for layer in layers[:-1])


def is_plain_attention(attn: Any) -> bool:
    return (
        type(attn).__name__ in _ATTENTIONS
        and isinstance(attn.q_norm, nn.Identity)
        and attn.gate is None
        and getattr(attn, "num_kv_groups", 1) == 1
        and attn.num_heads * attn.head_dim == attn.proj.out_features
    )


def is_plain_pool(pool: Any) -> bool:
    return (
        type(pool).__name__ == "AttentionPoolLatent"
        and (pool.latent_len, pool.pool, pool.pos_embed) == (1, "token", None)
        and isinstance(pool.q_norm, nn.Identity)
        and type(pool.mlp).__name__ == "Mlp"
        and isinstance(pool.norm, nn.LayerNorm)
        and pool.out_features == pool.proj.in_features
    )
