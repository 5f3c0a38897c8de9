"""tools/embed.py on Ray: the same files as in one process, whoever dies on the way."""

# ruff: noqa: F811 (the fixtures imported from tests.pipeline.test_embed are named again where they are asked for)

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from iosr_fast.pipeline.embedding_files import read_embeddings
from tests import ROOT
from tests.pipeline.test_embed import (  # noqa: F401 (engine is a fixture)
    ROOT,
    assert_encodes,
    embedded,
    engine,
    logged,
    part_bytes,
    write_pictures,
)
from tools.embedding import plan as plans
from tools.embedding.cluster import ATTEMPTS, Worker, _values, attempt
from tools.embedding.inputs import open_source
from tools.embedding.items import Chunk
from tools.embedding.plan import Plan

Engine = Path
OPTIONS = ("--chunk", "5", "--batch", "5")


def kill_in_the_middle(out: Path, running: Callable[[], bool]) -> tuple[int, str]:
    """SIGKILL a worker while it computes a part, when others are written; its pid, and the part it did not finish."""
    deadline = time.monotonic() + 120
    while running() and time.monotonic() < deadline:
        time.sleep(0.002)
        for mark in out.glob(".part-*.attempt.tmp") if len(part_bytes(out)) >= 2 else ():
            try:
                pid = int(mark.read_text().split()[0])
                os.kill(pid, signal.SIGSTOP)
            except (OSError, IndexError):
                continue  # finished in the meantime, or only just begun
            part = mark.name.removeprefix(".").split(".")[0]
            if mark.exists() and not list(out.glob(f"{part}.*")):
                os.kill(pid, signal.SIGKILL)
                return pid, part
            os.kill(pid, signal.SIGCONT)
    raise AssertionError("found no worker at work in the middle of the run")


@pytest.mark.slow
def test_a_worker_killed_in_the_middle_loses_nothing(engine: Engine, tmp_path: Path) -> None:
    pytest.importorskip("ray.data")
    given, out = tmp_path / "in", tmp_path / "out"
    paths = write_pictures(given, 400)
    embedded(engine, given, tmp_path / "local", *OPTIONS)
    words = ["--engine", str(engine), "--input", str(given), "--out", str(out), *OPTIONS]
    command = [sys.executable, str(ROOT / "tools" / "embed.py"), *words, "--ray", "--workers", "2", "--threads", "1"]
    with (tmp_path / "said").open("w") as said:
        process = subprocess.Popen(command, stdout=said, stderr=said)
        try:
            killed, unfinished = kill_in_the_middle(out, lambda: process.poll() is None)
            there = part_bytes(out)
            assert process.wait(timeout=180) == 0, (tmp_path / "said").read_text()
        finally:
            process.kill()
            process.wait()
    assert 2 <= len(there) < 80 and killed != process.pid
    by = {entry["part"].split(".")[0]: entry["pid"] for entry in logged(out)}
    assert by[unfinished] != killed
    assert sorted(entry["part"] for entry in logged(out)) == sorted(part_bytes(out)), "each part is told of once"
    part = read_embeddings(out)
    assert part.keys == [path.relative_to(given).as_posix() for path in paths]
    assert_encodes(engine, part, paths)
    assert part_bytes(out) == part_bytes(tmp_path / "local")
    assert not list(out.glob(".*"))


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[dict[str, str]]:
    """A cluster of this machine, which ends with the test: the environment for its `--address auto`."""
    pytest.importorskip("ray.data")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Whether the user has a token of Ray's lying about must not matter.
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}
    environment["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"] = "0"
    command = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--num-cpus=2"]
    command += [f"--port={port}", "--node-ip-address=127.0.0.1", "--include-dashboard=false"]
    with (tmp_path / "head").open("w") as said:
        process = subprocess.Popen(command, env=environment, stdout=said, stderr=said)
    try:
        deadline = time.monotonic() + 90
        while "Ray runtime started" not in (tmp_path / "head").read_text() and time.monotonic() < deadline:
            assert process.poll() is None, (tmp_path / "head").read_text()
            time.sleep(0.1)
        yield {**environment, "RAY_ADDRESS": f"127.0.0.1:{port}"}
    finally:
        process.terminate()
        process.wait(timeout=30)


