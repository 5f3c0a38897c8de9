"""The text encoder without torch, for each kind of text encoder among open_clip's models, at tiny widths."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests import ROOT

torch = pytest.importorskip("torch", reason="torch comes with the cpu extra")
pytest.importorskip("onnxscript", reason="onnxscript comes with the cpu extra")
open_clip = pytest.importorskip("open_clip", reason="open_clip comes with the cpu extra")
pytest.importorskip("tokenizers", reason="tokenizers comes with the serve extra")

from iosr_fast.classifier import Classifier  # noqa: E402
from iosr_fast.clip.demo.pictures import load_index  # noqa: E402
from iosr_fast.clip.load import LoadedClip, load_clip  # noqa: E402
from iosr_fast.clip.load_tokenizer import hugging_face_tokenizer  # noqa: E402
from iosr_fast.clip.prompts import PHOTO_TEMPLATES, embed_classes  # noqa: E402
from iosr_fast.clip.text_tower import encode_tokens, end_token  # noqa: E402
from iosr_fast.encoders.text_encoder import FILE, TOKENIZER_FILE, WEIGHTS_FILE, TextEncoder  # noqa: E402
from iosr_fast.export import text as module  # noqa: E402
from iosr_fast.export.text import HARD_TEXTS, ClipText, export_text  # noqa: E402
from tests.clip import tokenizer_files  # noqa: E402
from tests.demo_cache import demo_bundle  # noqa: E402

pytestmark = pytest.mark.slow

SIGLIP: dict[str, Any] = {
    "context_length": 16,
    "no_causal_mask": True,
    "pool_type": "last",
    "proj_bias": True,
    "norm_kwargs": {"eps": 1e-6},
    "tokenizer_kwargs": {"clean": "canonicalize"},
}
COCA = {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1, "attn_pooler_heads": 2}
# The text part of a configuration, the rest of it, the tokenizer's files; the token behind which texts are cut.
FAMILIES: dict[str, tuple[dict[str, Any], dict[str, Any], Any, int | None]] = {
    "CLIP": ({"context_length": 12, "layers": 2}, {}, None, 49407),
    "PE-Core": ({"context_length": 12}, {"custom_text": True}, None, 49407),
    "MobileCLIP2": ({"context_length": 12, "no_causal_mask": True}, {"custom_text": True}, None, None),
    "CoCa": (
        {"context_length": 12, "embed_cls": True, "output_tokens": True},
        {"custom_text": True, "multimodal_cfg": COCA},
        None,
        None,
    ),
    "SigLIP": (
        SIGLIP | {"vocab_size": 300},
        {"custom_text": True, "init_logit_bias": -10},
        tokenizer_files.siglip,
        None,
    ),
    "SigLIP 2": (
        SIGLIP | {"vocab_size": 501, "act_kwargs": {"approximate": "tanh"}},
        {"custom_text": True, "init_logit_bias": -10},
        tokenizer_files.siglip2,
        None,
    ),
    "SigLIP i18n": (
        SIGLIP | {"vocab_size": 300, "proj_type": "none", "width": 128},
        {"custom_text": True, "init_logit_bias": -10},
        tokenizer_files.siglip,
        None,
    ),
    "CLIPA": (
        {
            "context_length": 12,
            "vocab_size": 300,
            "no_causal_mask": True,
            "pool_type": "last",
            "tokenizer_kwargs": {"strip_sep_token": True},
        },
        {},
        tokenizer_files.bert,
        None,
    ),
    "worldwide": (
        {"context_length": 20, "vocab_size": 400, "pool_type": "eos", "eos_id": 2},
        {},
        tokenizer_files.xlm_v,
        2,
    ),
    "blocks of its own": (
        {"context_length": 12, "no_causal_mask": True, "pool_type": "first", "qk_norm": True, "scale_fc": True},
        {"custom_text": True},
        None,
        None,
    ),
}


@pytest.fixture(scope="module")
def bundle() -> Path:
    """Made before `_tidy` changes what an export checks: other tests share it."""
    return demo_bundle()


@pytest.fixture(autouse=True)
def _tidy(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One thread, some of the demo's names in place of all in the check of an export, and open_clip's own models."""
    some = {"concepts": load_index()["concepts"][:20]}
    monkeypatch.setattr(module, "load_index", lambda: some)
    factory = open_clip.factory
    monkeypatch.setattr(factory, "_MODEL_CONFIG_PATHS", list(factory._MODEL_CONFIG_PATHS))
    monkeypatch.setattr(factory, "_MODEL_CONFIGS", deepcopy(factory._MODEL_CONFIGS))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def family(name: str, folder: Path) -> LoadedClip:
    """A CLIP of this family with random weights, none of which is at its trivial start, so that everything counts."""
    text, others, make, _ = FAMILIES[name]
    files = {"hf_tokenizer_name": str(make(folder / "tokenizer"))} if make else {}
    config = {
        "embed_dim": 128,
        "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 16, "layers": 1, "head_width": 8},
        "text_cfg": {"width": 32, "heads": 2, "layers": 1} | text | files,
    } | others
    path = folder / f"tiny-{name.replace(' ', '-')}.json"
    path.write_text(json.dumps(config))
    open_clip.add_model_config(path)
    clip = load_clip(path.stem, "none")
    generator = torch.Generator().manual_seed(3)
    for key, value in getattr(clip.model, "text", clip.model).named_parameters():
        if value.ndim == 1:
            value.copy_(float(key.endswith("weight")) + 0.2 * torch.randn(value.shape, generator=generator))
        elif "embedding" in key:
            value.mul_(30)
    return clip


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "SigLIP 2" else pytest.mark.slow) for name in FAMILIES]
)
def test_text_encoders_equal_open_clips(name: str, tmp_path: Path) -> None:
    clip, end = family(name, tmp_path), FAMILIES[name][3]
    (tmp_path / "text").mkdir()
    facts = export_text(clip, tmp_path / "text")
    assert json.loads(json.dumps(facts)) == facts and facts["eot"] == end == end_token(clip)
    assert facts["max_abs_error"] < 1e-5 and facts["tokens_checked"] > 100 and facts["width"] == 128
    assert facts["templates"] == list(PHOTO_TEMPLATES)
    encoder = TextEncoder(tmp_path / "text", facts)
    texts = ["A Photo of a Cat!", "snake_case & C++", "cat " * 30, "", "柴犬 🐈", *HARD_TEXTS[:9]]
    tokens = clip.tokenizer(texts)
    np.testing.assert_array_equal(encoder.tokenize(texts), tokens.numpy())
    with torch.inference_mode():
        expected = clip.model.encode_text(tokens, normalize=True).numpy()
        np.testing.assert_allclose(encode_tokens(clip, tokens).numpy(), expected, atol=1e-5)
    np.testing.assert_allclose(encoder.embed(texts), expected, atol=1e-5)
    for text, row in zip(texts, expected, strict=True):  # an embedding does not depend on the batch
        np.testing.assert_allclose(encoder.embed([text])[0], row, atol=1e-5)
    near = expected @ expected.T - np.eye(len(texts))
    assert np.quantile(near, 0.5) < 0.99  # the texts differ


