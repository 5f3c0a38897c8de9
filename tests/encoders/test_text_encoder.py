"""The text encoder without torch: open_clip's tokens and embeddings, and a clear refusal where it can't have them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests import ROOT

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
open_clip = pytest.importorskip("open_clip")
pytest.importorskip("onnxscript")
pytest.importorskip("tokenizers")
hypothesis = pytest.importorskip("hypothesis")

from hypothesis import strategies as st  # noqa: E402

from iosr_fast.clip.demo.pictures import load_index  # noqa: E402
from iosr_fast.clip.load import LoadedClip, load_clip  # noqa: E402
from iosr_fast.clip.prompts import DEMO_TEMPLATES, PHOTO_TEMPLATES, embed_classes  # noqa: E402
from iosr_fast.encoders.text_encoder import FILE, TOKENIZER_FILE, TextEncoder  # noqa: E402
from iosr_fast.export import text as module  # noqa: E402
from iosr_fast.export.text import ClipText, export_text  # noqa: E402
from iosr_fast.images.geometry import Geometry  # noqa: E402
from tests.demo_cache import shared_cache  # noqa: E402

pytestmark = pytest.mark.slow

VOCABULARY = 49408


@pytest.fixture(scope="module")
def demo() -> LoadedClip:
    return load_clip("demo")


@pytest.fixture(scope="module")
def exported(demo: LoadedClip, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("text")
    with shared_cache():
        facts = ClipText(demo).write(folder)
    assert facts is not None
    return folder, facts


@pytest.fixture(scope="module")
def encoder(exported: tuple[Path, dict[str, Any]]) -> TextEncoder:
    return TextEncoder(*exported)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Models this small lose more to waking threads than they gain."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def few_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check of an export reads some of the demo's names in place of all, which takes seconds."""
    some = {"concepts": load_index()["concepts"][:20]}
    monkeypatch.setattr(module, "load_index", lambda: some)


def small_clip(quick_gelu: bool = False, **text: Any) -> LoadedClip:
    """Random weights with nothing left at its trivial start: biases, LayerNorms and LayerScales are drawn too."""
    config = {"context_length": 9, "vocab_size": VOCABULARY, "width": 16, "heads": 2, "layers": 1} | text
    vision = open_clip.CLIPVisionCfg(image_size=16, patch_size=8, width=16, layers=1, head_width=8)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = open_clip.CLIP(12, vision, open_clip.CLIPTextCfg(**config), quick_gelu)
        for name, value in model.named_parameters():
            if value.ndim == 1:
                torch.nn.init.normal_(value, mean=float(name.endswith(("weight", "gamma"))), std=0.2)
    return LoadedClip(
        model=model.eval().requires_grad_(False),
        tokenizer=open_clip.SimpleTokenizer(context_length=config["context_length"]),
        name="small",
        geometry=Geometry(16),
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        logit_scale=100.0,
        fingerprint="small",
    )


def torchs(clip: LoadedClip, texts: list[str]) -> np.ndarray:
    with torch.inference_mode():
        return clip.model.encode_text(clip.tokenizer(texts), normalize=True).numpy()


def test_facts_say_what_was_written_and_checked(demo: LoadedClip, exported: tuple[Path, dict[str, Any]]) -> None:
    folder, facts = exported
    assert sorted(path.name for path in folder.iterdir()) == sorted((FILE, TOKENIZER_FILE))
    assert json.loads(json.dumps(facts)) == facts  # it goes into a manifest
    assert (facts["context_length"], facts["width"], facts["precision"]) == (16, 128, "fp32")
    assert (facts["clean"], facts["eot"]) == ("lower", 49407)
    assert facts["templates"] == list(DEMO_TEMPLATES) and facts["clip_fingerprint"] == demo.fingerprint
    assert facts["tokens_checked"] > 9 * len(load_index()["concepts"])
    assert 0 < facts["max_abs_error"] < 1e-5 and facts["min_cosine"] > 0.99999
    model = onnx.load(folder / FILE)
    assert not any(item.metadata_props for item in (model, model.graph, *model.graph.node, *model.graph.value_info))


