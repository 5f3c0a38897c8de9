"""The text encoder without torch: open_clip's tokens and embeddings, for each kind of text encoder among open_clip's
models at tiny widths, and a clear refusal where it can't have them."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import open_clip
import pytest
import torch

from iosr_fast.backbones.demo.pictures import load_index
from iosr_fast.backbones.load import LoadedModel, load_clip
from iosr_fast.backbones.load_tokenizer import hugging_face_tokenizer
from iosr_fast.backbones.prompts import DEMO_TEMPLATES, PHOTO_TEMPLATES, embed_classes
from iosr_fast.backbones.text_tower import encode_tokens, end_token
from iosr_fast.backbones.tokenizer import count_tokens
from iosr_fast.classifier import Classifier
from iosr_fast.encoders.text_encoder import FILE, TOKENIZER_FILE, WEIGHTS_FILE, TextEncoder
from iosr_fast.export import text as module
from iosr_fast.export.text import HARD_TEXTS, ClipText, export_text
from tests.backbones import tokenizer_files
from tests.demo_cache import demo_bundle, shared_cache
from tests.interpreter import printed

pytestmark = pytest.mark.slow

Exported = tuple[Path, dict[str, Any]]
CUSTOM = {"custom_text": True}
CLEAN, STRIP = {"tokenizer_kwargs": {"clean": "canonicalize"}}, {"tokenizer_kwargs": {"strip_sep_token": True}}
LAST = {"no_causal_mask": True, "pool_type": "last", "vocab_size": 300}
SIGLIP = LAST | CLEAN | {"context_length": 16, "proj_bias": True, "norm_kwargs": {"eps": 1e-6}}
COCA = {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1, "attn_pooler_heads": 2}
WORLDWIDE = {"context_length": 20, "vocab_size": 400, "pool_type": "eos", "eos_id": 2}
OWN_BLOCKS = {"no_causal_mask": True, "pool_type": "first", "qk_norm": True, "scale_fc": True}
TANH = {"vocab_size": 501, "act_kwargs": {"approximate": "tanh"}}
# The text part of a configuration, the rest of it, the tokenizer's files; the token behind which texts are cut.
FAMILIES: dict[str, tuple[dict[str, Any], dict[str, Any], Any, int | None]] = {
    "CLIP": ({"layers": 2}, {}, None, 49407),
    "PE-Core": ({}, CUSTOM, None, 49407),
    "MobileCLIP2": ({"no_causal_mask": True}, CUSTOM, None, None),
    "CoCa": ({"embed_cls": True, "output_tokens": True}, CUSTOM | {"multimodal_cfg": COCA}, None, None),
    "SigLIP": (SIGLIP, CUSTOM, tokenizer_files.siglip, None),
    "SigLIP 2": (SIGLIP | TANH, CUSTOM, tokenizer_files.siglip2, None),
    "SigLIP i18n": (SIGLIP | {"proj_type": "none", "width": 128}, CUSTOM, tokenizer_files.siglip, None),
    "CLIPA": (LAST | STRIP, {}, tokenizer_files.bert, None),
    "worldwide": (WORLDWIDE, {}, tokenizer_files.xlm_v, 2),
    "blocks of its own": (OWN_BLOCKS, CUSTOM, None, None),
}


@pytest.fixture(scope="module")
def bundle() -> Path:
    """Made before `_tidy` changes what an export checks: other tests share it."""
    return demo_bundle()


@pytest.fixture(scope="module")
def demo() -> LoadedModel:
    return load_clip("demo")


@pytest.fixture(scope="module")
def exported(demo: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    folder = tmp_path_factory.mktemp("text")
    with shared_cache():
        facts = ClipText(demo).write(folder)
    assert facts is not None
    return folder, facts


@pytest.fixture(scope="module")
def encoder(exported: Exported) -> TextEncoder:
    return TextEncoder(*exported)


@pytest.fixture(autouse=True)
def _tidy(exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some of the demo's names in place of all in the check of an export, and open_clip's own models."""
    some = {"concepts": load_index()["concepts"][:20]}
    monkeypatch.setattr(module, "load_index", lambda: some)
    factory = open_clip.factory
    monkeypatch.setattr(factory, "_MODEL_CONFIG_PATHS", list(factory._MODEL_CONFIG_PATHS))
    monkeypatch.setattr(factory, "_MODEL_CONFIGS", deepcopy(factory._MODEL_CONFIGS))


