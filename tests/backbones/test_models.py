"""What the configurations say of models, against what loading and fusing say; models of the hub and of folders."""

from __future__ import annotations

import contextlib
import importlib.util
import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import safetensors.torch as safetensors_torch
import torch

from iosr_fast.backbones.load import load_clip
from iosr_fast.backbones.models import DEMO_FOLDER, check_model, model_config
from iosr_fast.backbones.support import describe_model, list_models
from iosr_fast.cli.models import KINDS
from iosr_fast.exceptions import MissingPackageError
from tests.cli.runs import done, never, refused, run

pytestmark = pytest.mark.slow

MODEL = json.loads((DEMO_FOLDER / "iosr-fast-demo.json").read_text())
CONFIG = {"model_cfg": MODEL, "preprocess_cfg": {"std": [0.5] * 3}}
PLAIN = {"ModifiedResNet", "ConvNeXt", "FastVit"}
NAMES = sorted({name for name, _ in open_clip.list_pretrained()})


@pytest.mark.parametrize("name", NAMES)
def test_the_table_says_what_the_checks_say(name: str) -> None:
    support = describe_model(name)
    assert support.tags == tuple(open_clip.list_pretrained_tags_by_model(name))
    missing = not support.text and importlib.util.find_spec("transformers") is None
    for pretrained in (*support.tags, "none"):
        with pytest.raises(MissingPackageError) if missing else contextlib.nullcontext():
            check_model(name, pretrained)
    assert support.family and support.image_size == model_config(name)["vision_cfg"]["image_size"]


def test_the_command_lists_all_and_makes_no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most models are usable, and two thirds of them are fused."""
    monkeypatch.setattr(open_clip, "create_model", never)
    listed = list_models()
    assert [one.name for one in listed] == sorted(NAMES, key=str.casefold)
    assert len(listed) >= 108 and sum(one.dual for one in listed) >= 70
    assert {"Eva", "VisionTransformer", *PLAIN} == {one.family for one in listed}
    assert not any(one.dual for one in listed if one.family in PLAIN or one.name.startswith(("coca", "ViTamin")))
    rows = json.loads(run("models", "--json").output)
    assert len(rows) == len(NAMES) and list(rows[0]) == ["name", "tags", "family", "dual", "text"]
    kinds, table = (part.splitlines() for part in run("models").output.split("\n\n"))
    assert [line.split()[0] for line in kinds] == list(KINDS)
    assert len(table) == len(NAMES) + 2 and table[-1].startswith(f"{len(NAMES)} models: ")
    assert any(line.split()[:3] == ["convnext_base", "ConvNeXt", "224"] for line in table)
    one = run("models", "ViT-B-16-SigLIP2").output
    assert one.splitlines()[1].split() == ["ViT-B-16-SigLIP2", "VisionTransformer", "224", "768", "1", "yes", "yes"]
    assert one.endswith("tags  webli\n")
    row = done("models", "photographs").splitlines()[1]
    assert row.split() == ["photographs", "EfficientNet", "256", "1280", "0", "no", "no"]
    assert json.loads(done("models", "timm/vit_small_patch16_dinov3", "--json"))["tags"] == ["lvd1689m"]
    assert "did you mean 'ViT-B-16-SigLIP2'" in refused("models", "ViT-B16-SigLip2")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model's folder with the demo's weights."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps(CONFIG))
    safetensors_torch.save_file(load_clip("demo").model.state_dict(), folder / "open_clip_model.safetensors")
    return folder


def test_a_folder_is_loaded_by_its_own_configuration(folder: Path) -> None:
    name, demo = f"local-dir:{folder}", load_clip("demo")
    clip = load_clip(name)
    assert clip.name == name and clip.std == (0.5, 0.5, 0.5) and clip.image_size == 64
    state = demo.model.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in clip.model.state_dict().items())
    assert torch.equal(clip.tokenizer(["a cat"]), demo.tokenizer(["a cat"]))
    assert describe_model(name).dual and describe_model(name).tags == ()
    assert load_clip(name, "none").fingerprint != clip.fingerprint
    weights = folder / "open_clip_model.safetensors"
    torch.save(demo.model.state_dict(), folder / "open_clip_pytorch_model.bin")
    weights.unlink()
    assert load_clip(name).fingerprint == clip.fingerprint


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("open_clip_config.json", None, "expected open_clip_config.json in"),
        ("open_clip_config.json", "{", "expected JSON in"),
        ("open_clip_config.json", "[]", "expected embed_dim, vision_cfg"),
        ("open_clip_model.safetensors", None, "expected weights beside open_clip_config"),
        (
            "open_clip_model.safetensors",
            {"weight": torch.zeros(2)},
            "expected weights of local-dir:",
        ),
    ],
)
def test_a_folder_that_is_none_is_refused(folder: Path, file: str, content: Any, said: str) -> None:
    (folder / file).unlink()
    if isinstance(content, str):
        (folder / file).write_text(content)
    elif content is not None:
        safetensors_torch.save_file(content, folder / file)
    with pytest.raises((ValueError, OSError), match=said):
        load_clip(f"local-dir:{folder}")


def test_text_encoders_are_what_the_exporter_writes() -> None:
    """The towers of all models, made of shapes alone and with one layer, against the table's `text`."""
    from open_clip.model import _build_text_tower

    from iosr_fast.backbones.text_tower import POOLS, pooling

    seen = set()
    for one in list_models():
        text = {**model_config(one.name)["text_cfg"], "layers": 1, "vocab_size": 8}
        if one.text and (key := json.dumps(text, sort_keys=True)) not in seen:
            seen.add(key)
            with torch.device("meta"):
                tower = _build_text_tower(one.width, text)
            assert type(tower) is open_clip.transformer.TextTransformer and pooling(tower)[0] in POOLS, one.name
    assert len(seen) > 10
