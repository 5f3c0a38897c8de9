"""The log of changes: what was acknowledged is made again, to the last bit, whatever ended the process."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from iosr_fast.classifier import Classifier
from iosr_fast.cli import app
from iosr_fast.exceptions import IosrFastError
from iosr_fast.methods import METHODS
from iosr_fast.store import change_log, sqlite_file
from iosr_fast.store.change_log import ChangeLog, LogWriteError
from iosr_fast.store.changes import AddExamples, Change, RemoveExamples
from iosr_fast.store.head_files import fingerprint
from iosr_fast.store.log_reader import read_log, reading
from tests import ROOT
from tests.store.live_parts import pictures, random_examples, small_classifier
from tests.store.logs import base, changed, renamed, reopened, write_log

PIXELS = pictures(np.random.default_rng(99), 8, 4)[0].reshape(8, 4, 8, 8, 3)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "log" / "changes.db"


def change(classifier: Classifier) -> None:
    """One of each kind."""
    classifier.add_class("sixth", PIXELS[6, :3])
    classifier.add_examples("motif 2", PIXELS[2, :2])
    classifier.rename_class("~1", "first")
    classifier.rename_class("~4", "fourth", keep_text=True)
    classifier.remove_examples(classifier.examples("motif 2")[1:3])
    classifier.remove_class("motif 3")
    classifier.retune()
    classifier.add_class("seventh", PIXELS[7, :2])


@pytest.mark.slow
@pytest.mark.parametrize("every", [3, 256], ids=["from a snapshot", "from the beginning"])
@pytest.mark.parametrize("method", ["tip-adapter++", "proker", "gda++", "ape", "tip-x++", "zero-shot"])
def test_the_state_is_made_again_to_the_last_bit(method: str, every: int, path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(change_log, "MOST_CHANGES", every)
    options = {"method": method, "alpha": None, "beta": None}
    options["reducer"] = "centre" if METHODS[method].needs_support else None
    classifier, again = small_classifier(**options), small_classifier(**options)
    classifier.open_log(path)
    change(classifier)
    classifier.close_log()
    again.open_log(path)
    assert again.version == 9 and again.snapshot().next_class == 7
    assert fingerprint(again.snapshot()) == fingerprint(classifier.snapshot())
    queries = PIXELS.reshape(-1, 8, 8, 3)
    np.testing.assert_array_equal(again.decision_function(queries), classifier.decision_function(queries))
    assert again.explain(queries[:4], nearest=3) == classifier.explain(queries[:4], nearest=3)
    assert again.picture("e15") == classifier.picture("e15") is not None
    again.add_examples("seventh", PIXELS[7, 2:])  # and it goes on from there
    again.close_log()
    third = small_classifier(**options)
    third.open_log(path)
    assert fingerprint(third.snapshot()) == fingerprint(again.snapshot())
    third.close_log()


def test_history_is_read_and_printed_while_the_log_is_in_use(path: Path) -> None:
    classifier = small_classifier()
    classifier.open_log(path)
    change(classifier)
    entries = read_log(path)
    assert [one.version for one in entries] == list(range(2, 10))
    assert [one.op for one in entries][:3] == ["add_class", "add_examples", "rename_class"]
    assert entries[1].class_id == "~2" and entries[1].example_ids == ("e18", "e19") and entries[2].name == "first"
    assert (entries[-1].classes, entries[-1].images) == (6, len(classifier.snapshot().examples))
    shown = CliRunner().invoke(app, ["info", str(path)])
    assert shown.exit_code == 0, shown.output
    assert "version 9, 6 classes" in shown.stdout and "add_examples ~2, images 'e18', 'e19'" in shown.stdout
    assert fingerprint(small_classifier().snapshot()) in shown.stdout
    with reading(path), closing(sqlite3.connect(path, timeout=0)) as other, pytest.raises(sqlite3.Error, match="lock"):
        other.execute("BEGIN EXCLUSIVE")  # a writer waits until all was read
    classifier.close_log()
    path.write_bytes(path.read_bytes().replace(b"first", b"f\x1b[2J"))
    shown = CliRunner().invoke(app, ["info", str(path)])
    assert shown.exit_code == 2 and "version 3" in shown.stdout and "version 4" not in shown.stdout
    assert "the change to version 4 is missing or was changed" in shown.output


@pytest.mark.parametrize(("limit", "most"), [("MOST_CHANGES", 20), ("MOST_BYTES", 700)])
def test_a_start_makes_few_changes_again(limit: str, most: int, path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(change_log, limit, most)
    path.parent.mkdir()
    (left := path.with_name(".changes.db.new")).write_bytes(b"of a process that was killed while it began the log")
    left.chmod(0o600)
    for _ in range(6):
        state = write_log(path, changes=15)[-1]
    applied: list[str] = []
    real = Change.replay
    monkeypatch.setattr(Change, "replay", lambda *values: applied.append("") or real(*values))
    assert fingerprint(reopened(path)) == fingerprint(state) and 0 < len(applied) <= 20
    assert len(read_log(path)) == 90
    assert path.stat().st_mode & 0o077 == 0 and os.listdir(path.parent) == [path.name]
    assert path.read_bytes()[68:72] == b"IOSR"  # as in logs of earlier versions
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("SELECT DISTINCT length(part) FROM snapshot").fetchall() == [(65_536,)]


def test_a_snapshot_may_be_smaller_than_the_one_before(path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(change_log, "MOST_CHANGES", 1)
    log, state = ChangeLog.open(path, base())
    added = random_examples(np.random.default_rng(1), [1] * 400, state.next_example)
    for change in (AddExamples.of(1, added), RemoveExamples((*added.ids.tolist(),))):
        state = renamed(log, changed(log, state, change), "Class 2")  # beside "class 2", as earlier versions took it
    log.close()
    assert fingerprint(reopened(path)) == fingerprint(state)


def test_a_log_that_another_process_has_begun_meanwhile_is_kept(path: Path, monkeypatch: Any) -> None:
    real = sqlite_file.lock

    def late(*values: Any) -> int:
        monkeypatch.undo()
        write_log(path)
        return real(*values)

    monkeypatch.setattr(sqlite_file, "lock", late)
    with pytest.raises(BlockingIOError, match="another process writes this log"):
        ChangeLog.open(path, base())
    assert len(read_log(path)) == 3 and os.listdir(path.parent) == [path.name]


def test_a_second_writer_is_refused(path: Path) -> None:
    log, state = ChangeLog.open(path, base())
    code = f"from tests.store.logs import *\ntry: reopened(Path({str(path)!r}))\nexcept BlockingIOError as e: print(e)"
    for _ in range(2):
        with pytest.raises(BlockingIOError, match=r"this process has this log open: .* \(close_log\)"):
            ChangeLog.open(path, base())
        read_log(path)  # which takes no lock away
        other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
        assert "another process writes this log" in other.stdout, other.stderr
        state = renamed(log, state, "first")
    log.close()
    assert reopened(path).version == 3


@pytest.mark.slow
def test_a_killed_process_keeps_every_acknowledged_change(path: Path, monkeypatch: Any) -> None:
    code = f"""
