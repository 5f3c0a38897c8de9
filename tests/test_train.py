"""The training loop: it learns, goes on after any interruption as if there had been none, refuses what can't work."""

from __future__ import annotations

import logging
import multiprocessing
import os
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch comes with the train extra")
pytest.importorskip("open_clip", reason="open_clip comes with the train extra")
pytest.importorskip("lightning_fabric", reason="lightning-fabric comes with the train extra")

from iosr_fast.offline.adapter import Adapter, init_adapter  # noqa: E402
from iosr_fast.offline.batches import cut  # noqa: E402
from iosr_fast.offline.clip import LoadedClip, load_clip  # noqa: E402
from iosr_fast.offline.data import FolderPictures, SubsetPictures, TensorPictures  # noqa: E402
from iosr_fast.offline.train import Progress, train_adapter  # noqa: E402
from iosr_fast.offline.train_config import DinoConfig, TrainConfig, dino_config  # noqa: E402
from tools.training.sources import validation_pictures  # noqa: E402

SUPERVISED = TrainConfig(epochs=3, batch=8, schedule="cosine", augment=True)
SMALL_HEAD = DinoConfig(out_dim=32, hidden=16, head_bottleneck=8, local_crops=2, momentum=0.9)
CONFIGS = {
    "supervised": SUPERVISED,
    "kept": replace(SUPERVISED, cached_views=2),
    "kept in bf16": replace(SUPERVISED, augment=False, cached_views=1, kept_precision="bf16"),
    "accumulated": replace(SUPERVISED, accumulate=2),
    "bf16-mixed": replace(SUPERVISED, precision="bf16-mixed"),
    "dino": dino_config(epochs=3, batch=8, warmup_epochs=1, dino=SMALL_HEAD),
}


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


class Stopped(Exception):
    pass


def stop_at(*when: int):
    def report(progress: Progress) -> None:
        if (progress.epoch, progress.step) == when:
            raise Stopped

    return report


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


def test_what_is_kept_changes_the_weights_by_rounding_only(clip: LoadedClip, pictures: TensorPictures) -> None:
    config = TrainConfig(epochs=2, batch=10)
    computed = train_adapter(clip, fresh(clip, 3), pictures, config)
    kept = train_adapter(clip, fresh(clip, 3), pictures, replace(config, cached_views=1))
    torch.testing.assert_close(weights(kept), weights(computed), atol=2e-3, rtol=0.05)
    assert not torch.equal(weights(kept), weights(computed))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_training_stopped_within_an_epoch_ends_as_an_uninterrupted_one(
    clip: LoadedClip, pictures: TensorPictures, tmp_path: Path, name: str
) -> None:
    config = CONFIGS[name]
    whole = train_adapter(clip, fresh(clip), pictures, config)
    with pytest.raises(Stopped):
        train_adapter(clip, fresh(clip), pictures, config, tmp_path, stop_at(2, 4), checkpoint_every=3)
    steps: list[tuple[int, int]] = []
    resumed = train_adapter(
        clip, fresh(clip), pictures, config, tmp_path, lambda p: steps.append((p.epoch, p.step)), checkpoint_every=3
    )
    assert steps[0] == (2, 3), "the last checkpoint was of step 6, the second of epoch 2"
    torch.testing.assert_close(weights(resumed), weights(whole), atol=0, rtol=0)
    lines = (tmp_path / "steps.csv").read_text().splitlines()
    assert len(lines) == 1 + 12, "a line a step, none twice"


def test_a_signal_ends_the_training_after_the_step_and_saves_it(
    clip: LoadedClip, pictures: TensorPictures, tmp_path: Path
) -> None:
    def report(progress: Progress) -> None:
        if (progress.epoch, progress.step) == (2, 2):
            os.kill(os.getpid(), signal.SIGTERM)

    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt, match="stopped after step 7 of 12"):
        train_adapter(clip, fresh(clip), pictures, SUPERVISED, tmp_path, report)
    assert signal.getsignal(signal.SIGTERM) == handler
    resumed = train_adapter(clip, fresh(clip), pictures, SUPERVISED, tmp_path)
    whole = train_adapter(clip, fresh(clip), pictures, SUPERVISED)
    torch.testing.assert_close(weights(resumed), weights(whole), atol=0, rtol=0)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_a_signal_to_all_processes_of_the_group_leaves_those_that_decode(
    clip: LoadedClip, tmp_path: Path, number: signal.Signals
) -> None:
    """Ctrl-C in a terminal, torchrun and batch systems signal the group; the step needs its pictures all the same."""
    write_folder(tmp_path / "in", 20)
    source = FolderPictures(tmp_path / "in", clip.image_size, workers=2)
    signalled = []

    def report(progress: Progress) -> None:
        if (progress.epoch, progress.step) == (1, 2):
            children = multiprocessing.active_children()
            signalled.extend(children)
            for child in children:
                assert child.pid is not None
                os.kill(child.pid, number)
            for child in children:
                child.join(0.5)
            assert all(child.is_alive() for child in children)
            os.kill(os.getpid(), number)

    with pytest.raises(KeyboardInterrupt, match="stopped after step 3 of 10"):
        train_adapter(clip, fresh(clip), source, TrainConfig(batch=4), tmp_path / "out", report)
    assert len(signalled) == 2
    assert (tmp_path / "out" / "checkpoints" / "step-000000003").is_dir()


