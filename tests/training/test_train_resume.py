"""A training that is stopped, killed or out of disk resumes from its last whole checkpoint to the same weights."""

# ruff: noqa: F811 (the names of fixtures are those of arguments)

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch comes with the cpu extra")
pytest.importorskip("open_clip", reason="open_clip comes with the cpu extra")
pytest.importorskip("lightning_fabric", reason="lightning-fabric comes with the train extra")

from iosr_fast.clip.load import LoadedClip  # noqa: E402
from iosr_fast.training.checkpoints import Checkpoints  # noqa: E402
from iosr_fast.training.data import FolderPictures, TensorPictures  # noqa: E402
from iosr_fast.training.train import Progress, train_adapter  # noqa: E402
from iosr_fast.training.train_config import DinoConfig, TrainConfig, dino_config  # noqa: E402
from tests.training.test_train import (  # noqa: E402, F401 (clip and pictures are fixtures)
    SUPERVISED,
    clip,
    fresh,
    pictures,
    weights,
    write_folder,
)

pytestmark = pytest.mark.slow

SMALL_HEAD = DinoConfig(out_dim=32, hidden=16, head_bottleneck=8, local_crops=1, momentum=0.9)
CONFIGS = {
    "supervised": SUPERVISED,
    "cached": replace(SUPERVISED, cached_views=2),
    "cached in bf16": replace(SUPERVISED, augment=False, cached_views=1, cache_precision="bf16"),
    "accumulated": replace(SUPERVISED, accumulate=2),
    "bf16-mixed": replace(SUPERVISED, precision="bf16-mixed"),
    "dino": dino_config(epochs=3, batch=8, warmup_epochs=1, dino=SMALL_HEAD),
}


@pytest.fixture(scope="module")
def whole(clip: LoadedClip, pictures: TensorPictures) -> Callable[[str], torch.Tensor]:
    """The weights of an uninterrupted training by the name of its config, each trained once."""
    trained: dict[str, torch.Tensor] = {}

    def get(name: str) -> torch.Tensor:
        if name not in trained:
            trained[name] = weights(train_adapter(clip, fresh(clip), pictures, CONFIGS[name]))
        return trained[name]

    return get


class Stopped(Exception):
    pass


def stop_at(*when: int):
    def report(progress: Progress) -> None:
        if (progress.epoch, progress.step) == when:
            raise Stopped

    return report


@pytest.mark.parametrize("name", CONFIGS)
def test_a_training_stopped_within_an_epoch_ends_as_an_uninterrupted_one(
    clip: LoadedClip, pictures: TensorPictures, whole: Callable[[str], torch.Tensor], tmp_path: Path, name: str
) -> None:
    config = CONFIGS[name]
    with pytest.raises(Stopped):
        train_adapter(clip, fresh(clip), pictures, config, tmp_path, stop_at(2, 4), checkpoint_every=3)
    steps: list[tuple[int, int]] = []
    resumed = train_adapter(
        clip, fresh(clip), pictures, config, tmp_path, lambda p: steps.append((p.epoch, p.step)), checkpoint_every=3
    )
    assert steps[0] == (2, 3), "the last checkpoint was of step 6, the second of epoch 2"
    assert torch.equal(weights(resumed), whole(name))
    lines = (tmp_path / "steps.csv").read_text().splitlines()
    assert len(lines) == 1 + 12, "a line a step, none twice"


