"""A damaged audit log is opened on demand: what is whole is kept, what is dropped is said, and nothing is destroyed."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from iosr_fast.store.audit import open_log, read_log
from iosr_fast.store.head_files import fingerprint
from iosr_fast.store.log_format import LogDamagedError, make_line
from tests.store.audit_parts import Crash, base, contents, copied, failing, head_of, renamed, reopened, write_log


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "changes.jsonl"


def test_recovery_says_what_it_drops_and_destroys_nothing(path: Path, caplog) -> None:
    states = write_log(path, changes=6)
    full, proved = path.read_bytes(), head_of(path).read_bytes()
    ends = np.cumsum([len(line) for line in full.splitlines(keepends=True)]).tolist()
    for damaged, version, said in (
        (full[: ends[3] + 9], 4, "Dropped: 3 acknowledged changes, versions 5 to 7 (nothing else of it can be read)"),
        (full[: ends[3] + 9] + b"\0" + full[ends[3] + 10 :], 4, "(version 6, rename_class at 20"),
        (full[:-1], 7, "No change is dropped"),
        (b"", 1, "Dropped: 6 acknowledged changes, versions 2 to 7"),
        (bytes(5000), 1, "Dropped: 6 acknowledged changes, versions 2 to 7"),
    ):
        for file in path.parent.iterdir():
            file.unlink()
        path.write_bytes(damaged)
        head_of(path).write_bytes(proved)
        with pytest.raises(LogDamagedError):
            reopened(path)
        caplog.clear()
        assert fingerprint(reopened(path, recover=True)) == fingerprint(states[version - 1])
        assert said in caplog.text and f"is recovered at version {version}" in caplog.text
        assert path.with_name("changes.jsonl.before-recovery-1").read_bytes() == damaged
        assert path.with_name("changes.jsonl.head.before-recovery-1").read_bytes() == proved
        log, state = open_log(path, base())  # and it continues without
        state = renamed(log, state, "later")
        log.close(state)
        assert fingerprint(reopened(path)) == fingerprint(state) and state.version == version + 1
        assert read_log(path)[0]["dropped"] == 7 - version
    caplog.clear()
    assert reopened(path, recover=True).version == state.version and not caplog.text  # nothing to recover


def test_recovery_without_a_head_drops_nothing_that_can_be_read(path: Path, caplog) -> None:
    states = write_log(path)
    for content in (None, b"", b"damaged" * 100, bytes(2000)):
        head_of(path).unlink()
        if content is not None:
            head_of(path).write_bytes(content)
        caplog.clear()
        assert fingerprint(reopened(path, recover=True)) == fingerprint(states[-1])
        assert "No change is known to be dropped, but the head is damaged" in caplog.text
        assert fingerprint(reopened(path)) == fingerprint(states[-1])
    path.unlink()
    head_of(path).write_bytes(b"damaged")
    assert fingerprint(reopened(path, recover=True)) == fingerprint(states[-1])  # from what was written beside it


def test_recovery_does_not_take_another_classifier(path: Path, tmp_path: Path) -> None:
    write_log(path)
    path.write_bytes(path.read_bytes()[:-30])
    before = contents(tmp_path)
    for damage in (path.read_bytes(), b"", bytes(300)):
        path.write_bytes(damage)
        with pytest.raises(ValueError, match="log of another state"):
            reopened(path, seed=1, recover=True)
        assert path.read_bytes() == damage
    assert {file.name for file in tmp_path.iterdir()} == {file.name for file in before}
    assert not re.search("recovery", "".join(os.listdir(tmp_path)))


def nothing(path: Path) -> int:
    path.parent.mkdir(exist_ok=True)
    return 1


def earlier_format(path: Path) -> int:
    write_log(path)
    records, chain, text = read_log(path), "", b""
    for record in [{"op": "open", "format": 1, "base": fingerprint(base()), "version": 1}, *records[1:]]:
        line, chain = make_line(record, chain)
        text += line
    head_of(path).unlink()
    path.write_bytes(text)
    return 4


def damaged(path: Path) -> int:
    write_log(path)
    path.write_bytes(path.read_bytes()[:-9])
    return 3


@pytest.mark.parametrize("make", [nothing, earlier_format, damaged])
def test_a_crash_at_any_call_of_opening_loses_nothing(
    make: Callable[[Path], int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Creation, the takeover of an earlier format, recovery."""
    monkeypatch.setattr(os, "fsync", lambda _: None)  # what was written is there for the copy
    for at in range(120):
        path = tmp_path / str(at) / "changes.jsonl"
        version = make(path)
        before = path.read_bytes() if make is damaged else b""
        crashed = True
        with failing(monkeypatch, at, Crash(), once=False) as calls, suppress(Crash):
            reopened(path, recover=True)
            crashed = False
        there = copied(path.parent, tmp_path / "copy") / path.name
        assert reopened(there, recover=make is damaged).version == version, at
        assert reopened(there).version == version
        assert make is not damaged or before in contents(there.parent).values(), "the file as it was"
        if not crashed:
            assert at >= 10 and len(calls) == at
            return
    raise AssertionError("opening takes fewer calls")
