"""The adapter, its file and the encoder that trains it, against literal computation."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import ROOT

torch = pytest.importorskip("torch", reason="torch comes with the cpu extra")
pytest.importorskip("open_clip", reason="open_clip comes with the cpu extra")

from iosr_fast.clip.adapter import (  # noqa: E402
    Adapter,
    check_belongs,
    encode_adapted,
    encode_plain,
    init_adapter,
    load_adapter,
    save_adapter,
)
from iosr_fast.clip.load import LoadedClip, load_clip  # noqa: E402
from iosr_fast.training.adapted_encoder import AdaptedEncoder  # noqa: E402
from iosr_fast.training.augment import augment_batch, draw_augmentation  # noqa: E402


@pytest.fixture(scope="module")
def clip() -> LoadedClip:
    return load_clip("demo")


def random_adapter(clip: LoadedClip, first: int) -> Adapter:
    adapter = init_adapter(clip, first, bottleneck=9, scale=0.5).eval()
    generator = torch.Generator().manual_seed(first)
    with torch.no_grad():
        for value in adapter.parameters():
            value.copy_(torch.randn(value.shape, generator=generator) * 0.1)
    return adapter


def weights(adapter: Adapter) -> torch.Tensor:
    return torch.cat([value.flatten() for value in adapter.parameters()])


def test_a_fresh_adapter_changes_nothing(clip: LoadedClip) -> None:
    pixels = torch.randn(3, 3, 64, 64)
    adapter = init_adapter(clip, 0).eval()
    with torch.no_grad():
        torch.testing.assert_close(encode_adapted(clip, adapter, pixels), encode_plain(clip, pixels))


def test_block_equals_the_formula(clip: LoadedClip) -> None:
    block = random_adapter(clip, 5).blocks["5"]
    x = torch.randn(2, 7, 128)
    down = torch.clamp(x @ block.down_proj.weight.T + block.down_proj.bias, min=0)
    expected = 0.5 * (down @ block.up_proj.weight.T + block.up_proj.bias)
    torch.testing.assert_close(block(x), expected)


@pytest.mark.parametrize("first", range(6))
def test_training_forward_equals_the_literal_pass(clip: LoadedClip, first: int) -> None:
    adapter, pixels = random_adapter(clip, first), torch.randn(3, 3, 64, 64)
    encoder = AdaptedEncoder(clip, first)
    with torch.no_grad():
        expected, plain = encode_adapted(clip, adapter, pixels), encode_plain(clip, pixels)
        assert (expected - plain).abs().max() > 1e-3
        stem = encoder.stem(pixels)
        torch.testing.assert_close(encoder.tail(adapter, *stem), expected, atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(encoder.tail(None, *stem), plain, atol=1e-4, rtol=1e-5)
    assert [tuple(part.shape[1:]) for part in stem] == [encoder.stem_shape] * 2


def test_gradients_equal_those_of_the_literal_pass(clip: LoadedClip) -> None:
    pixels = torch.randn(2, 3, 64, 64)
    grads = []
    for shortcut in (True, False):
        adapter = random_adapter(clip, 3).requires_grad_(True)
        encoder = AdaptedEncoder(clip, 3)
        features = encoder.tail(adapter, *encoder.stem(pixels)) if shortcut else encode_adapted(clip, adapter, pixels)
        features.square().sum().backward()
        grads.append(torch.cat([value.grad.flatten() for value in adapter.parameters()]))
    assert grads[1].abs().max() > 1e-3
    torch.testing.assert_close(grads[0], grads[1], atol=1e-4, rtol=1e-3)


def test_file_round_trip(clip: LoadedClip, tmp_path: Path) -> None:
    adapter = random_adapter(clip, 4)
    save_adapter(adapter, tmp_path / "a.safetensors")
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == 0o644
    loaded = load_adapter(tmp_path / "a.safetensors")
    assert loaded.config == adapter.config and loaded.fingerprint() == adapter.fingerprint()
    torch.testing.assert_close(weights(loaded), weights(adapter), atol=0, rtol=0)
    check_belongs(loaded, clip)


def test_bad_adapters_are_named(clip: LoadedClip, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no adapter at .*a\.safetensors"):
        load_adapter(tmp_path / "a.safetensors")
    (tmp_path / "a.safetensors").write_bytes(b"not a safetensors file")
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        load_adapter(tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="header has no config"):
        load_adapter(ROOT / "iosr_fast/clip/demo/data/clip.safetensors")
    with pytest.raises(ValueError, match=r"first_adapted_block in 0\.\.5 .* got 6"):
        init_adapter(clip, 6)
    with pytest.raises(ValueError, match="trained for another CLIP"):
        check_belongs(random_adapter(clip, 5), load_clip("demo", pretrained="none"))


def test_augmentation_stays_in_range_and_does_not_depend_on_the_batch() -> None:
    images = torch.rand(4, 3, 16, 16)
    drawn = draw_augmentation(4, torch.Generator().manual_seed(1))
    assert torch.equal(drawn, draw_augmentation(4, torch.Generator().manual_seed(1)))
    augmented = augment_batch(images, drawn)
    assert augmented.shape == images.shape and augmented.min() >= 0 and augmented.max() <= 1
    assert not torch.equal(augmented, images)
    torch.testing.assert_close(augment_batch(images[2:3], drawn[2:3]), augmented[2:3])
    still = torch.tensor([[0.0, 1, 0, 0, 1, 1, 1, 0, 0, 0]]).expand(4, -1)
    torch.testing.assert_close(augment_batch(images, still), images, atol=1e-5, rtol=1e-5)