@pytest.mark.slow
def test_on_a_cluster_that_is_running(engine: Engine, cluster: dict[str, str], tmp_path: Path) -> None:
    given, out = tmp_path / "in", tmp_path / "out"
    paths = write_pictures(given, 30)
    good = paths[12].read_bytes()
    paths[12].write_bytes(b"no image")

    def run_there(out: Path, *options: str) -> subprocess.CompletedProcess[str]:
        words = ["--engine", str(engine), "--input", str(given), "--out", str(out), *OPTIONS]
        words += ["--ray", "--address", cluster["RAY_ADDRESS"], *options]
        command = [sys.executable, str(ROOT / "tools" / "embed.py"), *words]
        return subprocess.run(command, env=cluster, capture_output=True, text=True, timeout=180)

    stopped = run_there(out, "--workers", "2", "--threads", "1")
    assert stopped.returncode == 2
    assert f"can't read image {paths[12]}: it is not an image of a known format" in stopped.stderr
    assert "part-00002.safetensors" not in part_bytes(out) and not (out / "manifest.json").exists()
    paths[12].write_bytes(good)
    done = run_there(out, "--workers", "2", "--threads", "1")
    assert done.returncode == 0, done.stderr
    assert_encodes(engine, read_embeddings(out), paths)
    refused = run_there(tmp_path / "other", "--threads", "64")
    assert refused.returncode == 2 and "expected room for a worker of 64 cores" in refused.stderr


# A worker by itself, without Ray


@pytest.fixture
def prepared(engine: Engine, tmp_path: Path) -> tuple[list[Path], Plan, list[Chunk], Path]:
    """Pictures, and a folder with their plan in which nothing is computed yet."""
    paths, out = write_pictures(tmp_path / "in", 12), tmp_path / "out"
    source = open_source(str(tmp_path / "in"))
    chunks = source.cut(6)
    manifest = json.loads((engine / "manifest.json").read_text())
    plan = plans.make_plan(
        source, chunks, manifest, "onnxruntime", chunk=6, batch=4, dtype="float32", file_format="safetensors"
    )
    with plans.locked(out):
        plans.enter_plan(out, plan)
    return paths, plan, chunks, out


def row_of(chunk: Chunk) -> dict[str, object]:
    return {"number": chunk.number, "items": json.dumps([_values(item) for item in chunk.items]), "rows": chunk.rows}


def test_a_worker_finds_done_what_one_that_died_had_finished(
    engine: Engine,
    prepared: tuple[list[Path], Plan, list[Chunk], Path],
) -> None:
    _, plan, chunks, out = prepared
    worker = Worker(str(engine), plan.to_json(), str(out), 1, False)
    first = worker(row_of(chunks[1]))
    assert (first["part"], first["images"], first["bad"], first["killer"]) == ("part-00001.safetensors", 6, "", False)
    written = (out / first["part"]).stat().st_mtime_ns
    assert worker(row_of(chunks[1]))["images"] == 6
    assert (out / first["part"]).stat().st_mtime_ns == written
    (out / first["part"]).write_bytes(b"damaged")
    assert worker(row_of(chunks[1]))["images"] == 6
    assert plans.check_part(out / first["part"], plan, chunks[1]) == (None, 0)


def test_a_worker_names_a_bad_image_and_gives_up_a_chunk_that_kills(
    engine: Engine,
    prepared: tuple[list[Path], Plan, list[Chunk], Path],
) -> None:
    paths, plan, chunks, out = prepared
    worker = Worker(str(engine), plan.to_json(), str(out), 1, False)
    paths[2].write_bytes(b"no image")
    told = worker(row_of(chunks[0]))
    assert told["bad"] == str(paths[2]) and "not an image" in told["reason"]
    part = out / "part-00001.safetensors"
    for died in range(ATTEMPTS):
        assert not worker(row_of(chunks[1]))["killer"]
        part.unlink()
        dying = attempt(part)
        assert dying.__enter__() == died  # a process that is killed never leaves the block
        part.parent.joinpath(f".{part.name}.{died}.attempt.tmp").touch()
        dying.__exit__(None, None, None)
    assert worker(row_of(chunks[1]))["killer"]
    assert plans.missing_parts(out, plan, chunks, False, print) == (chunks, 0)
    assert not worker(row_of(chunks[1]))["killer"], "a new run starts counting anew"


def test_a_worker_refuses_another_folder_and_another_engine(
    engine: Engine,
    prepared: tuple[list[Path], Plan, list[Chunk], Path],
    tmp_path: Path,
) -> None:
    _, plan, _, out = prepared
    with pytest.raises(RuntimeError, match="to be one folder on all machines"):
        Worker(str(engine), plan.to_json(), str(tmp_path / "elsewhere"), 1, False)
    with pytest.raises(RuntimeError, match="has none; put it on the share"):
        Worker(str(tmp_path / "nowhere"), plan.to_json(), str(out), 1, False)
    other = json.dumps({**json.loads(plan.to_json()), "engine": "0" * 64}, indent=2)
    (out / plans.PLAN).write_text(other)
    with pytest.raises(RuntimeError, match="expected one engine on all machines"):
        Worker(str(engine), other, str(out), 1, False)
