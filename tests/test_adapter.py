"""The adapter, its file and its training, against literal computation."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="torch comes with the train extra")
pytest.importorskip("open_clip", reason="open_clip comes with the train extra")

from iosr_fast.offline.adapter import (  # noqa: E402
    Adapter,
    check_belongs,
    encode_adapted,
    encode_plain,
    init_adapter,
    load_adapter,
    save_adapter,
)
from iosr_fast.offline.augment import augment_batch  # noqa: E402
from iosr_fast.offline.clip import LoadedClip, load_clip  # noqa: E402
from iosr_fast.offline.data import FolderPictures, TensorPictures  # noqa: E402
from iosr_fast.offline.train import AdaptedEncoder, TrainConfig, train_adapter  # noqa: E402


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


@pytest.fixture(scope="module")
def pictures() -> TensorPictures:
    """Three classes that a colour tells apart."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(30) % 3
    images = torch.randint(0, 120, (30, 3, 64, 64), generator=generator, dtype=torch.uint8)
    images[torch.arange(30), labels] += 100
    return TensorPictures(images, labels, ["red", "green", "blue"])


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
    encoder = AdaptedEncoder(clip, adapter)
    with torch.no_grad():
        expected = encode_adapted(clip, adapter, pixels)
        assert (expected - encode_plain(clip, pixels)).abs().max() > 1e-3
        torch.testing.assert_close(encoder.tail(*encoder.stem(pixels)), expected, atol=1e-4, rtol=1e-5)


def test_gradients_equal_those_of_the_literal_pass(clip: LoadedClip) -> None:
    pixels = torch.randn(2, 3, 64, 64)
    grads = []
    for shortcut in (True, False):
        adapter = random_adapter(clip, 3).requires_grad_(True)
        encoder = AdaptedEncoder(clip, adapter)
        features = encoder.tail(*encoder.stem(pixels)) if shortcut else encode_adapted(clip, adapter, pixels)
        features.square().sum().backward()
        grads.append(torch.cat([value.grad.flatten() for value in adapter.parameters()]))
    assert grads[1].abs().max() > 1e-3
    torch.testing.assert_close(grads[0], grads[1], atol=1e-4, rtol=1e-3)


def test_file_round_trip(clip: LoadedClip, tmp_path: Path) -> None:
    adapter = random_adapter(clip, 4)
    save_adapter(adapter, tmp_path / "a.safetensors")
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
        load_adapter(Path(__file__).parent.parent / "iosr_fast/demo/data/clip.safetensors")
    with pytest.raises(ValueError, match=r"first_adapted_block in 0\.\.5 .* got 6"):
        init_adapter(clip, 6)
    with pytest.raises(ValueError, match="trained for another CLIP"):
        check_belongs(random_adapter(clip, 5), load_clip("demo", pretrained="none"))


@pytest.mark.parametrize("cached_views", [0, 2])
def test_training_learns(clip: LoadedClip, pictures: TensorPictures, cached_views: int) -> None:
    losses: list[float] = []
    adapter = init_adapter(clip, 4, bottleneck=16, scale=0.1)
    before = weights(adapter).clone()
    config = TrainConfig(epochs=6, batch=10, schedule="cosine", augment=True, cached_views=cached_views)
    trained = train_adapter(clip, adapter, pictures, config, report=lambda step: losses.append(step.loss))
    assert len(losses) == 6 * 3
    assert sum(losses[-3:]) < 0.5 * sum(losses[:3])
    assert not torch.equal(weights(trained), before)
    assert trained.training is False and trained.config.training["pictures"] == 30
    assert not any(p.requires_grad for p in clip.model.parameters())


@pytest.mark.parametrize("cached_views", [0, 2])
def test_a_stopped_training_ends_as_an_uninterrupted_one(
    clip: LoadedClip, pictures: TensorPictures, tmp_path: Path, cached_views: int
) -> None:
    config = TrainConfig(epochs=3, batch=8, schedule="cosine", augment=True, cached_views=cached_views)
    whole = train_adapter(clip, init_adapter(clip, 5, 8), pictures, config)
    path = tmp_path / "checkpoint"

    class Stopped(Exception):
        pass

    def stop(step) -> None:
        if (step.epoch, step.step) == (2, 3):
            raise Stopped

    with pytest.raises(Stopped):
        train_adapter(clip, init_adapter(clip, 5, 8), pictures, config, path, stop)
    epochs: list[int] = []
    resumed = train_adapter(
        clip, init_adapter(clip, 5, 8), pictures, config, path, lambda step: epochs.append(step.epoch)
    )
    assert epochs[0] == 2
    torch.testing.assert_close(weights(resumed), weights(whole), atol=0, rtol=0)
    with pytest.raises(ValueError, match="of another training"):
        train_adapter(clip, init_adapter(clip, 5, 8), pictures, replace(config, learning_rate=1.0), path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="is damaged"):
        train_adapter(clip, init_adapter(clip, 5, 8), pictures, config, path)


def test_normalisation_is_an_option(clip: LoadedClip, pictures: TensorPictures) -> None:
    config = TrainConfig(batch=30)
    ours = train_adapter(clip, init_adapter(clip, 5, 8), pictures, config)
    as_published = train_adapter(clip, init_adapter(clip, 5, 8), pictures, replace(config, normalise=False))
    assert not torch.equal(weights(ours), weights(as_published))


def test_a_folder_trains_and_a_damaged_file_is_named(clip: LoadedClip, tmp_path: Path) -> None:
    from PIL import Image

    for name in ("red", "blue"):
        (tmp_path / name).mkdir()
        for i in range(3):
            Image.new("RGB", (80 + i, 70), name).save(tmp_path / name / f"{i}.png")
    source = FolderPictures(tmp_path, clip.image_size, workers=0)
    assert source.class_names == ["blue", "red"] and source.labels.tolist() == [0, 0, 0, 1, 1, 1]
    train_adapter(clip, init_adapter(clip, 5, 8), source, TrainConfig(batch=4))
    (tmp_path / "red" / "1.png").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"red/1\.png"):
        train_adapter(clip, init_adapter(clip, 5, 8), source, TrainConfig(batch=4))


def test_impossible_training_is_refused_before_it_starts(clip: LoadedClip, pictures: TensorPictures) -> None:
    one = TensorPictures(pictures.images, torch.zeros(30, dtype=torch.int64), ["all"])
    with pytest.raises(ValueError, match="at least two classes"):
        train_adapter(clip, init_adapter(clip, 5, 8), one, TrainConfig())
    with pytest.raises(ValueError, match="use fewer views"):
        train_adapter(clip, init_adapter(clip, 5, 8), pictures, TrainConfig(cached_views=10_000_000))


def test_augmentation_stays_in_range_and_repeats() -> None:
    images = torch.rand(4, 3, 16, 16)
    first, again = (augment_batch(images, torch.Generator().manual_seed(1)) for _ in range(2))
    assert first.shape == images.shape and first.min() >= 0 and first.max() <= 1
    assert torch.equal(first, again) and not torch.equal(first, images)
    still = augment_batch(images, torch.Generator(), max_rotation_deg=0, max_shift=0, scale_range=(1, 1), max_colour=0)
    torch.testing.assert_close(still, images, atol=1e-5, rtol=1e-5)
