"""The training loop: it learns, takes each picture once, and refuses what can't work before it starts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="torch comes with the cpu extra")
pytest.importorskip("open_clip", reason="open_clip comes with the cpu extra")
pytest.importorskip("lightning_fabric", reason="lightning-fabric comes with the train extra")

from iosr_fast.clip.adapter import Adapter, encode_plain, init_adapter  # noqa: E402
from iosr_fast.clip.load import LoadedClip, load_clip  # noqa: E402
from iosr_fast.images.geometry import Geometry  # noqa: E402
from iosr_fast.training import probe as probe_module  # noqa: E402
from iosr_fast.training.batches import split_steps  # noqa: E402
from iosr_fast.training.data import FolderPictures, SubsetPictures, TensorPictures  # noqa: E402
from iosr_fast.training.sources import validation_pictures  # noqa: E402
from iosr_fast.training.train import train_adapter  # noqa: E402
from iosr_fast.training.train_config import DinoConfig, TrainConfig, dino_config  # noqa: E402

SUPERVISED = TrainConfig(epochs=3, batch=8, schedule="cosine", augment=True)


@pytest.fixture(scope="module")
def clip() -> LoadedClip:
    return load_clip("demo")


@pytest.fixture(scope="module")
def pictures() -> TensorPictures:
    """Three classes that a colour tells apart."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(30) % 3
    images = torch.randint(0, 120, (30, 3, 64, 64), generator=generator, dtype=torch.uint8)
    images[torch.arange(30), labels] += 100
    return TensorPictures(images, labels, ["red", "green", "blue"])


def fresh(clip: LoadedClip, first: int = 5, bottleneck: int = 8) -> Adapter:
    return init_adapter(clip, first, bottleneck)


def weights(adapter: Adapter) -> torch.Tensor:
    return torch.cat([value.flatten() for value in adapter.parameters()])


@pytest.mark.slow
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


@pytest.mark.slow
def test_cached_activations_change_the_weights_by_rounding_only(clip: LoadedClip, pictures: TensorPictures) -> None:
    config = TrainConfig(epochs=2, batch=10)
    computed = train_adapter(clip, fresh(clip, 3), pictures, config)
    cached = train_adapter(clip, fresh(clip, 3), pictures, replace(config, cached_views=1))
    torch.testing.assert_close(weights(cached), weights(computed), atol=2e-3, rtol=0.05)
    assert not torch.equal(weights(cached), weights(computed))


@pytest.mark.slow
def test_accumulation_does_not_change_the_gradient(clip: LoadedClip, pictures: TensorPictures) -> None:
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
def test_normalisation_is_an_option(clip: LoadedClip, pictures: TensorPictures) -> None:
    config = TrainConfig(batch=30)
    ours = train_adapter(clip, fresh(clip), pictures, config)
    as_published = train_adapter(clip, fresh(clip), pictures, replace(config, normalise=False))
    assert not torch.equal(weights(ours), weights(as_published))


@pytest.mark.slow
def test_held_out_pictures_are_measured_each_epoch(clip: LoadedClip, pictures: TensorPictures, tmp_path: Path) -> None:
    reports = []
    held_out = SubsetPictures(validation_pictures(Geometry(64)), torch.arange(60))
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
        assert 0.1 < adapted.overlap_area < 0.9 and adapted.linear_probe > 5 / plain.classes
    assert reports[0][1] == reports[1][1], "the plain embeddings do not change"
    assert reports[0][2] != reports[0][1]
    assert abs(reports[0][1].overlap_area - reports[2][1].overlap_area) < 0.02, "cached in fp16, or computed"
    assert len((tmp_path / "0" / "epochs.csv").read_text().splitlines()) == 3


def write_folder(folder: Path, each: int) -> None:
    from PIL import Image

    for name in ("red", "blue"):
        (folder / name).mkdir(parents=True)
        for i in range(each):
            Image.new("RGB", (80 + i, 70), name).save(folder / name / f"{i}.png")


