"""The tokenizer of a CLIP: open_clip's own, or that of a Hugging Face repository, read without transformers."""

from __future__ import annotations

import importlib
import importlib.util
import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from iosr_fast.backbones.download import downloading
from iosr_fast.backbones.tokenizer import Clean, Tokenizer, clean_text
from iosr_fast.exceptions import IosrFastError, MissingPackageError
from iosr_fast.utils.require import require

_SETTINGS = ("special_tokens_map.json", "tokenizer_config.json")  # a later file overrides an earlier one
_COPY_FILES = (
    f"copy {', '.join(_SETTINGS)} and tokenizer.json beside the model's open_clip_config.json and name their folder by "
    "local-dir:FOLDER"
)
_PADS_LEFT = ("GemmaTokenizer", "LlamaTokenizer")  # unless their settings name a side


def load_tokenizer(name: str, config: Mapping[str, Any]) -> Any:
    """The tokenizer of an open_clip model: called with texts, it gives tokens int64 (T, context length).

    `name` is as open_clip takes it ("ViT-B-16", "hf-hub:OWNER/REPOSITORY", "local-dir:FOLDER"), `config` the model's
    configuration (`open_clip.get_model_config(name)`, "model_cfg" of an open_clip_config.json).

    A Hugging Face tokenizer is read from tokenizer.json and two small files beside it, without transformers.
    transformers is needed for a repository without a tokenizer.json, which it converts, and for a text encoder that is
    a model of Hugging Face.

    Raises ValueError for files that are no tokenizer and for more tokens than the model has embeddings; ImportError,
    which names the command, for missing transformers; OSError for a failed download.
    """
    open_clip = require("open_clip", "cpu")
    text: Mapping[str, Any] = config["text_cfg"]
    options = dict(text.get("tokenizer_kwargs") or {})
    length, source, mode = text.get("context_length", 77), text.get("hf_tokenizer_name"), text.get("tokenizer_mode")
    if not source:
        return open_clip.SimpleTokenizer(context_length=length, **options)
    if name.startswith("local-dir:"):
        source = name.removeprefix("local-dir:")
    model = text.get("hf_model_name")
    if model or mode or options.get("language"):
        what = f"text encoder of {name}, {model}," if model else f"tokenizer of {name}"
        require_transformers(f"the {what} runs in Hugging Face's transformers")
        with downloading(str(source), "the tokenizer", _COPY_FILES) as hub:
            cached = {"local_files_only": bool(hub.unreachable)}
            return open_clip.tokenizer.HFTokenizer(source, length, tokenizer_mode=mode, **cached, **options)
    tokenizer = hugging_face_tokenizer(source, length, **options)
    check_vocabulary(name, tokenizer, text.get("vocab_size", 49408))
    return tokenizer


def hugging_face_tokenizer(
    source: str | Path, context_length: int, clean: Clean = "whitespace", strip_sep_token: bool = False
) -> Tokenizer:
    """What open_clip's HFTokenizer(source, context_length, clean, strip_sep_token) does.

    `source` is a folder, or a repository of the Hugging Face hub. Raises as `load_tokenizer`.
    """
    content, settings = _read(source)
    if content is None:
        content, settings = _convert(source)
    try:
        backend = require("tokenizers", "serve").Tokenizer.from_str(content)
    except Exception as error:  # tokenizers raises bare Exceptions
        raise IosrFastError(f"expected a tokenizer in tokenizer.json of {source}, got a file with: {error}") from error
    padding, truncation = backend.padding or {}, backend.truncation or {}
    known = [settings.get("pad_token"), padding.get("pad_token"), "<pad>", "[PAD]"]
    pad = next((token for token in known if token and backend.token_to_id(token) is not None), None)
    if pad is None:
        raise IosrFastError(f"expected a padding token in tokenizer.json of {source}, got none of {known}")
    if "add_bos_token" in settings or "add_eos_token" in settings:
        backend.post_processor = _bos_and_eos(backend, settings)
    kind = str(settings.get("tokenizer_class")).removesuffix("Fast")
    side = settings.get("padding_side") or padding.get("direction") or ("left" if kind in _PADS_LEFT else "right")
    backend.enable_padding(direction=side, length=context_length, pad_id=backend.token_to_id(pad), pad_token=pad)
    cut = settings.get("truncation_side") or truncation.get("direction") or "right"
    backend.enable_truncation(context_length, direction=cut)
    if strip_sep_token:
        backend = _without_separator(backend, settings.get("sep_token") or "[SEP]", source)
    theirs = require("open_clip", "cpu").tokenizer.HFTokenizer
    options = {"context_length": context_length, "clean": clean, "strip_sep_token": strip_sep_token}
    return Tokenizer(backend, clean, partial(theirs, str(source), **options))


