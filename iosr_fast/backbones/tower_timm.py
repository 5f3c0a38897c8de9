"""timm's VisionTransformer and Eva, inside open_clip's TimmModel, as a VisionTower.

SigLIP, MobileCLIP-B and copies of open_clip's ViT are VisionTransformers; PE-Core, EVA01 and EVA02 are Evas, with
rotary positions, SwiGLU, inner norms or norms after attention and MLP.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from iosr_fast.backbones.timm_parts import (
    is_patches,
    is_plain_attention,
    is_plain_pool,
    mlp_parts,
    projections,
    split_rows,
    stem,
    unless_identity,
)
from iosr_fast.backbones.tower import (
    Affine,
    AttentionPoolParts,
    BlockParts,
    Pool,
    TowerBlock,
    TowerParts,
    VisionTower,
    affine,
    shallow_copy,
)

_POOLS: dict[str, Pool] = {"token": "cls", "avg": "avg", "map": "map"}
_BLOCKS = {"Block", "EvaBlock", "EvaBlockPostNorm"}
_MLPS = {"Mlp", "GluMlp", "SwiGLU"}


class TimmBlock(TowerBlock):
    """A Block, an EvaBlock or an EvaBlockPostNorm of timm."""

    def __init__(self, block: Any, tower: TimmTower) -> None:
        self.block, self.tower = block, tower
        self.post_norm = type(block).__name__ == "EvaBlockPostNorm"

    def attend(self, x: torch.Tensor) -> torch.Tensor:
        block = self.block
        rotary = self.tower.rotary(x.shape[1])
        options = {} if rotary is None else {"rope": rotary}
        if self.post_norm:
            update = block.norm1(block.attn(x, **options))
        else:
            update = self._scale(1, block.attn(block.norm1(x), **options))
        return x + block.drop_path1(update)

    def mlp(self, x: torch.Tensor) -> torch.Tensor:
        block = self.block
        update = block.norm2(block.mlp(x)) if self.post_norm else self._scale(2, block.mlp(block.norm2(x)))
        return block.drop_path2(update)

    def parts(self) -> BlockParts:
        block, attn = self.block, self.block.attn
        query, key, value = projections(attn)
        return BlockParts(
            norm_1=block.norm1,
            query=query,
            key=key,
            value=value,
            attention_norm=unless_identity(attn.norm),
            out=affine(attn.proj),
            scale_1=self._gamma(1),
            norm_2=block.norm2,
            mlp=mlp_parts(block.mlp),
            scale_2=self._gamma(2),
            post_norm=self.post_norm,
        )

    def _gamma(self, branch: int) -> torch.Tensor | None:
        """LayerScale: a module ls1 in timm's Block, a parameter gamma_1 in Eva's."""
        scale = getattr(self.block, f"ls{branch}", None)
        return getattr(self.block, f"gamma_{branch}", getattr(scale, "gamma", None))

    def _scale(self, branch: int, x: torch.Tensor) -> torch.Tensor:
        gamma = self._gamma(branch)
        return x if gamma is None else x * gamma


class TimmTower(VisionTower):
    """A vision transformer of timm, with the CLS token's output, the mean of the patches, or attention pooling."""

    def __init__(self, visual: Any) -> None:
        self.visual, self.trunk = visual, visual.trunk
        trunk = self.trunk
        self.blocks = [TimmBlock(block, self) for block in trunk.blocks]
        self.width, self.heads = trunk.embed_dim, trunk.blocks[0].attn.num_heads
        self.image_size, self.patch_size = tuple(trunk.patch_embed.img_size), trunk.patch_embed.feat_ratio()
        self.side, self.prefix = trunk.patch_embed.grid_size[0], trunk.num_prefix_tokens
        projection = self._projection()
        self.embedding_width = trunk.num_features if projection is None else len(projection.weight)
        self.reads_cls = trunk.attn_pool is None and trunk.global_pool == "token"
        self.norm_pre = trunk.norm_pre
        self._rotary: dict[Any, torch.Tensor] = {}

    def rotary(self, tokens: int) -> torch.Tensor | None:
        """timm's [sin, cos] for this number of tokens, (patches, 2 head widths); None without rotary positions."""
        rope = getattr(self.trunk, "rope", None)
        if rope is None:
            return None
        side = math.isqrt(tokens - self.prefix)
        if side == self.side:
            return rope.get_embed()
        key = side, rope.bands.device, rope.pos_embed.dtype
        if key not in self._rotary:
            other = copy.deepcopy(rope)
            other.update_feat_shape((side, side))
            self._rotary[key] = other.get_embed()
        return self._rotary[key]

    def pool(self, x: torch.Tensor) -> torch.Tensor:
        return self.visual.head(self.trunk.forward_head(self.trunk.norm(x)))

    def parts(self) -> TowerParts:
        trunk, positions = self.trunk, self._positions()
        rotary = self.rotary(self.tokens)
        sin_cos = None if rotary is None else rotary.chunk(2, dim=-1)
        norm, fc_norm = unless_identity(trunk.norm), unless_identity(trunk.fc_norm)
        last = norm or fc_norm
        assert last is not None
        return TowerParts(
            stem=stem(trunk.patch_embed),
            prefix=self._prefix_tokens() + positions[: self.prefix],
            positions=positions[self.prefix :],
            norm_pre=unless_identity(trunk.norm_pre),
            blocks=[block.parts() for block in self.blocks],
            rotary=None if sin_cos is None else (sin_cos[0], sin_cos[1]),
            half_layout=bool(getattr(trunk.blocks[0].attn, "rotate_half", False)),
            norm=last,
            norm_after_pool=norm is None,
            pool=_POOLS[trunk.global_pool],
            attention_pool=None if trunk.attn_pool is None else self._attention_pool(),
            projection=self._projection(),
        )

    def refusals(self) -> Mapping[str, bool]:
        trunk, pool = self.trunk, self.trunk.attn_pool
        (height, width), (rows, columns) = self.image_size, trunk.patch_embed.grid_size
        first = trunk.blocks[0]
        attn, mlp, rope = first.attn, first.mlp, getattr(trunk, "rope", None)
        norms = [norm for norm in (trunk.norm, trunk.fc_norm) if not isinstance(norm, nn.Identity)]
        kinds = {type(part).__name__ for part in trunk.blocks} - _BLOCKS
        return {
            f"{trunk.global_pool!r} pooling; expected 'token', 'avg' or 'map'": trunk.global_pool not in _POOLS,
            "an attention pool with several queries, positions of its own or query-key norms": pool is not None
            and not is_plain_pool(pool),
            f"{'/'.join(sorted(kinds))} blocks; expected Block, EvaBlock or EvaBlockPostNorm": bool(kinds),
            f"{type(attn).__name__} layers with query-key norms, gates or grouped keys": not is_plain_attention(attn),
            f"{type(mlp).__name__} layers; expected Mlp, GluMlp or SwiGLU": type(mlp).__name__ not in _MLPS
            or getattr(mlp, "gate_last", False),
            f"{type(rope).__name__} positions; expected RotaryEmbeddingCat": rope is not None
            and type(rope).__name__ != "RotaryEmbeddingCat",
            "a stem that is no convolution, or chain of convolutions, over patches": not is_patches(trunk.patch_embed),
            "positions for pictures of any size": bool(trunk.dynamic_img_size),
            "no norm, or two, after the last block": len(norms) != 1,
            "prefix tokens in its mean": trunk.global_pool == "avg" and getattr(trunk, "pool_include_prefix", False),
            "an MLP after its pool": bool(self.visual.head) and not hasattr(self.visual.head, "proj"),
            f"images of {height}x{width} in {rows}x{columns} patches; expected both square": height != width
            or rows != columns,
        }

    def resized(self, size: int) -> Any:
        visual, trunk = shallow_copy(self.visual), shallow_copy(self.trunk)
        trunk.patch_embed = shallow_copy(trunk.patch_embed)
        if getattr(trunk, "rope", None) is not None:
            trunk.rope = copy.deepcopy(trunk.rope)  # update_feat_shape replaces its buffer
        trunk.set_input_size((size, size))
        visual.trunk, visual.image_size = trunk, (size, size)
        return visual

    def _attention_pool(self) -> AttentionPoolParts:
        pool = self.trunk.attn_pool
        key, value = split_rows(pool.kv.weight, pool.kv.bias, 2)
        return AttentionPoolParts(
            query=pool.q(pool.latent)[0, 0],
            heads=pool.num_heads,
            key=key,
            value=value,
            out=affine(pool.proj),
            norm=pool.norm,
            mlp=mlp_parts(pool.mlp),
            with_prefix=getattr(self.trunk, "pool_include_prefix", True),  # Eva has no such option
        )

    def _projection(self) -> Affine | None:
        head = getattr(self.visual.head, "proj", None) or self.trunk.head
        return affine(head) if isinstance(head, nn.Linear) else None

    def _embed_own_size(self, pixels: torch.Tensor) -> torch.Tensor:
        trunk = self.trunk
        x = trunk._pos_embed(trunk.patch_embed(pixels))
        tokens = x[0] if isinstance(x, tuple) else trunk.patch_drop(x)  # Eva returns its rotary table too
        return trunk.norm_pre(tokens)

    def _patches(self, pixels: torch.Tensor) -> torch.Tensor:
        embed = self.trunk.patch_embed
        x = embed.backbone(pixels) if hasattr(embed, "backbone") else pixels
        return getattr(embed, "norm", nn.Identity())(embed.proj(x).flatten(2).transpose(1, 2))

    def _prefix_tokens(self) -> torch.Tensor:
        tokens = [token[0] for token in (self.trunk.cls_token, self.trunk.reg_token) if token is not None]
        return torch.cat(tokens) if tokens else next(self.trunk.parameters()).new_zeros(0, self.width)

    def _positions(self) -> torch.Tensor:
        """Without positions of the prefix tokens (`no_embed_class`) theirs are 0."""
        position = self.trunk.pos_embed
        zeros = next(self.trunk.parameters()).new_zeros
        if position is None:
            return zeros(self.tokens, self.width)
        if self.trunk.no_embed_class:
            return torch.cat([zeros(self.prefix, self.width), position[0]])
        return position[0]