def test_checkpoints_by_time_come_between_those_of_the_epochs(
    clip: LoadedClip, pictures: TensorPictures, tmp_path: Path
) -> None:
    for minutes, last in ((1e-6, "step-000000005"), (60.0, "step-000000004")):
        folder = tmp_path / last
        with pytest.raises(Stopped):
            train_adapter(clip, fresh(clip), pictures, SUPERVISED, folder, stop_at(2, 2), checkpoint_minutes=minutes)
        assert max(path.name for path in (folder / "checkpoints").iterdir()) == last


def scaled() -> Any:
    """16-mixed with a gradient scaler, as on a GPU; Lightning takes bfloat16 on a CPU where it chooses by itself."""
    from lightning_fabric import Fabric
    from lightning_fabric.plugins import MixedPrecision

    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
    return Fabric(accelerator="cpu", devices=1, plugins=[MixedPrecision("16-mixed", "cpu", scaler)])


def test_the_gradient_scaler_goes_on_as_well(clip: LoadedClip, pictures: TensorPictures, tmp_path: Path) -> None:
    config = replace(SUPERVISED, precision="16-mixed", clip_grad=1.0)
    fabric = scaled()
    whole = train_adapter(clip, fresh(clip), pictures, config, fabric=fabric)
    with pytest.raises(Stopped):
        train_adapter(clip, fresh(clip), pictures, config, tmp_path, stop_at(2, 3), fabric=scaled())
    resuming = scaled()
    resumed = train_adapter(clip, fresh(clip), pictures, config, tmp_path, fabric=resuming)
    torch.testing.assert_close(weights(resumed), weights(whole), atol=0, rtol=0)
    assert resuming._precision.state_dict() == fabric._precision.state_dict() != scaled()._precision.state_dict()


@pytest.mark.filterwarnings("ignore:You passed .Fabric")
def test_a_checkpoint_without_a_scaler_goes_on_with_one(
    clip: LoadedClip, pictures: TensorPictures, tmp_path: Path
) -> None:
    config = replace(SUPERVISED, epochs=2, precision="16-mixed")
    with pytest.raises(Stopped):
        train_adapter(clip, fresh(clip), pictures, config, tmp_path, stop_at(2, 1))
    steps: list[int] = []
    train_adapter(clip, fresh(clip), pictures, config, tmp_path, lambda p: steps.append(p.epoch), fabric=scaled())
    assert steps == [2, 2, 2, 2]


