"""open_clip's text encoder on tokens that are cut behind the last end token of a batch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from iosr_fast.clip.load import LoadedClip


class TextTower(nn.Module):
    """tokens int64 (T, L), any L from 2 to the context length -> embeddings (T, D) float32, L2-normalised.

    open_clip's own layers. Attention is causal, so a batch may be cut behind its last end token: positions and mask
    are cut alike.
    """

    mask: torch.Tensor

    def __init__(self, model: Any, eot: int) -> None:
        super().__init__()
        self.token_embedding, self.positional_embedding = model.token_embedding, model.positional_embedding
        self.transformer, self.ln_final, self.projection = model.transformer, model.ln_final, model.text_projection
        self.register_buffer("mask", model.attn_mask)
        self.eot = eot

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        length = tokens.shape[1]
        x = self.token_embedding(tokens) + self.positional_embedding[:length]
        x = self.ln_final(self.transformer(x, attn_mask=self.mask[:length, :length]))
        end = (tokens == self.eot).int().argmax(1)
        return F.normalize(x[torch.arange(x.shape[0]), end] @ self.projection, dim=-1)


def is_causal(model: Any, eot: int) -> bool:
    """Whether a text's embedding is the output at its end token, which sees no token behind it."""
    mask = getattr(model, "attn_mask", None)
    if mask is None or not torch.equal(mask, torch.full_like(mask, float("-inf")).triu(1)):
        return False
    return model.text_pool_type == "argmax" or (model.text_pool_type, model.text_eos_id) == ("eos", eot)


def encode_tokens(clip: LoadedClip, tokens: torch.Tensor) -> torch.Tensor:
    """Embeddings (T, D), L2-normalised, of tokens (T, context length); padding is left out if attention is causal."""
    import open_clip

    model: Any = clip.model
    eot = getattr(clip.tokenizer, "eot_token_id", None)
    plain = type(model) is open_clip.CLIP and isinstance(getattr(model, "text_projection", None), nn.Parameter)
    if eot is None or not plain or not is_causal(model, eot) or model.positional_embedding.dtype != torch.float32:
        whole: torch.Tensor = model.encode_text(tokens, normalize=True)
        return whole
    longest = int((tokens == eot).int().argmax(1).max()) + 1
    cut: torch.Tensor = TextTower(model, eot)(tokens[:, :longest])
    return cut