from tests.store.logs import *
from iosr_fast.store import change_log
change_log.MOST_CHANGES = 5
log, state = ChangeLog.open(Path({str(path)!r}), base())
print(state.version, flush=True)
while True:
    state = renamed(log, state, "name " * (state.version % 90) + str(state.version))
    print(state.version, flush=True)
"""
    rng, reached, kills = np.random.default_rng(0), 1, 12
    for _ in range(kills):
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT)
        assert process.stdout is not None
        acknowledged = [process.stdout.readline() for _ in range(int(rng.integers(2, 30)))]
        process.send_signal(signal.SIGKILL)
        acknowledged += process.stdout.read().splitlines()
        process.wait(20)
        state = reopened(path)
        assert state.version in (int(acknowledged[-1]), int(acknowledged[-1]) + 1) and state.version > reached
        reached = state.version
    assert [one.version for one in read_log(path)] == list(range(2, reached + 1))


@pytest.mark.parametrize("written", [False, True], ids=["before", "after"])
def test_an_interrupt_leaves_log_and_state_consistent(written: bool, path: Path, monkeypatch: Any) -> None:
    """A change that was written before the interrupt is made by the next one, even if that is refused."""
    classifier = small_classifier(thumbnails=0)
    classifier.open_log(path)
    real = ChangeLog.append

    def append(*values: Any) -> None:
        if written:
            real(*values)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ChangeLog, "append", append)
        classifier.rename_class("~0", "interrupted", keep_text=True)
    assert classifier.version == 1
    with pytest.raises(IosrFastError, match="each once, got 'e99'"):
        classifier.remove_examples(["e99"])
    assert ("interrupted" in classifier.classes_) is written  # the refused change has published what the log has
    classifier.rename_class("~1", "next", keep_text=True)
    assert classifier.version == (3 if written else 2) and ("interrupted" in classifier.classes_) is written
    classifier.close_log()
    again = small_classifier(thumbnails=0)
    again.open_log(path)
    assert fingerprint(again.snapshot()) == fingerprint(classifier.snapshot())
    again.close_log()


@pytest.mark.parametrize("every", [1, 256], ids=["a snapshot is due", "none is due"])
def test_a_full_disk_refuses_changes_until_there_is_room(every: int, path: Path, monkeypatch: Any, caplog: Any) -> None:
    log, state = ChangeLog.open(path, base())
    state = renamed(log, state, "first")
    most = log._db.execute("PRAGMA max_page_count").fetchone()[0]
    log._db.execute("PRAGMA max_page_count=1")  # no more pages than there are
    monkeypatch.setattr(change_log, "MOST_CHANGES", every)
    made = 0
    with pytest.raises(LogWriteError, match=r"the change was not made: .*No space left") as refusal:
        while made < 20:
            state, made = renamed(log, state, "x" * 400 + str(made)), made + 1
    assert refusal.value.errno == errno.ENOSPC and "No space left" in log.failure
    assert ("so that a start takes longer" in caplog.text) is (every == 1)
    with pytest.raises(LogWriteError):
        renamed(log, state, "y" * 400)
    log._db.execute(f"PRAGMA max_page_count={most}")
    state = renamed(log, state, "last")
    assert log.failure == ""
    log.close()
    assert fingerprint(reopened(path)) == fingerprint(state)


def test_a_start_writes_nothing_so_that_a_full_disk_serves(path: Path) -> None:
    pytest.importorskip("resource", reason="limits of file sizes are POSIX's")
    write_log(path)
    code = f"""
