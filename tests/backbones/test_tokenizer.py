"""Hugging Face tokenizers without transformers: the tokens of open_clip's HFTokenizer, for each kind its models use."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import open_clip
import pytest
import tokenizers

from iosr_fast.backbones.load import load_clip
from iosr_fast.backbones.load_tokenizer import hugging_face_tokenizer, load_tokenizer
from iosr_fast.backbones.prompts import embed_classes
from iosr_fast.backbones.tokenizer import clean_text, count_tokens
from iosr_fast.export.text import HARD_TEXTS
from tests.backbones import tokenizer_files

Make = Callable[[Path], Path]
# How to make the files, the context, open_clip's options; tokens before and behind a text, and the padding.
KINDS: dict[str, tuple[Make, int, dict[str, Any], list[int], list[int], int]] = {
    "SigLIP": (tokenizer_files.siglip, 16, {"clean": "canonicalize"}, [], [1], 1),
    "SigLIP 2": (tokenizer_files.siglip2, 64, {"clean": "canonicalize"}, [], [1], 0),
    "CLIPA": (tokenizer_files.bert, 32, {"strip_sep_token": True}, [2], [0], 0),
    "BERT": (tokenizer_files.bert, 32, {"clean": "lower"}, [2], [3], 0),
    "XLM-V": (tokenizer_files.xlm_v, 77, {}, [0], [2], 1),
}


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ...]:
    make, *others = KINDS[request.param]
    return make(tmp_path_factory.mktemp("tokenizer")), *others


@pytest.mark.parametrize("clean", ["canonicalize", "lower", "whitespace"])
def test_texts_are_cleaned_as_open_clip_does(clean: Any) -> None:
    theirs = open_clip.tokenizer.get_clean_fn(clean)
    for text in (*HARD_TEXTS, "snake_case __init__ a-b/c\\d", "&lt;_&gt;"):
        assert clean_text(text, clean) == theirs(text)


def test_tokens_are_those_of_the_file_cut_and_padded(kind: tuple[Any, ...]) -> None:
    folder, length, options, before, behind, pad = kind
    split = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    clean = open_clip.tokenizer.get_clean_fn(options.get("clean", "whitespace"))
    rows, counts = [], []
    for text in HARD_TEXTS:
        words = split.encode(clean(text), add_special_tokens=False).ids
        row = [*before, *words[: length - len(before) - len(behind)], *behind]
        rows.append(row + [pad] * (length - len(row)))
        counts.append(len(before) + len(words) + len(behind))
    tokenizer = hugging_face_tokenizer(folder, length, **options)
    tokens = tokenizer(list(HARD_TEXTS))
    assert [count_tokens(tokenizer, text) for text in HARD_TEXTS] == counts and max(counts) > 2 * length
    assert tokens.dtype.is_floating_point is False and tokens.shape == (len(HARD_TEXTS), length)
    np.testing.assert_array_equal(tokens.numpy(), rows)
    assert len({len(set(row)) for row in rows}) > 5  # the texts differ


def change(folder: Path, **settings: Any) -> Path:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return folder


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, ["cat", 1, 0, 0, 0]),
        ({"padding_side": None}, [0, 0, 0, "cat", 1]),  # Gemma's own side
        ({"padding_side": "left", "add_bos_token": True}, [0, 0, 2, "cat", 1]),
        ({"add_eos_token": False}, ["cat", 0, 0, 0, 0]),
        ({"pad_token": {"content": "<unk>", "special": True}}, ["cat", 1, 3, 3, 3]),
    ],
)
def test_settings_beside_the_file_count(settings: dict[str, Any], expected: list[Any], tmp_path: Path) -> None:
    folder = change(tokenizer_files.siglip2(tmp_path), **settings)
    split = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    word = split.encode("cat", add_special_tokens=False).ids
    row = [token for item in expected for token in (word if item == "cat" else [item])]
    assert hugging_face_tokenizer(folder, len(row), "canonicalize")("cat")[0].tolist() == row


def test_texts_may_be_cut_on_the_left(tmp_path: Path) -> None:
    folder = tokenizer_files.bert(tmp_path)
    whole = hugging_face_tokenizer(folder, 7)("a b c d e")[0].tolist()
    assert hugging_face_tokenizer(folder, 5)("a b c d e")[0].tolist() == [*whole[:4], 3]
    assert hugging_face_tokenizer(change(folder, truncation_side="left"), 5)("a b c d e")[0].tolist() == [2, *whole[3:]]


@pytest.mark.parametrize(("mode", "added"), [("", 2), ("clips", 3)])
def test_tokens_of_transformers_are_counted_before_they_are_cut(mode: str, added: int, tmp_path: Path) -> None:
    split = tokenizers.Tokenizer.from_file(str(tokenizer_files.bert(tmp_path) / "tokenizer.json"))

    class Backend:
        all_special_tokens = ("[SEP]",)

        def __call__(self, text: str, **options: bool) -> Any:
            return SimpleNamespace(input_ids=split.encode(text, **options).ids)

    theirs = object.__new__(open_clip.tokenizer.HFTokenizer)  # whose __init__ needs transformers
    theirs.__dict__ |= {"clean_fn": str.strip, "tokenizer": Backend(), "tokenizer_mode": mode}
    assert count_tokens(theirs, " a b c d e") == len(split.encode("a b c d e", add_special_tokens=False)) + added


def config(source: str | None = None, **text: Any) -> dict[str, Any]:
    return {
        "text_cfg": {"context_length": 16, "vocab_size": 500} | ({"hf_tokenizer_name": source} if source else {}) | text
    }


def test_names_are_read_as_open_clip_reads_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    folder = tokenizer_files.siglip(tmp_path / "files")
    asked = []

    def download(repository: str, name: str, **_: Any) -> str:
        if repository == "timm/nowhere":
            raise huggingface_hub.errors.LocalEntryNotFoundError("no network")
        asked.append((repository, name))
        if not (folder / name).is_file():
            raise huggingface_hub.errors.EntryNotFoundError(name)
        return str(folder / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    options = {"tokenizer_kwargs": {"clean": "canonicalize"}}
    expected = hugging_face_tokenizer(folder, 16, "canonicalize")(["Cat!"]).tolist()
    for name in ("ViT-B-16-SigLIP", "hf-hub:timm/ViT-B-16-SigLIP"):
        assert load_tokenizer(name, config("timm/ViT-B-16-SigLIP", **options))(["Cat!"]).tolist() == expected
    assert {repository for repository, _ in asked} == {"timm/ViT-B-16-SigLIP"}
    local = load_tokenizer(f"local-dir:{folder}", config("timm/ViT-B-16-SigLIP", **options))
    assert local(["Cat!"]).tolist() == expected
    for name in ("hf-hub:timm/vit_base_patch16_clip_224.openai", "ViT-B-32"):
        tokenizer = load_tokenizer(name, {"text_cfg": {"context_length": 77}})
        assert type(tokenizer) is open_clip.SimpleTokenizer and tokenizer.context_length == 77
    with pytest.raises(OSError, match=r"tokenizer of timm/nowhere can't be .*; without a network, .*local-dir:FOLDER"):
        load_tokenizer("ViT-B-16-SigLIP", config("timm/nowhere"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "expected a tokenizer in tokenizer.json of .*, got a file with: "),
        (None, "has no tokenizer.json, and transformers has to convert .*: pip install transformers sentencepiece"),
    ],
)
def test_files_that_are_no_tokenizer_are_refused(
    content: str | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "transformers" else find(name))
    path = tokenizer_files.bert(tmp_path) / "tokenizer.json"
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises((ValueError, ImportError), match=message):
        load_tokenizer(f"local-dir:{tmp_path}", config("bert-base-uncased"))


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    folder = tokenizer_files.siglip2(tmp_path / "gemma")
    with pytest.raises(ValueError, match=r"of local-dir:.* has 501 tokens for 500 embeddings .*'<h1>' is number 500"):
        load_tokenizer(f"local-dir:{folder}", config("timm/ViT-B-16-SigLIP2"))
    # No text contains <h1> once SigLIP's cleaning has removed its punctuation.
    load_tokenizer(f"local-dir:{folder}", config("timm/ViT-B-16-SigLIP2", tokenizer_kwargs={"clean": "canonicalize"}))
    unseparated = tokenizer_files.siglip(tmp_path / "t5")
    with pytest.raises(ValueError, match=r"of .* that adds '\[SEP\]', got one that adds \['</s>'\]"):
        load_tokenizer(f"local-dir:{unseparated}", config("x", tokenizer_kwargs={"strip_sep_token": True}))
    change(folder, pad_token="<none>")
    (folder / "tokenizer.json").write_text((folder / "tokenizer.json").read_text().replace("<pad>", "<fill>"))
    with pytest.raises(ValueError, match=r"expected a padding token in tokenizer.json of .*got none of \['<none>'"):
        load_tokenizer(f"local-dir:{folder}", config("timm/ViT-B-16-SigLIP2"))


@pytest.mark.parametrize("text", ["a <eos> b", "&lt;bos&gt;", "<PAD>"])
def test_special_tokens_are_refused(text: str, tmp_path: Path) -> None:
    folder = tokenizer_files.siglip2(tmp_path)
    with pytest.raises(ValueError, match=r"without the tokenizer's special token <(eos|bos|pad)>, got"):
        hugging_face_tokenizer(folder, 16)(text)
    assert hugging_face_tokenizer(folder, 16, "canonicalize")(text).shape == (1, 16)  # which leaves no brackets


def test_an_embedding_of_a_class_does_not_depend_on_the_others() -> None:
    clip, names = load_clip("demo"), [f"number {i}" for i in range(9)]
    templates = ["{}", "a {}", "an icon of {}", "the {}", "one {}"]
    alone = [embed_classes(clip, [name], templates)[0] for name in names]
    np.testing.assert_allclose(embed_classes(clip, names, templates), np.stack(alone), atol=1e-6)
