"""The training loop: it learns, takes each picture once, and refuses what can't work before it starts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from iosr_fast.backbones.adapter import adapted_pass, init_adapter
from iosr_fast.backbones.demo.pictures import held_out
from iosr_fast.backbones.load import LoadedModel
from iosr_fast.training.adapted_encoder import AdaptedEncoder
from iosr_fast.training.augment import augment_batch, draw_augmentation
from iosr_fast.training.batches import Batches, split_steps
from iosr_fast.training.config import TrainConfig
from iosr_fast.training.overlap import overlap_area, pair_cosines
from iosr_fast.training.pictures import TensorPictures
from iosr_fast.training.train import train_adapter
from tests.training.small import fresh, logged, weights


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
def test_cached_views_give_what_computing_them_each_time_gives(
    clip: LoadedModel, pictures: TensorPictures, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TrainConfig(epochs=5, batch=10, augment=True, cached_views=2)
    computed: list[int] = []
    stem, prepare = AdaptedEncoder.stem, Batches.prepare

    def counted(self: AdaptedEncoder, pixels: torch.Tensor) -> Any:
        computed.append(len(pixels))
        return stem(self, pixels)

    def forgetful(self: Batches, epoch: int) -> Iterator[None]:
        self.cached.clear()
        return prepare(self, epoch)

    monkeypatch.setattr(AdaptedEncoder, "stem", counted)
    cached = weights(train_adapter(clip, fresh(clip, 3), pictures, config))
    assert sum(computed) == 2 * 30
    monkeypatch.setattr(Batches, "prepare", forgetful)
    assert torch.equal(weights(train_adapter(clip, fresh(clip, 3), pictures, config)), cached)
    assert sum(computed) == (2 + 5) * 30


@pytest.mark.parametrize("wrong", [1e5, float("nan")])
def test_numbers_beyond_float16_are_not_cached(
    clip: LoadedModel, pictures: TensorPictures, monkeypatch: pytest.MonkeyPatch, wrong: float
) -> None:
    monkeypatch.setattr(AdaptedEncoder, "stem", lambda self, pixels: (torch.full((len(pixels), 65, 8), wrong),) * 2)
    with pytest.raises(ValueError, match=r"finite in float16, got up to (100000|nan); train without cached views"):
        train_adapter(clip, fresh(clip), pictures, TrainConfig(cached_views=1))


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
    steps = torch.randperm(count, generator=torch.Generator().manual_seed(count)).split(8)
    taken: list[list[int]] = [[] for _ in steps]
    for rank in range(world):
        step = 0
        for part in split_steps(torch.cat(steps), TrainConfig(batch=8, accumulate=2), world, rank):
            assert 1 <= len(part.rows) <= 8 // (2 * world) and part.step_pictures == len(steps[step])
            taken[step] += part.rows.tolist() if part.weight else []
            step += part.last
        assert step == len(steps)
    assert [sorted(rows) for rows in taken] == [sorted(rows.tolist()) for rows in steps]


@pytest.mark.slow
def test_overlap_is_measured_each_epoch_with_the_encoders_own_pixels(
    clip: LoadedModel, pictures: TensorPictures, tmp_path: Path
) -> None:
    test, _ = held_out()
    images, labels = torch.from_numpy(test.images[:120]).permute(0, 3, 1, 2), torch.from_numpy(test.concepts[:120])
    source = TensorPictures(images, labels, test.names)
    config = TrainConfig(epochs=2, batch=10, normalise=False)
    reports: list[tuple[int, float, float]] = []
    more: dict[str, Any] = {"held_out": source, "report_epoch": lambda *measured: reports.append(measured)}
    trained = train_adapter(clip, fresh(clip, scale=1.0), pictures, config, tmp_path, **more)
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (clip.mean, clip.std))
    pixels, visual = (images / 255 - mean) / std, clip.model.visual
    with torch.no_grad():
        units = [F.normalize(rows).numpy() for rows in (visual(pixels), adapted_pass(visual, trained, pixels))]
    plain, adapted = (overlap_area(*pair_cosines(rows, labels.numpy())) for rows in units)
    assert [epoch for epoch, _, _ in reports] == [1, 2] and reports[0][1] == reports[1][1]
    assert reports[1][1:] == pytest.approx((plain, adapted), abs=2e-3), "a cosine may lie on a bin's border"
    assert abs(plain - adapted) > 0.005 and reports[0][2] != reports[1][2]
    rows = logged(tmp_path)
    assert [bool(row["adapted_overlap_area"]) for row in rows] == [False, False, True] * 2, "at the ends of epochs"
    assert float(rows[2]["plain_overlap_area"]) == pytest.approx(reports[0][1])


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
    with pytest.raises(ValueError, match=r"15,360\.000 GB, got a machine with .* GB; cache fewer views"):
        train_adapter(clip, fresh(clip), pictures, TrainConfig(cached_views=10**9))


def test_augmentation_stays_in_range_and_does_not_depend_on_the_batch() -> None:
    images = torch.rand(4, 3, 16, 16)
    drawn = draw_augmentation(4, torch.Generator().manual_seed(1))
    augmented = augment_batch(images, drawn)
    assert augmented.shape == images.shape and augmented.min() >= 0 and augmented.max() <= 1
    assert not torch.equal(augmented, images)
    torch.testing.assert_close(augment_batch(images[2:3], drawn[2:3]), augmented[2:3])
    still = torch.tensor([[0.0, 1, 0, 0, 1, 1, 1, 0, 0, 0]]).expand(4, -1)
    torch.testing.assert_close(augment_batch(images, still), images, atol=1e-5, rtol=1e-5)
