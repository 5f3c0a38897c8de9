"""The audit log of a running classifier: JSON lines, one a change, from which its state is replayed.

A change is acknowledged when its line is on the disk, and then the head beside the log (log_format), which counts the
lines and holds the hash of their chain. So a log that lost acknowledged changes is refused. A change that was not
acknowledged is kept if its line is complete, else dropped. At intervals the state is written beside the log, which then
starts from it (log_writer.AuditLog.compact).
"""

from __future__ import annotations

import logging
import os
import re
import stat
from pathlib import Path
from typing import Any

from iosr_fast.exceptions import IosrFastError
from iosr_fast.head.head import Head
from iosr_fast.store.head_files import fingerprint
from iosr_fast.store.log_format import (
    FORMAT,
    OURS,
    Lines,
    LogDamagedError,
    LogHead,
    Mark,
    open_head,
    parse,
    read_head,
    read_lines,
)
from iosr_fast.store.log_recovery import recover_log, replay
from iosr_fast.store.log_writer import AuditLog, file_of, make_folder, next_number, numbered, read_state
from iosr_fast.utils.files import remove_leftovers

_log = logging.getLogger("iosr_fast")


def open_log(path: str | Path, state: Head, recover: bool = False) -> tuple[AuditLog, Head]:
    """Open a log for writing and make its changes on `state`; a new log begins with `state`.

    Nothing is written before all is checked. An unacknowledged change that a crash left is kept if its line is whole,
    else dropped with a warning. Raises LogDamagedError, a ValueError, where acknowledged changes are missing
    or damaged (`recover` keeps those that are whole, log_recovery.recover_log); ValueError for a log that begins from
    another state and for anything that is no log; BlockingIOError where another process has it open.
    """
    path = Path(os.path.abspath(path))
    head_path = path.with_name(f"{path.name}.head")
    for one in (path, head_path):
        if os.path.lexists(one) and not stat.S_ISREG(one.lstat().st_mode):
            raise IosrFastError(
                f"expected {one} to be a regular file or not to exist, got something else: name another"
            )
    if not head_path.exists():
        _check_ours(path)
    make_folder(path.parent)
    log = AuditLog(path, head := open_head(head_path), fingerprint(state))
    try:
        try:
            return log, _opened(log, head, state)
        except LogDamagedError as damage:
            if not recover:
                raise
            return log, recover_log(log, head, state, damage)
    except BaseException:
        log.abandon()
        raise


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a log's file as written, verified by their chain. The first names the state before the log.

    `path` is the file in use or a closed one (".gz"). Raises IosrFastError for damage, and if the head of the file in
    use counts more lines.

    >>> from tempfile import TemporaryDirectory
    >>> from iosr_fast import Classifier
    >>> classifier = Classifier("demo", method="zero-shot").fit(class_names=["lemon", "pear"])
    >>> with TemporaryDirectory() as folder:
    ...     classifier.open_log(Path(folder, "changes.jsonl"))
    ...     _ = classifier.rename_class("pear", "apple")
    ...     [line["op"] for line in read_log(Path(folder, "changes.jsonl"))]
    ['open', 'rename_class']
    """
    path = Path(path)
    mark = read_head(path.with_name(f"{path.name}.head"))
    lines = parse(path, read_lines(path))
    if lines.error:
        raise IosrFastError(lines.error)
    if mark is not None and mark.lines > lines.end:
        raise IosrFastError(f"expected {path} to go to line {mark.lines}, as its head says, got {lines.end}")
    return lines.records


def check_base(path: Path, base: str, state: str) -> None:
    if base != state:
        raise IosrFastError(
            f"{path} is the log of another state: expected one that begins from {state[:12]}, got {base[:12]}; load "
            "the bundle it was begun with, or begin a new log"
        )


def _check_ours(path: Path) -> None:
    """A file without a head is a log of format 1, or none that this wrote."""
    if path.exists():
        with path.open("rb") as file:
            first = file.read(len(OURS))
        if first != OURS:
            raise IosrFastError(
                f"expected {path} to be an audit log or not to exist, got "
                f"{'another file' if first else 'an empty file'}: name another, or remove it to begin a new log"
            )


def _opened(log: AuditLog, head: LogHead, state: Head) -> Head:
    """Check everything, replay the changes, and only then write."""
    path, mark = log.path, head.mark
    if mark is None and not head.blank:
        raise LogDamagedError(f"{head.path} is damaged: it can't be said how far {path} should go")
    if not path.exists():
        if mark is not None and mark.lines:
            check_base(path, mark.base, log.base)
            raise LogDamagedError(f"{path} is missing: {head.path} says that it has {mark.lines} lines")
        for snapshot in numbered(path, "state").values():
            raise LogDamagedError(f"{path} and its head are missing, but its snapshot {snapshot} is there")
        log.begin(state, Mark(0, "", state.version, log.base), next_number(path), snapshot=False)
        return state
    if head.blank:
        _check_ours(path)
    lines = parse(path, path.read_bytes())
    check_base(path, _base_of(lines) or (mark.base if mark is not None else log.base), log.base)
    if lines.error:
        raise LogDamagedError(lines.error)
    _check_extent(path, head, lines)
    state = _begun(path, lines.records[0], state)
    for record in lines.records[1:]:
        state = replay(path, record, state)
    state = state.compiled()
    if lines.rest:
        _log.warning("%s ends in half a line, which is dropped: its change was never acknowledged", path)
    remove_leftovers(path.parent, of=re.escape(path.name) + r"(?:\.\d+\.\w+)?")
    log.resume(lines, state)
    log.compact(state)
    return state


def _base_of(lines: Lines) -> str:
    """What the first line says that the log began from; "" where there is none."""
    return str(lines.records[0].get("base", "")) if lines.records else ""


def _begun(path: Path, first: dict[str, Any], state: Head) -> Head:
    """The state that the first line of a log says it begins from: `state`, which is its base, or a snapshot."""
    if first.get("op") != "open" or first.get("format") not in (1, FORMAT):
        raise IosrFastError(f"expected {path} to begin with a line of format {FORMAT}, got {first.get('format')}")
    snapshot = first.get("snapshot")
    if snapshot is None:
        return state
    file = file_of(path, snapshot["number"], "state")
    try:
        begun, about = read_state(file)
    except (OSError, ValueError) as error:
        raise LogDamagedError(f"{path} begins from {file}, which can't be read ({error})") from error
    if about["sha256"] != snapshot["sha256"]:
        raise LogDamagedError(f"{path} begins from another {file}")
    return begun


def _check_extent(path: Path, head: LogHead, lines: Lines) -> None:
    """Whether all that the head says was acknowledged is there."""
    mark = head.mark
    if mark is None:
        if not lines.records or lines.records[0].get("format") != 1:
            raise LogDamagedError(f"{head.path} is missing: it can't be said how far {path} should go")
        return
    if lines.end < mark.lines or not lines.records:
        raise LogDamagedError(f"{path} ends after line {lines.end}, but {mark.lines} were acknowledged")
    if lines.chain_at(mark.lines) != mark.chain:
        raise LogDamagedError(f"{head.path} is of another log than {path}, or older than its first line")
    # A write of the head that a power cut tore came after that of a line. Where there is none, it is other damage.
    if None in head.marks and lines.end == mark.lines:
        raise LogDamagedError(f"{head.path} is damaged: it can't be said that {path} has all it should have")
