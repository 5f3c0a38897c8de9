"""CLIP's image encoder, split at the first adapter into a frozen part and a part that training differentiates.

stem    patch embedding, the blocks before the first adapted one, and that block's attention and MLP: independent of
        the adapter, so it runs without autograd, once for both embeddings, and its outputs can be cached
tail    the adapters and the blocks after; if the embedding reads the CLS token only, the last block computes only that
"""

from __future__ import annotations

import torch

from iosr_fast.backbones.adapter import Adapter
from iosr_fast.backbones.load import LoadedModel
from iosr_fast.backbones.vision_tower import vision_tower


class AdaptedEncoder:
    """The image encoder of `clip`, split for adapters in the blocks from `first_adapted_block` on.

    Raises ValueError for an encoder that is no vision transformer of open_clip or timm.
    """

    def __init__(self, clip: LoadedModel, first_adapted_block: int) -> None:
        self.tower = vision_tower(clip.model.visual, clip.name)
        self.first, self.last = first_adapted_block, len(self.tower.blocks) - 1
        self.image_size, self.patch_size = clip.image_size, self.tower.patch_size
        self.output_dim = self.tower.embedding_width

    @torch.no_grad()
    def stem(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The stream after the first adapted block's attention, and the one after its MLP: both (B, tokens, width).

        `pixels` (B, 3, S, S), normalised floats; S may differ from the CLIP's own size (crops of DINO), by patches.
        """
        x = self.tower.embed(pixels)
        for block in self.tower.blocks[: self.first]:
            x = block.attend(x)
            x = x + block.mlp(x)
        x = self._attend(self.first, x)
        return x, x + self.tower.blocks[self.first].mlp(x)

    @property
    def stem_shape(self) -> tuple[int, int]:
        """(tokens, width) of both outputs of `stem` for one picture of the CLIP's own size."""
        tokens = 1 if self.first == self.last and self.tower.reads_cls else self.tower.tokens
        return tokens, self.tower.width

    def tail(self, adapter: Adapter | None, after_attention: torch.Tensor, after_mlp: torch.Tensor) -> torch.Tensor:
        """From the stem's outputs to the un-normalised embedding (B, D): adapted, or plain if `adapter` is None."""
        x = after_mlp if adapter is None else after_mlp + adapter.blocks[str(self.first)](after_attention)
        for i in range(self.first + 1, self.last + 1):
            attended = self._attend(i, x)
            x = attended + self.tower.blocks[i].mlp(attended)
            if adapter is not None:
                x = x + adapter.blocks[str(i)](attended)
        return self.tower.pool(x)

    def _attend(self, i: int, x: torch.Tensor) -> torch.Tensor:
        block = self.tower.blocks[i]
        return block.attend_cls(x) if i == self.last and self.tower.reads_cls else block.attend(x)
