"""The folder of a run's parts, and the log by which an interrupted run resumes.

log.jsonl begins with the plan: everything that determines the parts, except the images themselves. A line follows for
each part that is finished: what it holds, its SHA-256, and by which process and in how many seconds it was written. A
part counts if the log knows it, it has that SHA-256, and its images are unchanged. Any other part is computed again,
which gives the same bytes.

A part is renamed into place when it is whole, and logged then, so a kill at any moment loses the parts that are being
computed and nothing else. The folder is locked while a run writes, so two runs never share a folder.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from iosr_fast.exceptions import IosrFastError, printable
from iosr_fast.files.source import Chunk
from iosr_fast.sealed.files import lock_folder, remove_leftovers, unlock
from iosr_fast.sealed.manifest import MANIFEST, read_manifest, sha256, write_manifest
from iosr_fast.utils.machine import package_version

LOG = "log.jsonl"
_PACKAGES = ("numpy", "pillow", "onnxruntime", "openvino", "torch", "safetensors", "pyarrow", "ray")


@dataclass(frozen=True)
class Done:
    """A finished part of `images` images, of which `errors` are unreadable and `rejected` belong to no class, and
    whose label is `accepted`. `chunk` is the digest of its images before they were read."""

    part: str
    sha256: str
    chunk: str
    images: int
    errors: int
    rejected: int
    seconds: float
    pid: int
    host: str
    accepted: int = 0


def check_folder(folder: Path) -> None:
    """Raise FileExistsError if `folder` holds other files than a run's, NotADirectoryError if it is a file."""
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"expected a folder to write to, got the file {folder}")
    others = not (folder / LOG).exists() and folder.exists() and any(path.name[0] != "." for path in folder.iterdir())
    if others:
        raise FileExistsError(f"{folder} exists and holds other files than a run's parts; choose another folder")


class Parts:
    """The parts of a run in `folder`, by `open_parts`."""

    def __init__(self, folder: Path, plan: dict[str, Any], chunks: Sequence[Chunk], suffix: str, log: BinaryIO) -> None:
        self.folder, self._plan, self._chunks, self._suffix, self._log = folder, plan, chunks, suffix, log
        self._done = _read_log(folder, plan, log)

    @property
    def paths(self) -> list[Path]:
        """The files of all parts, in order."""
        return [self.folder / part_name(chunk.number, self._suffix) for chunk in self._chunks]

    def missing(self, skip_bad: bool) -> list[Chunk]:
        """The chunks whose parts must be computed. Reads every part, and says on stderr why one that is there is
        computed again; without `skip_bad` those with unreadable images are."""
        missing = []
        for chunk, path in zip(self._chunks, self.paths, strict=True):
            reason = self._reason(chunk, path, skip_bad)
            if reason is not None:
                missing.append(chunk)
                self._done.pop(path.name, None)
            if reason:
                say(f"{path.name} is computed again: {reason}")
        if missing:
            (self.folder / MANIFEST).unlink(missing_ok=True)  # it claims that all parts exist
        return missing

    def add(self, done: Done) -> None:
        """Log a part that was written."""
        self._log.write(json.dumps(asdict(done)).encode() + b"\n")
        self._log.flush()
        self._done[done.part] = done

    def total(self, field: str) -> int:
        """The sum of a field of all parts."""
        return sum(getattr(done, field) for done in self._done.values())

    def seal(self, kind: str, readable: str) -> None:
        """Write manifest.json: the plan, counts (that of readable images is called `readable`), versions, and every
        file's size and SHA-256. One that says so already stays."""
        remove_leftovers(self.folder)
        names = [path.name for path in self.paths]
        versions = {name: package_version(name) for name in _PACKAGES}
        facts = {
            **self._plan,
            readable: self._plan["images"] - self.total("errors"),
            "errors": self.total("errors"),
            "rejected": self.total("rejected"),
            "accepted": self.total("accepted"),
            "parts": names,
            "versions": {name: version for name, version in versions.items() if version is not None},
        }
        with suppress(ValueError, FileNotFoundError):
            held = read_manifest(self.folder, kind, verify=False)
            if {name: held.get(name) for name in facts} == json.loads(json.dumps(facts)):
                return
        (self.folder / MANIFEST).unlink(missing_ok=True)  # it lists all files but itself
        write_manifest(self.folder, kind, facts, {name: self._done[name].sha256 for name in names})

    def remove(self) -> None:
        """Remove the folder, the log last: with the log, what a kill leaves is a run that resumes."""
        remove_leftovers(self.folder)
        for path in self.paths:
            path.unlink()
        (self.folder / LOG).unlink()
        with suppress(OSError):  # the next run has begun in it
            self.folder.rmdir()

    def _reason(self, chunk: Chunk, path: Path, skip_bad: bool) -> str | None:
        """Why a part must be computed, "" if it is not there; None if it counts."""
        done = self._done.get(path.name)
        if not path.is_file():
            return ""
        if done is None:
            return "the run that wrote it did not log it"
        if done.chunk != chunk.digest():
            return "its images have changed since"
        if done.sha256 != sha256(path):
            return "it is damaged or another file than the one that was written"
        if done.errors and not skip_bad:
            return f"{done.errors} of its images could not be read, and --skip-bad is not given"
        return None


@contextmanager
def open_parts(folder: Path, plan: Mapping[str, Any], chunks: Sequence[Chunk], suffix: str) -> Iterator[Parts]:
    """Begin or resume a run in `folder`, which other runs can't enter meanwhile.

    Raises FileExistsError while another run writes, IosrFastError for the parts of another plan.
    """
    check_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        lock = lock_folder(folder.resolve())
    except BlockingIOError:
        raise FileExistsError(f"another run is writing to {folder}; wait for it or choose another place") from None
    try:
        with (folder / LOG).open("a+b") as log:
            yield Parts(folder, dict(plan), chunks, suffix, log)
    finally:
        unlock(lock)


def _read_log(folder: Path, plan: dict[str, Any], log: BinaryIO) -> dict[str, Done]:
    """The finished parts by name, after a new log has got its plan. What a kill left of a line is cut off."""
    own = json.dumps(plan).encode() + b"\n"
    log.seek(0)
    first = log.readline()
    if not first.endswith(b"\n"):  # new, or killed while the first line was written
        if not own.startswith(first):
            raise IosrFastError(f"expected the log of a run in {folder / LOG}, found another file; move it away")
        log.truncate(0)
        log.write(own)
        log.flush()
        return {}
    try:
        held = dict(json.loads(first))
    except (ValueError, TypeError) as error:
        raise IosrFastError(f"{folder / LOG} is damaged; remove {folder} to start again") from error
    if different := differences(held, json.loads(own)):
        raise IosrFastError(
            f"{folder} holds parts of another run, which differs in {different}: resume with that run's input and "
            "options, choose another place, or remove the folder to start again"
        )
    done, end = {}, len(first)
    for line in log:
        try:
            one = Done(**json.loads(line))
        except (ValueError, TypeError):
            break
        if not line.endswith(b"\n"):
            break
        done[one.part], end = one, end + len(line)
    if log.seek(0, os.SEEK_END) > end:
        log.truncate(end)
    return done


def part_name(number: int, suffix: str) -> str:
    return f"part-{number:05d}{suffix}"


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The entries in which two plans differ, for an error message; "" if none."""
    pairs = [(name, before.get(name), now.get(name)) for name in {**before, **now}]
    return "; ".join(f"{name} (there {old!s:.80}, now {new!s:.80})" for name, old, new in pairs if old != new)


def say(line: str) -> None:
    """Print a line to stderr."""
    print(printable(line), file=sys.stderr, flush=True)
