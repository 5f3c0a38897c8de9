"""The fused encoder of every family of vision transformers against two literal passes of open_clip's and timm's own."""

from __future__ import annotations

import copy
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import open_clip
import pytest
import torch

from iosr_fast.backbones.dual_blocks import LastBlock, Norm
from iosr_fast.backbones.dual_config import GraphPrecision
from iosr_fast.backbones.dual_encoder import DualEncoder
from iosr_fast.backbones.fuse import build_dual_encoder
from iosr_fast.backbones.two_pass import two_passes
from iosr_fast.backbones.vision_tower import resize_clip, vision_tower
from iosr_fast.encoders.engine_folder import ONNX_FILE, PLAIN_FILE
from iosr_fast.encoders.runtimes.openvino import openvino_core
from iosr_fast.export.onnx import write_plain_graph
from iosr_fast.export.quantize import encoder as quantize
from iosr_fast.export.quantize.encoder import quantize_onnx
from iosr_fast.export.source import source_of
from tests.backbones.families import FAMILIES, family_clip
from tests.backbones.small_clip import random_adapter, random_pixels, run, small_clip
from tests.demo_cache import export_once

pytestmark = pytest.mark.usefixtures("one_torch_thread")
ANY_FAMILY = pytest.mark.parametrize("family", FAMILIES)


def equal(got: Any, expected: Any, atol: float = 1e-5) -> None:
    for row, right in zip(got, expected, strict=True):
        np.testing.assert_allclose(row, right, atol=atol)


@ANY_FAMILY
@pytest.mark.parametrize("first", [None, 0, 1, 2])
def test_equals_two_passes(family: str, first: int | None) -> None:
    clip = family_clip(family)
    adapter = None if first is None else random_adapter(clip, first)
    encoder = build_dual_encoder(clip, adapter)
    for batch in (1, 3):
        pixels = random_pixels(batch, clip.image_size)
        expected = two_passes(clip, adapter, pixels)
        assert len(expected) == (1 if first is None else 2)
        equal(run(encoder, pixels), expected)
        assert np.abs(expected[0] - expected[-1]).max() > 1e-2 or first is None
        assert batch == 1 or np.abs(expected[0][0] - expected[0][1]).max() > 1e-2


@pytest.mark.parametrize(
    "vision",
    [
        {"layers": 1},
        {"final_ln_after_pool": True},
        {"image_size": 35},
        {"act_kwargs": {"approximate": "tanh"}},
        {"norm_kwargs": {"eps": 1e-3}},
        {"mlp_ratio": 2.5, "head_width": 32},
        {"quick_gelu": True},
    ],
    ids=str,
)
def test_variations_of_the_vision_transformer(vision: dict[str, Any]) -> None:
    clip = small_clip(**vision)
    adapter, pixels = random_adapter(clip, 0), random_pixels(3, clip.image_size)
    equal(run(build_dual_encoder(clip, adapter), pixels), two_passes(clip, adapter, pixels))


def test_work_is_shared_and_left_out() -> None:
    """The prefix sees each image once; the last block projects no token to keys or values."""
    clip = small_clip()
    encoder = build_dual_encoder(clip, random_adapter(clip, 1))
    seen: list[int] = []
    for block in encoder.blocks:
        block.c_fc.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0].shape[0]))
    run(encoder, random_pixels(3, 32))
    assert seen == [3, 3, 6]
    names = {name for name, _ in encoder.blocks[-1].named_parameters()}
    assert {"k_weight", "v_weight"} <= names and not any(name.startswith(("k_proj", "v_proj")) for name in names)


@ANY_FAMILY
@pytest.mark.parametrize(("precision", "cosine"), [("fp16", 0.9999), ("bf16", 0.999)])
def test_half_precision_is_close_and_the_config_survives_json(
    family: str, precision: GraphPrecision, cosine: float
) -> None:
    clip = family_clip(family)
    adapter, pixels = random_adapter(clip, 1), random_pixels(4, clip.image_size)
    encoder = build_dual_encoder(clip, adapter, precision)
    again = DualEncoder.from_config(json.loads(json.dumps(encoder.config)))
    again.load_state_dict(encoder.state_dict())
    expected, of_gpu = two_passes(clip, adapter, pixels), run(copy.deepcopy(encoder).for_gpu(), pixels)
    for got, same, other, right in zip(run(encoder, pixels), run(again, pixels), of_gpu, expected, strict=True):
        np.testing.assert_array_equal(got, same)
        assert got.dtype == other.dtype == np.float32
        assert min((rows * right).sum(1).min() for rows in (got, other)) > cosine


def test_quick_gelu_is_one_kernel_on_a_gpu() -> None:
    clip, pixels = small_clip(quick_gelu=True), random_pixels(3, 32)
    adapter = random_adapter(clip, 1)
    encoder = build_dual_encoder(clip, adapter).for_gpu()
    with torch.profiler.profile() as profile:
        got = run(encoder, pixels)
    equal(got, two_passes(clip, adapter, pixels))
    counts = Counter(event.name for event in profile.events())
    assert counts["aten::silu"] == len(encoder.blocks) and not counts["aten::sigmoid"]
    half = build_dual_encoder(clip, adapter, "fp16").for_gpu()
    for got, right in zip(run(half, pixels), two_passes(clip, adapter, pixels), strict=True):
        assert (got * right).sum(1).min() > 0.9999


