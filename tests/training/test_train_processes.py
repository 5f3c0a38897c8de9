"""iosr-fast train-adapter on two processes over gloo: the same batches as one, and exact resumption after a kill."""

from __future__ import annotations

import multiprocessing
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests import ROOT

torch = pytest.importorskip("torch", reason="torch comes with the cpu extra")
pytest.importorskip("lightning_fabric", reason="lightning-fabric comes with the train extra")

from PIL import Image  # noqa: E402

from iosr_fast.clip.adapter import load_adapter  # noqa: E402
from iosr_fast.clip.demo.pictures import load_pictures  # noqa: E402
from iosr_fast.training.processes import check_same, check_shared  # noqa: E402

OPTIONS = {
    "supervised": "--epochs 4 --batch 16 --accumulate 2 --cached-views 1 --held-out 0.2",
    "dino": "--objective dino --epochs 1 --batch 8 --accumulate 2 --dino-out 64 --local-crops 1 --held-out 0",
}

SPAWN = multiprocessing.get_context("forkserver")
SPAWN.set_forkserver_preload(
    [
        "iosr_fast.training.train",
        "iosr_fast.training.sources",
        "torch.distributed",
        "torchvision.transforms.v2",
        "open_clip",
    ]
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A slice of the demo's generic pictures, 8 concepts in several styles, as a folder of class folders."""
    root = tmp_path_factory.mktemp("pictures")
    pictures = load_pictures("generic")
    for row in range(len(pictures.concepts)):
        if pictures.concepts[row] < 8:
            place = root / f"class {pictures.concepts[row]:02d}"
            place.mkdir(exist_ok=True)
            Image.fromarray(pictures.images[row]).save(place / f"{row}.png")
    return root


def arguments(folder: Path, out: Path, objective: str, workers: int = 0) -> list[str]:
    options = ["--data", str(folder), "--out", str(out), "--first-adapted-block", "5", "--checkpoint-every", "2"]
    return [*options, "--workers", str(workers), "--accelerator", "cpu", *shlex.split(OPTIONS[objective])]


def run_rank(rank: int, port: int, options: list[str], log: Path) -> None:
    """One of two processes of a training, with the environment that torchrun gives it."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    os.environ.update({name: str(value) for name, value in names.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_RUN_ID="test")
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    torch.set_num_threads(1)
    sys.argv = ["train_adapter.py", *options]
    from iosr_fast.cli.train_adapter import train_adapter
    from iosr_fast.utils import command

    command.run(train_adapter)


class Pair:
    """Two processes of one training, forked from a server that has imported torch once."""

    def __init__(self, options: list[str], log: Path) -> None:
        self.log = log
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.ranks = [SPAWN.Process(target=run_rank, args=(rank, port, options, log)) for rank in range(2)]
        for process in self.ranks:
            process.start()

    def wait_for(self, steps: Path, lines: int) -> None:
        """Until steps.csv has this many lines."""
        deadline = time.monotonic() + 120
        while not steps.is_file() or len(steps.read_bytes().splitlines()) < lines:
            assert all(process.is_alive() for process in self.ranks), self.log.read_text()[-3000:]
            assert time.monotonic() < deadline, self.log.read_text()[-3000:]
            time.sleep(0.005)

    def signal(self, number: signal.Signals) -> None:
        for process in self.ranks:
            assert process.pid is not None
            os.kill(process.pid, number)

    def exit_codes(self) -> list[int | None]:
        for process in self.ranks:
            process.join(200)
            process.kill()
        return [process.exitcode for process in self.ranks]


def weights(path: Path) -> torch.Tensor:
    return torch.cat([value.flatten() for value in load_adapter(path).parameters()])


def steps_csv(out: Path) -> Path:
    return out.with_name(f"{out.name}.training") / "steps.csv"


def assert_same_training(one: Path, other: Path) -> None:
    assert torch.equal(weights(one), weights(other))
    assert steps_csv(one).read_text() == steps_csv(other).read_text()


@pytest.mark.slow
def test_torchrun_and_a_pair_killed_and_resumed_end_with_the_same_weights(folder: Path, tmp_path: Path) -> None:
    """Also: one process sees the batches of two. It differs in dropout only, which the first step's loss ignores."""
    whole, killed, one = (tmp_path / f"{name}.safetensors" for name in ("whole", "killed", "one"))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(ROOT / "tools" / "train_adapter.py"), *arguments(folder, whole, "supervised")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 processes on cpu" in done.stdout and "linear probe" in done.stdout

    pair = Pair(arguments(folder, killed, "supervised"), tmp_path / "log.txt")
    pair.wait_for(steps_csv(killed), 4)  # the checkpoint of step 2 is written
    pair.ranks[1].kill()  # torchrun would end the other
    pair.signal(signal.SIGKILL)
    assert pair.exit_codes() == [-signal.SIGKILL] * 2
    assert not killed.exists() and any((steps_csv(killed).parent / "checkpoints").iterdir())
    resumed = Pair(arguments(folder, killed, "supervised"), tmp_path / "log.txt")
    assert resumed.exit_codes() == [0, 0], resumed.log.read_text()[-3000:]
    assert_same_training(killed, whole)

    from typer.testing import CliRunner

    from tests.cli.test_train_adapter import APP

    single = CliRunner().invoke(APP, arguments(folder, one, "supervised"))
    assert single.exit_code == 0, single.output
    losses = []
    for out in (one, whole):
        header, first, *_ = steps_csv(out).read_text().splitlines()
        losses.append(float(first.split(",")[header.split(",").index("loss")]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5), "a fresh adapter changes nothing, dropped out or not"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("objective", "number"), [("supervised", signal.SIGTERM), ("dino", signal.SIGINT)], ids=["SIGTERM", "dino, SIGINT"]
)
def test_a_pair_that_is_stopped_saves_the_same_step_and_resumes_exactly(
    folder: Path, tmp_path: Path, objective: str, number: signal.Signals
) -> None:
    stopped, whole = tmp_path / "stopped.safetensors", tmp_path / "whole.safetensors"
    # The signal also reaches the processes that decode.
    pair = Pair(arguments(folder, stopped, objective, workers=1), tmp_path / "log.txt")
    pair.wait_for(steps_csv(stopped), 3)
    pair.signal(number)
    assert pair.exit_codes() == [130, 130]
    text = pair.log.read_text()
    match = re.search(r"stopped after step (\d+) of (\d+)", text)
    assert match is not None, text[-3000:]
    step, total = int(match[1]), int(match[2])
    assert 2 <= step < total
    assert (steps_csv(stopped).parent / "checkpoints" / f"step-{step:09d}").is_dir()
    assert len(steps_csv(stopped).read_text().splitlines()) == 1 + step
    if objective == "dino":  # supervised: the test above
        for out in (stopped, whole):
            assert Pair(arguments(folder, out, objective), tmp_path / "log.txt").exit_codes() == [0, 0]
        assert_same_training(stopped, whole)


class FakeFabric:
    """One of two ranks in two threads: `broadcast` and `all_reduce` as Fabric's."""

    device, world_size = torch.device("cpu"), 2

    def __init__(self, rank: int, barrier: threading.Barrier, shared: dict[Any, Any]) -> None:
        self.global_rank, self.is_global_zero = rank, rank == 0
        self.barrier, self.shared, self.calls = barrier, shared, 0

    def _exchange(self, value: Any) -> tuple[Any, Any]:
        self.calls += 1
        self.shared[self.calls, self.global_rank] = value
        self.barrier.wait(10)
        return self.shared[self.calls, 0], self.shared[self.calls, 1]

    def broadcast(self, value: Any) -> Any:
        return self._exchange(value)[0]

    def all_reduce(self, value: torch.Tensor, reduce_op: str) -> torch.Tensor:
        assert reduce_op == "sum"
        first, second = self._exchange(value)
        return first + second


def on_two_ranks(check: Any, *values: Any) -> list[str]:
    """The messages of the ValueErrors that `check(fabric, value)` raises on each rank."""
    barrier, shared = threading.Barrier(2), {}  # type: ignore[var-annotated]

    def run(rank: int) -> str:
        try:
            check(FakeFabric(rank, barrier, shared), values[rank])
        except ValueError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(run, range(2)))


def test_processes_that_differ_are_refused_before_training(tmp_path: Path) -> None:
    assert on_two_ranks(check_same, {"seed": 0, "epochs": 1}, {"seed": 0, "epochs": 1}) == ["", ""]
    first, second = on_two_ranks(check_same, {"seed": 0, "epochs": 1}, {"seed": 1, "epochs": 1})
    assert "got in process 1 seed 1 where the first has 0" in second and "got another in 1 of them" in first
    assert on_two_ranks(check_shared, tmp_path / "a", tmp_path / "a") == ["", ""]
    for message in on_two_ranks(check_shared, tmp_path / "a", tmp_path / "b"):
        assert "1 of 2 see another folder than the first process" in message
    assert not list(tmp_path.rglob(".shared*"))