@pytest.mark.parametrize("name", ["SigLIP 2", "CLIPA"])
def test_a_saved_classifier_embeds_names_without_torch(
    name: str, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip, saved = family(name, tmp_path), Classifier.load(bundle)
    opened = saved._fit.clip
    clip = replace(
        clip, fingerprint=opened.encoder.source.manifest["clip_fingerprint"]
    )  # text and engine are one CLIP's
    monkeypatch.setenv("IOSR_FAST_CACHE", str(tmp_path / "cache"))
    saved._fit = replace(saved._fit, clip=replace(opened, text=ClipText(clip)))
    if name == "CLIPA":  # as a text encoder of more than 2 GB: the weights in a file of their own
        monkeypatch.setattr(module, "LARGEST_FILE", 1000)
    saved.save(tmp_path / "first")
    Classifier.load(tmp_path / "first").save(tmp_path / "saved")  # which copies the files
    files = {FILE, TOKENIZER_FILE} | ({WEIGHTS_FILE} if name == "CLIPA" else set())
    assert {path.name for path in (tmp_path / "saved" / "text").iterdir()} == files
    names = ["Red Panda", "Zürich's C++", "rock_n_roll"]
    program = (
        "import json, sys\n"
        "for name in ('torch', 'open_clip', 'transformers', 'huggingface_hub'): sys.modules[name] = None\n"
        "from iosr_fast import Classifier\n"
        "classifier = Classifier.load(sys.argv[1])\n"
        "print(json.dumps(classifier._fit.clip.text.embed_classes(json.loads(sys.argv[2])).tolist()))"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "saved"), json.dumps(names)]
    run = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    np.testing.assert_allclose(json.loads(run.stdout), embed_classes(clip, names), atol=1e-5)


def test_another_tokenizer_of_the_same_weights_is_exported_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IOSR_FAST_CACHE", str(tmp_path / "cache"))
    clip = family("SigLIP", tmp_path / "first")
    smaller = hugging_face_tokenizer(tokenizer_files.siglip(tmp_path / "second", 290), 16, "canonicalize")
    written = []
    for number, each in enumerate((clip, replace(clip, tokenizer=smaller), clip)):
        folder = tmp_path / str(number)
        folder.mkdir()
        assert ClipText(each).write(folder) is not None
        written.append((folder / TOKENIZER_FILE).read_bytes())
    assert written[0] == written[2] != written[1]


def test_names_without_a_letter_are_refused_where_punctuation_is_dropped(tmp_path: Path) -> None:
    clip = family("SigLIP 2", tmp_path)
    encoder = TextEncoder(tmp_path, export_text(clip, tmp_path))
    with pytest.raises(ValueError, match=r"at least one visible character \(this CLIP's tokenizer drops punct.*'\?!'"):
        encoder.embed_classes(["cat", "?!"])
    with pytest.raises(RuntimeError, match=f"expected {TOKENIZER_FILE} in .* to fill a context of 64, got 16"):
        TextEncoder(tmp_path, encoder.facts | {"context_length": 64}).embed_classes(["cat"])


def test_what_can_not_be_exported_says_why(tmp_path: Path) -> None:
    clip = family("SigLIP 2", tmp_path)

    def refused(message: str, **changed: Any) -> None:
        with pytest.raises(ValueError, match=message):
            export_text(replace(clip, **changed), tmp_path)
        assert not any((tmp_path / name).exists() for name in (FILE, TOKENIZER_FILE))

    refused("SimpleTokenizer or a tokenizer.json, got SimpleNamespace", tokenizer=SimpleNamespace())
    clip.model.text.pool_type = "none"
    refused("it has 'none' pooling; expected one of")
    clip.model.text.pool_type, clip.model.text.context_length = "last", 64
    refused("it has a context of 64 for rows of 16")
    clip.model.text.context_length, clip.model.text.vocab_size = 16, 400
    refused("has 501 tokens for 400 embeddings")
    other = open_clip.hf_model.HFTextEncoder
    refused("TextTransformer .*, got HFTextEncoder", model=SimpleNamespace(text=other.__new__(other)))