@pytest.mark.parametrize("damage", ["cut", "flipped", "no manifest", "empty manifest"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    clip: LoadedClip, pictures: TensorPictures, tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    with pytest.raises(Stopped):
        train_adapter(clip, fresh(clip), pictures, SUPERVISED, tmp_path, stop_at(3, 1))
    one, two = sorted((tmp_path / "checkpoints").iterdir())
    assert (one.name, two.name) == ("step-000000004", "step-000000008")
    state, manifest = two / "state.safetensors", two / "manifest.json"
    content = bytearray(state.read_bytes())
    if damage == "cut":
        state.write_bytes(content[:-100])
    elif damage == "flipped":
        content[-50] ^= 1
        state.write_bytes(content)
    elif damage == "no manifest":
        manifest.unlink()
    else:
        manifest.write_text("")
    steps: list[int] = []
    with caplog.at_level(logging.WARNING):
        resumed = train_adapter(
            clip, fresh(clip), pictures, SUPERVISED, tmp_path, lambda progress: steps.append(progress.epoch)
        )
    assert "step-000000008 is damaged and passed over" in caplog.text and steps[0] == 2
    whole = train_adapter(clip, fresh(clip), pictures, SUPERVISED)
    torch.testing.assert_close(weights(resumed), weights(whole), atol=0, rtol=0)
    (two / "manifest.json").unlink()  # a second time
    again = train_adapter(clip, fresh(clip), pictures, SUPERVISED, tmp_path)
    torch.testing.assert_close(weights(again), weights(whole), atol=0, rtol=0)


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Writing beyond `size` bytes fails in this process, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_an_error_that_loses_nothing(clip: LoadedClip, pictures: TensorPictures, tmp_path: Path) -> None:
    with largest_file(4096), pytest.raises(OSError, match=r"can't write a checkpoint of step 4 .*none is there yet"):
        train_adapter(clip, fresh(clip), pictures, SUPERVISED, tmp_path / "first")
    with pytest.raises(Stopped):
        train_adapter(clip, fresh(clip), pictures, SUPERVISED, tmp_path, stop_at(2, 1))
    with largest_file(4096), pytest.raises(OSError, match=r"step 8 .*step 4 is safe there: free some space"):
        train_adapter(clip, fresh(clip), pictures, SUPERVISED, tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000000004"]
    resumed = train_adapter(clip, fresh(clip), pictures, SUPERVISED, tmp_path)
    whole = train_adapter(clip, fresh(clip), pictures, SUPERVISED)
    torch.testing.assert_close(weights(resumed), weights(whole), atol=0, rtol=0)


def test_another_training_does_not_go_on_from_these_checkpoints(
    clip: LoadedClip, pictures: TensorPictures, tmp_path: Path
) -> None:
    train_adapter(clip, fresh(clip), pictures, replace(SUPERVISED, epochs=1), tmp_path)
    with pytest.raises(ValueError, match=r"another training \(epochs 3 where it has 1\)"):
        train_adapter(clip, fresh(clip), pictures, SUPERVISED, tmp_path)
    other = TensorPictures(pictures.images.flip(0), pictures.labels, pictures.class_names)
    with pytest.raises(ValueError, match=r"another training \(source "):
        train_adapter(clip, fresh(clip), other, replace(SUPERVISED, epochs=1), tmp_path)


def test_accumulation_does_not_change_the_gradient(clip: LoadedClip, pictures: TensorPictures) -> None:
    config = TrainConfig(epochs=2, batch=12)  # the last step has 6
    made = [
        weights(train_adapter(clip, init_adapter(clip, 4, 8, dropout=0.0), pictures, replace(config, accumulate=parts)))
        for parts in (1, 3)
    ]
    torch.testing.assert_close(made[1], made[0], atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("count", [1, 5, 16, 17, 23])
def test_each_picture_is_in_one_process_at_one_step(world: int, count: int) -> None:
    config = TrainConfig(batch=8, accumulate=2)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(count))
    ranks = [cut(order, config, world, rank) for rank in range(world)]
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
    with pytest.raises(ValueError, match="2 processes can take in 3 equal parts each, got 8; a multiple of 6 does"):
        cut(torch.arange(8), TrainConfig(batch=8, accumulate=3), 2, 0)


def test_normalisation_is_an_option(clip: LoadedClip, pictures: TensorPictures) -> None:
    config = TrainConfig(batch=30)
    ours = train_adapter(clip, fresh(clip), pictures, config)
    as_published = train_adapter(clip, fresh(clip), pictures, replace(config, normalise=False))
    assert not torch.equal(weights(ours), weights(as_published))


def test_held_out_pictures_are_measured_each_epoch(clip: LoadedClip, pictures: TensorPictures, tmp_path: Path) -> None:
    told = []
    held_out = SubsetPictures(validation_pictures(64), torch.arange(120))
    for cached_views in (0, 1):
        train_adapter(
            clip,
            fresh(clip),
            pictures,
            TrainConfig(epochs=2, batch=10, cached_views=cached_views),
            tmp_path / str(cached_views),
            held_out=held_out,
            report_epoch=lambda *measured: told.append(measured),
        )
    assert [epoch for epoch, _, _ in told] == [1, 2, 1, 2]
    for _, plain, adapted in told:
        assert plain.pictures == adapted.pictures == 120 and plain.classes >= 30
        assert 0.1 < adapted.overlap_area < 0.9 and adapted.linear_probe > 5 / plain.classes
    assert told[0][1] == told[1][1], "the plain embeddings do not change"
    assert told[0][2] != told[0][1]
    assert abs(told[0][1].overlap_area - told[2][1].overlap_area) < 0.02, "kept in fp16, or computed"
    assert len((tmp_path / "0" / "epochs.csv").read_text().splitlines()) == 3


def write_folder(folder: Path, each: int) -> None:
    from PIL import Image

    for name in ("red", "blue"):
        (folder / name).mkdir(parents=True)
        for i in range(each):
            Image.new("RGB", (80 + i, 70), name).save(folder / name / f"{i}.png")


def test_a_folder_trains_and_a_damaged_file_is_named(clip: LoadedClip, tmp_path: Path) -> None:
    write_folder(tmp_path, 3)
    source = FolderPictures(tmp_path, clip.image_size, workers=0)
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
    with pytest.raises(ValueError, match="3 equal parts each, got 128; a multiple of 3 does"):
        train_adapter(clip, fresh(clip), pictures, TrainConfig(accumulate=3), tmp_path / "uneven")
    assert not (tmp_path / "uneven").exists()
    with pytest.raises(OSError, match="fewer cached views"):
        train_adapter(clip, fresh(clip), pictures, TrainConfig(cached_views=10_000_000))
    for wrong in ({"epochs": 0}, {"precision": "fp8"}, {"learning_rate": 0.0}, {"kept_precision": "int8"}):
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