@pytest.mark.slow
def test_only_what_is_measured_is_encoded(
    clip: LoadedClip, pictures: TensorPictures, monkeypatch: pytest.MonkeyPatch
) -> None:
    held_out = SubsetPictures(validation_pictures(Geometry(64)), torch.arange(120))
    monkeypatch.setattr(probe_module, "MOST_PICTURES", 60)
    encoded: list[int] = []
    iterate = SubsetPictures.iterate

    def counted(self: SubsetPictures, order: torch.Tensor, batch: int):
        encoded.append(len(order))
        return iterate(self, order, batch)

    monkeypatch.setattr(SubsetPictures, "iterate", counted)
    measured = []
    train_adapter(
        clip,
        fresh(clip),
        pictures,
        TrainConfig(batch=30),
        held_out=held_out,
        report_epoch=lambda epoch, plain, adapted: measured.append(plain),
    )
    assert 30 <= max(encoded) <= 60 and measured[0].pictures == max(encoded)
    with torch.no_grad():
        rows = torch.from_numpy(probe_module.probed_rows(held_out.labels.numpy()))
        pixels = next(iterate(held_out, rows, 60))[1]
        mean, std = (torch.tensor(value).view(3, 1, 1) for value in (clip.mean, clip.std))
        whole = torch.nn.functional.normalize(encode_plain(clip, (pixels.float() / 255 - mean) / std), dim=-1)
    expected = probe_module.probe(whole.numpy(), held_out.labels[rows].numpy())
    assert measured[0].linear_probe == expected.linear_probe
    assert measured[0].auroc == pytest.approx(expected.auroc, abs=1e-4)


@pytest.mark.slow
def test_a_folder_trains_and_a_damaged_file_is_named(clip: LoadedClip, tmp_path: Path) -> None:
    write_folder(tmp_path, 3)
    source = FolderPictures(tmp_path, clip.geometry, workers=0)
    assert source.class_names == ["blue", "red"] and source.labels.tolist() == [0, 0, 0, 1, 1, 1]
    train_adapter(clip, fresh(clip), source, TrainConfig(batch=4))
    (tmp_path / "red" / "1.png").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"red/1\.png"):
        train_adapter(clip, fresh(clip), source, TrainConfig(batch=4))


def test_impossible_training_is_refused_before_it_starts(
    clip: LoadedClip, pictures: TensorPictures, tmp_path: Path
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
    with pytest.raises(OSError, match="cache fewer views"):
        train_adapter(clip, fresh(clip), pictures, TrainConfig(cached_views=10_000_000))
    for wrong in ({"epochs": 0}, {"precision": "fp8"}, {"learning_rate": 0.0}, {"cache_precision": "int8"}):
        with pytest.raises(ValueError, match="expected"):
            TrainConfig(**wrong)  # type: ignore[arg-type]
    for wrong in ({"momentum": 1.0}, {"local_scale": (0.5, 0.2)}, {"out_dim": 0}, {"teacher_temperature": (0.0, 0.1)}):
        with pytest.raises(ValueError, match="expected"):
            DinoConfig(**wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="cached_views=0"):
        dino_config(cached_views=1)


def test_learning_rate_and_weight_decay_follow_their_schedules() -> None:
    cosine = TrainConfig(epochs=3, learning_rate=1.0, min_learning_rate=0.1, schedule="cosine", warmup_epochs=1)
    rates = [cosine.learning_rate_at(step, 10) for step in range(30)]
    assert rates[0] == 0 and rates[5] == pytest.approx(0.5) and rates[10] == 1
    assert rates[20] == pytest.approx(0.55) and rates[29] == pytest.approx(0.1, abs=0.01)
    assert all(TrainConfig(learning_rate=0.5).learning_rate_at(step, 10) == 0.5 for step in range(10))
    dino = dino_config(batch=128, epochs=4, warmup_epochs=0)
    assert dino.learning_rate_at(0, 5) == pytest.approx(8e-4 / 2), "for a batch of 256"
    assert dino.weight_decay_at(0, 5) == pytest.approx(0.04) and dino.weight_decay_at(10, 5) == pytest.approx(0.22)
