"""Interrupted runs: killed at any moment and resumed they give the bytes of an uninterrupted one, and never mix."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from iosr_fast.classifier import Classifier
from iosr_fast.files.embedding_files import read_embeddings
from iosr_fast.files.parts import LOG, open_parts
from iosr_fast.files.run import parts_of, run
from iosr_fast.files.source import read_source
from iosr_fast.files.work import Classify, Embed, ReadOptions
from tests.files.runs import classify, done, embed, logged, part_bytes, refused, write_pictures

pytestmark = pytest.mark.slow

KILLS = 8
OPTIONS = ReadOptions(batch=4, runtime="onnxruntime", threads=1, skip_bad=True)


def in_a_process(work: Callable[[], object], seconds: float) -> bool:
    """Whether `work` ends within the time, in a process of its own that SIGKILL ends otherwise."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            assert os.waitstatus_to_exitcode(status) == 0
            return True
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


@pytest.mark.parametrize("name", ["labels.csv", "labels.parquet", "labels", "embeddings"])
def test_a_run_killed_at_any_moment_ends_with_the_same_bytes(
    name: str, bundle: Path, tmp_path: Path, rng: np.random.Generator
) -> None:
    pytest.importorskip("pyarrow")
    paths = write_pictures(tmp_path / "in", 60)
    paths[31].write_bytes(b"no picture")
    source = read_source([str(tmp_path / "in")], relative=True)
    forms = {"labels.csv": "csv", "labels.parquet": "parquet", "labels": "parts"}
    work = Embed(str(bundle / "engine")) if name == "embeddings" else Classify(str(bundle), forms[name], 2)  # type: ignore[arg-type]
    whole, out = tmp_path / "whole" / name, tmp_path / name
    whole.parent.mkdir()
    started = time.monotonic()
    counts = run(work, source, whole, OPTIONS, chunk=4)
    seconds = time.monotonic() - started
    assert counts[:2] == (60, 1)

    def start() -> None:
        assert run(work, source, out, OPTIONS, chunk=4) == counts

    kills = 0
    while kills < KILLS and not in_a_process(start, rng.uniform(0.1, 0.6) * seconds):
        kills += 1
        if out.is_file() or (out / "manifest.json").exists():
            break  # killed when all was written
    before = part_bytes(out)
    if not out.is_file() or parts_of(out).exists():
        start()
    if out.suffix:
        assert out.read_bytes() == whole.read_bytes() and not parts_of(out).exists()
        return
    assert part_bytes(out) == part_bytes(whole) and before.items() <= part_bytes(out).items()
    assert not list(out.glob(".*")) and {line["part"] for line in logged(out)} == set(part_bytes(whole))
    assert len(logged(out)) <= len(part_bytes(whole)) + kills, "finished parts were to be kept"
    held = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in out.iterdir()}
    start()
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in out.iterdir()} == held


def test_ctrl_c_says_that_the_same_command_resumes(bundle: Path, tmp_path: Path) -> None:
    write_pictures(tmp_path / "in", 150)
    out = tmp_path / "labels.csv"
    words = ["classify", bundle, tmp_path / "in", "--out", out, "--chunk", "5", "--threads", "1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "iosr_fast", *map(str, words)],
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background jobs ignore Ctrl-C, and so would what they start.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        deadline = time.monotonic() + 60
        while len(part_bytes(parts_of(out))) < 3 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
    finally:
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and f"the same command resumes {out}" in said and "Traceback" not in said
    kept = {part["part"] for part in logged(parts_of(out))}
    assert 2 <= len(kept) < 30 and not out.exists()
    assert f"{5 * len(kept)} of 150 images are done already" in done(
        classify(bundle, tmp_path / "in", "--out", out, "--chunk", "5")
    )


def test_missing_damaged_and_foreign_parts_are_computed_again(
    bundle: Path, pictures: list[Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    done(embed(bundle, tmp_path / "in", out, "--chunk", "4"))
    whole = part_bytes(out)
    parts = [out / name for name in whole]
    parts[0].unlink()
    parts[1].write_bytes(whole[parts[1].name][:-100])
    shutil.copy(parts[5], parts[3])
    shutil.copy(pictures[0], pictures[17])
    with (out / LOG).open("a") as log:
        log.write('{"part": "half a li')
    said = done(embed(bundle, tmp_path / "in", out, "--chunk", "4"))
    assert [part["part"] for part in logged(out)[8:]] == [parts[i].name for i in (0, 1, 3, 4)]
    for i, reason in {1: "it is damaged", 3: "it is damaged or another", 4: "its images have changed since"}.items():
        assert f"{parts[i].name} is computed again: {reason}" in said
    changed = part_bytes(out)
    assert changed.pop(parts[4].name) != whole.pop(parts[4].name) and changed == whole
    part = read_embeddings(out)
    np.testing.assert_array_equal(part.embeddings.plain[17], part.embeddings.plain[0])


def test_runs_of_other_images_options_and_classifiers_never_mix(
    bundle: Path, pictures: list[Path], tmp_path: Path
) -> None:
    out = tmp_path / "labels.csv"
    pictures[20].write_bytes(b"no picture")
    refused(classify(bundle, tmp_path / "in", "--out", out, "--chunk", "5"))  # stops in its middle
    before = part_bytes(parts_of(out))

    def differs(*words: object, given: tuple[Path, ...] = (tmp_path / "in",), by: Path = bundle) -> str:
        said = refused(classify(by, *given, "--out", out, "--chunk", "5", *words))
        assert "holds parts of another run, which differs in" in said and part_bytes(parts_of(out)) == before
        return said

    assert "top (there 1, now 2)" in differs("--top", "2")
    assert "batch (there 16, now 2)" in differs("--batch", "2")
    assert "unknown_label (there None, now unknown); keep (there None, now 0.9)" in differs(
        "--reject-unknown", "--keep", "0.9"
    )
    assert "images (there 30, now 29)" in differs(given=tuple(pictures[:29]))
    classifier = Classifier.load(bundle)
    classifier.rename_class("~0", "another name", keep_text=True)
    classifier.save(tmp_path / "other")
    assert "classifier (there " in differs(by=tmp_path / "other")
    Image.new("RGB", (9, 9)).save(pictures[20])
    done(classify(bundle, tmp_path / "in", "--out", out, "--chunk", "5"))


def test_two_runs_never_write_to_one_folder(bundle: Path, pictures: list[Path], tmp_path: Path) -> None:
    with open_parts(tmp_path / "out", {"a": 1}, [], ".x"):
        assert "another run is writing to" in refused(embed(bundle, tmp_path / "in", tmp_path / "out"))
    assert "holds parts of another run, which differs in a (there 1" in refused(
        embed(bundle, tmp_path / "in", tmp_path / "out")
    )


def test_a_log_survives_a_kill_at_each_byte_and_is_never_taken_from_others(tmp_path: Path) -> None:
    with open_parts(tmp_path, {"a": 1, "images": 0}, [], ".x"):
        whole = (tmp_path / LOG).read_bytes()
    for cut in range(len(whole)):
        (tmp_path / LOG).write_bytes(whole[:cut])
        with open_parts(tmp_path, {"a": 1, "images": 0}, [], ".x"):
            assert (tmp_path / LOG).read_bytes() == whole
    for foreign, message in ((b"somebody's notes", "found another file"), (b"notes\n", "log.jsonl is damaged")):
        (tmp_path / LOG).write_bytes(foreign)
        with pytest.raises(ValueError, match=message), open_parts(tmp_path, {"a": 1, "images": 0}, [], ".x"):
            pass
        assert (tmp_path / LOG).read_bytes() == foreign
