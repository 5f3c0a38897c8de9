"""Engines of image encoders that are not fused: the numbers are open_clip's own, in every precision and batch."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import open_clip
import pytest
import torch

from iosr_fast import Classifier
from iosr_fast.backbones.load import load_model
from iosr_fast.backbones.two_pass import two_passes
from iosr_fast.delivery import engine_judge
from iosr_fast.encoders.runtimes import open_engine
from iosr_fast.encoders.runtimes.openvino import openvino_core
from iosr_fast.exceptions import IosrFastError, UnavailableError
from iosr_fast.export.build import write_engine
from iosr_fast.export.candidates import list_candidates, with_smaller_images
from iosr_fast.export.onnx import export_onnx
from iosr_fast.export.quantize.calibration import NO_PRODUCTS
from iosr_fast.export.source import EngineSource, source_of
from iosr_fast.sealed.verified_folder import open_verified
from tests.backbones.families import randomise
from tests.backbones.plain_clips import PLAIN_CLIPS, plain_clip
from tests.backbones.small_clip import random_pixels
from tests.cli.runs import never
from tests.demo_cache import export_once
from tests.export.graphs import BOOL, FLOAT, FLOAT16, INT64, UINT8, element_types


@pytest.fixture(scope="module", params=PLAIN_CLIPS)
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Any]:
    """A family, its engine in fp32 and the manifest."""
    folder, clip = tmp_path_factory.mktemp(request.param) / "engine", plain_clip(request.param)
    before = {name: value.clone() for name, value in clip.model.state_dict().items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("iosr_fast.export.source.export_onnx", export_once)
        manifest = write_engine(source_of(clip), folder, "onnxruntime")
    after = clip.model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    return request.param, folder, manifest


@pytest.mark.slow
def test_an_engine_is_open_clips_own_encode_image(built: tuple[str, Path, Any], tmp_path: Path) -> None:
    """In fp32 and near it in int8; `optimize` lists no more than there is."""
    family, folder, manifest = built
    clip = plain_clip(family)
    assert manifest["dual_encoder"] is None and manifest["first_adapted_block"] is None and manifest["width"] == 24
    pixels = random_pixels(16, clip.image_size)
    with torch.inference_mode():
        mean, std = (torch.tensor(value).view(3, 1, 1) for value in (clip.mean, clip.std))
        x = (torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - mean) / std
        expected = clip.model.encode_image(x, normalize=True).numpy()
    assert expected.std(0).max() > 1e-3  # pictures differ
    for runtime in ("onnxruntime", "openvino"):
        encoder = open_engine(folder, runtime)
        assert not encoder.adapted and encoder.width == 24
        for batch in (1, 5):
            got = encoder.encode(pixels[:batch])
            assert got.adapted is None
            np.testing.assert_allclose(got.plain, expected[:batch], atol=1e-4)
    source = open_verified(folder, "engine")
    listed = list_candidates(source, pictures=16, with_clip=True)
    assert {one.precision for one in listed} <= {"fp32", "bf16", "int8"} and "torch" not in {c.runtime for c in listed}
    assert with_smaller_images(source, listed) == []
    manifest = write_engine(EngineSource(source), tmp_path / "int8", "onnxruntime", "int8", pictures=pixels)
    assert manifest["quantised"]["products"] + len(manifest["quantised"]["kept"]) >= 3
    assert (open_engine(tmp_path / "int8", "onnxruntime").encode(pixels).plain * expected).sum(1).min() >= 0.99


@pytest.mark.slow
def test_tensorrt_takes_the_graph_which_is_fp32(built: tuple[str, Path, Any]) -> None:
    """TensorRT transposes no uint8, so pixels become floats first."""
    pytest.importorskip("tensorrt_rtx")
    from iosr_fast.encoders.runtimes.tensorrt import build_plan

    path = built[1] / "encoder.onnx"
    types = element_types(path)
    assert set(types.values()) <= {FLOAT, UINT8, INT64, BOOL} and FLOAT16 not in types.values()
    graph = onnx.load(path, load_external_data=False).graph
    assert {node.op_type for node in graph.node if "pixels" in node.input} <= {"Cast", "Shape"}
    assert build_plan(path, "tensorrt_rtx", 3)


ENCODERS = ("test_vit", "test_convnext", "test_efficientnet")  # of timm; the last one has convolutions alone


@pytest.mark.slow
@pytest.mark.parametrize("name", ENCODERS)
def test_encoders_of_timm_in_every_precision_and_as_a_plan(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    has_rtx = importlib.util.find_spec("tensorrt_rtx") is not None  # without it, the others are tested all the same
    monkeypatch.setattr("iosr_fast.export.source.export_onnx", export_once)
    clip = load_model(f"timm/{name}", "none")
    pixels = random_pixels(24, clip.image_size) // (1 + np.arange(24, dtype=np.uint8) % 5)[:, None, None, None]
    if name != "test_efficientnet":  # its statistics are of its own weights
        randomise(clip.model.visual)
    runtimes = ["onnxruntime", "tensorrt_rtx"][: 1 + has_rtx]
    manifest = write_engine(source_of(clip), tmp_path / "engine", runtimes[-1], max_batch=3)
    assert list(manifest["check"]) == runtimes and len(manifest["plans"]) == has_rtx
    (expected,) = two_passes(clip, None, pixels[16:])
    assert expected.std(0).max() > 1e-3  # pictures differ
    for runtime in ("onnxruntime", "openvino"):
        np.testing.assert_allclose(
            open_engine(tmp_path / "engine", runtime).encode(pixels[16:]).plain, expected, atol=1e-4
        )
    left_out = {
        one.precision: one.left_out for one in list_candidates(open_verified(tmp_path / "engine", "engine"), 16)
    }
    has_bf16 = "BF16" in openvino_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    assert left_out == {
        "fp32": "",
        "bf16": "" if has_bf16 else "this processor has no bf16 instructions",
        "int8": NO_PRODUCTS if name == "test_efficientnet" else "",
    }
    for precision in ("bf16", "int8"):
        if left_out[precision] == NO_PRODUCTS:
            monkeypatch.setattr("iosr_fast.export.source.export_onnx", never)
            with pytest.raises(IosrFastError, match=f"expected fp32 or bf16 for timm/{name}, got int8"):
                write_engine(source_of(clip), tmp_path / "int8", "openvino", "int8", pictures=pixels[:16])
            continue
        write_engine(
            EngineSource(tmp_path / "engine"), tmp_path / precision, "openvino", precision, pictures=pixels[:16]
        )
        got = open_engine(tmp_path / precision, "openvino").encode(pixels[16:]).plain
        assert (got * expected).sum(1).min() >= (0.99 if precision == "int8" else 0.999)
        assert np.abs(got - expected).max() > 1e-5 or left_out[precision]


@pytest.mark.slow
def test_a_convolutional_encoder_is_optimized_without_8_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IOSR_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(engine_judge, "_TIMING_S", 0.1)
    images = [pixels // (1 + 3 * (i % 2)) for i, pixels in enumerate(random_pixels(16, 160))]
    labels = ["bright", "dark"] * 8
    classifier = Classifier("timm/test_efficientnet", "none", precision="auto", method="tip-adapter")
    choice = classifier.fit(images, labels).engine_choice_
    assert choice is not None and list(classifier.predict(images)) == labels
    assert {one.reason for one in choice.candidates if one.precision == "int8"} == {NO_PRODUCTS}
    assert "failed" not in {one.verdict for one in choice.candidates}


@pytest.mark.slow
def test_a_folder_with_a_resnet_becomes_a_classifier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a folder that open_clip loads to a saved classifier with the fastest engine."""
    from safetensors.torch import save_file

    text = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    vision = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16, "patch_size": None, "head_width": 32}
    config = {"embed_dim": 24, "vision_cfg": vision, "text_cfg": text}
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    torch.manual_seed(0)
    model = open_clip.CLIP(**config)
    randomise(model.visual)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    monkeypatch.setattr(engine_judge, "_TIMING_S", 0.1)
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (64, 64, 3), dtype=np.uint8) // (1 + 3 * (i % 2)) for i in range(12)]
    labels = ["bright", "dark"] * 6
    name = f"local-dir:{folder}"
    classifier = Classifier(name, precision="auto", method="tip-adapter").fit(images, labels)
    assert classifier.engine_choice_ is not None and "torch" not in str(classifier.engine_choice_.chosen)
    classifier.save(tmp_path / "saved")
    loaded = Classifier.load(tmp_path / "saved")
    assert list(loaded.predict(images)) == list(classifier.predict(images)) == labels
    with pytest.raises(ValueError, match=r"has a ModifiedResNet image encoder.* every method without"):
        Classifier(name, adapter=folder / "open_clip_model.safetensors").fit(images, labels)


@pytest.mark.slow
def test_what_pytorch_can_not_export_is_said_in_words(tmp_path: Path) -> None:
    class FiveAxes(torch.nn.Module):
        image_size, outputs = 8, ("plain",)

        def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
            x = pixels.float()[:, None]
            return (torch.nn.functional.scaled_dot_product_attention(x, x, x).flatten(1),)

    with pytest.raises(UnavailableError, match=r"can't export this model as ONNX: Error .*attention.*FILE\.onnx"):
        export_onnx(FiveAxes(), tmp_path / "encoder.onnx")  # type: ignore[arg-type]
