"""Interrupted runs: killed at any moment and resumed they give the bytes of an uninterrupted one, and never mix."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
from PIL import Image

from iosr_fast.classifier import Classifier
from iosr_fast.exceptions import BadImageError
from iosr_fast.files import parts, tables
from iosr_fast.files.embedding_files import read_embeddings
from iosr_fast.files.parts import LOG, open_parts, parts_of
from iosr_fast.files.run import run
from iosr_fast.files.source import read_source
from iosr_fast.files.stream import ReadOptions
from iosr_fast.files.work import Classify, Embed
from iosr_fast.sealed import files
from tests.files.runs import classify, done, embed, logged, part_bytes, refused, write_pictures

pytestmark = pytest.mark.slow

OPTIONS = ReadOptions(batch=4, runtime="onnxruntime", threads=1, skip_bad=True)
WRITERS = tuple(module.__file__ for module in (files, parts, tables))


def held(folder: Path) -> dict[str, bytes]:
    """The files of a folder and below, temporary ones left out."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and ".tmp" not in str(path))
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def left_by_kills(work: Callable[[], object], folder: Path, states: Path) -> list[Path]:
    """Copies of each state of `folder` in which a kill at any line of the writing modules leaves it."""
    seen: set[tuple[tuple[str, bytes], ...]] = set()

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        if frame.f_code.co_filename not in WRITERS:
            return None
        paths = sorted(folder.rglob("*"))
        state = tuple((str(path), path.read_bytes() if path.is_file() else b"") for path in paths)
        if state not in seen:
            shutil.copytree(folder, states / f"{len(seen)}")
            seen.add(state)
        return trace

    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(None)
    return [states / f"{number}" for number in range(len(seen))]


@pytest.mark.parametrize("name", ["labels.csv", "labels.parquet", "labels", "embeddings"])
def test_a_run_killed_at_any_moment_ends_with_the_same_bytes(name: str, bundle: Path, tmp_path: Path) -> None:
    write_pictures(tmp_path / "in", 12)[7].write_bytes(b"no picture")
    source = read_source([str(tmp_path / "in")], relative=True)
    forms = {"labels.csv": "csv", "labels.parquet": "parquet", "labels": "parts"}
    work = Embed(str(bundle / "engine")) if name == "embeddings" else Classify(str(bundle), forms[name], 2)  # type: ignore[arg-type]

    def finish(folder: Path) -> None:
        assert run(work, source, folder / name, OPTIONS, chunk=4)[:2] == (12, 1)

    (whole := tmp_path / "whole").mkdir()
    states = left_by_kills(lambda: finish(whole), whole, tmp_path / "states")
    final = held(whole)
    assert len(states) > 8 and (name in final or f"{name}/manifest.json" in final)
    for state in states:
        before = held(state)
        results = {file: content for file, content in before.items() if LOG not in file and ".parts" not in file}
        assert results.items() <= final.items(), "nothing appears half"
        if "." not in name or name not in before or parts_of(state / name).exists():
            finish(state)
        assert held(state) == final, "parts that were logged are logged once"
    times = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    if "." not in name:
        finish(whole)
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*")} == times


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
        while len(logged(parts_of(out))) < 3 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
    finally:
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and f"the same command resumes {out}" in said and "Traceback" not in said
    kept = {part["part"] for part in logged(parts_of(out))}
    assert 2 <= len(kept) < 30 and not out.exists()
    said = done(classify(bundle, tmp_path / "in", "--out", out, "--chunk", "5"))
    assert f"{5 * len(kept)} of 150 images are done already" in said


@pytest.mark.parametrize("form", ["csv", "parquet"])
def test_damage_in_an_unfinished_table_is_found(
    form: Any, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (paths := write_pictures(tmp_path / "in", 16))[14].write_bytes(b"no picture")
    work, source, out = Classify(str(bundle), form), read_source([str(tmp_path / "in")]), tmp_path / f"labels.{form}"
    with pytest.raises(BadImageError):
        run(work, source, out, replace(OPTIONS, skip_bad=False), chunk=4)
    shutil.copy(paths[0], paths[14])
    run(work, source, tmp_path / f"whole.{form}", OPTIONS, chunk=4)
    (rows,) = parts_of(out).glob("rows*")
    left, log = rows.read_bytes(), (parts_of(out) / LOG).read_bytes()
    first, second, _ = (line["size"] for line in logged(parts_of(out)))
    flipped = left[:first] + bytes([left[first] ^ 1]) + left[first + 1 :]
    for damaged, kept in ((left + b"more", 12), (left[:-1], 8), (left[: first + second], 8), (flipped, 4)):
        parts_of(out).mkdir(exist_ok=True)
        rows.write_bytes(damaged)
        (parts_of(out) / LOG).write_bytes(log)
        capsys.readouterr()
        run(work, source, out, OPTIONS, chunk=4)
        said = capsys.readouterr().err
        assert f"{kept} of 16 images are done already" in said
        assert ("and what follows it, is computed again: it is damaged" in said) == (damaged in (left[:-1], flipped))
        assert out.read_bytes() == (tmp_path / f"whole.{form}").read_bytes() and not parts_of(out).exists()
        out.unlink()


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
    before = held(parts_of(out))

    def differs(*words: object, given: tuple[Path, ...] = (tmp_path / "in",), by: Path = bundle) -> str:
        said = refused(classify(by, *given, "--out", out, "--chunk", "5", *words))
        assert "holds parts of another run, which differs in" in said and held(parts_of(out)) == before
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
    with open_parts(tmp_path / "out", {"a": 1}, [], Classify(str(bundle))):
        assert "another run is writing to" in refused(embed(bundle, tmp_path / "in", tmp_path / "out"))
    said = refused(embed(bundle, tmp_path / "in", tmp_path / "out"))
    assert "holds parts of another run, which differs in a (there 1" in said


def test_a_log_survives_a_kill_at_each_byte_and_is_never_taken_from_others(tmp_path: Path) -> None:
    plan, work = {"a": 1, "images": 0}, Classify("nowhere")
    with open_parts(tmp_path, plan, [], work):
        whole = (tmp_path / LOG).read_bytes()
    for cut in range(len(whole)):
        (tmp_path / LOG).write_bytes(whole[:cut])
        with open_parts(tmp_path, plan, [], work):
            assert (tmp_path / LOG).read_bytes() == whole
    for foreign, message in ((b"somebody's notes", "found another file"), (b"notes\n", "log.jsonl is damaged")):
        (tmp_path / LOG).write_bytes(foreign)
        with pytest.raises(ValueError, match=message), open_parts(tmp_path, plan, [], work):
            pass
        assert (tmp_path / LOG).read_bytes() == foreign
