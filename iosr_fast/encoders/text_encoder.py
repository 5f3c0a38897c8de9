"""Class names -> text embeddings without torch: a CLIP's text encoder in ONNX Runtime, its tokenizer in `tokenizers`.

`export.export_text` writes the files, so that a saved classifier can add classes by name. Needs the `serve` extra.
"""

from __future__ import annotations

import html
import shutil
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from iosr_fast.clip.prompts import check_templates
from iosr_fast.exceptions import IosrFastError, UnavailableError
from iosr_fast.utils.require import require
from iosr_fast.utils.verified_folder import VerifiedFolder

FILE = "text.onnx"
TOKENIZER_FILE = "tokenizer.json"
SPECIAL_TOKENS = ("<start_of_text>", "<end_of_text>")
_BATCH = 32  # texts per run: bounds the widest activation of ViT-B/16's text encoder to 20 MB
_SAVE_AGAIN = "save the classifier again with its CLIP at hand"


class TextSource(Protocol):
    """A text encoder: that of a loaded CLIP (export.clip_text.ClipText) or of a saved classifier (TextEncoder)."""

    def embed_classes(self, names: Sequence[str], templates: Sequence[str] | None = None) -> np.ndarray:
        """(C, D) float32, L2-normalised: the mean over templates of the embeddings of template.format(name)."""
        ...

    def write(self, folder: Path) -> dict[str, Any] | None:
        """Write its files into an existing folder. Returns the facts for TextEncoder.open; None if it can't be
        exported."""
        ...


