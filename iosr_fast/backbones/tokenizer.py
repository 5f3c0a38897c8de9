"""Texts -> tokens without torch and without transformers, as open_clip cleans and splits them."""

from __future__ import annotations

import hashlib
import html
import string
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from iosr_fast.exceptions import IosrFastError
from iosr_fast.utils.require import require

if TYPE_CHECKING:
    import torch

Clean = Literal["canonicalize", "lower", "whitespace"]
SPECIAL_TOKENS = ("<start_of_text>", "<end_of_text>")  # of open_clip's SimpleTokenizer
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def clean_text(text: str, clean: Clean = "lower") -> str:
    """A text as open_clip cleans it before it is split: ftfy, HTML entities twice, single spaces; then

    - "lower": lower case (SimpleTokenizer);
    - "whitespace": nothing more (Hugging Face's tokenizers);
    - "canonicalize": lower case, "_" as a space, no ASCII punctuation (SigLIP).

    >>> clean_text("Rock_n_Roll &amp;  Soul!", "canonicalize")
    'rock n roll soul'
    """
    text = html.unescape(html.unescape(require("ftfy", "serve").fix_text(text)))
    if clean == "canonicalize":
        text = text.replace("_", " ").translate(_NO_PUNCTUATION)
    text = " ".join(text.split())
    return text if clean == "whitespace" else text.lower()


class Tokenizer:
    """A `tokenizers.Tokenizer` that truncates and pads to its context, behind open_clip's cleaning.

    `backbones.load_tokenizer` makes one of the files of a Hugging Face tokenizer, `export.text` one of open_clip's
    SimpleTokenizer; both are stored as one tokenizer.json. `reference` makes open_clip's own, which needs transformers.
    """

    def __init__(self, backend: Any, clean: Clean = "lower", reference: Callable[[], Any] | None = None) -> None:
        self.backend = backend
        self.clean = clean
        self.reference = reference
        self.context_length = len(backend.encode("").ids)
        added = [token.content for token in backend.get_added_tokens_decoder().values() if token.special]
        self.special_tokens = tuple(added) or SPECIAL_TOKENS

    def digest(self) -> str:
        """SHA-256 over all that determines the tokens of a text."""
        return hashlib.sha256(f"{self.clean} {self.backend.to_str()}".encode()).hexdigest()

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """(T, context_length) int64, equal to the tokens of open_clip's tokenizer.

        Raises ValueError for a text that contains a special token, which open_clip reads as the start or the end.
        """
        cleaned = [self.clean_text(text) for text in texts]
        # One text at a time: encode_batch starts a pool of threads, which does not survive a later fork().
        return np.array([self.backend.encode(text).ids for text in cleaned], dtype=np.int64)

    def clean_text(self, text: str) -> str:
        """A text as it is split. Raises ValueError for one that contains a special token, in any case."""
        return _without_special(clean_text(text, self.clean), self.special_tokens)

    def __call__(self, texts: str | Sequence[str]) -> torch.Tensor:
        """`encode` as open_clip's tokenizers are called: a text or several, (T, context_length) int64 in torch."""
        import torch

        return torch.from_numpy(self.encode([texts] if isinstance(texts, str) else texts))


def count_tokens(tokenizer: Any, text: str) -> int:
    """The tokens of a text, start and end included, that a tokenizer of `load_tokenizer` cuts to its `context_length`.

    Raises ValueError for a text that contains a special token.
    """
    if isinstance(tokenizer, Tokenizer):
        encoding = tokenizer.backend.encode(tokenizer.clean_text(text))  # what was cut off is in `overflowing`
        return sum(encoding.attention_mask) + sum(part.special_tokens_mask.count(0) for part in encoding.overflowing)
    # What stands for a tokenizer that could not be downloaded raises the reason when it is called (backbones.load).
    cleaned, backend = getattr(tokenizer, "clean_fn", tokenizer)(text), getattr(tokenizer, "tokenizer", None)
    if backend is None:  # open_clip's SimpleTokenizer
        _without_special(cleaned, [tokenizer.decoder[i] for i in tokenizer.all_special_ids])
        return len(tokenizer.encode(text)) + 2
    _without_special(cleaned, backend.all_special_tokens)  # open_clip's HFTokenizer
    own = 3 if tokenizer.tokenizer_mode == "clips" else 0  # which has special tokens of its own
    return len(backend(cleaned, add_special_tokens=not own).input_ids) + own


def _without_special(text: str, tokens: Sequence[str]) -> str:
    folded = text.casefold()
    for token in tokens:
        if token.casefold() in folded:
            raise IosrFastError(f"expected a text without the tokenizer's special token {token}, got {text!r}")
    return text
