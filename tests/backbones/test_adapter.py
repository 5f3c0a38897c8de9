"""The adapter, its file, and training with it, against literal computation in every family of encoders."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from iosr_fast.backbones.adapter import (
    adapted_pass,
    check_belongs,
    init_adapter,
    load_adapter,
    random_adapter,
    save_adapter,
)
from iosr_fast.backbones.load import LoadedModel, load_clip
from iosr_fast.training.adapted_encoder import AdaptedEncoder
from tests import ROOT
from tests.backbones import small_clip
from tests.backbones.families import FAMILIES, family_clip

ANY_FAMILY = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(scope="module")
def clip() -> LoadedModel:
    return load_clip("demo")


def test_the_formula(clip: LoadedModel) -> None:
    """A new adapter changes nothing, a random one does; a block adds scale * up_proj(relu(down_proj(x)))."""
    pixels, visual, x = torch.randn(3, 3, 64, 64), clip.model.visual, torch.randn(2, 7, 128)
    with torch.no_grad():
        torch.testing.assert_close(adapted_pass(visual, init_adapter(clip, 0).eval(), pixels), visual(pixels))
        assert (adapted_pass(visual, random_adapter(clip, 2), pixels) - visual(pixels)).abs().max() > 1e-3
    block = random_adapter(clip, 5).blocks["5"]
    down = torch.clamp(x @ block.down_proj.weight.T + block.down_proj.bias, min=0)
    torch.testing.assert_close(block(x), 0.03 * (down @ block.up_proj.weight.T + block.up_proj.bias))


def test_file_round_trip(clip: LoadedModel, tmp_path: Path) -> None:
    adapter = random_adapter(clip, 4)
    save_adapter(adapter, tmp_path / "a.safetensors")
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == 0o644
    loaded = load_adapter(tmp_path / "a.safetensors")
    assert loaded.config == adapter.config and loaded.fingerprint() == adapter.fingerprint()
    state = loaded.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in adapter.state_dict().items())
    check_belongs(loaded, clip)


def test_bad_adapters_are_named(clip: LoadedModel, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no adapter at .*a\.safetensors"):
        load_adapter(tmp_path / "a.safetensors")
    (tmp_path / "a.safetensors").write_bytes(b"not a safetensors file")
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        load_adapter(tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="header has no config"):
        load_adapter(ROOT / "iosr_fast/backbones/demo/data/clip.safetensors")
    with pytest.raises(ValueError, match=r"first_adapted_block in 0\.\.5 .* got 6"):
        init_adapter(clip, 6)
    with pytest.raises(ValueError, match="trained for another CLIP"):
        check_belongs(random_adapter(clip, 5), load_clip("demo", pretrained="none"))


@ANY_FAMILY
def test_stem_and_tail_are_the_literal_pass(family: str) -> None:
    """For an adapter in the last block; tests/training compares gradients for one in the middle."""
    clip = family_clip(family)
    visual, pixels = clip.model.visual, torch.randn(2, 3, clip.image_size, clip.image_size)
    adapter, encoder = small_clip.random_adapter(clip, 2), AdaptedEncoder(clip, 2)
    stem = encoder.stem(pixels)
    assert [tuple(part.shape[1:]) for part in stem] == [encoder.stem_shape] * 2
    torch.testing.assert_close(encoder.tail(None, *stem), visual(pixels), atol=1e-4, rtol=1e-5)
    adapted = adapted_pass(visual, adapter, pixels)
    torch.testing.assert_close(encoder.tail(adapter, *stem), adapted, atol=1e-4, rtol=1e-5)
