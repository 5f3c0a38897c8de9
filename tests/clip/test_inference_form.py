"""The form that PyTorch executes against the form that engines and ONNX files have."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch comes with the cpu extra")
pytest.importorskip("open_clip", reason="open_clip comes with the cpu extra")
pytest.importorskip("timm", reason="timm comes with the cpu extra")

from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from iosr_fast.clip.dual_blocks import Block  # noqa: E402
from iosr_fast.clip.dual_encoder import DualEncoder  # noqa: E402
from iosr_fast.clip.fuse import build_dual_encoder  # noqa: E402
from iosr_fast.clip.inference_form import ATTENTION, attention_priority, to_inference_form  # noqa: E402
from iosr_fast.clip.load import LoadedClip  # noqa: E402
from tests.clip.families import FAMILIES, family_clip  # noqa: E402
from tests.clip.small_clip import random_adapter, random_pixels, small_clip  # noqa: E402
from tests.clip.test_dual_encoder import run  # noqa: E402

QUICK = "vit-quick-gelu"


def clip_of(family: str) -> LoadedClip:
    return small_clip(quick_gelu=True) if family == QUICK else family_clip(family)


def both_forms(clip: LoadedClip, **options: Any) -> tuple[DualEncoder, DualEncoder]:
    unchanged, changed = (build_dual_encoder(clip, random_adapter(clip, 1), **options) for _ in range(2))
    to_inference_form(changed)
    return unchanged, changed


@pytest.mark.parametrize("family", [*FAMILIES, QUICK])
def test_it_is_exact_up_to_rounding(family: str) -> None:
    clip = clip_of(family)
    unchanged, changed = both_forms(clip)
    parameters = [sum(value.numel() for value in one.state_dict().values()) for one in (unchanged, changed)]
    assert parameters[0] == parameters[1], "no weight is there twice"
    forms = [(unchanged, changed)] + ([both_forms(clip, merged=3)] if not unchanged.shapes.rotary else [])
    for batch in (1, 3):
        pixels = random_pixels(batch, clip.image_size)
        for before, after in forms:
            for got, expected in zip(run(after, pixels), run(before, pixels), strict=True):
                np.testing.assert_allclose(got, expected, atol=1e-5)


def test_half_precision_loses_no_more_than_a_tenth() -> None:
    """By the weights of LayerNorms, which are rounded; the mean over families, as one family's errors are few."""
    ratios = []
    for family in (QUICK, "clipa", "siglip", "registers", "mobileclip-b", "pe-core", "eva02"):
        clip, pixels = clip_of(family), random_pixels(32, clip_of(family).image_size)
        exact = run(build_dual_encoder(clip, random_adapter(clip, 1)), pixels)
        errors = []
        for encoder in both_forms(clip, precision="fp16"):
            off = [((got - right) ** 2).sum(1) for got, right in zip(run(encoder, pixels), exact, strict=True)]
            errors.append(float(np.sqrt(np.mean(off))))
        assert 1e-5 < errors[0] < 1e-2
        ratios.append(errors[1] / errors[0])
    assert np.mean(ratios) < 1.1, ratios


class Launches(TorchDispatchMode):
    """Lists the operators that compute, in order: on a GPU each is one kernel, or a product with its epilogue."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        is_view = func._schema.returns[0].alias_info is not None or name == "_unsafe_view"
        if not is_view:
            self.names.append(name.removesuffix("_flash_attention_for_cpu").removeprefix("_").removeprefix("native_"))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("quick_gelu", [False, True])
def test_a_block_is_ten_launches(precision: str, quick_gelu: bool) -> None:
    _, encoder = both_forms(small_clip(quick_gelu), precision=precision)
    block = encoder.blocks[0]
    assert isinstance(block, Block)
    x = torch.randn(3, 17, 64).to(encoder.shapes.dtype)
    with torch.no_grad(), attention_priority(), Launches() as launches:
        x, _ = block.attend(x, None, None)
        x + block.mlp(x)
    attention = ["layer_norm", "addmm", "scaled_dot_product", "addmm", "add"]
    assert launches.names == [*attention, "layer_norm", "addmm", "silu" if quick_gelu else "gelu", "addmm", "add"]


def test_attention_gets_heads_that_its_kernels_take_without_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Contiguous in the last dimension, all others a multiple of 16 bytes apart; a mask for merged tokens."""
    attend, masks = torch.nn.functional.scaled_dot_product_attention, []

    def watched(q: Any, k: Any, v: Any, mask: Any, scale: float) -> Any:
        for part in (q, k, v):
            assert part.stride(-1) == 1 and all(stride * part.element_size() % 16 == 0 for stride in part.stride()[:-1])
            assert part.untyped_storage().data_ptr() == q.untyped_storage().data_ptr(), "views of one product"
        assert mask is None or mask.dtype == q.dtype
        masks.append(mask)
        return attend(q, k, v, mask, scale=scale)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    clip = small_clip()
    for merged in (0, 3):
        run(both_forms(clip, precision="fp16", merged=merged)[1], random_pixels(3, clip.image_size))
    assert [mask is None for mask in masks] == [True, True, True, False]


def test_the_order_of_attention_kernels_ends_with_the_block() -> None:
    order = torch._C._get_sdp_priority_order
    before = order()
    with attention_priority():
        assert order()[: len(ATTENTION)] == [backend.value for backend in ATTENTION] != before[: len(ATTENTION)]
    assert order() == before
