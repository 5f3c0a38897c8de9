"""The fused encoder of every family of vision transformers against two literal passes of open_clip's and timm's own."""

from __future__ import annotations

import copy
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch comes with the cpu extra")
pytest.importorskip("open_clip", reason="open_clip comes with the cpu extra")
pytest.importorskip("timm", reason="timm comes with the cpu extra")
onnx = pytest.importorskip("onnx", reason="onnx comes with the cpu extra")
ort = pytest.importorskip("onnxruntime", reason="onnxruntime comes with the cpu extra")
pytest.importorskip("onnxscript", reason="onnxscript comes with the cpu extra")

from iosr_fast.clip.dual_encoder import DualEncoder  # noqa: E402
from iosr_fast.clip.fuse import build_dual_encoder  # noqa: E402
from iosr_fast.clip.resize import resize_clip  # noqa: E402
from iosr_fast.clip.two_pass import two_passes  # noqa: E402
from iosr_fast.clip.vision_tower import vision_tower  # noqa: E402
from iosr_fast.encoders.engine_folder import ONNX_FILE as FILE  # noqa: E402
from iosr_fast.encoders.engine_folder import PLAIN_FILE  # noqa: E402
from iosr_fast.encoders.runtimes.openvino import openvino_core  # noqa: E402
from iosr_fast.export.onnx import export_onnx, write_plain_graph  # noqa: E402
from iosr_fast.export.quantize import encoder as quantize  # noqa: E402
from iosr_fast.export.quantize.encoder import quantize_onnx  # noqa: E402
from tests.clip.families import FAMILIES, family_clip  # noqa: E402
from tests.clip.small_clip import random_adapter, random_pixels  # noqa: E402
from tests.clip.test_dual_encoder import run  # noqa: E402

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("first", [None, 0, 1, 2])
def test_equals_two_passes(family: str, first: int | None) -> None:
    clip = family_clip(family)
    adapter = None if first is None else random_adapter(clip, first)
    encoder = build_dual_encoder(clip, adapter)
    for batch in (1, 3):
        pixels = random_pixels(batch, clip.image_size)
        expected, got = two_passes(clip, adapter, pixels), run(encoder, pixels)
        assert len(got) == len(expected) == (1 if first is None else 2)
        for row, right in zip(got, expected, strict=True):
            np.testing.assert_allclose(row, right, atol=1e-5)
        assert np.abs(expected[0] - expected[-1]).max() > 1e-2 or first is None
        assert batch == 1 or np.abs(expected[0][0] - expected[0][1]).max() > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
def test_fp16_is_close_and_the_config_survives_json(family: str) -> None:
    clip = family_clip(family)
    adapter, pixels = random_adapter(clip, 1), random_pixels(4, clip.image_size)
    encoder = build_dual_encoder(clip, adapter, "fp16")
    again = DualEncoder.from_config(json.loads(json.dumps(encoder.config)))
    again.load_state_dict(encoder.state_dict())
    expected = two_passes(clip, adapter, pixels)
    for got, same, right in zip(run(encoder, pixels), run(again, pixels), expected, strict=True):
        np.testing.assert_array_equal(got, same)
        assert (got * right).sum(1).min() > 0.9999


@pytest.mark.parametrize("family", FAMILIES)
def test_smaller_pictures_are_timms_and_open_clips_own(family: str) -> None:
    """After resize_clip two passes are those of the resized modules; the CLIP itself stays as it is."""
    clip = family_clip(family)
    patch = vision_tower(clip.model.visual).patch_size
    pixels = random_pixels(2, clip.image_size)
    before = two_passes(clip, None, pixels)[0]
    smaller = resize_clip(clip, 3 * patch)
    adapter, small_pixels = random_adapter(clip, 1), random_pixels(2, 3 * patch)
    for got, expected in zip(
        run(build_dual_encoder(smaller, adapter), small_pixels), two_passes(smaller, adapter, small_pixels), strict=True
    ):
        np.testing.assert_allclose(got, expected, atol=1e-5)
    np.testing.assert_array_equal(two_passes(clip, None, pixels)[0], before)
    if hasattr(clip.model.visual, "trunk"):
        other = copy.deepcopy(clip.model.visual)
        other.set_input_size((3 * patch, 3 * patch))
        x = torch.randn(2, 3, 3 * patch, 3 * patch)
        torch.testing.assert_close(smaller.model.visual(x), other(x), atol=0, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_engine_has_both_streams_and_the_plain_form(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ONNX graph in both runtimes, the plain graph beside it, and all products in 8 bits."""
    clip = family_clip(family)
    adapter = random_adapter(clip, 1)
    export_onnx(build_dual_encoder(clip, adapter), tmp_path / FILE)
    assert write_plain_graph(tmp_path)
    graph = onnx.load(tmp_path / FILE, load_external_data=False).graph
    kinds = Counter(node.op_type for node in graph.node)
    # One Shape, of the batch: the prefix tokens are repeated for each picture.
    assert not {"Size", "If", "Loop"} & set(kinds) and kinds["Shape"] <= 1
    both, plain = session(tmp_path / FILE), session(tmp_path / PLAIN_FILE)
    request = openvino_core().compile_model(tmp_path / FILE, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for batch in (1, 3):
        pixels = random_pixels(batch, clip.image_size)
        expected = two_passes(clip, adapter, pixels)
        for got, right in zip(both.run(None, {"pixels": pixels}), expected, strict=True):
            np.testing.assert_allclose(got, right, atol=1e-4)
        np.testing.assert_allclose(plain.run(None, {"pixels": pixels})[0], expected[0], atol=1e-4)
        for got, right in zip(request([pixels]).values(), expected, strict=True):
            np.testing.assert_allclose(got, right, atol=1e-4)
    monkeypatch.setitem(quantize.LARGEST_EMBEDDING_ERROR, "u8s8", 1.0)  # keep none in float to save the embeddings
    report = quantize_onnx(tmp_path / FILE, tmp_path / "int8.onnx", random_pixels(32, clip.image_size))
    assert report["products"] >= 21, "three blocks' six matrices at least, and the adapters'"
    pixels = random_pixels(9, clip.image_size)
    in_int8 = session(tmp_path / "int8.onnx").run(None, {"pixels": pixels})
    for got, right in zip(in_int8, two_passes(clip, adapter, pixels), strict=True):
        assert (got * right).sum(1).min() >= 0.99


def session(path: Path) -> Any:
    return ort.InferenceSession(path, providers=["CPUExecutionProvider"])
