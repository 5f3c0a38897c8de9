"""The training log: interrupted and resumed, it holds what an uninterrupted one does, in CSV and in TensorBoard."""

from __future__ import annotations

import csv
import os
import resource
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from iosr_fast.training import training_log
from iosr_fast.training.training_log import TrainingLog
from tests import ROOT

STEPS_AN_EPOCH = 5


def train(log: TrainingLog, first: int, last: int) -> None:
    """Log steps first..last as a training does: the loss of a step depends on the step alone."""
    for step in range(first, last + 1):
        epoch = (step - 1) // STEPS_AN_EPOCH + 1
        log.step(step, epoch, loss=1 / step, lr=8e-3 / step)
        if step % STEPS_AN_EPOCH == 0:
            log.epoch(step, epoch, overlap_area=1 / epoch, auroc=0.9)


def files(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in sorted(folder.glob("*.csv*"))}


def uninterrupted(folder: Path, last: int = 13) -> dict[str, str]:
    with closing(TrainingLog(folder, 0)) as log:
        train(log, 1, last)
    return files(folder)


def test_a_line_a_step_and_a_line_an_epoch_read_back_exactly(tmp_path: Path) -> None:
    log = TrainingLog(tmp_path, 0)
    log.step(1, 1, loss=0.1, accuracy=2 / 3)
    log.step(step=2, epoch=1, accuracy=float("nan"), loss=1e-30)  # in the order of the first line
    log.epoch(2, 1, auroc=1)
    # Written out by each call, not by close.
    assert (tmp_path / "steps.csv").read_text() == (
        "step,epoch,loss,accuracy\n1,1,0.1,0.6666666666666666\n2,1,1e-30,nan\n"
    )
    assert (tmp_path / "epochs.csv").read_text() == "step,epoch,auroc\n2,1,1.0\n"
    log.close()
    log.close()
    with (tmp_path / "steps.csv").open(newline="") as file:
        assert float(next(csv.DictReader(file))["accuracy"]) == 2 / 3


@pytest.mark.parametrize("checkpoint", [3, 5, 8, 10])
@pytest.mark.parametrize("torn", ["", "12", "12,3,0.08", "step,ep"])
def test_interrupted_and_resumed_is_as_uninterrupted(tmp_path: Path, checkpoint: int, torn: str) -> None:
    log = TrainingLog(tmp_path / "interrupted", 0)
    train(log, 1, 11)  # and is killed: never closed
    with (tmp_path / "interrupted" / "steps.csv").open("a") as file:
        file.write(torn)
    with closing(TrainingLog(tmp_path / "interrupted", checkpoint)) as log:
        train(log, checkpoint + 1, 13)
    assert files(tmp_path / "interrupted") == uninterrupted(tmp_path / "uninterrupted")


def test_resumed_at_the_last_line_nothing_is_rewritten(tmp_path: Path) -> None:
    whole = uninterrupted(tmp_path)
    inode = (tmp_path / "steps.csv").stat().st_ino
    TrainingLog(tmp_path, 13).close()
    assert files(tmp_path) == whole
    assert (tmp_path / "steps.csv").stat().st_ino == inode


def test_a_fresh_training_moves_an_earlier_one_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = uninterrupted(tmp_path)
    with closing(TrainingLog(tmp_path, 0)) as log:
        log.step(1, 1, other_columns=1.0)
    assert "is of an earlier training and is renamed to steps.previous.csv" in caplog.text
    assert files(tmp_path) == {
        "epochs.csv": "",
        "epochs.previous.csv": whole["epochs.csv"],
        "steps.csv": "step,epoch,other_columns\n1,1,1.0\n",
        "steps.previous.csv": whole["steps.csv"],
    }


@pytest.mark.parametrize("content", ["", "step,ep", "step,epoch,loss\n", "step,epoch,loss\n1,1"])
def test_killed_before_its_first_line_it_starts_afresh(tmp_path: Path, content: str) -> None:
    (tmp_path / "steps.csv").write_text(content)
    assert uninterrupted(tmp_path) == uninterrupted(tmp_path / "other")


WRITER = """
import sys
from pathlib import Path
from tests.training.test_training_log import *
with closing(TrainingLog(Path(sys.argv[1]), 0)) as log:
    print("ready", flush=True)
    train(log, 1, 10**9)
"""


@pytest.mark.slow
def test_killed_at_any_moment_it_goes_on(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WRITER, str(tmp_path / "killed")]
    writer = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT)
    try:
        assert writer.stdout is not None and writer.stdout.readline() == b"ready\n"
        while not (tmp_path / "killed" / "epochs.csv").stat().st_size:
            time.sleep(0.001)
    finally:
        writer.send_signal(signal.SIGKILL)
        writer.communicate()
    with closing(TrainingLog(tmp_path / "killed", 4)) as log:
        train(log, 5, 13)
    assert files(tmp_path / "killed") == uninterrupted(tmp_path / "uninterrupted")


