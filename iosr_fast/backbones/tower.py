"""What adapters, training, benchmarks and `fuse` read of a vision transformer, whichever library built it.

    x = tower.embed(pixels)
    for block in tower.blocks:
        x = block.attend(x)           the residual stream after attention; an adapter reads it
        x = x + block.mlp(x)          the adapter's update is added to the MLP's
    embedding = tower.pool(x)

These methods call the modules of open_clip and timm, so a pass through them is the literal one. `parts` describes the
same computation by its weights; `fuse` builds the dual encoder from this description alone.

`vision_tower.vision_tower` gives the tower of an encoder. It holds the modules of its encoder, not copies, so it sees
changes of weights, device and dtype.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

Pool = Literal["cls", "avg", "map"]


class Affine(NamedTuple):
    """x -> weight x + bias; weight (outputs, inputs), or (outputs, inputs, k, k) of a convolution over patches."""

    weight: torch.Tensor
    bias: torch.Tensor | None


def affine(layer: Any) -> Affine:
    """The weights of a Linear or a convolution."""
    return Affine(layer.weight, layer.bias)


@dataclass(frozen=True)
class MlpParts:
    """project(norm(activation(expand(x)))), or with a gate project(norm(silu(gate(x)) * expand(x)))."""

    expand: Affine
    gate: Affine | None
    activation: nn.Module
    norm: nn.Module | None
    project: Affine


@dataclass(frozen=True)
class BlockParts:
    """A block: x <- x + scale_1 * attention(norm_1(x)), then x <- x + scale_2 * mlp(norm_2(x)).

    `attention_norm` is between the heads and `out`. With `post_norm` the norms are at the ends of both branches:
    x + norm_1(attention(x)), x + norm_2(mlp(x)).
    """

    norm_1: nn.Module
    query: Affine
    key: Affine
    value: Affine
    attention_norm: nn.Module | None
    out: Affine
    scale_1: torch.Tensor | None
    norm_2: nn.Module
    mlp: MlpParts
    scale_2: torch.Tensor | None
    post_norm: bool = False


@dataclass(frozen=True)
class AttentionPoolParts:
    """y = out(attention of the constant `query` over the tokens), then y + mlp(norm(y)).

    `query` (width,) is projected and not yet scaled; `with_prefix`: it also attends to the CLS and register tokens.
    """

    query: torch.Tensor
    heads: int
    key: Affine
    value: Affine
    out: Affine
    norm: nn.Module
    mlp: MlpParts
    with_prefix: bool


@dataclass(frozen=True)
class TowerParts:
    """An encoder by its weights. Tokens before the first block: norm_pre([prefix, stem(pixels) + positions]).

    `stem` is a chain of convolutions over patches that don't overlap, with the MLPs' activation between them. `prefix`
    (n, width), the CLS token and registers, has its positions added. `rotary` is (sin, cos), each (patches, head
    width), in the layout x0 y0 x1 y1 ... of pairs (`half_layout`: x0 x1 ... y0 y1 ...); the prefix is not rotated.
    """

    stem: Sequence[Affine]
    prefix: torch.Tensor
    positions: torch.Tensor
    norm_pre: nn.Module | None
    blocks: Sequence[BlockParts]
    rotary: tuple[torch.Tensor, torch.Tensor] | None
    half_layout: bool
    norm: nn.Module
    norm_after_pool: bool
    pool: Pool
    attention_pool: AttentionPoolParts | None
    projection: Affine | None


class TowerBlock(ABC):
    """One transformer block, x (B, tokens, width). `block` is the library's own module."""

    block: Any

    @abstractmethod
    def attend(self, x: torch.Tensor) -> torch.Tensor:
        """The residual stream after attention, which the adapter reads."""

    def attend_cls(self, x: torch.Tensor) -> torch.Tensor:
        """attend(x)[:, :1], (B, 1, width)."""
        return self.attend(x)[:, :1]

    @abstractmethod
    def mlp(self, x: torch.Tensor) -> torch.Tensor:
        """The MLP's update, norm and scale included, of the residual stream after attention."""

    @abstractmethod
    def parts(self) -> BlockParts: ...


class VisionTower(ABC):
    """A vision transformer. `prefix`: tokens before the patches; `side`: patches per side; `reads_cls`: the embedding
    depends on the last block's output at the CLS token only."""

    visual: Any
    blocks: Sequence[TowerBlock]
    width: int
    heads: int
    image_size: tuple[int, int]
    patch_size: int
    side: int
    prefix: int
    embedding_width: int
    reads_cls: bool
    norm_pre: nn.Module

    @property
    def tokens(self) -> int:
        return self.prefix + self.side**2

    def embed(self, pixels: torch.Tensor) -> torch.Tensor:
        """The tokens before the first block, (B, tokens, width).

        `pixels` (B, 3, S, S), normalised floats. S may be another multiple of the patches than the encoder's own size;
        then positions are resampled from the encoder's grid.
        """
        if tuple(pixels.shape[-2:]) == self.image_size:
            return self._embed_own_size(pixels)
        x = self._patches(pixels)
        x = torch.cat([self._prefix_tokens().to(x.dtype).expand(len(x), -1, -1), x], dim=1)
        x = x + self.positions(pixels.shape[-1] // self.patch_size).to(x.dtype)
        return self.norm_pre(x)

    def positions(self, side: int) -> torch.Tensor:
        """Position embeddings (prefix + side**2, width), resampled bicubically if `side` is not the encoder's own."""
        positions = self._positions()
        if side == self.side:
            return positions
        grid = positions[self.prefix :].T.reshape(1, -1, self.side, self.side)
        resampled = F.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
        return torch.cat([positions[: self.prefix], resampled.flatten(2)[0].T])

    @abstractmethod
    def pool(self, x: torch.Tensor) -> torch.Tensor:
        """From the last block's output to the embedding (B, D), not L2-normalised.

        If `reads_cls`, x may be (B, 1, width), the CLS token alone.
        """

    @abstractmethod
    def parts(self) -> TowerParts:
        """The description of the encoder; call it only if no refusal applies."""

    @abstractmethod
    def refusals(self) -> Mapping[str, bool]:
        """{what the description does not cover: whether this encoder has it}."""

    @abstractmethod
    def resized(self, size: int) -> Any:
        """The encoder module for pictures of size x size: positions interpolated, all other weights shared."""

    @abstractmethod
    def _embed_own_size(self, pixels: torch.Tensor) -> torch.Tensor: ...

    @abstractmethod
    def _patches(self, pixels: torch.Tensor) -> torch.Tensor:
        """(B, patches, width), without positions."""

    @abstractmethod
    def _prefix_tokens(self) -> torch.Tensor:
        """(prefix, width), without positions."""

    @abstractmethod
    def _positions(self) -> torch.Tensor:
        """(prefix + patches, width) at the encoder's own size."""


def shallow_copy(module: Any) -> Any:
    """A copy of a module that shares parameters and submodules and can be given others."""
    clone = copy.copy(module)
    clone._parameters, clone._modules = dict(module._parameters), dict(module._modules)
    clone._buffers = dict(module._buffers)
    return clone