def _read(source: str | Path) -> tuple[str | None, dict[str, Any]]:
    """tokenizer.json, None if there is none, and the settings; a special token may be a string or an object."""
    settings: dict[str, Any] = {}
    *texts, content = _texts(source, (*_SETTINGS, "tokenizer.json"))
    for text in texts:
        settings |= json.loads(text or "{}")
    for key, value in settings.items():
        if key.endswith("_token") and isinstance(value, dict):
            settings[key] = value.get("content")
    return content, settings


def _texts(source: str | Path, names: Sequence[str]) -> list[str | None]:
    """The contents of files of a folder or of a repository of the hub; None where it has no such file."""
    if Path(source).is_dir():
        paths = [Path(source) / name for name in names]
        return [path.read_text("utf-8") if path.is_file() else None for path in paths]
    errors: Any = require("huggingface_hub.errors", "cpu")
    texts: list[str | None] = []
    with downloading(str(source), "the tokenizer", _COPY_FILES) as hub:
        for name in names:
            try:
                texts.append(hub.file(str(source), name).read_text("utf-8"))
            except errors.LocalEntryNotFoundError:  # an EntryNotFoundError too: the hub can't be asked
                raise
            except errors.EntryNotFoundError:
                texts.append(None)
    return texts


def _convert(source: str | Path) -> tuple[str, dict[str, Any]]:
    """As `_read`, by transformers, for a repository with a SentencePiece model alone (google/mt5-base)."""
    require_transformers(f"{source} has no tokenizer.json, and transformers has to convert what it has")
    auto = importlib.import_module("transformers").AutoTokenizer
    with downloading(str(source), "the tokenizer", _COPY_FILES) as hub:
        tokenizer = auto.from_pretrained(str(source), local_files_only=bool(hub.unreachable))
    if not tokenizer.is_fast:
        raise IosrFastError(f"expected a tokenizer.json in {source}, or files that transformers converts to one")
    names = ("pad_token", "sep_token", "padding_side", "truncation_side")
    return tokenizer.backend_tokenizer.to_str(), {name: getattr(tokenizer, name) for name in names}


def require_transformers(reason: str) -> None:
    """Raise ImportError, with the reason and the command, without Hugging Face's transformers."""
    if importlib.util.find_spec("transformers") is None:
        pip = "pip install transformers sentencepiece protobuf"
        raise MissingPackageError(f"{reason}; transformers is not installed: {pip}")


def _bos_and_eos(backend: Any, settings: Mapping[str, Any]) -> Any:
    """The start and end tokens that the settings ask for (Gemma's default: a start token alone)."""
    processors = require("tokenizers", "serve").processors
    bos = [settings["bos_token"]] if settings.get("add_bos_token", True) else []
    eos = [settings["eos_token"]] if settings.get("add_eos_token", False) else []
    return processors.TemplateProcessing(
        single=[*bos, "$A", *eos], special_tokens=[(token, backend.token_to_id(token)) for token in (*bos, *eos)]
    )


def _without_separator(backend: Any, separator: str, source: str | Path) -> Any:
    """The tokenizer with id 0 where it adds its separator, which is how CLIPA was trained."""
    content = json.loads(backend.to_str())
    added = (content["post_processor"] or {}).get("special_tokens", {})
    if separator not in added:
        raise IosrFastError(
            f"expected a tokenizer.json of {source} that adds {separator!r}, got one that adds {[*added]}"
        )
    added[separator]["ids"] = [0]
    return type(backend).from_str(json.dumps(content))


def check_vocabulary(name: str, tokenizer: Tokenizer, vocabulary: int) -> None:
    """Raise ValueError if a text could get a token for which the model, of `vocabulary` embeddings, has none.

    Tokens that no cleaned text contains do not count: SigLIP's multilingual tokenizer has a hundred of them behind the
    model's vocabulary (<extra_id_7>).
    """
    backend = tokenizer.backend
    if backend.get_vocab_size() <= vocabulary:
        return
    always = set(backend.encode("").tokens)
    for token, i in sorted(backend.get_vocab().items(), key=lambda item: item[1]):
        word = token.removeprefix("\N{LOWER ONE EIGHTH BLOCK}")  # SentencePiece's space
        if i < vocabulary:
            continue
        kept = token not in tokenizer.special_tokens and clean_text(word, tokenizer.clean) == word
        if kept or token in always:
            raise IosrFastError(
                f"the tokenizer of {name} has {backend.get_vocab_size()} tokens for {vocabulary} embeddings of its "
                f"text encoder, and {token!r} is number {i}; expected the tokenizer that the model was trained with"
            )
