"""Snapshots beside an audit log: a restart costs the same after many changes, and no moment of writing one is weak."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from iosr_fast.head.method_config import MethodConfig
from iosr_fast.store import log_writer
from iosr_fast.store.audit import open_log, read_log
from iosr_fast.store.changes import Change
from iosr_fast.store.head_files import fingerprint
from iosr_fast.store.log_format import LogDamagedError
from iosr_fast.store.log_writer import LogWriteError, numbered
from tests import ROOT
from tests.store.audit_parts import Crash, base, copied, failing, head_of, renamed, reopened
from tests.store.live_parts import pictures, random_head, random_queries, small_classifier

pytestmark = pytest.mark.slow


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "log" / "changes.jsonl"


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> int:
    """A snapshot after so many lines."""
    monkeypatch.setattr(log_writer, "MOST_LINES", 5)
    return 5


def count_of(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    applied: list[str] = []
    real = Change.apply

    def apply(self: Change, *values: Any, **options: Any) -> Any:
        applied.append(self.op)
        return real(self, *values, **options)

    monkeypatch.setattr(Change, "apply", apply)
    return applied


def test_a_restart_after_many_changes_makes_few_of_them_again(path: Path, monkeypatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)
    log, state = open_log(path, base())
    for number in range(2_000):
        state = renamed(log, state, f"name {number}")
    log.close(state)
    applied = count_of(monkeypatch)
    assert fingerprint(reopened(path)) == fingerprint(state)
    assert len(applied) <= log_writer.MOST_LINES and path.stat().st_size < 300 * (log_writer.MOST_LINES + 2)
    # One snapshot is kept, and all the lines, which any can read.
    assert len(numbered(path, "state")) == 1
    files = [*numbered(path, "gz").values(), path]
    versions = [line["version"] for file in files for line in read_log(file) if line["op"] != "open"]
    assert versions == list(range(2, 2_002)) and all(file.stat().st_mode & 0o077 == 0 for file in path.parent.iterdir())


@pytest.mark.parametrize("method", ["tip-adapter++", "proker", "gda++", "ape", "tip-x++", "zero-shot"])
def test_a_restart_from_a_snapshot_answers_as_before_to_the_last_bit(method: str, path: Path, few: int) -> None:
    options = {"method": method, "alpha": None, "beta": None, "views": 2}
    options["reducer"] = "pca:12" if method in ("tip-adapter++", "gda++") else None
    classifier, again = small_classifier(**options), small_classifier(**options)
    images, _ = pictures(np.random.default_rng(99), 8, 4)
    classifier.open_log(path)
    for number in range(7):
        classifier.add_class(f"new {number}", images[4 * number : 4 * number + 2])
        if number % 3:
            classifier.remove_examples(classifier.examples(f"new {number}")[:1])
            classifier.rename_class("~0", f"first {number}")
    classifier.remove_class("~2")
    classifier.retune()
    classifier.close_log()
    assert len(numbered(path, "gz")) >= 3
    again.open_log(path)
    again.close_log()
    assert fingerprint(again.snapshot()) == fingerprint(classifier.snapshot())
    assert again.classes() == classifier.classes() and again.version == classifier.version
    np.testing.assert_array_equal(again.decision_function(images), classifier.decision_function(images))
    assert again.explain(images[:4], nearest=3) == classifier.explain(images[:4], nearest=3)


@pytest.mark.parametrize("method", ["proker", "gda", "ape", "tip-x"])
def test_a_restart_makes_one_plan_for_all_changes(method: str, path: Path, monkeypatch) -> None:
    classifier = small_classifier(method=method, alpha=None, beta=None)
    images, _ = pictures(np.random.default_rng(99), 8, 4)
    classifier.open_log(path)
    for number in range(8):
        classifier.add_class(f"new {number}", images[4 * number : 4 * number + 2])
    classifier.close_log()
    again = small_classifier(method=method, alpha=None, beta=None)
    compiled: list[str] = []
    real = MethodConfig.compile
    monkeypatch.setattr(MethodConfig, "compile", lambda *values: compiled.append("plan") or real(*values))
    again.open_log(path)
    again.close_log()
    assert len(compiled) == 1
    np.testing.assert_array_equal(again.decision_function(images), classifier.decision_function(images))


@pytest.mark.parametrize("precision", ["fp16", "bf16", "int8"])
def test_narrow_keys_come_back_from_a_snapshot(precision: str, path: Path, few: int) -> None:
    rng = np.random.default_rng(3)
    first = random_head(rng, 4, 3, key_precision=precision)
    log, state = open_log(path, first)
    for number in range(few + 1):
        state = renamed(log, state, f"name {number}")
    log.close(state)
    log, again = open_log(path, first)
    log.close(again)
    queries = random_queries(rng, 9)
    assert fingerprint(again) == fingerprint(state)
    np.testing.assert_array_equal(again.score(queries), state.score(queries))


def test_a_crash_at_any_call_of_a_snapshot_loses_nothing(path: Path, tmp_path: Path, few: int, monkeypatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)  # what was written is there for the copy
    for at in range(80):
        for file in path.parent.iterdir() if path.parent.exists() else ():
            file.unlink()
        log, state = open_log(path, base())
        for number in range(few):
            state = renamed(log, state, f"name {number}")
        crashed = True
        with failing(monkeypatch, at, Crash(), once=False) as calls, suppress(Crash):
            renamed(log, state, "the change that compacts")
            crashed = False
        there = copied(path.parent, tmp_path / "copy") / path.name
        log.close(state)
        again = reopened(there)
        assert again.version in (state.version, state.version + 1), at
        assert again.class_names[1] in ("name 4", "the change that compacts")
        assert fingerprint(reopened(there)) == fingerprint(again)
        if not crashed:
            assert at >= 20 and len(calls) == at and again.version == state.version + 1
            return
    raise AssertionError("a snapshot takes fewer calls")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")], ids=repr)
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_failure_at_any_call_of_a_snapshot_costs_no_change(
    path: Path, few: int, monkeypatch, error: BaseException, after: bool
) -> None:
    log, state = open_log(path, base())
    for at in range(80):
        made, log._due = state, (0, 0)
        expected = suppress(KeyboardInterrupt, LogWriteError)
        with failing(monkeypatch, at, error, once=True, after=after) as calls, expected:
            made = renamed(log, state, f"with the snapshot {at}")
        state = renamed(log, made, f"after it {at}")
        if len(calls) <= at:
            break
    else:
        raise AssertionError("a snapshot takes fewer calls")
    assert at >= 20
    log.close(state)
    assert fingerprint(reopened(path)) == fingerprint(state)
    assert len(numbered(path, "state")) == 1
    if not after:  # an interrupt right after a file is made leaves it, until it is an hour old
        assert not [file for file in path.parent.iterdir() if file.name.endswith(".tmp")]


def test_a_snapshot_that_finds_no_room_is_tried_again_later(path: Path, few: int, monkeypatch, caplog) -> None:
    log, state = open_log(path, base())
    with monkeypatch.context() as patch:

        def full(*_: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        patch.setattr(log_writer, "write_closed", full)
        for number in range(3 * few):
            state = renamed(log, state, f"name {number}")
    assert len(read_log(path)) == 3 * few + 1 and caplog.text.count("grows on") == 2
    for number in range(few):
        state = renamed(log, state, f"later {number}")
    assert len(numbered(path, "gz")) == 1
    log.close(state)
    assert fingerprint(reopened(path)) == fingerprint(state)


def test_a_second_process_is_refused_after_a_snapshot_too(path: Path, few: int) -> None:
    pytest.importorskip("fcntl", reason="locks of files are POSIX's")
    log, state = open_log(path, base())
    for number in range(2 * few):
        state = renamed(log, state, f"name {number}")
        with pytest.raises(BlockingIOError, match="another process writes this log"):
            open_log(path, base())
    log.close(state)
    assert reopened(path).version == state.version


def test_a_damaged_snapshot_is_refused_and_recovered_from_closed_lines(path: Path, few: int, caplog) -> None:
    log, state = open_log(path, base())
    for number in range(3 * few):
        state = renamed(log, state, f"name {number}")
    log.close(state)
    (snapshot,) = numbered(path, "state").values()
    full = snapshot.read_bytes()
    rng = np.random.default_rng(0)
    for at in rng.choice(len(full), 60, replace=False):
        snapshot.write_bytes(full[:at] + bytes([full[at] ^ 4]) + full[at + 1 :])
        with pytest.raises(LogDamagedError, match=r"begins from .*\.state, which can't be read|begins from another"):
            reopened(path)
    for damaged in (full[:-1], b"", None):
        snapshot.unlink(missing_ok=True)
        if damaged is not None:
            snapshot.write_bytes(damaged)
        with pytest.raises(LogDamagedError, match="can't be read"):
            reopened(path)
    assert fingerprint(reopened(path, recover=True)) == fingerprint(state) and "No change is dropped" in caplog.text
    assert fingerprint(reopened(path)) == fingerprint(state)


def test_recovery_of_a_lost_log_begins_at_its_snapshot(path: Path, few: int, caplog) -> None:
    log, state = open_log(path, base())
    for number in range(2 * few):
        state = renamed(log, state, f"name {number}")
    log.close(state)
    kept = state.version - (len(read_log(path)) - 1)
    path.write_bytes(b"")
    assert reopened(path, recover=True).version == kept
    assert f"acknowledged changes, versions {kept + 1} to {state.version} (nothing" in caplog.text
    for file in (path, head_of(path)):  # without a head, too
        file.unlink()
    assert reopened(path, recover=True).version == kept


def test_old_closed_lines_may_be_deleted_and_are_never_overwritten(path: Path, few: int) -> None:
    def more(changes: int) -> Any:
        log, state = open_log(path, base())
        for number in range(changes):
            state = renamed(log, state, f"name {number}")
        log.close(state)
        return state

    more(3 * few)
    for file in list(numbered(path, "gz").values())[:-1]:
        file.unlink()
    state = more(2 * few)
    assert fingerprint(reopened(path)) == fingerprint(state)
    kept = {file: file.read_bytes() for file in numbered(path, "gz").values()}
    for file in (path, head_of(path)):
        file.unlink()
    with pytest.raises(LogDamagedError, match=r"missing, but its snapshot .*\.state is there"):
        more(1)
    for file in numbered(path, "state").values():
        file.unlink()
    more(2 * few)  # a new log of the same name
    assert {file: file.read_bytes() for file in kept} == kept


def test_a_killed_process_keeps_every_acknowledged_change(path: Path) -> None:
    code = """
import sys
from contextlib import suppress
from pathlib import Path
from iosr_fast.store import log_writer
from tests.store.audit_parts import base, open_log, renamed
log_writer.MOST_LINES = 7
log, state = open_log(sys.argv[1], base())
print(state.version, flush=True)
while True:
    state = renamed(log, state, f"name {state.version}")
    print(state.version, flush=True)
"""
    reached = 1
    for lines in (23, 58):
        process = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True, cwd=ROOT)
        assert process.stdout is not None
        for _ in range(lines):
            said = process.stdout.readline()
        process.send_signal(signal.SIGKILL)
        said = ([said, *process.stdout.read().splitlines()])[-1]
        process.wait(20)
        state = reopened(path)
        assert state.version in (int(said), int(said) + 1) and state.version > reached
        reached = state.version
