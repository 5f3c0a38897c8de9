"""Lines of an audit log: JSON, each with the SHA-256 over the chain of the line before and its own text.

The chain and the count of lines run through all files of a log (audit.AuditLog.compact). The first line of a file says
where in the chain it begins.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

FORMAT = 2  # format 1 has no head, and its first line no place in the chain
OURS = b'{"base":"'  # how the first line of every format begins


class LogDamagedError(ValueError):
    """Acknowledged changes are missing from a log, or it can't be proved that none are. Recovery opens it."""

    def __init__(self, what: str) -> None:
        super().__init__(
            f"{what}; restore the log from a copy, or open it with recover=True (`iosr-fast serve --recover`), which "
            "keeps what is whole, says what it drops and leaves the files as they are now beside it"
        )


@dataclass(frozen=True)
class Mark:
    """A place between two lines: the `lines` before it, their `chain`, and the `version` of the state there; `base` is
    the fingerprint of the state that the log began from."""

    lines: int
    chain: str
    version: int
    base: str


@dataclass(frozen=True)
class Lines:
    """What can be verified of a file of lines: `records` in order, `chains` after each, from `start` (a count of lines
    and their chain) on, in `size` bytes; `error`, why the next line is none of them; `rest`, half a line at the end."""

    start: tuple[int, str]
    records: list[dict[str, Any]]
    chains: list[str]
    size: int
    error: str
    rest: bytes

    @property
    def end(self) -> int:
        """The number of lines up to the end of the file."""
        return self.start[0] + len(self.records)

    def chain_at(self, lines: int) -> str | None:
        """The chain of the first so many lines; None where that place is not in this file."""
        at = lines - self.start[0]
        return ([self.start[1], *self.chains])[at] if 0 <= at <= len(self.chains) else None


def parse(path: Path, text: bytes) -> Lines:
    """Verify lines as far as they go; never raises for what is in them."""
    start, chain, error, size = (0, ""), "", "", 0
    records: list[dict[str, Any]] = []
    chains: list[str] = []
    *whole, rest = text.split(b"\n")
    for number, raw in enumerate(whole, 1):
        try:
            record = json.loads(raw)
            claimed = record.pop("chain")
            if number == 1 and record["format"] != 1:
                start = int(record["lines"]), str(record["previous"])
                chain = start[1]
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as problem:
            error = f"line {number} of {path} is damaged ({problem})"
            break
        chain = _chained(record, chain)
        if claimed != chain or raw != _text({**record, "chain": chain}):
            error = f"line {number} of {path} was changed, or one before it is missing"
            break
        records.append(record)
        chains.append(chain)
        size += len(raw) + 1
    return Lines(start, records, chains, size, error, b"" if error else rest)


def make_line(record: dict[str, Any], chain: str) -> tuple[bytes, str]:
    """A record with the time as a line that follows `chain`, and the chain after it."""
    dated = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), **record}
    chain = _chained(dated, chain)
    return _text({**dated, "chain": chain}) + b"\n", chain


def read_lines(path: Path) -> bytes:
    """The bytes of a file of lines, be it in use or closed (.gz). OSError, or ValueError for a damaged one."""
    data = path.read_bytes()
    try:
        return gzip.decompress(data) if path.suffix == ".gz" else data
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is damaged ({error})") from error


def _chained(record: dict[str, Any], chain: str) -> str:
    return hashlib.sha256(chain.encode() + _text(record)).hexdigest()


def _text(record: dict[str, Any]) -> bytes:
    return json.dumps(record, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