def test_a_kill_while_lines_are_removed_removes_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = uninterrupted(tmp_path)

    def stop(*paths: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        TrainingLog(tmp_path, 7)
    monkeypatch.undo()
    assert {name: text for name, text in files(tmp_path).items() if not name.endswith(".tmp")} == whole
    with closing(TrainingLog(tmp_path, 7)) as log:
        train(log, 8, 13)
    assert files(tmp_path) == whole


def test_a_full_disk_leaves_whole_lines(tmp_path: Path) -> None:
    with closing(TrainingLog(tmp_path, 0)) as log:
        log.step(1, 1, loss=0.5)
        size = (tmp_path / "steps.csv").stat().st_size
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 3, hard))  # stands for a disk with room for three bytes
        try:
            with pytest.raises(OSError, match=r"can't be written completely; free disk space and resume"):
                log.step(2, 1, loss=0.25)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        log.step(2, 1, loss=0.25)
    assert (tmp_path / "steps.csv").read_text() == "step,epoch,loss\n1,1,0.5\n2,1,0.25\n"


def test_other_columns_are_refused_in_one_run_and_across_runs(tmp_path: Path) -> None:
    with closing(TrainingLog(tmp_path, 0)) as log:
        log.step(1, 1, loss=0.5)
        for values in ({"loss": 1.0, "more": 1.0}, {}, {"lr": 1.0}):
            with pytest.raises(ValueError, match=r"expected the values \['loss'\], the columns of .*steps.csv, got"):
                log.step(2, 1, **values)
    with (
        closing(TrainingLog(tmp_path, 1)) as log,
        pytest.raises(ValueError, match=r"the columns of .*steps.csv, got \['lr'\]; log the same"),
    ):
        log.step(2, 1, lr=0.5)
    assert (tmp_path / "steps.csv").read_text() == "step,epoch,loss\n1,1,0.5\n"


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("name,class\na,b\n", 1),
        ("step,epoch,loss\n1,1,0.5\n2,1\n", 3),
        ("step,epoch,loss\n1,1,0.5\n2,1,high\n3,1,0.1\n", 3),
        ("step,epoch,loss\n2,1,0.5\n2,1,0.5\n", 3),
        ("step,epoch,loss\n\n", 2),
    ],
)
def test_somebody_else_s_or_a_damaged_file_is_refused_and_left_alone(tmp_path: Path, content: str, line: int) -> None:
    uninterrupted(tmp_path)
    (tmp_path / "epochs.csv").write_text(content)
    before = files(tmp_path)
    for resume_step in (0, 3):
        with pytest.raises(ValueError, match=rf"epochs.csv to be a training's log .* in line {line}: .* move the file"):
            TrainingLog(tmp_path, resume_step)
        assert files(tmp_path) == before


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_shows_an_interrupted_training_as_an_uninterrupted_one(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    pytest.importorskip("torch")
    with closing(TrainingLog(tmp_path / "whole", 0, tensorboard=True)) as log:
        train(log, 1, 13)
    whole = scalars(tmp_path / "whole")
    assert set(whole) == {"train/loss", "train/lr", "held-out/overlap_area", "held-out/auroc"}
    assert whole["train/loss"] == [(step, pytest.approx(1 / step)) for step in range(1, 14)]
    assert whole["held-out/overlap_area"] == [(5, 1.0), (10, 0.5)]
    with closing(TrainingLog(tmp_path / "cut", 0, tensorboard=True)) as log:
        train(log, 1, 4)
        log.step(5, 1, loss=77.0, lr=77.0)  # what is taken again comes out otherwise, to be seen
        log.epoch(5, 1, overlap_area=77.0, auroc=77.0)
    with closing(TrainingLog(tmp_path / "cut", 4, tensorboard=True)) as log:
        train(log, 5, 13)
    assert scalars(tmp_path / "cut") == whole
    assert files(tmp_path / "cut") == files(tmp_path / "whole")


def test_a_missing_tensorboard_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(module: str, extra: str) -> Any:
        raise ImportError(f"{module} is needed here and is not installed: pip install 'iosr_fast[{extra}]' brings it")

    monkeypatch.setattr(training_log, "require", missing)
    with pytest.raises(ImportError, match=r"tensorboard is needed here .* pip install 'iosr_fast\[train\]'"):
        TrainingLog(tmp_path / "log", 0, tensorboard=True)
    assert not (tmp_path / "log").exists()
