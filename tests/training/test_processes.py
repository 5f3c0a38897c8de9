"""iosr-fast train-adapter on two processes over gloo: the same batches as one, and exact resumption after a kill."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from iosr_fast.backbones.adapter import load_adapter
from iosr_fast.training.processes import check_same, in_first_process
from tests import ROOT
from tests.cli import runs
from tests.forked import FORKED
from tests.training.small import logged, weights, write_folder
from tests.waiting import wait_until

SETTINGS: dict[str, Any] = {
    "supervised": {"held_out": 0.2, "training": {"epochs": 4, "batch": 16, "accumulate": 2, "cached_views": 1}},
    "dino": {
        "held_out": 0,
        "training": {"epochs": 1, "batch": 8, "accumulate": 2, "dino": {"out_dim": 64, "local_crops": 1}},
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pictures")
    write_folder(root, 24)
    return root


def arguments(folder: Path, out: Path, objective: str, workers: int = 0) -> list[str]:
    settings = out.with_suffix(".json")
    settings.write_text(json.dumps({"first_adapted_block": 5, "checkpoint_minutes": 1e-9, **SETTINGS[objective]}))
    options = ["--data", str(folder), "--out", str(out), "--objective", objective, "--settings", str(settings)]
    return [*options, "--workers", str(workers), "--accelerator", "cpu"]


def run_rank(rank: int, port: int, options: list[str], log: Path) -> None:
    """One of two processes of a training, with the environment that torchrun gives it."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    os.environ.update({name: str(value) for name, value in names.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_RUN_ID="test")
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.setpgid(0, 0)
    torch.set_num_threads(1)
    sys.argv = ["train-adapter", *options]
    from iosr_fast.cli import command
    from iosr_fast.cli.train_adapter import train_adapter

    command.run(train_adapter)


class Pair:
    """Two processes of one training, forked from a server that has imported torch once."""

    def __init__(self, options: list[str], log: Path) -> None:
        self.log = log
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.ranks = [FORKED.Process(target=run_rank, args=(rank, port, options, log)) for rank in range(2)]
        for process in self.ranks:
            process.start()

    def wait_for(self, out: Path, steps: int) -> None:
        """Until so many steps are logged."""

        def logged() -> int:
            return sum(path.read_bytes().count(b"\n") - 1 for path in folder_of(out).glob("log/*/metrics.csv"))

        wait_until(lambda: logged() >= steps or not all(process.is_alive() for process in self.ranks), 120)
        assert logged() >= steps, self.log.read_text()[-3000:]

    def signal(self, number: signal.Signals) -> None:
        for process in self.ranks:
            os.kill(process.pid, number)

    def exit_codes(self) -> list[int | None]:
        for process in self.ranks:
            process.join(200)
            process.kill()
        return [process.exitcode for process in self.ranks]


def group_lives(leader: Any) -> bool:
    try:
        os.killpg(leader.pid, 0)
    except ProcessLookupError:
        return False
    return True


def folder_of(out: Path) -> Path:
    return out.with_name(f"{out.name}.training")


def log_of(out: Path) -> list[dict[str, str]]:
    return logged(folder_of(out))


def assert_same_training(one: Path, other: Path) -> None:
    assert torch.equal(weights(load_adapter(one)), weights(load_adapter(other)))
    assert log_of(one) == log_of(other)


@pytest.mark.slow
def test_torchrun_and_a_pair_killed_and_resumed_end_with_the_same_weights(folder: Path, tmp_path: Path) -> None:
    """Also: one process sees the batches of two. It differs in dropout only, which the first step's loss ignores."""
    whole, killed, one = (tmp_path / f"{name}.safetensors" for name in ("whole", "killed", "one"))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "iosr_fast", "train-adapter", *arguments(folder, whole, "supervised")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 processes on cpu" in done.stdout and "overlap of held-out pictures" in done.stdout

    pair = Pair(arguments(folder, killed, "supervised"), tmp_path / "log.txt")
    pair.wait_for(killed, 3)  # the checkpoint of step 2 is written
    pair.ranks[1].kill()  # torchrun would end the other
    pair.signal(signal.SIGKILL)
    assert pair.exit_codes() == [-signal.SIGKILL] * 2
    assert not killed.exists() and any((folder_of(killed) / "checkpoints").iterdir())
    resumed = Pair(arguments(folder, killed, "supervised"), tmp_path / "log.txt")
    assert resumed.exit_codes() == [0, 0], resumed.log.read_text()[-3000:]
    assert_same_training(killed, whole)

    runs.done("train-adapter", *arguments(folder, one, "supervised"))
    losses = [float(log_of(out)[0]["loss"]) for out in (one, whole)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5), "a fresh adapter changes nothing, dropped out or not"


@pytest.mark.slow
def test_a_pair_that_is_stopped_saves_the_same_step_and_resumes_exactly(folder: Path, tmp_path: Path) -> None:
    stopped, whole = tmp_path / "stopped.safetensors", tmp_path / "whole.safetensors"
    pair = Pair(arguments(folder, stopped, "dino", workers=1), tmp_path / "log.txt")
    pair.wait_for(stopped, 2)
    pair.signal(signal.SIGINT)
    assert pair.exit_codes() == [130, 130]
    wait_until(lambda: not any(map(group_lives, pair.ranks)), 20, "no process that decodes outlives the training")
    match = re.search(r"stopped after step (\d+) of 6", pair.log.read_text())
    assert match is not None, pair.log.read_text()[-3000:]
    step = int(match[1])
    assert (folder_of(stopped) / "checkpoints" / f"step-{step:09d}").is_dir() and len(log_of(stopped)) == step < 6
    for out in (stopped, whole):
        assert Pair(arguments(folder, out, "dino"), tmp_path / "log.txt").exit_codes() == [0, 0]
    assert_same_training(stopped, whole)


def test_processes_that_differ_are_refused_before_training() -> None:
    fabric = SimpleNamespace(world_size=2, global_rank=1, device="cpu", all_reduce=lambda value, reduce_op: value)
    fabric.broadcast = lambda key: {"seed": 0, "epochs": 1}  # of the first process
    check_same(fabric, {"seed": 0, "epochs": 1})
    with pytest.raises(ValueError, match="got in process 1 seed 1 where the first has 0"):
        check_same(fabric, {"seed": 1, "epochs": 1})
    fabric.all_reduce = lambda value, reduce_op: value + 1
    with pytest.raises(ValueError, match="got another in 1 of them"):
        check_same(fabric, {"seed": 0, "epochs": 1})


def test_an_error_of_the_first_process_is_raised_in_all() -> None:
    first = SimpleNamespace(is_global_zero=True, broadcast=lambda value: value)
    assert in_first_process(first, lambda: 1) == 1
    other = SimpleNamespace(is_global_zero=False, broadcast=lambda value: OSError("the disk is full"))
    with pytest.raises(OSError, match="the disk is full"):
        in_first_process(other, lambda: 1)
