"""tools/train_adapter.py as it is used: two processes over gloo, killed at a random moment, and started again."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import ROOT

torch = pytest.importorskip("torch", reason="torch comes with the train extra")
pytest.importorskip("lightning_fabric", reason="lightning-fabric comes with the train extra")
if not Path("/proc/self/task").is_dir():
    pytest.skip("finds the processes of a training in /proc, which is Linux's", allow_module_level=True)

from PIL import Image  # noqa: E402

from iosr_fast.clip.adapter import load_adapter  # noqa: E402
from iosr_fast.clip.demo.pictures import load_pictures  # noqa: E402

OPTIONS = {
    "supervised": ["--epochs", "3", "--batch", "16", "--accumulate", "2", "--cached-views", "1"],
    "dino": ["--objective", "dino", "--epochs", "2", "--batch", "16", "--accumulate", "2", "--dino-out", "64"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A slice of the demo's generic pictures: 12 concepts in at least 4 styles, as a folder of class folders."""
    made = tmp_path_factory.mktemp("pictures")
    pictures = load_pictures("generic")
    for row in range(len(pictures.concepts)):
        if pictures.concepts[row] < 12:
            place = made / f"class {pictures.concepts[row]:02d}"
            place.mkdir(exist_ok=True)
            Image.fromarray(pictures.images[row]).save(place / f"{row}.png")
    return made


def start(folder: Path, out: Path, objective: str, log: Path, workers: int = 0) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(ROOT / "tools" / "train_adapter.py"), "--data", str(folder), "--out", str(out)]
    command += ["--first-adapted-block", "4", "--checkpoint-every", "2", "--workers", str(workers)]
    command += ["--held-out", "0.2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with log.open("ab") as told:
        return subprocess.Popen([*command, *OPTIONS[objective]], cwd=ROOT, env=environment, stdout=told, stderr=told)


def finish(process: subprocess.Popen[bytes], log: Path) -> None:
    assert process.wait(timeout=300) == 0, log.read_text()[-3000:]


def wait_for(process: subprocess.Popen[bytes], steps: Path, lines: int) -> None:
    """Until steps.csv has this many lines."""
    deadline = time.monotonic() + 120
    while not steps.is_file() or len(steps.read_bytes().splitlines()) < lines:
        assert process.poll() is None and time.monotonic() < deadline, "the training ended, or never began"
        time.sleep(0.005)


def kill_a_worker(process: subprocess.Popen[bytes], steps: Path, lines: int) -> None:
    """SIGKILL one of the two processes once steps.csv has this many lines; torchrun ends the other."""
    wait_for(process, steps, lines)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    assert process.wait(timeout=120) != 0


def weights(path: Path) -> torch.Tensor:
    return torch.cat([value.flatten() for value in load_adapter(path).parameters()])


@pytest.mark.slow
@pytest.mark.parametrize("objective", OPTIONS)
def test_two_processes_killed_and_resumed_end_as_two_that_were_not(
    folder: Path, tmp_path: Path, objective: str
) -> None:
    log = tmp_path / "log.txt"
    whole, resumed = tmp_path / "whole.safetensors", tmp_path / "resumed.safetensors"
    finish(start(folder, whole, objective, log), log)
    killed = start(folder, resumed, objective, log)
    training = tmp_path / "resumed.safetensors.training"
    kill_a_worker(killed, training / "steps.csv", 4)
    assert not resumed.exists() and any((training / "checkpoints").iterdir())
    finish(start(folder, resumed, objective, log), log)
    assert torch.equal(weights(resumed), weights(whole))
    plain_steps = (tmp_path / "whole.safetensors.training" / "steps.csv").read_text()
    assert (training / "steps.csv").read_text() == plain_steps, "the log as well"
    told = log.read_text()
    assert "2 processes on cpu" in told and "linear probe" in told


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_two_processes_asked_to_stop_save_the_same_step(folder: Path, tmp_path: Path, number: signal.Signals) -> None:
    log, out = tmp_path / "log.txt", tmp_path / "adapter.safetensors"
    process = start(folder, out, "supervised", log, workers=2)  # torchrun's signal reaches those as well
    training = tmp_path / "adapter.safetensors.training"
    wait_for(process, training / "steps.csv", 4)
    process.send_signal(number)
    assert process.wait(timeout=120) != 0
    told = log.read_text()
    found = re.search(r"stopped after step (\d+) of (\d+)", told)
    assert found is not None, told[-3000:]
    step = int(found[1])
    assert 3 <= step < int(found[2])
    assert (training / "checkpoints" / f"step-{step:09d}").is_dir()
    assert len((training / "steps.csv").read_text().splitlines()) == 1 + step


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "told"),
    [
        ("--out {}/machine$RANK/a.safetensors", "1 of 2 see another than the first one does"),
        ("--out {}/a.safetensors --seed $RANK", "got in process 1 seed 1 where the first has 0"),
    ],
    ids=["folders", "options"],
)
def test_processes_that_differ_are_found_out_before_training(
    folder: Path, tmp_path: Path, options: str, told: str
) -> None:
    train = f"'{sys.executable}' '{ROOT}/tools/train_adapter.py' --data '{folder}' --workers 0 --held-out 0 "
    train += options.format(f"'{tmp_path}'")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([*command, "bash", "-c", train], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0 and told in done.stderr, done.stderr[-3000:]
    assert not list(tmp_path.rglob("*.csv")) and not list(tmp_path.rglob(".shared*"))


@pytest.mark.slow
def test_one_process_and_two_see_the_same_batches(folder: Path, tmp_path: Path) -> None:
    """The weights differ by what dropout draws in each process alone; the first step's loss comes before it matters."""
    log = tmp_path / "log.txt"
    finish(start(folder, tmp_path / "two.safetensors", "supervised", log), log)
    command = [sys.executable, str(ROOT / "tools" / "train_adapter.py"), "--data", str(folder)]
    command += ["--out", str(tmp_path / "one.safetensors"), "--first-adapted-block", "4", "--workers", "0"]
    command += ["--held-out", "0.2", *OPTIONS["supervised"]]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    losses = []
    for name in ("one", "two"):
        lines = (tmp_path / f"{name}.safetensors.training" / "steps.csv").read_text().splitlines()
        column = lines[0].split(",").index("loss")
        losses.append(float(lines[1].split(",")[column]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5), "a fresh adapter changes nothing, dropped out or not"