import resource
from tests.store.logs import *
resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
log, state = ChangeLog.open(Path({str(path)!r}), base())
try: renamed(log, state, "second")
except OSError as error: print(error.errno, log.failure)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print(renamed(log, state, "third").version)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == f"{errno.EFBIG} {os.strerror(errno.EFBIG)}\n5\n", done.stderr


def test_a_file_that_changes_while_it_is_in_use_takes_no_change(path: Path) -> None:
    write_log(path)
    kept = path.read_bytes()

    def by_another_program() -> None:
        with sqlite3.connect(path) as other:
            other.execute("UPDATE meta SET last = zeroblob(36)")
        other.close()

    for damage in (
        path.unlink,
        lambda: path.rename(path.with_name("elsewhere")),
        lambda: (path.rename(path.with_name("elsewhere")), path.write_bytes(kept)),
        lambda: os.truncate(path, 0),
        lambda: os.truncate(path, 4096),
        lambda: os.truncate(path, 1 << 20),
        by_another_program,
    ):
        path.write_bytes(kept)
        log, state = ChangeLog.open(path, base())
        damage()
        with pytest.raises(LogWriteError, match="while it was in use"):
            renamed(log, state, "never")
        assert log.failure
        if damage is by_another_program:
            damage()  # the refusal has left no lock
        log.close()
    path.write_bytes(kept)
    assert reopened(path).version == 4


def test_a_change_that_was_cut_off_while_it_was_written_is_taken_back(path: Path, tmp_path: Path) -> None:
    write_log(path)
    full, journal = path.read_bytes(), path.with_name("changes.db-journal")
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA cache_size=2")  # so that pages are written before the end
        for number in range(40):
            row = (number + 9, "now", "rename_class", bytes(3_000), bytes(32))
            db.execute("INSERT INTO changes VALUES(?, ?, ?, ?, ?)", row)
        (copy := tmp_path / "copy").mkdir()
        for file in (path, journal):
            shutil.copy(file, copy)
        db.rollback()
    db.close()
    assert (copy / path.name).read_bytes() != full
    with pytest.raises(OSError, match="a start of the classifier takes back a change that was cut off"):
        read_log(copy / path.name)
    assert reopened(copy / path.name).version == 4 and (copy / path.name).read_bytes() == full
