"""Class names -> text embeddings without torch: a CLIP's text encoder in ONNX Runtime, its tokenizer in `tokenizers`.

What `offline.export_text` writes, so that a saved classifier can take new classes by name. Needs the `serve` extra.
"""

from __future__ import annotations

import html
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from iosr_fast.utils.require import require
from iosr_fast.utils.verified_folder import VerifiedFolder

FILE = "text.onnx"
TOKENIZER_FILE = "tokenizer.json"
SPECIAL_TOKENS = ("<start_of_text>", "<end_of_text>")
_BATCH = 32  # texts a run: ViT-B/16's widest activation is then 20 MB, also where every text fills the context
_AGAIN = "save the classifier again with its CLIP at hand"


class TextEncoder:
    """A text encoder from `folder`; safe to share between threads. It is loaded at the first use, not before: from
    `held`, the folder as it was verified, where it is given, whatever has become of it since."""

    def __init__(
        self, folder: Path, facts: dict[str, Any], threads: int | None = None, held: VerifiedFolder | None = None
    ) -> None:
        self.folder = folder
        self.held = held
        self.facts = facts
        self.context_length: int = facts["context_length"]
        self.width: int = facts["width"]
        self.eot: int = facts["eot"]
        self.templates: tuple[str, ...] = tuple(facts["templates"])
        self._threads = threads
        self._lock = threading.Lock()
        self._tokenizer: Any = None
        self._session: Any = None

    @classmethod
    def open(cls, folder: str | Path, facts: dict[str, Any], threads: int | None = None) -> TextEncoder:
        """The encoder that `export_text` wrote to `folder` and returned the facts of; loads nothing yet.

        `threads` as for ONNX Runtime's image encoder (None: one a core). Raises FileNotFoundError where a file is
        missing, ValueError where a fact is; what is in the files shows at the first use.
        """
        folder = Path(folder)
        for name in (FILE, TOKENIZER_FILE):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{name} is missing from {folder}; {_AGAIN}")
        missing = sorted({"context_length", "width", "eot", "templates"} - set(facts))
        if missing:
            raise ValueError(f"the facts of the text encoder in {folder} lack {', '.join(missing)}; {_AGAIN}")
        return cls(folder, facts, threads)

    def embed_classes(self, names: Sequence[str], templates: Sequence[str] | None = None) -> np.ndarray:
        """(C, D) float32, L2-normalised: each class's mean over templates t of the normalised text(t.format(name)).

        `templates` default to those of the CLIP. As `offline.text.embed_classes`, but texts run in batches of 32, so
        that memory does not grow with C. Raises ValueError for no names, an empty name, a name that is no string or
        holds one of CLIP's special tokens, no templates, and a template without a `{}` to put the name into;
        RuntimeError for damaged files, ImportError where the `serve` extra is missing.
        """
        names = _checked_names(names)
        templates = self.templates if templates is None else checked_templates(templates)
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

        Attention is causal and the embedding is read at the end token, so what pads the rows is cut off: exact, and
        eight times faster for short texts in a context of 77.
        """
        tokens = self.tokenize(texts)
        longest = int((tokens == self.eot).argmax(1).max()) + 1
        embeddings: np.ndarray = self._open()[1].run(None, {"tokens": tokens[:, :longest]})[0]
        return embeddings

    def tokenize(self, texts: Sequence[str]) -> np.ndarray:
        """(T, context_length) int64, equal to what open_clip's tokenizer makes of the same texts.

        Raises ValueError for a text that holds a special token: open_clip reads it as the start or the end.
        """
        cleaned = [clean(text) for text in texts]
        tokenizer = self._open()[0]
        # One by one: encode_batch starts a pool of threads, which a later fork() would not survive.
        return np.array([tokenizer.encode(text).ids for text in cleaned], dtype=np.int64)

    def _open(self) -> tuple[Any, Any]:
        """Tokenizer and ONNX Runtime session, made by whoever comes first."""
        with self._lock:
            if self._session is None:
                self._tokenizer = self._load_tokenizer()
                self._session = self._load_session()
            return self._tokenizer, self._session

    def _load_tokenizer(self) -> Any:
        tokenizers = require("tokenizers", "serve")
        path = self.folder / TOKENIZER_FILE
        content = path.read_bytes() if self.held is None else self.held.read(TOKENIZER_FILE)
        try:
            tokenizer = tokenizers.Tokenizer.from_buffer(content)
            length = len(tokenizer.encode("").ids)
        except Exception as error:  # tokenizers raises bare Exceptions
            raise RuntimeError(f"tokenizers can't load {TOKENIZER_FILE} in {self.folder}: {error}; {_AGAIN}") from error
        if length != self.context_length:
            raise RuntimeError(
                f"expected {TOKENIZER_FILE} in {self.folder} to fill a context of {self.context_length}, got {length}; "
                f"{_AGAIN}"
            )
        return tokenizer

    def _load_session(self) -> Any:
        ort = require("onnxruntime", "serve")
        options = ort.SessionOptions()
        options.intra_op_num_threads = self._threads or 0
        options.log_severity_level = 3

        def opener(folder: Path) -> Any:
            try:
                return ort.InferenceSession(str(folder / FILE), options, providers=["CPUExecutionProvider"])
            except Exception as error:  # ONNX Runtime's exceptions share no public base class
                raise RuntimeError(f"ONNX Runtime can't load {FILE} in {self.folder}: {error}; {_AGAIN}") from error

        session = opener(self.folder) if self.held is None else self.held.open_with(opener)
        shape = session.get_outputs()[0].shape
        if shape[1:] != [self.width]:
            raise RuntimeError(f"expected {FILE} in {self.folder} to give (T, {self.width}), got {shape}; {_AGAIN}")
        return session


def clean(text: str) -> str:
    """What open_clip does to a text before it splits it: ftfy, HTML entities twice, single spaces, lower case.

    Raises ValueError for a text that holds a special token.
    """
    text = html.unescape(html.unescape(require("ftfy", "serve").fix_text(text)))
    text = " ".join(text.split()).lower()
    for token in SPECIAL_TOKENS:
        if token in text.casefold():
            raise ValueError(f"expected a text without CLIP's special token {token}, got {text!r}")
    return text


def _checked_names(names: Sequence[str]) -> list[str]:
    if isinstance(names, str):
        raise ValueError(f"expected a list of class names, got the string {names!r}; put it into a list")
    for name in names:
        if not isinstance(name, str):
            raise ValueError(f"expected class names as strings, got {name!r} of type {type(name).__name__}")
        if not clean(name):
            raise ValueError(f"expected class names with something to read in them, got {name!r}")
    if not len(names):
        raise ValueError("expected at least one class name, got none")
    return list(names)


def checked_templates(templates: Sequence[str]) -> tuple[str, ...]:
    """Prompts as a tuple. Raises ValueError where there are none or one has no `{}` to put the class name into."""
    if isinstance(templates, str) or not len(templates):
        raise ValueError(f"expected a list of one or more templates, got {templates!r}")
    for template in templates:
        if "{}" not in template:
            raise ValueError(f"expected templates with {{}} where the class name goes, got {template!r}")
    return tuple(templates)
