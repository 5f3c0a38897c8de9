"""The training loop: it learns, takes each picture once, and refuses what can't work before it starts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from iosr_fast.backbones.adapter import init_adapter
from iosr_fast.backbones.load import LoadedModel
from iosr_fast.images.geometry import Geometry
from iosr_fast.training import held_out as held_out_module
from iosr_fast.training.augment import augment_batch, draw_augmentation
from iosr_fast.training.batches import split_steps
from iosr_fast.training.config import TrainConfig
from iosr_fast.training.pictures import SubsetPictures, TensorPictures, demo_sources
from iosr_fast.training.train import train_adapter
from tests.training.small import fresh, logged, weights


def validation_pictures(count: int) -> SubsetPictures:
    held_out = demo_sources(Geometry(64), Geometry(64)).held_out
    assert held_out is not None
    return SubsetPictures(held_out, torch.arange(count))


@pytest.mark.slow
@pytest.mark.parametrize("cached_views", [0, 2])
def test_training_learns(clip: LoadedModel, pictures: TensorPictures, cached_views: int) -> None:
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


@pytest.mark.slow
def test_accumulation_does_not_change_the_gradient(clip: LoadedModel, pictures: TensorPictures) -> None:
    config = TrainConfig(epochs=2, batch=12)  # the last step has 6
    results = [
        weights(train_adapter(clip, init_adapter(clip, 4, 8, dropout=0.0), pictures, replace(config, accumulate=parts)))
        for parts in (1, 3)
    ]
    torch.testing.assert_close(results[1], results[0], atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("count", [1, 5, 16, 17, 23])
def test_each_picture_is_in_one_process_at_one_step(world: int, count: int) -> None:
    config = TrainConfig(batch=8, accumulate=2)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(count))
    ranks = [split_steps(order, config, world, rank) for rank in range(world)]
    taken = torch.cat([part.rows for parts in ranks for part in parts if part.weight])
    assert sorted(taken.tolist()) == list(range(count))
    steps = -(-count // 8)
    for parts in ranks:
        assert sum(part.last for part in parts) == steps and parts[-1].last
        assert all(1 <= len(part.rows) <= 8 // (2 * world) for part in parts)
    for step in range(steps):
        sizes = []
        for parts in ranks:
            ends = [i for i, part in enumerate(parts) if part.last]
            mine = parts[(ends[step - 1] + 1 if step else 0) : ends[step] + 1]
            sizes.append(sum(len(part.rows) * part.weight for part in mine))
        assert sum(sizes) == ranks[0][ends[step]].step_pictures == len(order[8 * step : 8 * step + 8])


def test_a_batch_that_processes_cannot_share_is_refused() -> None:
    with pytest.raises(ValueError, match="2 processes can take in 3 equal parts each, got 8; choose a multiple of 6"):
        split_steps(torch.arange(8), TrainConfig(batch=8, accumulate=3), 2, 0)


@pytest.mark.slow
def test_held_out_pictures_are_measured_each_epoch(clip: LoadedModel, pictures: TensorPictures, tmp_path: Path) -> None:
    reports = []
    held_out = validation_pictures(60)
    for cached_views in (0, 1):
        train_adapter(
            clip,
            fresh(clip),
            pictures,
            TrainConfig(epochs=2, batch=10, cached_views=cached_views),
            tmp_path / str(cached_views),
            held_out=held_out,
            report_epoch=lambda *measured: reports.append(measured),
        )
    assert [epoch for epoch, _, _ in reports] == [1, 2, 1, 2]
    for _, plain, adapted in reports:
        assert plain.pictures == adapted.pictures == 60 and plain.classes >= 15
        assert 0.1 < adapted.overlap_area < 0.9
    assert reports[0][1] == reports[1][1], "the plain embeddings do not change"
    assert reports[0][2] != reports[0][1]
    assert reports[0][1] == reports[2][1]
    rows = logged(tmp_path / "0")
    assert [bool(row["adapted_auroc"]) for row in rows] == [False, False, True] * 2, "at the ends of epochs"
    assert float(rows[2]["plain_auroc"]) == pytest.approx(reports[0][1].auroc)


@pytest.mark.slow
def test_only_what_is_measured_is_encoded_with_the_encoders_own_pixels(
    clip: LoadedModel, pictures: TensorPictures, monkeypatch: pytest.MonkeyPatch
) -> None:
    held_out = validation_pictures(120)
    monkeypatch.setattr(held_out_module, "MOST_PICTURES", 60)
    rows = torch.from_numpy(held_out_module.chosen_rows(held_out.labels.numpy()))
    assert 30 <= len(rows) <= 60
    pixels = torch.cat(list(held_out.iterate(rows, 60)))
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (clip.mean, clip.std))
    with torch.no_grad():
        whole = clip.model.encode_image((pixels.float() / 255 - mean) / std).numpy()
    expected = held_out_module.overlap(whole, held_out.labels[rows].numpy())
    measured: list[held_out_module.Overlap] = []
    more = {"held_out": held_out, "report_epoch": lambda epoch, plain, adapted: measured.append(plain)}
    train_adapter(clip, fresh(clip), pictures, TrainConfig(batch=30, normalise=False), **more)
    assert measured[0].pictures == len(rows)
    assert measured[0].auroc == pytest.approx(expected.auroc, abs=1e-4)


def test_impossible_training_is_refused_before_it_starts(
    clip: LoadedModel, pictures: TensorPictures, tmp_path: Path
) -> None:
    one = TensorPictures(pictures.images, torch.zeros(30, dtype=torch.int64), ["all"])
    with pytest.raises(ValueError, match="at least two classes"):
        train_adapter(clip, fresh(clip), one, TrainConfig())
    none = TensorPictures(pictures.images[:0], pictures.labels[:0], ["a", "b"])
    with pytest.raises(ValueError, match="expected pictures to train on, got none"):
        train_adapter(clip, fresh(clip), none, TrainConfig())
    with pytest.raises(ValueError, match="3 equal parts each, got 128; choose a multiple of 3"):
        train_adapter(clip, fresh(clip), pictures, TrainConfig(accumulate=3), tmp_path / "uneven")
    assert not (tmp_path / "uneven").exists()
    with pytest.raises(ValueError, match="cache fewer views"):
        train_adapter(clip, fresh(clip), pictures, TrainConfig(cached_views=10_000_000))


def test_augmentation_stays_in_range_and_does_not_depend_on_the_batch() -> None:
    images = torch.rand(4, 3, 16, 16)
    drawn = draw_augmentation(4, torch.Generator().manual_seed(1))
    augmented = augment_batch(images, drawn)
    assert augmented.shape == images.shape and augmented.min() >= 0 and augmented.max() <= 1
    assert not torch.equal(augmented, images)
    torch.testing.assert_close(augment_batch(images[2:3], drawn[2:3]), augmented[2:3])
    still = torch.tensor([[0.0, 1, 0, 0, 1, 1, 1, 0, 0, 0]]).expand(4, -1)
    torch.testing.assert_close(augment_batch(images, still), images, atol=1e-5, rtol=1e-5)
