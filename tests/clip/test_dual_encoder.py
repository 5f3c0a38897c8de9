"""The fused encoder against the literal two passes: equal for every start block, batch and activation."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
open_clip = pytest.importorskip("open_clip")

from iosr_fast.clip.architecture import vision_config  # noqa: E402
from iosr_fast.clip.dual_encoder import DualEncoder  # noqa: E402
from iosr_fast.clip.fuse import build_dual_encoder  # noqa: E402
from iosr_fast.clip.two_pass import two_passes  # noqa: E402
from tests.clip.small_clip import random_adapter, random_pixels, small_clip  # noqa: E402


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Models this small lose more to waking threads than they gain."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run(encoder: DualEncoder, pixels: np.ndarray) -> tuple[np.ndarray, ...]:
    with torch.no_grad():
        return tuple(output.numpy() for output in encoder(torch.from_numpy(pixels)))


@pytest.mark.parametrize("quick_gelu", [False, True])
@pytest.mark.parametrize("first", [0, 1, 2])
def test_equals_two_passes(first: int, quick_gelu: bool) -> None:
    clip = small_clip(quick_gelu)
    adapter = random_adapter(clip, first)
    encoder = build_dual_encoder(clip, adapter)
    for batch in (1, 2, 3, 5, 7):
        pixels = random_pixels(batch, 32)
        plain, adapted = two_passes(clip, adapter, pixels)
        got = run(encoder, pixels)
        assert [g.shape for g in got] == [(batch, 24), (batch, 24)]
        np.testing.assert_allclose(got[0], plain, atol=1e-5)
        np.testing.assert_allclose(got[1], adapted, atol=1e-5)
        assert np.abs(plain - adapted).max() > 1e-2  # the adapter does something, so the two outputs can't be mixed up


@pytest.mark.parametrize(
    "vision",
    [
        {"layers": 1},
        {"no_ln_pre": True},
        {"ls_init_value": 0.5},
        {"final_ln_after_pool": True},
        {"patch_dropout": 0.5},
        {"image_size": 35},
        {"pos_embed_type": "sin_cos_2d"},
        {"act_kwargs": {"approximate": "tanh"}},
        {"norm_kwargs": {"eps": 1e-3}},
        {"mlp_ratio": 2.5, "head_width": 32},
    ],
    ids=str,
)
def test_variations_of_the_vision_transformer(vision: dict[str, Any]) -> None:
    clip = small_clip(**vision)
    adapter = random_adapter(clip, 0)
    pixels = random_pixels(3, clip.image_size)
    for got, expected in zip(
        run(build_dual_encoder(clip, adapter), pixels), two_passes(clip, adapter, pixels), strict=True
    ):
        np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.slow
def test_vit_b_32() -> None:
    clip = small_clip(**(vision_config("ViT-B-32") or {}), head_width=64)
    adapter = random_adapter(clip, 9, bottleneck=64)
    pixels = random_pixels(2, 224)
    for got, expected in zip(
        run(build_dual_encoder(clip, adapter), pixels), two_passes(clip, adapter, pixels), strict=True
    ):
        np.testing.assert_allclose(got, expected, atol=1e-5)


def test_without_an_adapter_only_plain() -> None:
    clip = small_clip()
    pixels = random_pixels(3, 32)
    got = run(build_dual_encoder(clip), pixels)
    assert len(got) == 1
    np.testing.assert_allclose(got[0], two_passes(clip, None, pixels)[0], atol=1e-5)


def test_the_last_block_projects_no_token_to_keys_or_values() -> None:
    encoder = build_dual_encoder(small_clip())
    names = {name for name, _ in encoder.blocks[-1].named_parameters()}
    assert {"k_weight", "v_weight"} <= names
    assert not any(name.startswith(("k_proj", "v_proj")) for name in names)


def test_the_shared_prefix_sees_each_image_once() -> None:
    clip = small_clip()
    encoder = build_dual_encoder(clip, random_adapter(clip, 1))
    seen: list[int] = []
    for block in encoder.blocks:
        block.c_fc.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0].shape[0]))
    run(encoder, random_pixels(3, 32))
    assert seen == [3, 3, 6]


def test_fp16_is_strongly_typed_and_close() -> None:
    clip = small_clip()
    adapter = random_adapter(clip, 1)
    encoder = build_dual_encoder(clip, adapter, "fp16")
    for name, value in encoder.named_parameters():
        fp32 = "ln_" in name or name in ("cls_token", "position")
        assert value.dtype == (torch.float32 if fp32 else torch.float16), name
    pixels = random_pixels(4, 32)
    for got, expected in zip(run(encoder, pixels), two_passes(clip, adapter, pixels), strict=True):
        assert got.dtype == np.float32
        assert (got * expected).sum(1).min() > 0.9999


def test_config_round_trip_through_json() -> None:
    clip = small_clip(True)
    encoder = build_dual_encoder(clip, random_adapter(clip, 1))
    again = DualEncoder.from_config(json.loads(json.dumps(encoder.config)))
    again.load_state_dict(encoder.state_dict())
    pixels = random_pixels(2, 32)
    for got, expected in zip(run(again, pixels), run(encoder, pixels), strict=True):
        np.testing.assert_array_equal(got, expected)
    with pytest.raises(ValueError, match="expected the fields"):
        DualEncoder.from_config({"width": 64})


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
def test_refuses_by_name(vision: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_dual_encoder(small_clip(**vision))


def test_refuses_another_clips_adapter_and_an_unknown_precision() -> None:
    clip = small_clip()
    other = random_adapter(small_clip(fingerprint="other"), 1)
    with pytest.raises(ValueError, match="trained for another CLIP"):
        build_dual_encoder(clip, other)
    with pytest.raises(ValueError, match="'fp32' or 'fp16'"):
        build_dual_encoder(clip, precision="int8")


@pytest.mark.slow
def test_the_module_needs_no_open_clip() -> None:
    code = "import sys; sys.modules['open_clip'] = None; import iosr_fast.clip.dual_encoder"
    subprocess.run([sys.executable, "-c", code], check=True)
