"""Runs on Ray: the same files as in one process, whichever worker dies."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from iosr_fast.classifier import Classifier
from iosr_fast.files import part_folder
from iosr_fast.files.embedding_files import read_embeddings
from iosr_fast.files.part_folder import PartFolder
from iosr_fast.files.plan import Plan, make_plan
from iosr_fast.files.ray_workers import ATTEMPTS, Worker, attempt, row_of
from iosr_fast.files.source import Chunk
from iosr_fast.files.sources import folder_source
from iosr_fast.store.bundle import load_bundle
from iosr_fast.utils.manifest import read_manifest
from tests.files.runs import (
    assert_answers,
    assert_encodes,
    classified,
    logged,
    part_bytes,
    read_all,
    words,
    write_pictures,
)

pytestmark = pytest.mark.slow

OPTIONS = ("--chunk", "5", "--batch", "5")


def kill_a_worker(out: Path, running: Callable[[], bool]) -> tuple[int, str]:
    """SIGKILL a worker while it computes a part, once others are written; its pid, and the part it did not finish."""
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


def test_a_worker_killed_in_the_middle_loses_nothing(bundle: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray.data")
    given, out, parts = tmp_path / "in", tmp_path / "out", 40
    paths = write_pictures(given, 5 * parts)
    paths[140].write_bytes(b"no image")
    classified(bundle, given, tmp_path / "local", *OPTIONS, "--skip-bad")
    options = words("classify", bundle, given, out, *OPTIONS, "--skip-bad", "--ray", "--workers", "2")
    with (tmp_path / "said").open("w") as said:
        process = subprocess.Popen([sys.executable, "-m", "iosr_fast", *options], stdout=said, stderr=said)
        try:
            killed, unfinished = kill_a_worker(out, lambda: process.poll() is None)
            existing = part_bytes(out)
            assert process.wait(timeout=180) == 0, (tmp_path / "said").read_text()
        finally:
            process.kill()
            process.wait()
    assert 2 <= len(existing) < parts and killed != process.pid
    by = {entry["part"].split(".")[0]: entry["pid"] for entry in logged(out)}
    assert by[unfinished] != killed
    assert sorted(entry["part"] for entry in logged(out)) == sorted(part_bytes(out)), "each part is logged once"
    assert part_bytes(out) == part_bytes(tmp_path / "local")
    table = read_all(out)
    assert [i for i, error in enumerate(table["error"].to_pylist()) if error is not None] == [140]
    readable = [i for i in range(len(paths)) if i != 140]
    assert_answers(bundle, table.take(readable), [paths[i] for i in readable])
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


def test_on_a_cluster_that_is_running(engine: Path, cluster: dict[str, str], tmp_path: Path) -> None:
    given, out = tmp_path / "in", tmp_path / "out"
    paths = write_pictures(given, 30)
    good = paths[12].read_bytes()
    paths[12].write_bytes(b"no image")

    def run_there(out: Path, *options: str) -> subprocess.CompletedProcess[str]:
        words = ["--engine", str(engine), "--input", str(given), "--out", str(out), *OPTIONS]
        words += ["--ray", "--address", cluster["RAY_ADDRESS"], *options]
        command = [sys.executable, "-m", "iosr_fast", "embed", *words]
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


@dataclass
class Prepared:
    model: Path
    paths: list[Path]
    plan: Plan
    chunks: list[Chunk]
    out: Path

    def worker(self, model: Path | None = None, out: Path | None = None, plan: str | None = None) -> Worker:
        plan = self.plan.to_json() if plan is None else plan
        return Worker(str(model or self.model), self.plan.kind, plan, str(out or self.out), 1, False)

    def missing(self) -> list[Chunk]:
        with PartFolder(self.out, self.plan, self.chunks, False).open() as missing:
            return missing


@pytest.fixture(params=["embed", "classify"])
def prepared(request: pytest.FixtureRequest, engine: Path, bundle: Path, tmp_path: Path) -> Prepared:
    """A run in which nothing is computed yet."""
    model = engine if request.param == "embed" else bundle
    paths, out = write_pictures(tmp_path / "in", 12), tmp_path / "out"
    source = folder_source(tmp_path / "in")
    chunks = source.cut(6)
    loaded = None if model == engine else load_bundle(bundle)
    facts = read_manifest(engine if loaded is None else loaded.engine, "engine", verify=False)
    plan = make_plan(source, chunks, facts, "onnxruntime", chunk=6, batch=4, bundle=loaded, top=3)
    with PartFolder(out, plan, chunks, False).open():
        pass
    return Prepared(model, paths, plan, chunks, out)


def test_a_worker_keeps_the_part_that_a_dead_one_had_finished(prepared: Prepared) -> None:
    worker, row = prepared.worker(), row_of(prepared.chunks[1])
    first = worker(row)
    assert (first["images"], first["bad"], first["killer"]) == (6, "", False)
    part = prepared.out / first["part"]
    written = part.stat().st_mtime_ns
    assert worker(row)["images"] == 6 and part.stat().st_mtime_ns == written
    assert prepared.missing() == prepared.chunks[:1]
    part.write_bytes(b"damaged")
    assert worker(row)["images"] == 6
    assert prepared.plan.check_part(part, prepared.chunks[1]) == (None, 0)


def test_a_worker_names_a_bad_image_and_gives_up_a_chunk_that_kills(prepared: Prepared) -> None:
    worker, chunks = prepared.worker(), prepared.chunks
    prepared.paths[2].write_bytes(b"no image")
    result = worker(row_of(chunks[0]))
    assert result["bad"] == str(prepared.paths[2]) and "not an image" in result["reason"]
    part = prepared.out / prepared.plan.part_name(1)
    for died in range(ATTEMPTS):
        assert not worker(row_of(chunks[1]))["killer"]
        part.unlink()
        dying = attempt(part)
        assert dying.__enter__() == died  # a process that is killed never leaves the block
        part.parent.joinpath(f".{part.name}.{died}.attempt.tmp").touch()
        dying.__exit__(None, None, None)
    assert worker(row_of(chunks[1]))["killer"]
    assert prepared.missing() == chunks
    assert not worker(row_of(chunks[1]))["killer"], "a new run starts counting anew"


def test_a_worker_refuses_another_folder_engine_or_classifier(prepared: Prepared, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="to be one folder on all machines"):
        prepared.worker(out=tmp_path / "elsewhere")
    with pytest.raises(RuntimeError, match="has none; put it on the share"):
        prepared.worker(tmp_path / "nowhere")
    if prepared.plan.kind == "embeddings":
        other = json.dumps({**json.loads(prepared.plan.to_json()), "engine": "0" * 64}, indent=2)
        (prepared.out / part_folder.PLAN).write_text(other)
        with pytest.raises(RuntimeError, match="expected one engine on all machines"):
            prepared.worker(plan=other)
    else:
        classifier = Classifier.load(prepared.model)
        classifier.rename_class("~0", "another name", keep_text=True)
        classifier.save(tmp_path / "other")
        with pytest.raises(RuntimeError, match="expected one classifier on all machines"):
            prepared.worker(tmp_path / "other")