def family(name: str, folder: Path) -> LoadedModel:
    """A CLIP of this family with random weights, none of which is at its trivial start, so that everything counts."""
    text, others, make, _ = FAMILIES[name]
    files = {"hf_tokenizer_name": str(make(folder / "tokenizer"))} if make else {}
    config = {
        "embed_dim": 128,
        "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 16, "layers": 1, "head_width": 8},
        "text_cfg": {"context_length": 12, "width": 32, "heads": 2, "layers": 1} | text | files,
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


@pytest.mark.parametrize("name", FAMILIES)
def test_tokens_and_embeddings_of_each_family_are_open_clips(name: str, tmp_path: Path) -> None:
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
    assert np.quantile(expected @ expected.T - np.eye(len(texts)), 0.5) < 0.99, "the texts differ"


def test_classes_get_the_embeddings_that_torch_gives(demo: LoadedModel, encoder: TextEncoder) -> None:
    names = [concept["name"] for concept in load_index()["concepts"][::7]]
    names += ["Zürich's Grossmünster"]
    got = encoder.embed_classes(names)
    assert got.dtype == np.float32 and encoder.templates == DEMO_TEMPLATES
    np.testing.assert_allclose(got, embed_classes(demo, names), atol=1e-5)
    np.testing.assert_allclose(encoder.embed_classes(names[:3]), got[:3], atol=1e-6)
    chosen = ["a {} or two {}s", "{}"]
    np.testing.assert_allclose(
        encoder.embed_classes(names[:5], chosen), embed_classes(demo, names[:5], chosen), atol=1e-5
    )


@pytest.mark.parametrize("templates", [["{}", "a {}"], []])
def test_a_text_embedding_is_the_mean_over_prompts_and_descriptions(
    templates: list[str], demo: LoadedModel, encoder: TextEncoder
) -> None:
    own = {"tench": ["a large fish", "olive-green &amp; slimy"], "pike": ["a fish"]}
    given = [*own, "eel"] if templates else list(own), templates, own
    texts = [[*(t.replace("{}", name) for t in templates), *own.get(name, ())] for name in given[0]]
    expected = np.stack([encoder.embed(each).mean(0) for each in texts])
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(encoder.embed_classes(*given), expected, atol=1e-5)
    np.testing.assert_allclose(embed_classes(demo, *given), expected, atol=1e-5)


def test_texts_that_a_clip_would_cut_are_refused_with_their_length(demo: LoadedModel, encoder: TextEncoder) -> None:
    for embed, tokenizer in (
        (encoder.embed_classes, encoder._load()[0]),
        (partial(embed_classes, demo), demo.tokenizer),
    ):
        assert [count_tokens(tokenizer, text) for text in ("", "cat", "cat " * 14, "cat " * 99)] == [2, 3, 16, 101]
        embed(["cat " * 14], ["{}"])
        with pytest.raises(
            ValueError,
            match=r"reads texts of at most 16 tokens, .* got 17 tokens: 'a (cat ){14}'; shorten the name, or the pr",
        ):
            embed(["cat", "cat " * 14], ["{}", "a {}"])
        with pytest.raises(ValueError, match=r"got 101 tokens: .*; shorten the description"):
            embed(["cat"], None, {"cat": ["dog " * 99]})
        with pytest.raises(
            ValueError, match="without the tokenizer's special token <end_of_text>, got 'a <end_of_text>'"
        ):
            embed(["cat"], None, {"cat": ["a <END_of_text>"]})


def test_characters_of_every_kind_are_read_as_open_clip_reads_them(demo: LoadedModel, encoder: TextEncoder) -> None:
    """Alone, between letters and twice: shows whether both take a character for a letter, a number, a space or else."""
    sample = [*range(0x600), *range(0x600, 0x33480, 31), *range(0x33480, 0x110000, 997)]
    texts = ["x{0}y {0} {0}{0}1{0}".format(chr(code)) for code in sample]
    np.testing.assert_array_equal(encoder.tokenize(texts), demo.tokenizer(texts).numpy())


@pytest.mark.parametrize(
    ("names", "templates", "told"),
    [
        ([], None, r"a list of at least one class name, got \[\]"),
        ("cat", None, "a list of at least one class name, got 'cat'"),
        (["cat", " \n&nbsp;"], None, "that the tokenizer does not drop, got ' "),
        (["cat", 3], None, "expected names and descriptions .*, got 3"),
        (["cat"], ["a {}"] * 1001, "at most 1,000 templates, got 1,001"),
        (["cat"], ["{}" + " " * 1999], "which has more than 2,000 characters"),
        (["cat"], ["a\0 {}"], "which has control characters"),
        (["cat"], ["a {}", "a photo"], r"expected templates with \{\} where the class name goes, got 'a photo'"),
        (["&lt;start_of_text&gt;"], None, r"without the tokenizer's special token <start_of_text>"),
    ],
)
def test_bad_names_and_templates_are_refused(names: Any, templates: Any, told: str, encoder: TextEncoder) -> None:
    with pytest.raises(ValueError, match=told):
        encoder.embed_classes(names, templates)


def test_files_are_opened_at_the_first_use_and_once(exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    sessions, session = [], ort.InferenceSession
    monkeypatch.setattr(ort, "InferenceSession", lambda *a, **k: sessions.append(session(*a, **k)) or sessions[-1])
    names = [[f"thing {i}", "a dog of several words"[: 5 + i]] for i in range(16)]
    shared = TextEncoder(*exported, threads=1)
    assert sessions == []
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(shared.embed_classes, names))
    assert len(sessions) == 1
    for given, embeddings in zip(names, found, strict=True):
        np.testing.assert_array_equal(embeddings, shared.embed_classes(given))


@pytest.mark.parametrize("name", [FILE, TOKENIZER_FILE])
def test_damaged_files_are_named(name: str, exported: Exported, tmp_path: Path) -> None:
    folder, facts = exported
    for file in (FILE, TOKENIZER_FILE):
        (tmp_path / file).write_bytes((folder / file).read_bytes()[: 100_000 if file == name else None])
    encoder = TextEncoder(tmp_path, facts)
    for _ in range(2):  # a first failure is not taken for a success
        with pytest.raises(RuntimeError, match=rf"can't load {name} in .*save the classifier again"):
            encoder.embed_classes(["cat"])


@pytest.mark.parametrize("name", ["SigLIP 2", "CLIPA"])
def test_a_saved_classifier_embeds_names_without_torch(
    name: str, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip, saved = family(name, tmp_path), Classifier.load(bundle)
    opened = saved._fit.clip
    # Text and engine are one CLIP's.
    clip = replace(clip, fingerprint=opened.encoder.source.manifest["clip_fingerprint"])
    monkeypatch.setenv("IOSR_FAST_CACHE", str(tmp_path / "cache"))
    saved._fit = replace(saved._fit, clip=replace(opened, text=ClipText(clip)))
    if name == "CLIPA":  # as a text encoder of more than 2 GB: the weights in a file of their own
        monkeypatch.setattr(module, "LARGEST_FILE", 1000)
    saved.save(tmp_path / "first")
    Classifier.load(tmp_path / "first").save(tmp_path / "saved")  # which copies the files
    files = {FILE, TOKENIZER_FILE} | ({WEIGHTS_FILE} if name == "CLIPA" else set())
    assert {path.name for path in (tmp_path / "saved" / "text").iterdir()} == files
    given = ["Red Panda", "Zürich's C++"], ["{}"], {"Red Panda": ["a bear", "red"]}
    program = (
        "import json, sys\n"
        "for name in ('torch', 'open_clip', 'transformers', 'onnx', 'regex'): sys.modules[name] = None\n"
        "from iosr_fast import Classifier\n"
        "classifier = Classifier.load(sys.argv[1])\n"
        "print(json.dumps(classifier._fit.clip.text.embed_classes(*json.loads(sys.argv[2])).tolist()))"
    )
    found = json.loads(printed(program, str(tmp_path / "saved"), json.dumps(given)))
    np.testing.assert_allclose(found, embed_classes(clip, *given), atol=1e-5)


def test_cached_exports_are_of_weights_and_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IOSR_FAST_CACHE", str(tmp_path / "cache"))
    clip, written = family("SigLIP", tmp_path), []
    smaller = hugging_face_tokenizer(tokenizer_files.siglip(tmp_path / "second", 290), 16, "canonicalize")
    for number, each in enumerate((clip, replace(clip, tokenizer=smaller), clip)):
        (tmp_path / str(number)).mkdir()
        assert ClipText(each).write(tmp_path / str(number)) is not None
        written.append((tmp_path / str(number) / TOKENIZER_FILE).read_bytes())
    assert written[0] == written[2] != written[1]


def test_wrong_tokens_and_wrong_embeddings_are_refused(
    demo: LoadedModel, exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, right = onnx.load(exported[0] / FILE), module._character_ranges
    monkeypatch.setattr(module, "to_onnx", lambda *_: model)
    with monkeypatch.context() as changed:
        only_ascii = lambda kind: r"\x{61}-\x{7a}" if kind == r"[\p{L}]" else right(kind)  # noqa: E731
        changed.setattr(module, "_character_ranges", only_ascii)
        with pytest.raises(ValueError, match=rf"{TOKENIZER_FILE} to encode .* as open_clip's \[49406, .*, got \["):
            export_text(demo, tmp_path)
    (bias,) = (value for value in model.graph.initializer if "ln_final.bias" in value.name)
    bias.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(bias) * np.float32(1.1), bias.name))
    with pytest.raises(ArithmeticError, match=r"embeddings by text\.onnx in fp32 are wrong: expected error <= 0\.0001"):
        export_text(demo, tmp_path)


@pytest.mark.parametrize(
    ("text", "tokenizer", "told"),
    [
        ({"pool_type": "none"}, {}, "'none' pooling; expected one of"),
        ({"vocab_size": 64}, {}, "a vocabulary of 64 for 49408 tokens"),
        ({}, {"context_length": 77}, "a context of 12 for rows of 77"),
        ({"vocab_size": 49409}, {"additional_special_tokens": ["<mask>"]}, "special tokens of its own"),
        ({}, {"clean": "whitespace"}, "a tokenizer that does not lower the case, or drops tokens"),
    ],
)
def test_other_text_encoders_are_refused_by_name(
    text: dict[str, Any], tokenizer: dict[str, Any], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FAMILIES, "other", (text, {}, None, None))
    made = open_clip.SimpleTokenizer(**{"context_length": 12} | tokenizer)
    clip = replace(family("other", tmp_path), tokenizer=made)
    with pytest.raises(ValueError, match=f"the text encoder of tiny-other can't be exported: it has .*{told}"):
        export_text(clip, tmp_path)
    with pytest.raises(ValueError, match=r"SimpleTokenizer or a tokenizer\.json, got SimpleNamespace"):
        export_text(replace(clip, tokenizer=SimpleNamespace()), tmp_path)  # type: ignore[arg-type]
    assert not any((tmp_path / name).exists() for name in (FILE, TOKENIZER_FILE))
