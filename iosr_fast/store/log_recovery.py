"""Opening a damaged audit log: intact changes are kept, dropped ones are reported."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from iosr_fast.exceptions import IosrFastError
from iosr_fast.head.head import Head
from iosr_fast.store.changes import OPS, Change
from iosr_fast.store.log_format import Lines, LogDamagedError, LogHead, Mark, parse, read_lines
from iosr_fast.store.log_writer import AuditLog, next_number, numbered, private_file, read_state, write_closed

_SHOWN = 20
_log = logging.getLogger("iosr_fast")


def replay(path: Path, record: dict[str, Any], state: Head) -> Head:
    """The state after a line's change. Raises LogDamagedError where it doesn't fit."""
    try:
        after = Change.from_json(record, state.examples.width).apply(state)
        if after.version != record["version"]:
            raise IosrFastError(f"expected version {after.version}, got {record['version']}")
    except (ValueError, TypeError, LookupError, AttributeError, AssertionError, ArithmeticError) as error:
        raise LogDamagedError(f"a line of {path} can't be applied to version {state.version} ({error})") from error
    return after


def recover_log(log: AuditLog, head: LogHead, state: Head, damage: LogDamagedError) -> Head:
    """Replay the remaining changes of a log on `state`, its base, and begin the log again from there.

    Starts from a snapshot or the base, whichever leads further, and replays all lines that follow it in the chain,
    those of closed files included. A warning says how many changes are dropped and all that is known of
    them; the files as they were stay, as NAME.before-recovery-N.
    """
    path, mark = log.path, head.mark
    text = path.read_bytes() if path.exists() else b""
    lines = parse(path, text)
    if lines.rest:  # only its end may be missing
        lines = parse(path, text + b"\n")
    sources = [*_closed(path), lines]
    recovered, count, chain = max(
        (_replayed(path, start, sources) for start in _starts(log, state)), key=lambda end: end[1]
    )
    copies = _copies(path, head)
    seen = _seen(text, recovered.version)
    version = max(
        [recovered.version, *(line["version"] for line in seen)] if mark is None else [recovered.version, mark.version]
    )
    dropped = version - recovered.version
    number = next_number(path)
    if lines.records:
        write_closed(path, number, text[: lines.size].removesuffix(b"\n") + b"\n")
    head.marks = [None, None]
    log.begin(recovered, Mark(count, chain, recovered.version, log.base), number + 1, snapshot=True, dropped=dropped)
    _log.warning(
        "%s is recovered at version %d. %s. It was opened with recover because: %s. The files as they were: %s",
        path,
        recovered.version,
        _summary(dropped, recovered.version, version, seen, mark is not None),
        str(damage).partition(";")[0],
        ", ".join(str(one) for one in copies) or "none",
    )
    return recovered


def _starts(log: AuditLog, state: Head) -> Iterable[tuple[Head, int, str]]:
    """(state, lines, chain) to replay from: the base, and its readable snapshots."""
    yield state, 0, ""
    for file in numbered(log.path, "state").values():
        try:
            snapshot, about = read_state(file)
        except (OSError, ValueError) as error:
            _log.warning("%s is left out: %s", file, error)
            continue
        if about["base"] == log.base:
            yield snapshot, int(about["lines"]), str(about["previous"])


def _closed(path: Path) -> Iterable[Lines]:
    for file in numbered(path, "gz").values():
        try:
            yield parse(file, read_lines(file))
        except (OSError, ValueError) as error:
            _log.warning("%s is left out: %s", file, error)


def _replayed(path: Path, start: tuple[Head, int, str], sources: Iterable[Lines]) -> tuple[Head, int, str]:
    """How far lines lead on from a start."""
    state, count, chain = start
    for lines in sources:
        for record, after in zip(lines.records, lines.chains, strict=True):
            if lines.chain_at(count) != chain or lines.chain_at(count + 1) != after:
                continue
            try:
                state = state if record["op"] == "open" else replay(path, record, state)
            except LogDamagedError as error:
                _log.warning("%s", error)
                break
            count, chain = count + 1, after
    return state, count, chain


def _copies(path: Path, head: LogHead) -> list[Path]:
    """Copies of the files that recovery writes to or removes."""
    there = [one for one in (path, head.path, *numbered(path, "state").values()) if one.exists()]
    number = 1
    while any(_aside(one, number).exists() for one in (path, head.path)):
        number += 1
    for one in there:
        with private_file(_aside(one, number)) as temporary:
            shutil.copyfile(one, temporary)
    return [_aside(one, number) for one in there]


def _aside(file: Path, number: int) -> Path:
    return file.with_name(f"{file.name}.before-recovery-{number}")


def _seen(text: bytes, after: int) -> list[dict[str, Any]]:
    """Lines of changes later than a version that can still be read, though they are not proved to be whole."""
    lines = []
    for raw in text.split(b"\n"):
        try:
            line = json.loads(raw)
            if line["op"] in OPS and isinstance(line["version"], int) and line["version"] > after:
                lines.append(line)
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
    return lines


def _summary(dropped: int, first: int, last: int, seen: list[dict[str, Any]], proved: bool) -> str:
    least = "" if proved else "at least "
    if not dropped:
        return "No change is dropped" if proved else "No change is known to be dropped, but the head is damaged"
    known = [f"version {line['version']}, {line['op']} at {line.get('time')}" for line in seen]
    listed = "; ".join([*known[:_SHOWN], *([f"{len(known) - _SHOWN} more"] if len(known) > _SHOWN else [])])
    which = f"changes, versions {first + 1} to {last}" if dropped > 1 else f"change, version {last}"
    return f"Dropped: {least}{dropped} acknowledged {which} ({listed or 'nothing else of it can be read'})"
