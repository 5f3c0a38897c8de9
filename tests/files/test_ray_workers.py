"""Runs on Ray: the same files as in one process, whichever worker dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from iosr_fast.classifier import Classifier
from iosr_fast.files.stream import ReadOptions
from iosr_fast.files.work import Classify
from iosr_fast.ray import Pool, Worker
from tests.files.runs import classify, done, embed, logged, part_bytes, write_pictures

pytestmark = pytest.mark.slow

OPTIONS = ("--chunk", "5", "--batch", "5", "--threads", "1")


def start(*words: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "iosr_fast", *map(str, words), *OPTIONS, "--ray", "--workers", "2"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_a_killed_worker_loses_nothing(bundle: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    given, out, parts = tmp_path / "in", tmp_path / "out", 80
    paths = write_pictures(given, 5 * parts)
    paths[140].write_bytes(b"no image")
    done(classify(bundle, given, "--out", tmp_path / "local", *OPTIONS[:4], "--skip-bad"))
    process = start("classify", bundle, given, "--out", out, "--skip-bad")
    try:
        deadline = time.monotonic() + 300
        while not logged(out) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        victim, before = logged(out)[0]["pid"], len(part_bytes(out))
        os.kill(victim, signal.SIGKILL)
        said, _ = process.communicate(timeout=400)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0, said
    assert 0 < before < parts and victim != process.pid
    assert len({part["pid"] for part in logged(out)}) == 3, "another worker took its place"
    assert sorted(part["part"] for part in logged(out)) == sorted(part_bytes(out)), "each part is logged once"
    assert part_bytes(out) == part_bytes(tmp_path / "local") and not list(out.glob(".*"))
    table = tmp_path / "labels.csv"
    process = start("classify", bundle, given, "--out", table, "--skip-bad")
    assert process.wait(180) == 0
    assert table.read_text() == classify(bundle, given, "--skip-bad", *OPTIONS[2:4]).stdout


def test_an_unreadable_image_is_named_and_the_run_resumes_without_ray(bundle: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    given, out = tmp_path / "in", tmp_path / "out"
    paths = write_pictures(given, 20)
    good = paths[12].read_bytes()
    paths[12].write_bytes(b"no image")
    process = start("embed", "--engine", bundle, "--input", given, "--out", out, "--runtime", "onnxruntime")
    said, _ = process.communicate(timeout=400)
    assert process.returncode == 2 and f"can't read image {paths[12]}: it is not an image of a known format" in said
    assert "part-00002.safetensors" not in part_bytes(out) and not (out / "manifest.json").exists()
    paths[12].write_bytes(good)
    done(embed(bundle, given, out, *OPTIONS[:4], "--runtime", "onnxruntime"))
    assert len(part_bytes(out)) == 4


def test_a_worker_refuses_another_classifier(bundle: Path, tmp_path: Path) -> None:
    classifier = Classifier.load(bundle)
    classifier.rename_class("~0", "another name", keep_text=True)
    classifier.save(tmp_path / "other")
    with pytest.raises(RuntimeError, match=r"one engine and classifier on all machines, but on .* classifier \(there"):
        Worker(Classify(str(tmp_path / "other")), {**Classify(str(bundle)).facts, "images": 0}, ReadOptions())


def test_a_cluster_without_room_for_a_worker_is_refused() -> None:
    assert Pool().room({"CPU": 9.0}, 4) == 2 and Pool(gpus=0.5).room({"CPU": 9.0, "GPU": 1.0}, 1) == 2
    with pytest.raises(RuntimeError, match="room for a worker of 64 cores and 0 GPUs, got a cluster of 9 cores"):
        Pool().room({"CPU": 9.0}, 64)
