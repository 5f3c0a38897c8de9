"""A training that is stopped, killed or out of disk resumes from its last whole checkpoint to the same weights."""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from iosr_fast.backbones.load import LoadedModel
from iosr_fast.cli.train_adapter import read_data
from iosr_fast.training.adapted_encoder import AdaptedEncoder
from iosr_fast.training.config import DinoConfig, TrainConfig, dino_config
from iosr_fast.training.pictures import TensorPictures, file_sources
from iosr_fast.training.train import StepReport, train_adapter
from tests.full_disk import largest_file
from tests.training.small import fresh, logged, weights, write_folder

pytestmark = pytest.mark.slow

SUPERVISED = TrainConfig(epochs=3, batch=8, schedule="cosine", augment=True)  # 4 steps an epoch
SHORT = TrainConfig(epochs=2, batch=15)  # 2 steps an epoch
EVERY_STEP = 1e-9  # minutes between checkpoints
SMALL_HEAD = DinoConfig(out_dim=32, hidden=16, head_bottleneck=8, local_crops=1, momentum=0.9)
CONFIGS = {
    "supervised": SUPERVISED,
    "cached": replace(SUPERVISED, cached_views=2),
    "accumulated": replace(SUPERVISED, accumulate=2),
    "bf16-mixed": replace(SUPERVISED, precision="bf16-mixed"),
    "dino": dino_config(epochs=3, batch=8, warmup_epochs=1, dino=SMALL_HEAD),
}
Train = Callable[..., Any]


@pytest.fixture(scope="module")
def train(clip: LoadedModel, pictures: TensorPictures) -> Train:
    """The weights of a training of a fresh adapter."""

    def train(folder: Path | None = None, report: Any = None, config: TrainConfig = SUPERVISED, **more: Any) -> Any:
        return weights(train_adapter(clip, fresh(clip), more.pop("source", pictures), config, folder, report, **more))

    return train


@pytest.fixture(scope="module")
def whole(train: Train) -> Callable[[str], Any]:
    """The weights of an uninterrupted training by the name of its config, each trained once."""
    return functools.cache(lambda name: train(config=CONFIGS[name]))


class Stopped(Exception):
    pass


def stop_at(*when: int) -> Callable[[StepReport], None]:
    def report(progress: StepReport) -> None:
        if (progress.epoch, progress.step) == when:
            raise Stopped

    return report