def test_the_same_weights_under_another_name_have_prompts_of_their_own(
    demo: LoadedClip, exported: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    with shared_cache():
        facts = ClipText(replace(demo, name="ViT-B-32")).write(tmp_path)
    assert facts == {**exported[1], "templates": list(PHOTO_TEMPLATES)}


def test_classes_get_the_embeddings_that_torch_gives(demo: LoadedClip, encoder: TextEncoder) -> None:
    names = [concept["name"] for concept in load_index()["concepts"][::7]]
    names += ["Zürich's Grossmünster", "a" * 200]
    got = encoder.embed_classes(names)
    assert got.dtype == np.float32 and got.shape == (len(names), 128)
    np.testing.assert_allclose(got, embed_classes(demo, names), atol=1e-5)
    chosen = ["a {} or two {}s", "{}"]
    np.testing.assert_allclose(
        encoder.embed_classes(names[:40], chosen), embed_classes(demo, names[:40], chosen), atol=1e-5
    )
    for count in (1, 3, 7):  # a name's embedding does not depend on its company
        np.testing.assert_allclose(encoder.embed_classes(names[:count]), got[:count], atol=1e-6)


def test_memory_is_bounded_by_batches(encoder: TextEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, embed = [], TextEncoder.embed

    def watched(self: TextEncoder, texts: list[str]) -> np.ndarray:
        sizes.append(len(texts))
        return embed(self, texts)

    monkeypatch.setattr(TextEncoder, "embed", watched)
    encoder.embed_classes([f"class {i}" for i in range(15)])
    assert sizes == [32, 32, 11]


@pytest.mark.usefixtures("few_names")
def test_another_text_tower(tmp_path: Path) -> None:
    clip = small_clip(quick_gelu=True, layers=2, ls_init_value=0.5, pool_type="eos", eos_id=49407)
    for name in ("token_embedding", "positional_embedding"):  # so that words and places count
        value = getattr(clip.model, name)
        getattr(value, "weight", value).mul_(30)
    encoder = TextEncoder(tmp_path, export_text(clip, tmp_path))
    assert (encoder.context_length, encoder.width, encoder.templates[0]) == (9, 12, "a photo of a {}.")
    for texts in (["cat"], ["a b c d e f g h i j k", "x", ""], [f"{i} dogs" for i in range(7)]):
        np.testing.assert_allclose(encoder.embed(texts), torchs(clip, texts), atol=1e-5)


def scale(model: Any, name: str, factor: float) -> None:
    """Multiply the one weight of an ONNX model whose name has `name` in it."""
    (weight,) = (value for value in model.graph.initializer if name in value.name)
    weight.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(weight) * np.float32(factor), weight.name))


PIECES = st.one_of(
    st.text(max_size=8),
    st.characters(codec=None, categories=("L", "N", "M", "P", "S", "Zs", "Cc", "Cf", "Cs")),
    st.sampled_from(
        ["'s", "'S", "'\N{LATIN SMALL LETTER LONG S}", "'LL", "²", "ß", "İ", "Σ", "e\u0301", "\u0345", "<", "_"]
    ),
    st.sampled_from(["&amp;", "&#39;", "&lt;", "&eacute", ";amp;", "Ã©", "â€™", "\x1b[0m", "\ud83d", "\udc08"]),
    st.sampled_from([" ", "  ", "\t", "\r\n", "\x0b", "\x1c", "\x85", "\xa0", "\u2028", "\u3000", "\u200b"]),
)


@hypothesis.settings(max_examples=200, deadline=None, derandomize=True, database=None)
@hypothesis.given(text=st.lists(PIECES, max_size=12).map("".join))
def test_any_text_is_read_as_open_clip_reads_it(demo: LoadedClip, encoder: TextEncoder, text: str) -> None:
    np.testing.assert_array_equal(encoder.tokenize([text]), demo.tokenizer([text]).numpy())