@ANY_FAMILY
def test_the_form_for_a_gpu_computes_the_same_in_fewer_kernels(family: str) -> None:
    clip = family_clip(family)
    adapter, pixels = random_adapter(clip, 1), random_pixels(3, clip.image_size)
    equal(run(build_dual_encoder(clip, adapter).for_gpu(), pixels), two_passes(clip, adapter, pixels))
    encoder = build_dual_encoder(clip, adapter, "fp16")
    counts = []
    for form in (encoder, copy.deepcopy(encoder).for_gpu()):
        with torch.profiler.profile() as profile:
            run(form, pixels)
        counts.append(Counter(event.name for event in profile.events()))
    joined = sum(not isinstance(block, LastBlock) for block in encoder.blocks)
    norms = sum(isinstance(part, Norm) for part in encoder.modules() if part is not encoder.ln_pre)
    assert counts[1]["aten::linear"] == counts[0]["aten::linear"] - 2 * joined
    assert counts[1]["aten::to"] == counts[0]["aten::to"] - 2 * norms, "LayerNorms take and give fp16"


@pytest.mark.parametrize(
    ("vision", "message"),
    [
        ({"attentional_pool": True, "attn_pooler_heads": 4}, "attentional pooler"),
        ({"pool_type": "none"}, "'none' pooling"),
        ({"qk_norm": True}, "CustomResidualAttentionBlock"),
        ({"image_size": (32, 40)}, "32x40"),
        ({"layers": (1, 1, 1, 1), "head_width": 64}, "ModifiedResNet"),
    ],
)
def test_encoders_that_cannot_be_fused_are_refused_by_name(vision: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_dual_encoder(small_clip(**vision))


def test_other_refusals() -> None:
    for size in (0, 20, 40):
        with pytest.raises(ValueError, match=f"a multiple of 8, .* up to 32, got {size}"):
            resize_clip(small_clip(), size)
    with pytest.raises(ValueError, match="trained for another CLIP"):
        source_of(small_clip(), random_adapter(small_clip(fingerprint="other"), 1))
    with pytest.raises(ValueError, match=r"expected a precision of .*, got 'int8'"):
        build_dual_encoder(small_clip(), precision="int8")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected the fields"):
        DualEncoder.from_config({"width": 64})


@ANY_FAMILY
def test_smaller_pictures_are_timms_and_open_clips_own(family: str) -> None:
    """After resize_clip two passes are those of the resized modules; the CLIP itself stays as it is."""
    clip = family_clip(family)
    size = 3 * vision_tower(clip.model.visual).patch_size
    pixels = random_pixels(2, clip.image_size)
    before = two_passes(clip, None, pixels)[0]
    smaller = resize_clip(clip, size)
    assert (smaller.image_size, smaller.fingerprint) == (size, clip.fingerprint)
    adapter, small_pixels = random_adapter(clip, 1), random_pixels(2, size)
    equal(run(build_dual_encoder(smaller, adapter), small_pixels), two_passes(smaller, adapter, small_pixels))
    np.testing.assert_array_equal(two_passes(clip, None, pixels)[0], before)
    if hasattr(clip.model.visual, "trunk"):
        other, x = copy.deepcopy(clip.model.visual), torch.randn(2, 3, size, size)
        other.set_input_size((size, size))
        torch.testing.assert_close(smaller.model.visual(x), other(x), atol=0, rtol=0)
    else:
        state = {"visual.positional_embedding": clip.model.visual.positional_embedding.clone()}
        open_clip.model.resize_pos_embed(state, smaller.model, antialias=True)
        got = smaller.model.visual.positional_embedding
        torch.testing.assert_close(got, state["visual.positional_embedding"], atol=1e-6, rtol=0)


@pytest.mark.slow
@ANY_FAMILY
def test_an_engine_has_both_streams_and_the_plain_form(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ONNX graph in both runtimes, the plain graph beside it, and all products in 8 bits."""
    clip = family_clip(family)
    adapter = random_adapter(clip, 1)
    export_once(build_dual_encoder(clip, adapter), tmp_path / ONNX_FILE)
    assert write_plain_graph(tmp_path)
    kinds = Counter(node.op_type for node in onnx.load(tmp_path / ONNX_FILE, load_external_data=False).graph.node)
    # One Shape, of the batch: the prefix tokens are repeated for each picture.
    assert not {"Size", "If", "Loop"} & set(kinds) and kinds["Shape"] <= 1
    both, plain = session(tmp_path / ONNX_FILE), session(tmp_path / PLAIN_FILE)
    request = openvino_core().compile_model(tmp_path / ONNX_FILE, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for batch in (1, 3):
        pixels = random_pixels(batch, clip.image_size)
        expected = two_passes(clip, adapter, pixels)
        equal(both.run(None, {"pixels": pixels}), expected, 1e-4)
        equal(plain.run(None, {"pixels": pixels}), expected[:1], 1e-4)
        equal(request([pixels]).values(), expected, 1e-4)
    monkeypatch.setitem(quantize.LARGEST_EMBEDDING_ERROR, "u8s8", 1.0)  # keep none in float to save the embeddings
    report = quantize_onnx(tmp_path / ONNX_FILE, tmp_path / "int8.onnx", random_pixels(32, clip.image_size))
    assert report["products"] >= 21, "three blocks' six matrices at least, and the adapters'"
    pixels = random_pixels(9, clip.image_size)
    in_int8 = session(tmp_path / "int8.onnx").run(None, {"pixels": pixels})
    for got, right in zip(in_int8, two_passes(clip, adapter, pixels), strict=True):
        assert (got * right).sum(1).min() >= 0.99


def session(path: Path) -> Any:
    return ort.InferenceSession(path, providers=["CPUExecutionProvider"])