def checkpoints_in(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


@pytest.mark.parametrize("name", CONFIGS)
def test_a_training_stopped_within_an_epoch_ends_as_an_uninterrupted_one(
    train: Train, whole: Callable[[str], Any], tmp_path: Path, name: str
) -> None:
    with pytest.raises(Stopped):
        train(tmp_path, stop_at(2, 3), CONFIGS[name], checkpoint_minutes=EVERY_STEP)
    assert checkpoints_in(tmp_path) == ["step-000000005", "step-000000006"]
    steps: list[tuple[int, int]] = []
    assert torch.equal(train(tmp_path, lambda p: steps.append((p.epoch, p.step)), CONFIGS[name]), whole(name))
    assert steps[0] == (2, 3) and steps[-1] == (3, 4)
    assert [int(row["step"]) for row in logged(tmp_path)] == list(range(1, 13))


def test_tensorboard_shows_a_resumed_training_as_one(train: Train, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with pytest.raises(Stopped):
        train(tmp_path, stop_at(2, 2), SHORT, tensorboard=True)
    train(tmp_path, config=SHORT, tensorboard=True)
    events = {}
    for version in ("version_0", "version_1"):
        accumulator = EventAccumulator(str(tmp_path / "log" / version)).Reload()
        events |= {event.step: event.value for event in accumulator.Scalars("loss")}
    assert events == {int(row["step"]): pytest.approx(float(row["loss"])) for row in logged(tmp_path)}
    assert sorted(events) == [1, 2, 3, 4]


def test_a_signal_ends_the_caching_of_a_view_too(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    def stem(self: AdaptedEncoder, pixels: torch.Tensor) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return (torch.zeros(len(pixels), *self.stem_shape),) * 2

    monkeypatch.setattr(AdaptedEncoder, "stem", stem)
    with pytest.raises(KeyboardInterrupt, match="stopped after step 0 of 12"):
        train(config=CONFIGS["cached"])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_a_signal_ends_the_training_after_the_step_that_it_saves_and_leaves_processes_that_decode(
    clip: LoadedModel, train: Train, tmp_path: Path, number: signal.Signals
) -> None:
    """Ctrl-C in a terminal, torchrun and batch systems signal the group; the step needs its pictures all the same."""
    write_folder(tmp_path / "in", 20)
    source = file_sources(*read_data(tmp_path / "in"), clip.geometry, clip.geometry, 0, 0, workers=2).train
    signalled, handler = [], signal.getsignal(number)

    def report(progress: StepReport) -> None:
        if (progress.epoch, progress.step) == (1, 2):
            children = multiprocessing.active_children()
            signalled.extend(children)
            for child in children:
                os.kill(child.pid, number)
                child.join(0.5)
            assert all(child.is_alive() for child in children)
            os.kill(os.getpid(), number)

    with pytest.raises(KeyboardInterrupt, match="stopped after step 3 of 10"):
        train(tmp_path / "out", report, TrainConfig(batch=4), source=source)
    assert len(signalled) == 2 and checkpoints_in(tmp_path / "out") == ["step-000000003"]
    assert signal.getsignal(number) == handler


def scaled() -> Any:
    """16-mixed with a gradient scaler, as on a GPU; Lightning takes bfloat16 on a CPU where it chooses by itself."""
    from lightning_fabric import Fabric
    from lightning_fabric.plugins import MixedPrecision

    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
    return Fabric(accelerator="cpu", devices=1, plugins=[MixedPrecision("16-mixed", "cpu", scaler)])


def test_the_gradient_scaler_resumes_too(train: Train, tmp_path: Path) -> None:
    config = replace(SHORT, precision="16-mixed", clip_grad=1.0)
    fabric, resuming = scaled(), scaled()
    uninterrupted = train(config=config, fabric=fabric)
    with pytest.raises(Stopped):
        train(tmp_path, stop_at(2, 1), config, fabric=scaled())
    assert torch.equal(train(tmp_path, config=config, fabric=resuming), uninterrupted)
    expected = fabric.strategy.precision.state_dict()
    assert resuming.strategy.precision.state_dict() == expected != scaled().strategy.precision.state_dict()


@pytest.mark.parametrize("file", ["state.safetensors", "manifest.json"])
def test_a_damaged_checkpoint_is_skipped_for_the_one_before(
    train: Train, whole: Callable[[str], Any], tmp_path: Path, caplog: pytest.LogCaptureFixture, file: str
) -> None:
    with pytest.raises(Stopped):
        train(tmp_path, stop_at(3, 1))
    (tmp_path / "checkpoints" / "step-000000008" / file).write_bytes(b"damaged")
    (tmp_path / "checkpoints" / "damaged-step-000000008").mkdir()  # of an earlier damage
    epochs: list[int] = []
    assert torch.equal(train(tmp_path, lambda progress: epochs.append(progress.epoch)), whole("supervised"))
    assert epochs[0] == 2 and "step-000000008 is damaged and skipped" in caplog.text
    assert any((tmp_path / "checkpoints" / "damaged-step-000000008").iterdir())


def test_a_full_disk_is_an_error_that_loses_nothing(train: Train, whole: Callable[[str], Any], tmp_path: Path) -> None:
    with largest_file(4096), pytest.raises(OSError, match=r"can't write a checkpoint of step 4 .*there is no other"):
        train(tmp_path / "first")
    with pytest.raises(Stopped):
        train(tmp_path, stop_at(2, 1))
    with largest_file(4096), pytest.raises(OSError, match=r"step 8 .*that of step 4 is intact: free some space"):
        train(tmp_path)
    assert checkpoints_in(tmp_path) == ["step-000000004"]
    assert torch.equal(train(tmp_path), whole("supervised"))


def test_another_training_does_not_go_on_from_these_checkpoints(
    train: Train, pictures: TensorPictures, tmp_path: Path
) -> None:
    train(tmp_path, config=SHORT)
    with pytest.raises(ValueError, match=r"another training \(epochs 3 where it has 2\)"):
        train(tmp_path, config=replace(SHORT, epochs=3))
    other = TensorPictures(pictures.images.flip(0), pictures.labels, pictures.class_names)
    with pytest.raises(ValueError, match=r"another training \(source "):
        train(tmp_path, config=SHORT, source=other)
