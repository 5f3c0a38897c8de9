"""CLIP's image encoder, split at the first adapter into a frozen part and a part that training differentiates.

stem    patch embedding, the blocks before the first adapted one, and that block's attention and MLP: independent of
        the adapter, so it runs without autograd, once for both embeddings, and its outputs can be cached
tail    the adapters and the blocks after; the last block computes only the CLS token, as the compiled encoder does
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from iosr_fast.clip.adapter import Adapter, vision_blocks
from iosr_fast.clip.load import LoadedClip
from iosr_fast.exceptions import IosrFastError


class AdaptedEncoder:
    """The image encoder of `clip`, split for adapters in the blocks from `first_adapted_block` on.

    Raises ValueError for an encoder that pools its tokens instead of reading its CLS token.
    """

    def __init__(self, clip: LoadedClip, first_adapted_block: int) -> None:
        visual = clip.model.visual
        if visual.attn_pool is not None or visual.pool_type != "tok":
            raise IosrFastError(
                f"expected an encoder that reads its CLS token, got {clip.name}, which pools its tokens"
            )
        self.visual = visual
        self.blocks, self.first = vision_blocks(clip), first_adapted_block
        self.last = len(self.blocks) - 1
        self.image_size, self.output_dim = clip.image_size, visual.output_dim
        patch = visual.conv1.kernel_size[0]
        self.patch_size, self.side = patch, clip.image_size // patch

    @torch.no_grad()
    def stem(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The stream after the first adapted block's attention, and the one after its MLP: both (B, tokens, width).

        `pixels` (B, 3, S, S), normalised floats; S may differ from the CLIP's own size (crops of DINO), by patches.
        """
        x = self._embed(pixels)
        for block in self.blocks[: self.first]:
            x = block(x)
        x = self._attend(self.first, x)
        return x, self._mlp(self.first, x)

    def stem_shapes(self) -> list[tuple[int, int]]:
        """(tokens, width) of each of the two outputs of `stem` for one picture of the CLIP's own size."""
        tokens = 1 if self.first == self.last else self.side**2 + 1
        return [(tokens, self.blocks[0].ln_2.normalized_shape[0])] * 2

    def tail(self, adapter: Adapter | None, after_attention: torch.Tensor, after_mlp: torch.Tensor) -> torch.Tensor:
        """From the stem's outputs to the un-normalised embedding (B, D): adapted, or plain if `adapter` is None."""
        x = after_mlp if adapter is None else after_mlp + adapter.blocks[str(self.first)](after_attention)
        for i in range(self.first + 1, self.last + 1):
            attended = self._attend(i, x)
            x = self._mlp(i, attended)
            if adapter is not None:
                x = x + adapter.blocks[str(i)](attended)
        pooled, _ = self.visual._pool(x)
        projected: torch.Tensor = pooled @ self.visual.proj if self.visual.proj is not None else pooled
        return projected

    def _embed(self, pixels: torch.Tensor) -> torch.Tensor:
        if pixels.shape[-1] == self.image_size:
            embedded: torch.Tensor = self.visual._embeds(pixels)
            return embedded
        visual = self.visual
        x = visual.conv1(pixels).flatten(2).transpose(1, 2)
        cls = visual.class_embedding.to(x.dtype).expand(len(x), 1, -1)
        x = torch.cat([cls, x], dim=1) + self._positions(pixels.shape[-1] // self.patch_size).to(x.dtype)
        normed: torch.Tensor = visual.ln_pre(x)
        return normed

    def _positions(self, side: int) -> torch.Tensor:
        """Position embeddings for side x side patches, resampled from the CLIP's own grid (bicubic), as DINO does."""
        positions = self.visual.positional_embedding
        grid = positions[1:].T.reshape(1, -1, self.side, self.side)
        resampled = F.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
        return torch.cat([positions[:1], resampled.flatten(2)[0].T])

    def _attend(self, i: int, x: torch.Tensor) -> torch.Tensor:
        block = self.blocks[i]
        normed = block.ln_1(x)
        if i == self.last:  # only the CLS token is read after this block: one query, all keys and values
            x = x[:, :1]
            return x + block.ls_1(block.attn(normed[:, :1], normed, normed, need_weights=False)[0])
        return x + block.ls_1(block.attention(normed))

    def _mlp(self, i: int, x: torch.Tensor) -> torch.Tensor:
        block = self.blocks[i]
        return x + block.ls_2(block.mlp(block.ln_2(x)))