def test_characters_of_every_kind_are_read_as_open_clip_reads_them(demo: LoadedClip, encoder: TextEncoder) -> None:
    """Alone, between letters and twice: shows whether both take a character for a letter, a number, a space or else."""
    sample = [*range(0x600), *range(0x600, 0x33480, 31), *range(0x33480, 0x110000, 997)]
    texts = ["x{0}y {0} {0}{0}1{0}".format(chr(code)) for code in sample]
    np.testing.assert_array_equal(encoder.tokenize(texts), demo.tokenizer(texts).numpy())


@pytest.mark.parametrize("text", ["<start_of_text>", "a <END_OF_TEXT> b", "&lt;end_of_text&gt;", "<ſtart_of_text>"])
def test_special_tokens_are_refused(text: str, encoder: TextEncoder) -> None:
    with pytest.raises(ValueError, match=r"without the tokenizer's special token <(start|end)_of_text>"):
        encoder.embed_classes([text])


@pytest.mark.parametrize(
    ("names", "templates", "told"),
    [
        ([], None, "at least one class name, got none"),
        ("cat", None, "a list of class names, got the string 'cat'"),
        (["cat", ""], None, "at least one visible character, got ''"),
        (["cat", " \n&nbsp;"], None, "at least one visible character"),
        (["cat", 3], None, "class names as strings, got 3 of type int"),
        (["cat"], [], "one to 1,000 templates, got "),
        (["cat"], "{}", "a list of one to 1,000 templates, got '{}'"),
        (["cat"], ["a {}", "a photo"], r"expected templates with \{\} where the class name goes, got 'a photo'"),
    ],
)
def test_bad_names_and_templates_are_refused(names: Any, templates: Any, told: str, encoder: TextEncoder) -> None:
    with pytest.raises(ValueError, match=told):
        encoder.embed_classes(names, templates)


def test_files_are_opened_at_the_first_use_and_once(
    exported: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    sessions, session = [], ort.InferenceSession

    def counted(*arguments: Any, **options: Any) -> Any:
        sessions.append(session(*arguments, **options))
        return sessions[-1]

    monkeypatch.setattr(ort, "InferenceSession", counted)
    names = [[f"thing {i}", "a dog of several words"[: 5 + i]] for i in range(16)]
    shared = TextEncoder(*exported, threads=1)
    assert sessions == []
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(shared.embed_classes, names))
    assert len(sessions) == 1
    alone = TextEncoder(*exported, threads=1)
    for given, embeddings in zip(names, found, strict=True):
        np.testing.assert_array_equal(embeddings, alone.embed_classes(given))


def test_it_runs_without_torch(exported: tuple[Path, dict[str, Any]], encoder: TextEncoder, tmp_path: Path) -> None:
    folder, facts = exported
    (tmp_path / "facts.json").write_text(json.dumps(facts))
    code = (
        "import json, pathlib, sys\n"
        "from iosr_fast.encoders.text_encoder import TextEncoder\n"
        "encoder = TextEncoder(pathlib.Path(sys.argv[1]), json.load(open(sys.argv[2])))\n"
        "early = [name for name in ('onnxruntime', 'tokenizers', 'ftfy') if name in sys.modules]\n"
        "row = encoder.embed_classes(['red panda'])[0].tolist()\n"
        "late = [name for name in ('torch', 'open_clip', 'onnx', 'regex') if name in sys.modules]\n"
        "print(json.dumps([early, late, row]))"
    )
    command = [sys.executable, "-c", code, str(folder), str(tmp_path / "facts.json")]
    run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    early, late, row = json.loads(run.stdout)
    assert early == [] and late == []
    np.testing.assert_allclose(row, encoder.embed_classes(["red panda"])[0], atol=1e-6)


