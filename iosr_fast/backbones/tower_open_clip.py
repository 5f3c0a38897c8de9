"""open_clip's VisionTransformer as a VisionTower."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from iosr_fast.backbones.tower import (
    Affine,
    BlockParts,
    MlpParts,
    TowerBlock,
    TowerParts,
    VisionTower,
    affine,
    shallow_copy,
)


class OpenClipBlock(TowerBlock):
    """A ResidualAttentionBlock."""

    def __init__(self, block: Any) -> None:
        self.block = block

    def attend(self, x: torch.Tensor) -> torch.Tensor:
        block = self.block
        return x + block.ls_1(block.attention(block.ln_1(x)))

    def attend_cls(self, x: torch.Tensor) -> torch.Tensor:
        block, normed = self.block, self.block.ln_1(x)  # one query, all keys and values
        update = block.attn(normed[:, :1], normed, normed, need_weights=False)[0]
        return x[:, :1] + block.ls_1(update)

    def mlp(self, x: torch.Tensor) -> torch.Tensor:
        block = self.block
        return block.ls_2(block.mlp(block.ln_2(x)))

    def parts(self) -> BlockParts:
        block, attn = self.block, self.block.attn
        query, key, value = map(Affine, attn.in_proj_weight.chunk(3), attn.in_proj_bias.chunk(3))
        return BlockParts(
            norm_1=block.ln_1,
            query=query,
            key=key,
            value=value,
            attention_norm=None,
            out=affine(attn.out_proj),
            scale_1=getattr(block.ls_1, "gamma", None),
            norm_2=block.ln_2,
            mlp=MlpParts(affine(block.mlp.c_fc), None, block.mlp.gelu, None, affine(block.mlp.c_proj)),
            scale_2=getattr(block.ls_2, "gamma", None),
        )


class OpenClipTower(VisionTower):
    """open_clip's VisionTransformer, with the CLS token's output or the mean of the patches."""

    prefix = 1

    def __init__(self, visual: Any) -> None:
        self.visual = visual
        self.blocks = [OpenClipBlock(block) for block in visual.transformer.resblocks]
        self.width = visual.conv1.out_channels
        self.heads = visual.transformer.resblocks[0].attn.num_heads
        self.image_size, self.patch_size = tuple(visual.image_size), visual.conv1.kernel_size[0]
        self.side = visual.grid_size[0]
        self.embedding_width, self.norm_pre = visual.output_dim, visual.ln_pre
        self.reads_cls = visual.attn_pool is None and visual.pool_type == "tok"

    def pool(self, x: torch.Tensor) -> torch.Tensor:
        pooled, _ = self.visual._pool(x)
        return pooled @ self.visual.proj if self.visual.proj is not None else pooled

    def parts(self) -> TowerParts:
        visual = self.visual
        positions = self._positions()
        return TowerParts(
            stem=[affine(visual.conv1)],
            prefix=self._prefix_tokens() + positions[:1],
            positions=positions[1:],
            norm_pre=None if isinstance(visual.ln_pre, nn.Identity) else visual.ln_pre,
            blocks=[block.parts() for block in self.blocks],
            rotary=None,
            half_layout=False,
            norm=visual.ln_post,
            norm_after_pool=visual.pool_type == "avg" and visual.final_ln_after_pool,
            pool="cls" if visual.pool_type == "tok" else "avg",
            attention_pool=None,
            projection=Affine(visual.proj.T, None),
        )

    def refusals(self) -> Mapping[str, bool]:
        visual = self.visual
        (height, width), (patch_height, patch_width) = visual.image_size, visual.patch_size
        custom = {type(block).__name__ for block in visual.transformer.resblocks} - {"ResidualAttentionBlock"}
        return {
            "an attentional pooler; expected the CLS token or the mean of patches": visual.attn_pool is not None,
            f"{visual.pool_type!r} pooling; expected 'tok' (the CLS token) or 'avg' (the mean of patches)": (
                visual.pool_type not in ("tok", "avg")
            ),
            f"{'/'.join(sorted(custom))} blocks (query-key norms, cosine attention, scaled heads); expected plain "
            "ResidualAttentionBlock": bool(custom),
            f"images of {height}x{width} in patches of {patch_height}x{patch_width}; expected both square": (
                height != width or patch_height != patch_width
            ),
            "no projection to the embedding width": visual.proj is None,
        }

    def resized(self, size: int) -> Any:
        visual, side = shallow_copy(self.visual), size // self.patch_size
        position = self._positions().detach()
        grid = position[1:].double().T.reshape(1, -1, self.side, self.side)
        grid = F.interpolate(grid, (side, side), mode="bicubic", antialias=True, align_corners=False)
        resized = torch.cat([position[:1], grid.flatten(2)[0].T.to(position.dtype)])
        visual.positional_embedding = nn.Parameter(resized, requires_grad=False)
        visual.image_size, visual.grid_size = (size, size), (side, side)
        return visual

    def _embed_own_size(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.visual._embeds(pixels)

    def _patches(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.visual.conv1(pixels).flatten(2).transpose(1, 2)

    def _prefix_tokens(self) -> torch.Tensor:
        return self.visual.class_embedding[None]

    def _positions(self) -> torch.Tensor:
        return self.visual.positional_embedding