def test_a_signal_ends_the_training_after_the_step_and_saves_it(
    clip: LoadedClip, pictures: TensorPictures, whole: Callable[[str], torch.Tensor], tmp_path: Path
) -> None:
    def report(progress: Progress) -> None:
        if (progress.epoch, progress.step) == (2, 2):
            os.kill(os.getpid(), signal.SIGTERM)

    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt, match="stopped after step 7 of 12"):
        train_adapter(clip, fresh(clip), pictures, SUPERVISED, tmp_path, report)
    assert signal.getsignal(signal.SIGTERM) == handler
    resumed = train_adapter(clip, fresh(clip), pictures, SUPERVISED, tmp_path)
    assert torch.equal(weights(resumed), whole("supervised"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_a_signal_to_all_processes_of_the_group_leaves_those_that_decode(
    clip: LoadedClip, tmp_path: Path, number: signal.Signals
) -> None:
    """Ctrl-C in a terminal, torchrun and batch systems signal the group; the step needs its pictures all the same."""
    write_folder(tmp_path / "in", 20)
    source = FolderPictures(tmp_path / "in", clip.geometry, workers=2)
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
    config = TrainConfig(epochs=2, batch=15, precision="16-mixed", clip_grad=1.0)
    fabric = scaled()
    uninterrupted = train_adapter(clip, fresh(clip), pictures, config, fabric=fabric)
    with pytest.raises(Stopped):
        train_adapter(clip, fresh(clip), pictures, config, tmp_path, stop_at(2, 1), fabric=scaled())
    resuming = scaled()
    resumed = train_adapter(clip, fresh(clip), pictures, config, tmp_path, fabric=resuming)
    assert torch.equal(weights(resumed), weights(uninterrupted))
    assert (
        resuming.strategy.precision.state_dict()
        == fabric.strategy.precision.state_dict()
        != scaled().strategy.precision.state_dict()
    )


@pytest.mark.filterwarnings("ignore:You passed .Fabric")
def test_a_checkpoint_without_a_scaler_goes_on_with_one(
    clip: LoadedClip, pictures: TensorPictures, tmp_path: Path
) -> None:
    config = TrainConfig(epochs=2, batch=15, precision="16-mixed")
    with pytest.raises(Stopped):
        train_adapter(clip, fresh(clip), pictures, config, tmp_path, stop_at(2, 1))
    steps: list[int] = []
    train_adapter(clip, fresh(clip), pictures, config, tmp_path, lambda p: steps.append(p.epoch), fabric=scaled())
    assert steps == [2, 2]


@pytest.fixture(scope="module")
def stopped(clip: LoadedClip, pictures: TensorPictures, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a supervised training that stopped in its third epoch."""
    folder = tmp_path_factory.mktemp("stopped")
    with pytest.raises(Stopped):
        train_adapter(clip, fresh(clip), pictures, SUPERVISED, folder, stop_at(3, 1))
    return folder


@pytest.mark.parametrize("damage", ["cut", "flipped", "no manifest", "empty manifest"])
def test_a_damaged_checkpoint_is_skipped_for_the_one_before(
    stopped: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    folder = shutil.copytree(stopped / "checkpoints", tmp_path / "checkpoints")
    one, two = sorted(folder.iterdir())
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
    checkpoints = Checkpoints(folder, json.loads((one / "manifest.json").read_text())["key"])
    (folder / "damaged-step-000000008").mkdir()  # of an earlier damage
    checkpoint = checkpoints.latest()
    assert checkpoint is not None and checkpoint.step == 4
    assert not two.exists() and any((folder / "damaged-step-000000008").iterdir())
    assert "step-000000008 is damaged and skipped" in caplog.text


def test_a_training_with_a_damaged_checkpoint_ends_as_an_uninterrupted_one(
    clip: LoadedClip, pictures: TensorPictures, stopped: Path, whole: Callable[[str], torch.Tensor], tmp_path: Path
) -> None:
    folder = shutil.copytree(stopped, tmp_path / "out")
    (folder / "checkpoints" / "step-000000008" / "manifest.json").unlink()
    epochs: list[int] = []
    resumed = train_adapter(
        clip, fresh(clip), pictures, SUPERVISED, folder, lambda progress: epochs.append(progress.epoch)
    )
    assert epochs[0] == 2 and torch.equal(weights(resumed), whole("supervised"))


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Writing beyond `size` bytes fails in this process, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_an_error_that_loses_nothing(
    clip: LoadedClip, pictures: TensorPictures, whole: Callable[[str], torch.Tensor], tmp_path: Path
) -> None:
    with largest_file(4096), pytest.raises(OSError, match=r"can't write a checkpoint of step 4 .*there is no other"):
        train_adapter(clip, fresh(clip), pictures, SUPERVISED, tmp_path / "first")
    with pytest.raises(Stopped):
        train_adapter(clip, fresh(clip), pictures, SUPERVISED, tmp_path, stop_at(2, 1))
    with largest_file(4096), pytest.raises(OSError, match=r"step 8 .*that of step 4 is intact: free some space"):
        train_adapter(clip, fresh(clip), pictures, SUPERVISED, tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000000004"]
    resumed = train_adapter(clip, fresh(clip), pictures, SUPERVISED, tmp_path)
    assert torch.equal(weights(resumed), whole("supervised"))


def test_another_training_does_not_go_on_from_these_checkpoints(
    clip: LoadedClip, pictures: TensorPictures, tmp_path: Path
) -> None:
    train_adapter(clip, fresh(clip), pictures, replace(SUPERVISED, epochs=1), tmp_path)
    with pytest.raises(ValueError, match=r"another training \(epochs 3 where it has 1\)"):
        train_adapter(clip, fresh(clip), pictures, SUPERVISED, tmp_path)
    other = TensorPictures(pictures.images.flip(0), pictures.labels, pictures.class_names)
    with pytest.raises(ValueError, match=r"another training \(source "):
        train_adapter(clip, fresh(clip), other, replace(SUPERVISED, epochs=1), tmp_path)
