"""Whatever happens to the files of an audit log, an acknowledged change is there or its loss is an error."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest

from iosr_fast.store.audit import open_log, read_log
from iosr_fast.store.head_files import fingerprint
from iosr_fast.store.log_format import LogDamagedError, make_line
from iosr_fast.store.log_writer import LogWriteError
from tests.store.audit_parts import base, contents, failing, head_of, renamed, reopened, write_log
from tests.store.live_parts import small_classifier


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "changes.jsonl"


def refused(path: Path, match: str = "recover=True") -> None:
    """As damaged, and not a byte of any file is touched."""
    before = contents(path.parent)
    with pytest.raises(LogDamagedError, match=match):
        reopened(path)
    assert contents(path.parent) == before


def test_a_log_that_is_cut_at_any_byte_never_loses_a_change_in_silence(path: Path) -> None:
    last = write_log(path, changes=1)[-1]
    full = path.read_bytes()
    for cut in range(len(full)):
        path.write_bytes(full[:cut])
        refused(path, r"ends after line \d, but 2 were acknowledged; restore .*--recover")
    with pytest.raises(ValueError, match="as its head says"):
        read_log(path)
    path.write_bytes(full)
    assert fingerprint(reopened(path)) == fingerprint(last) and len(read_log(path)) == 2


def test_a_flipped_byte_of_log_or_head_is_harmless_or_refused(path: Path, monkeypatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)
    last = fingerprint(write_log(path, changes=1)[-1])
    whole, proved = path.read_bytes(), head_of(path).read_bytes()
    accepted = refusals = 0
    for file in (path, head_of(path)):
        full = file.read_bytes()
        for at in range(0, len(full), 1 if file == path else 32):
            file.write_bytes(full[:at] + bytes([full[at] ^ (1 << at % 7)]) + full[at + 1 :])
            try:
                assert fingerprint(reopened(path)) == last
                assert file == head_of(path) and at >= 512, "only half a write of the head explains itself"
                accepted += 1
            except LogDamagedError:
                refusals += 1
            path.write_bytes(whole)
            head_of(path).write_bytes(proved)
    assert refusals == len(whole) + 16 and accepted == 16


def test_a_log_that_was_emptied_or_overwritten_is_refused(path: Path) -> None:
    write_log(path)
    full = path.read_bytes()
    lines = full.splitlines(keepends=True)
    page = bytes(len(full) // 2)
    for damaged in (
        b"",
        b"\n",
        bytes(len(full)),
        bytes(len(full)) + b"\n",
        bytes(10_000),
        full[: len(page)] + page,
        page + full[len(page) :],
        full[:-1],  # a final newline
        full[:-1] + b"\0",
        full[:-1] + b" ",
        b"".join(lines[:-1]) + bytes(len(lines[-1])),
        b"".join([*lines[:2], lines[3]]),
        b"".join([lines[0], lines[2], lines[1], lines[3]]),
        b"".join(lines[1:]),
        lines[0],
        full + lines[-1],
        full + full,
        b"\xff\xd8\xff\xe0 a photograph",
        b'{"base":"elsewhere"}\n' * 4,
    ):
        path.write_bytes(damaged)
        refused(path)
    path.unlink()
    refused(path, r"is missing: .*changes.jsonl.head says that it has 4 lines")


def test_a_head_that_is_missing_or_of_another_log_is_refused(path: Path, tmp_path: Path) -> None:
    write_log(path)
    head = head_of(path)
    proved = head.read_bytes()
    write_log(other := tmp_path / "other" / "changes.jsonl", names="else")  # as many lines on the same base
    write_log(longer := tmp_path / "longer" / "changes.jsonl", changes=5)
    write_log(foreign := tmp_path / "foreign" / "changes.jsonl", seed=1)
    for swapped in (head_of(other), head_of(longer), head_of(foreign)):
        head.write_bytes(swapped.read_bytes())
        refused(path, "another log|were acknowledged")
    for damaged in (
        proved + b"\n",
        b"{}",
        b"\xff\xd8 a photograph",
        proved[512:] + proved[:511],
    ):
        head.write_bytes(damaged)
        refused(path)
    for nothing in (b"", bytes(1024)):
        head.write_bytes(nothing)
        with pytest.raises(LogDamagedError, match="head is missing"):
            reopened(path)
    head.unlink(missing_ok=True)
    refused(path, "head is missing")
    assert not head.exists()
    head.write_bytes(proved)
    assert reopened(path).version == 4


def test_an_older_head_loses_nothing(path: Path) -> None:
    """Of a copy of the folder that was made while changes came, say."""
    log, state = open_log(path, base())
    state = renamed(log, state, "first")
    older = head_of(path).read_bytes()
    for name in ("second", "third"):
        state = renamed(log, state, name)
    log.close(state)
    head_of(path).write_bytes(older)
    assert fingerprint(reopened(path)) == fingerprint(state)


def test_what_is_no_log_is_refused_and_not_touched(path: Path, tmp_path: Path) -> None:
    for content in (b"", b"\n", b"\xff\xd8\xff\xe0" * 5000, b'{"a": 1}\n', b'{"base"', b"half a line", bytes(100)):
        path.write_bytes(content)
        for recover in (False, True):
            with pytest.raises(ValueError, match=r"expected .* to be an audit log or not to exist, got an"):
                reopened(path, recover=recover)
            assert path.read_bytes() == content and os.listdir(tmp_path) == [path.name]
    path.unlink()
    path.write_bytes(b"")
    os.truncate(path, 1 << 40)  # it is not read to find out
    with pytest.raises(ValueError, match="another file"):
        reopened(path)
    path.unlink()
    photograph = tmp_path / "photograph.jpg"
    photograph.write_bytes(b"\xff\xd8\xff")
    for make in (
        lambda: path.mkdir(),
        lambda: os.mkfifo(path),
        lambda: path.symlink_to(photograph),
        lambda: path.symlink_to(tmp_path / "nothing"),
    ):
        make()
        with pytest.raises(ValueError, match="to be a regular file or not to exist"):
            reopened(path)
        assert sorted(os.listdir(tmp_path)) == [path.name, photograph.name]
        path.rmdir() if stat.S_ISDIR(path.lstat().st_mode) else path.unlink()
    with pytest.raises(ValueError, match="regular file"):
        reopened(Path(os.devnull))
    assert photograph.read_bytes() == b"\xff\xd8\xff"
    head_of(path).write_bytes(b"my own notes")
    with pytest.raises(LogDamagedError):
        reopened(path)
    assert head_of(path).read_bytes() == b"my own notes" and not path.exists()


def test_a_new_log_is_on_the_disk_with_its_name_and_folders(path: Path, tmp_path: Path, monkeypatch) -> None:
    synced: list[str] = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        real(descriptor)
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))

    if not os.path.exists("/proc/self/fd"):
        pytest.skip("needs /proc")
    monkeypatch.setattr(os, "fsync", fsync)
    deep = tmp_path / "a" / "b" / "changes.jsonl"
    log, state = open_log(deep, base())
    log.close(state)
    assert {str(tmp_path), str(tmp_path / "a"), str(deep.parent), str(deep), str(head_of(deep))} <= set(synced)
    assert deep.stat().st_mode & 0o077 == 0 == head_of(deep).stat().st_mode & 0o077


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), MemoryError(), OSError(errno.EIO, "Input/output error")], ids=repr
)
def test_a_change_that_fails_at_any_call_is_not_made(
    path: Path, monkeypatch, error: BaseException, after: bool
) -> None:
    log, state = open_log(path, base())
    state = renamed(log, state, "first")
    for at in range(20):
        lines, version = path.read_bytes(), state.version
        with failing(monkeypatch, at, error, once=True, after=after) as calls:
            try:
                state = renamed(log, state, f"attempt {at}")
                assert len(calls) <= at
            except (KeyboardInterrupt, MemoryError, LogWriteError):
                assert path.read_bytes() == lines and log.failure == (
                    "Input/output error" if isinstance(error, OSError) else ""
                )
        state = renamed(log, state, f"after {at}")
        assert log.failure == "" and state.version == version + (2 if len(calls) <= at else 1)
        if len(calls) <= at:
            break
    else:
        raise AssertionError("a change takes fewer calls")
    assert at >= 5
    log.close(state)
    assert fingerprint(reopened(path)) == fingerprint(state)


def test_a_disk_that_fails_for_good_refuses_changes_until_it_works(path: Path, monkeypatch) -> None:
    log, state = open_log(path, base())
    state = renamed(log, state, "first")
    broken = OSError(errno.EIO, "Input/output error")
    for at in range(6):
        with failing(monkeypatch, at, broken, once=False):
            for name in ("second", "third"):
                with pytest.raises(LogWriteError, match=r"the change was not made: it can't be logged \(Input/output"):
                    renamed(log, state, name)
            assert log.failure == "Input/output error"
        state = renamed(log, state, f"works {at}")
        assert log.failure == ""
    with failing(monkeypatch, 3, broken, once=False), pytest.raises(LogWriteError):
        renamed(log, state, "last")
    with failing(monkeypatch, 0, broken, once=False):
        log.close(state)  # it may end in a change that was not made, which a later start may keep or drop
    assert reopened(path).version in (state.version, state.version + 1)


def test_a_file_that_is_cut_or_replaced_while_in_use_takes_no_change(path: Path) -> None:
    """As `> changes.jsonl`, logrotate or an editor do it: what is written to the old file would be lost."""
    log, state = open_log(path, base())
    state = renamed(log, state, "first")
    kept = contents(path.parent)
    for file in (path, head_of(path)):
        for damage in (
            lambda file: file.unlink(),
            lambda file: file.rename(file.with_name("elsewhere")),
            lambda file: (file.rename(file.with_name("elsewhere")), file.write_bytes(kept[file])),
            lambda file: os.truncate(path, 0),
            lambda file: os.truncate(path, 1 << 20),
            lambda file: path.open("ab").write(b"a line of somebody else\n"),
        ):
            damage(file)
            log._due = (0, 0) if file == path else log._due  # a snapshot would be written, too
            there = contents(path.parent)
            with pytest.raises(LogWriteError, match="while it was in use"):
                renamed(log, state, "never")
            assert contents(path.parent) == there and log.failure
            log.close(state)
            for other in path.parent.iterdir():
                other.unlink()
            for other, content in kept.items():
                other.write_bytes(content)
            log, state = open_log(path, base())
            assert state.version == 2
    log.close(state)


def test_an_interrupt_between_log_and_state_takes_the_line_back(tmp_path: Path, monkeypatch) -> None:
    classifier = small_classifier(thumbnails=0)
    classifier.open_log(path := tmp_path / "changes.jsonl")
    classifier.rename_class("~0", "first", keep_text=True)
    real = type(classifier._store.log).append

    def append(*values: object) -> None:
        real(*values)
        raise KeyboardInterrupt

    before = classifier.snapshot()
    monkeypatch.setattr(type(classifier._store.log), "append", append)
    for settled in (True, False):
        with monkeypatch.context() as patch:
            if not settled:
                patch.setattr(type(classifier._store.log), "try_to_settle", lambda *_: None)  # a second interrupt
            with pytest.raises(KeyboardInterrupt):
                classifier.rename_class("~0", "never", keep_text=True)
        assert classifier.snapshot() is before and (b"never" not in path.read_bytes()) is settled
    monkeypatch.undo()
    classifier.rename_class("~0", "second", keep_text=True)
    classifier.close_log()
    again = small_classifier(thumbnails=0)
    again.open_log(path)
    assert again.classes_[0] == "second" and again.version == 3
    again.close_log()


def test_a_log_of_the_first_format_that_is_in_use_is_refused(path: Path) -> None:
    fcntl = pytest.importorskip("fcntl", reason="locks of files are POSIX's")
    opening = {"op": "open", "format": 1, "base": fingerprint(base()), "version": 1}
    path.write_bytes(make_line(opening, "")[0])
    with path.open("rb") as file:  # as earlier versions lock it
        fcntl.flock(file, fcntl.LOCK_EX)
        before = contents(path.parent)
        with pytest.raises(BlockingIOError, match="another process writes this log"):
            reopened(path)
        assert contents(path.parent) == before
    assert reopened(path).version == 1 and read_log(path)[0]["format"] == 2


def test_a_log_of_the_first_format_is_taken_over(path: Path) -> None:
    states = write_log(path)
    lines, chain = read_log(path), ""
    head_of(path).unlink()
    text = b""
    for record in [{"op": "open", "format": 1, "base": fingerprint(states[0]), "version": 1}, *lines[1:]]:
        line, chain = make_line(record, chain)
        text += line
    for content in (text, text + b'{"half'):
        for file in path.parent.iterdir():
            file.unlink()
        path.write_bytes(content)
        assert fingerprint(reopened(path)) == fingerprint(states[-1])
        assert [line["format"] for line in read_log(path)] == [2]
        assert [line["version"] for line in read_log(path.with_name("changes.jsonl.1.gz"))] == [1, 2, 3, 4]
        head = head_of(path)
        head.unlink()
        refused(path, "head is missing")
    path.write_bytes(text.replace(b"name 1", b"name 7"))
    refused(path, "line 3 of .* was changed")
