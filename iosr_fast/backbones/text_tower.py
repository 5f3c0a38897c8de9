"""open_clip's text encoder, on tokens that are cut behind the last end token of a batch where that changes nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from iosr_fast.backbones.load import LoadedModel

POOLS = ("argmax", "eos", "first", "last")


class TextTower(nn.Module):
    """tokens int64 (T, L) -> embeddings (T, D) float32, L2-normalised, by open_clip's own layers.

    `text` is a `text_transformer`. L is the context length; with an `end_token` any length from 2 on at which no end
    token of the batch is cut off. Layers of open_clip.CLIP lie in the model beside its image encoder, so the parts of
    the text encoder are taken over one by one.
    """

    mask: torch.Tensor | None

    def __init__(self, text: Any) -> None:
        super().__init__()
        self.pool, self.eos = pooling(text)
        # CoCa's class token, and its mask of the padding, are left to open_clip.
        self.whole = text if has_class_token(text) or getattr(text, "use_pad_mask", False) else None
        if self.whole is None:
            self.token_embedding, self.positional_embedding = text.token_embedding, text.positional_embedding
            self.transformer, self.ln_final, self.projection = text.transformer, text.ln_final, text.text_projection
            self.register_buffer("mask", text.attn_mask)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        if self.whole is not None:
            pooled = self.whole(tokens)
            return F.normalize(pooled[0] if isinstance(pooled, tuple) else pooled, dim=-1)
        length = tokens.shape[1]
        mask = None if self.mask is None else self.mask[:length, :length]
        x = self.token_embedding(tokens) + self.positional_embedding[:length]
        x = self._pooled(self.ln_final(self.transformer(x, attn_mask=mask)), tokens)
        if isinstance(self.projection, nn.Linear):
            x = self.projection(x)
        elif self.projection is not None:
            x = x @ self.projection
        return F.normalize(x, dim=-1)

    def _pooled(self, x: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        if self.pool in ("first", "last"):
            return x[:, 0 if self.pool == "first" else -1]
        end = tokens.argmax(1) if self.pool == "argmax" else (tokens == self.eos).int().argmax(1)
        return x[torch.arange(x.shape[0]), end]


def text_transformer(model: Any) -> Any:
    """What has the text layers: an open_clip.CLIP itself, or the TextTransformer of a CustomTextCLIP or CoCa.

    None for any other text encoder, such as a model of Hugging Face.
    """
    import open_clip

    if type(model) is open_clip.CLIP:
        return model
    text = getattr(model, "text", None)
    return text if type(text) is open_clip.transformer.TextTransformer else None


def pooling(text: Any) -> tuple[str, int]:
    """How a `text_transformer` pools its tokens (one of POOLS, or "none"), and the token at which "eos" reads."""
    if hasattr(text, "text_pool_type"):
        return text.text_pool_type, text.text_eos_id
    return text.pool_type, text.eos_id


def has_class_token(text: Any) -> bool:
    """Whether a `text_transformer` appends a token of its own, whose output it pools (CoCa)."""
    return getattr(text, "cls_emb", None) is not None


def end_token(clip: LoadedModel) -> int | None:
    """The token behind which a batch may be cut, exactly; None if the whole context is needed.

    A text may be cut where its embedding is the output at its end token and attention is causal: no token then sees
    one behind it.
    """
    tokenizer: Any = clip.tokenizer
    text = text_transformer(clip.model)
    if text is None or has_class_token(text) or text.attn_mask is None:
        return None
    mask = text.attn_mask
    if not torch.equal(mask, torch.full_like(mask, float("-inf")).triu(1)):
        return None
    pool, eos = pooling(text)
    if pool == "eos":
        return eos
    end: int | None = getattr(tokenizer, "eot_token_id", None)
    # The largest token of a text is its end token in open_clip's own tokenizer.
    return end if pool == "argmax" and end is not None and end == tokenizer.vocab_size - 1 else None


def encode_tokens(clip: LoadedModel, tokens: torch.Tensor) -> torch.Tensor:
    """Embeddings (T, D), L2-normalised, of tokens (T, context length); padding is left out where that is exact."""
    end = end_token(clip)
    if end is None:
        model: Any = clip.model
        return model.encode_text(tokens, normalize=True)
    longest = max(int((tokens == end).int().argmax(1).max()) + 1, 2)
    return TextTower(text_transformer(clip.model))(tokens[:, :longest])
