"""Class names -> text embeddings without torch: a CLIP's text encoder in ONNX Runtime, its tokenizer in `tokenizers`.

`export.text` writes the files, so that a saved classifier can add classes by name. Needs the `serve` extra.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from iosr_fast.backbones.prompts import Descriptions, check_templates, class_texts
from iosr_fast.backbones.tokenizer import Tokenizer
from iosr_fast.encoders.runtimes.onnxruntime import open_session
from iosr_fast.exceptions import UnavailableError
from iosr_fast.sealed.verified_folder import VerifiedFolder
from iosr_fast.utils.require import require

FILE = "text.onnx"
WEIGHTS_FILE = "text.weights"  # only beside a graph whose weights exceed 2 GB
TOKENIZER_FILE = "tokenizer.json"
_BATCH = 32  # texts per run: bounds the widest activation of ViT-B/16's text encoder to 20 MB


class TextSource(Protocol):
    """A text encoder: that of a loaded CLIP (export.text.ClipText) or of a saved classifier (TextEncoder)."""

    def embed_classes(
        self, names: Sequence[str], templates: Sequence[str] | None = None, descriptions: Descriptions | None = None
    ) -> np.ndarray:
        """(C, D) float32, L2-normalised: the mean of the unit embeddings of each class's texts."""

    def write(self, folder: Path) -> dict[str, Any] | None:
        """Write its files into an existing folder. Returns the facts for TextEncoder, None if it can't be exported."""


class TextEncoder:
    """The text encoder that `export_text` wrote to `folder`, loaded at its first use. Threads may share it.

    `facts` is what `export_text` returned; `threads` of ONNX Runtime, None for one per core. Of a verified folder the
    verified bytes are read, even if it has changed since.
    """

    def __init__(self, folder: Path | VerifiedFolder, facts: dict[str, Any], threads: int | None = None) -> None:
        self.folder = folder
        self.facts = facts
        self.eot: int | None = facts["eot"]  # None: texts are never cut
        self.templates: tuple[str, ...] = tuple(facts["templates"])
        self._threads = threads
        self._lock = threading.Lock()
        self._loaded: tuple[Tokenizer, Any] | None = None

    def embed_classes(
        self, names: Sequence[str], templates: Sequence[str] | None = None, descriptions: Descriptions | None = None
    ) -> np.ndarray:
        """(C, D) float32, L2-normalised: the mean of the unit embeddings of each class's texts (prompts.class_texts).

        `templates` default to those of the CLIP. Equals `prompts.embed_classes`, in batches of 32 texts, so memory
        does not grow with C. Raises ValueError as `check_templates` and `class_texts` do; RuntimeError for damaged
        files; ImportError without the `serve` extra.
        """
        templates = self.templates if templates is None else check_templates(templates)
        texts = class_texts(self._load()[0], names, templates, descriptions)
        flat = [(row, text) for row, own in enumerate(texts) for text in own]
        sums = np.zeros((len(texts), self.facts["width"]))
        for start in range(0, len(flat), _BATCH):
            rows, batch = zip(*flat[start : start + _BATCH], strict=True)
            np.add.at(sums, list(rows), self.embed(batch))
        embeddings: np.ndarray = (sums / np.linalg.norm(sums, axis=1, keepdims=True)).astype(np.float32)
        return embeddings

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """(T, D) float32, L2-normalised, in one run; T >= 1.

        Where attention is causal and the embedding is read at the end token `eot`, the padding behind the longest text
        is cut off, exactly and for speed.
        """
        tokens = self.tokenize(texts)
        if self.eot is not None:
            tokens = tokens[:, : max(int((tokens == self.eot).argmax(1).max()) + 1, 2)]
        embeddings: np.ndarray = self._load()[1].run(None, {"tokens": tokens})[0]
        return embeddings

    def tokenize(self, texts: Sequence[str]) -> np.ndarray:
        """(T, context_length) int64, equal to the tokens of open_clip's tokenizer.

        Raises ValueError for a text that contains a special token.
        """
        return self._load()[0].encode(texts)

    def write(self, folder: Path) -> dict[str, Any]:
        """Copy the files into `folder`; returns their facts. Raises ValueError for files changed since verification."""
        assert isinstance(self.folder, VerifiedFolder), "only a saved text encoder is saved again"
        for name in self.folder.files:
            self.folder.copy(name, folder / name)
        return self.facts

    def _load(self) -> tuple[Tokenizer, Any]:
        """Tokenizer and ONNX Runtime session, loaded by the first caller."""
        with self._lock:
            if self._loaded is None:
                if isinstance(self.folder, VerifiedFolder):
                    self._loaded = self.folder.open_with(self._open)
                else:
                    self._loaded = self._open(self.folder)
            return self._loaded

    def _open(self, folder: Path) -> tuple[Tokenizer, Any]:
        tokenizers, fix = require("tokenizers", "serve"), "save the classifier again with its CLIP at hand"
        try:
            # Facts of older versions lack "clean": they wrote no other tokenizers.
            backend = tokenizers.Tokenizer.from_file(str(folder / TOKENIZER_FILE))
            tokenizer = Tokenizer(backend, self.facts.get("clean", "lower"))
        except Exception as error:  # tokenizers raises bare Exceptions
            raise UnavailableError(f"can't load {TOKENIZER_FILE} in {folder}: {error}; {fix}") from error
        return tokenizer, open_session(folder / FILE, self._threads, fix=fix)