class TextEncoder:
    """A text encoder in `folder`, loaded at its first use. Threads may share it.

    With `source`, the verified folder, the verified bytes are read, even if `folder` has changed since.
    """

    def __init__(
        self, folder: Path, facts: dict[str, Any], threads: int | None = None, source: VerifiedFolder | None = None
    ) -> None:
        self.folder = folder
        self.source = source
        self.facts = facts
        self.context_length: int = facts["context_length"]
        self.width: int = facts["width"]
        self.eot: int = facts["eot"]
        self.templates: tuple[str, ...] = tuple(facts["templates"])
        self._threads = threads
        self._lock = threading.Lock()
        self._loaded: tuple[Any, Any] | None = None

    @classmethod
    def open(cls, folder: str | Path, facts: dict[str, Any], threads: int | None = None) -> TextEncoder:
        """The encoder that `export_text` wrote to `folder`; `facts` is what `export_text` returned.

        `threads` of ONNX Runtime; None: one per core. Raises FileNotFoundError for a missing file and ValueError for a
        missing fact. Damaged files raise at the first use.
        """
        folder = Path(folder)
        for name in (FILE, TOKENIZER_FILE):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{name} is missing from {folder}; {_SAVE_AGAIN}")
        missing = sorted({"context_length", "width", "eot", "templates"} - set(facts))
        if missing:
            raise IosrFastError(f"the facts of the text encoder in {folder} lack {', '.join(missing)}; {_SAVE_AGAIN}")
        return cls(folder, facts, threads)

    def embed_classes(self, names: Sequence[str], templates: Sequence[str] | None = None) -> np.ndarray:
        """(C, D) float32, L2-normalised: each class's mean over templates t of the normalised text(t.format(name)).

        `templates` default to those of the CLIP. Equals `clip.prompts.embed_classes`, in batches of 32 texts, so memory
        does not grow with C. Raises ValueError for no names, a name that is empty, is not a string or contains one of
        CLIP's special tokens, and a template without a `{}`; RuntimeError for damaged files; ImportError without the
        `serve` extra.
        """
        names = _check_names(names)
        templates = self.templates if templates is None else check_templates(templates)
        sums = np.zeros((len(names), self.width))
        for start in range(0, len(names) * len(templates), _BATCH):
            indices = np.arange(start, min(start + _BATCH, len(names) * len(templates)))
            rows, columns = np.divmod(indices, len(templates))
            texts = [templates[t].replace("{}", names[c]) for c, t in zip(rows, columns, strict=True)]
            np.add.at(sums, rows, self.embed(texts))
        embeddings: np.ndarray = (sums / np.linalg.norm(sums, axis=1, keepdims=True)).astype(np.float32)
        return embeddings

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """(T, D) float32, L2-normalised, in one run; T >= 1.

        Attention is causal and the embedding is read at the end token, so the padding behind the longest text can be
        cut off, exactly and for speed.
        """
        tokens = self.tokenize(texts)
        longest = int((tokens == self.eot).argmax(1).max()) + 1
        embeddings: np.ndarray = self._load()[1].run(None, {"tokens": tokens[:, :longest]})[0]
        return embeddings

    def tokenize(self, texts: Sequence[str]) -> np.ndarray:
        """(T, context_length) int64, equal to the tokens of open_clip's tokenizer.

        Raises ValueError for a text that contains a special token, which open_clip reads as the start or the end.
        """
        cleaned = [clean(text) for text in texts]
        tokenizer = self._load()[0]
        # One text at a time: encode_batch starts a pool of threads, which does not survive a later fork().
        return np.array([tokenizer.encode(text).ids for text in cleaned], dtype=np.int64)

    def write(self, folder: Path) -> dict[str, Any]:
        """Copy the files into `folder`; returns their facts. Raises ValueError for files changed since verification."""
        for name in (FILE, TOKENIZER_FILE):
            if self.source is None:
                shutil.copyfile(self.folder / name, folder / name)
            else:
                self.source.copy(name, folder / name)
        return self.facts

    def _load(self) -> tuple[Any, Any]:
        """Tokenizer and ONNX Runtime session, loaded by the first caller."""
        with self._lock:
            if self._loaded is None:
                self._loaded = self._load_tokenizer(), self._load_session()
            return self._loaded

    def _load_tokenizer(self) -> Any:
        tokenizers = require("tokenizers", "serve")
        content = self.source.read(TOKENIZER_FILE) if self.source else (self.folder / TOKENIZER_FILE).read_bytes()
        try:
            tokenizer = tokenizers.Tokenizer.from_buffer(content)
            length = len(tokenizer.encode("").ids)
        except Exception as error:  # tokenizers raises bare Exceptions
            raise UnavailableError(
                f"tokenizers can't load {TOKENIZER_FILE} in {self.folder}: {error}; {_SAVE_AGAIN}"
            ) from error
        if length != self.context_length:
            raise UnavailableError(
                f"expected {TOKENIZER_FILE} in {self.folder} to fill a context of {self.context_length}, got {length}; "
                f"{_SAVE_AGAIN}"
            )
        return tokenizer

    def _load_session(self) -> Any:
        ort = require("onnxruntime", "serve")
        options = ort.SessionOptions()
        options.intra_op_num_threads = self._threads or 0
        options.log_severity_level = 3

        def open_session(folder: Path) -> Any:
            try:
                return ort.InferenceSession(str(folder / FILE), options, providers=["CPUExecutionProvider"])
            except Exception as error:  # ONNX Runtime's exceptions share no public base class
                raise UnavailableError(
                    f"ONNX Runtime can't load {FILE} in {self.folder}: {error}; {_SAVE_AGAIN}"
                ) from error

        session = self.source.open_with(open_session) if self.source else open_session(self.folder)
        shape = session.get_outputs()[0].shape
        if shape[1:] != [self.width]:
            raise UnavailableError(
                f"expected {FILE} in {self.folder} to give (T, {self.width}), got {shape}; {_SAVE_AGAIN}"
            )
        return session


def clean(text: str) -> str:
    """A text as open_clip cleans it before tokenizing: ftfy, HTML entities twice, single spaces, lower case.

    Raises ValueError for a text that contains a special token.
    """
    text = html.unescape(html.unescape(require("ftfy", "serve").fix_text(text)))
    text = " ".join(text.split()).lower()
    for token in SPECIAL_TOKENS:
        if token in text.casefold():
            raise IosrFastError(f"expected a text without CLIP's special token {token}, got {text!r}")
    return text


def _check_names(names: Sequence[str]) -> list[str]:
    if isinstance(names, str):
        raise IosrFastError(f"expected a list of class names, got the string {names!r}; put it into a list")
    for name in names:
        if not isinstance(name, str):
            raise IosrFastError(f"expected class names as strings, got {name!r} of type {type(name).__name__}")
        if not clean(name):
            raise IosrFastError(f"expected class names with at least one visible character, got {name!r}")
    if not len(names):
        raise IosrFastError("expected at least one class name, got none")
    return list(names)