@pytest.mark.parametrize("package", ["onnxruntime", "tokenizers", "ftfy"])
def test_missing_packages_are_named(
    package: str, exported: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    encoder = TextEncoder(*exported)
    with pytest.raises(ImportError, match=rf"{package} is needed here.*pip install 'iosr_fast\[serve\]'"):
        encoder.embed_classes(["cat"])


@pytest.mark.parametrize("name", [FILE, TOKENIZER_FILE])
def test_damaged_and_missing_files_are_named(name: str, exported: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, facts = exported
    shutil.copytree(folder, tmp_path / "text")
    (tmp_path / "text" / name).write_bytes((folder / name).read_bytes()[:100_000])
    encoder = TextEncoder(tmp_path / "text", facts)
    for _ in range(2):  # a first failure is not taken for a success
        with pytest.raises(RuntimeError, match=rf"can't load {name} in .*save the classifier again"):
            encoder.embed_classes(["cat"])
    shutil.copyfile(folder / name, tmp_path / "text" / name)
    assert encoder.embed_classes(["cat"]).shape == (1, 128)


def test_facts_that_do_not_fit_the_files_are_refused(exported: tuple[Path, dict[str, Any]]) -> None:
    folder, facts = exported
    with pytest.raises(RuntimeError, match=rf"expected {FILE} in .* to give \(T, 64\), got \['texts', 128\]"):
        TextEncoder(folder, facts | {"width": 64}).embed_classes(["cat"])
    with pytest.raises(RuntimeError, match=f"expected {TOKENIZER_FILE} in .* to fill a context of 77, got 16"):
        TextEncoder(folder, facts | {"context_length": 77}).embed_classes(["cat"])


def wrong_letters(kind: str, right: Callable[[str], str] = module._character_ranges) -> str:
    return r"\x{61}-\x{7a}" if kind == r"[\p{L}]" else right(kind)


@pytest.mark.usefixtures("few_names")
def test_wrong_tokens_and_wrong_embeddings_are_not_left_behind(
    demo: LoadedClip, exported: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = onnx.load(exported[0] / FILE)
    monkeypatch.setattr(module, "to_onnx", lambda *_: model)
    with monkeypatch.context() as changed:
        changed.setattr(module, "_character_ranges", wrong_letters)
        with pytest.raises(ValueError, match=rf"{TOKENIZER_FILE} to encode .* as open_clip's \[49406, .*, got \["):
            export_text(demo, tmp_path)
    assert list(tmp_path.iterdir()) == []
    scale(model, "ln_final.bias", 1.1)
    with pytest.raises(ArithmeticError, match=r"embeddings by text\.onnx in fp32 are wrong: expected error <= 0\.0001"):
        export_text(demo, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "tokenizer", "told"),
    [
        ({"pool_type": "none"}, {}, "'none' pooling; expected one of"),
        ({"vocab_size": 64}, {}, "a vocabulary of 64 for 49408 tokens"),
        ({}, {"context_length": 77}, "a context of 9 for rows of 77"),
        ({}, {"additional_special_tokens": ["<mask>"]}, "a vocabulary of 49408 for 49409 tokens"),
        ({"vocab_size": VOCABULARY + 1}, {"additional_special_tokens": ["<mask>"]}, "special tokens of its own"),
        ({}, {"clean": "whitespace"}, "a tokenizer that does not lower the case"),
        ({}, {"reduction_mask": "simple"}, "or drops tokens"),
    ],
)
def test_other_text_sides_are_refused_by_name(
    text: dict[str, Any], tokenizer: dict[str, Any], told: str, tmp_path: Path
) -> None:
    made = open_clip.SimpleTokenizer(**{"context_length": 9} | tokenizer)
    with pytest.raises(ValueError, match=f"the text encoder of small can't be exported: it has .*{told}"):
        export_text(replace(small_clip(**text), tokenizer=made), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_other_refusals(tmp_path: Path) -> None:
    clip = small_clip()
    with pytest.raises(FileNotFoundError, match="expected an existing folder"):
        export_text(clip, tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"with its SimpleTokenizer or .* got SimpleNamespace"):
        export_text(replace(clip, tokenizer=SimpleNamespace()), tmp_path)  # type: ignore[arg-type]
