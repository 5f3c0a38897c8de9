"""The projections of a loaded CLIP: the last layers of both encoders, in its engine folder and in conversions of it."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch comes with the cpu extra")
pytest.importorskip("open_clip", reason="open_clip comes with the cpu extra")
pytest.importorskip("onnxruntime", reason="onnxruntime comes with the cpu extra")

from iosr_fast.clip.load import load_clip  # noqa: E402
from iosr_fast.encoders.projections import read_projections  # noqa: E402
from iosr_fast.export.convert import convert_engine  # noqa: E402
from iosr_fast.export.projections import clip_projections  # noqa: E402
from iosr_fast.utils.verified_folder import open_verified  # noqa: E402
from tests.clip.families import family_clip  # noqa: E402
from tests.demo_cache import demo_engine  # noqa: E402


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.mark.parametrize("linear", [False, True], ids=["parameter", "linear layer"])
def test_embeddings_are_projections_of_features(linear: bool) -> None:
    clip = load_clip("demo")
    model = clip.model
    if linear:
        layer = torch.nn.Linear(*model.text_projection.shape, bias=False)
        layer.weight.data = model.text_projection.detach().T.contiguous()
        del model.text_projection
        model.text_projection = layer
    projections = clip_projections(clip)
    assert projections is not None
    bare = copy.deepcopy(model)
    bare.visual.proj = bare.text_projection = None
    pixels, tokens = torch.randn(3, 3, clip.image_size, clip.image_size), clip.tokenizer(["a cat", "two dogs"])
    with torch.inference_mode():
        pairs = (
            (projections.image, bare.visual(pixels), model.encode_image(pixels)),
            (projections.text, bare.encode_text(tokens), model.encode_text(tokens)),
        )
    for projection, features, expected in pairs:
        assert projection.dtype == np.float32 and projection.shape[1] == features.shape[1]
        np.testing.assert_allclose(unit(features.numpy() @ projection.T), unit(expected.numpy()), atol=1e-5)


def test_a_clip_without_both_has_none() -> None:
    assert clip_projections(family_clip("siglip")) is None
    clip = load_clip("demo")
    width, embedding = clip.model.text_projection.shape
    clip.model.text_projection = None
    assert clip_projections(clip) is None
    del clip.model.text_projection
    clip.model.text_projection = torch.nn.Linear(width, embedding, bias=True)
    assert clip_projections(clip) is None


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_an_engine_and_its_conversions_have_the_file(precision: str, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    expected = clip_projections(load_clip("demo"))
    calibration = np.random.default_rng(0).integers(0, 256, (8, 64, 64, 3)).astype(np.uint8)
    convert_engine(demo_engine(), tmp_path / "engine", "openvino", precision, calibration)
    for folder in (demo_engine(), tmp_path / "engine"):
        found = read_projections(open_verified(folder, "engine"))
        assert found is not None and expected is not None
        for array, right in zip(found, expected, strict=True):
            np.testing.assert_array_equal(array, right)
