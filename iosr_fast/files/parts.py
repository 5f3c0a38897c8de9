"""Where the parts of a run go, and the log by which an interrupted run resumes.

log.jsonl begins with the plan: everything that determines the parts, except the images themselves. A line follows for
each part that is stored: what it holds, its size and SHA-256, and the process that made it. A part counts if the log
knows it, it has that SHA-256, and its images are unchanged. Any other part is computed again, which gives the same
bytes.

A part is stored whole, and logged then, so a kill at any moment loses the parts that are being computed and nothing
else. The folder is locked while a run writes, so two runs never share a folder.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from iosr_fast.exceptions import IosrFastError
from iosr_fast.files.chunks import Done
from iosr_fast.files.source import Chunk
from iosr_fast.files.work import Classify, Counts, Work
from iosr_fast.sealed.files import lock_folder, new_file, remove_leftovers, room_for, unlock
from iosr_fast.sealed.manifest import MANIFEST, read_manifest, sha256, write_manifest
from iosr_fast.utils.machine import package_version
from iosr_fast.utils.progress import say

LOG = "log.jsonl"
_PACKAGES = ("numpy", "pillow", "onnxruntime", "openvino", "torch", "safetensors", "pyarrow", "ray")


def parts_of(out: Path) -> Path:
    """The folder of a file that is being written; where `out` is a link, beside its target."""
    out = Path(os.path.realpath(out))
    return out.with_name(f"{out.name}.parts")


def check_folder(folder: Path) -> None:
    """Raise FileExistsError if `folder` holds other files than a run's, NotADirectoryError if it is a file."""
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"expected a folder to write to, got the file {folder}")
    others = not (folder / LOG).exists() and folder.exists() and any(path.name[0] != "." for path in folder.iterdir())
    if others:
        raise FileExistsError(f"{folder} exists and holds other files than a run's parts; choose another folder")


class Printed:
    """Parts are lines of a text stream; nothing is kept, so nothing resumes."""

    def __init__(self, chunks: Sequence[Chunk], file: TextIO) -> None:
        self._chunks, self._file, self._done = chunks, file, dict[str, Done]()

    @property
    def counts(self) -> Counts:
        """The counts of all parts together."""
        return Counts(*map(sum, zip(*(done.counts for done in self._done.values()), strict=True)))

    def missing(self, skip_bad: bool) -> list[Chunk]:
        """The chunks whose parts must be computed."""
        return [*self._chunks]

    def add(self, done: Done, content: bytes) -> None:
        """Store a part."""
        self._file.write(content.decode())
        self._done[done.part] = done

    def finish(self) -> None:
        """All parts are stored."""


class Folder(Printed):
    """The parts are files of a folder, by `open_parts`."""

    in_order = False  # whether a part is stored behind those before it

    def __init__(self, folder: Path, plan: dict[str, Any], chunks: Sequence[Chunk], work: Work, log: BinaryIO) -> None:
        self._folder, self._work, self._plan, self._chunks, self._log = folder, work, plan, chunks, log
        self._done = _read_log(folder, plan, log)

    def missing(self, skip_bad: bool) -> list[Chunk]:
        """The chunks whose parts must be computed. Reads every part, and says on stderr why one that is there is
        computed again; without `skip_bad` those with unreadable images are."""
        missing = list[Chunk]()
        for chunk in self._chunks:
            name = chunk.part(self._work.suffix)
            reason = "" if missing and self.in_order else self._reason(chunk, self._done.get(name), skip_bad)
            if reason is not None:
                missing.append(chunk)
                self._done.pop(name, None)
            if reason:
                say(f"{name}{', and what follows it,' * self.in_order} is computed again: {reason}")
        if missing:
            (self._folder / MANIFEST).unlink(missing_ok=True)  # it claims that all parts exist
        return missing

    def add(self, done: Done, content: bytes) -> None:
        """Store a part, then log it."""
        self._store(done.part, content)
        self._log.write(f"{done.to_json()}\n".encode())
        self._log.flush()
        self._done[done.part] = done

    def finish(self) -> None:
        """Write manifest.json: the plan, counts, versions, and every file's size and SHA-256. One that says so already
        stays."""
        remove_leftovers(self._folder)
        names = [chunk.part(self._work.suffix) for chunk in self._chunks]
        versions = {name: package_version(name) for name in _PACKAGES}
        counts = self.counts
        facts = {
            **self._plan,
            self._work.readable: counts.images - counts.errors,
            **counts._asdict(),
            "parts": names,
            "versions": {name: version for name, version in versions.items() if version is not None},
        }
        with suppress(ValueError, FileNotFoundError):
            held = read_manifest(self._folder, self._work.kind, verify=False)
            if {name: held.get(name) for name in facts} == json.loads(json.dumps(facts)):
                return
        (self._folder / MANIFEST).unlink(missing_ok=True)  # it lists all files but itself
        write_manifest(self._folder, self._work.kind, facts, {name: self._done[name].sha256 for name in names})

    def _digest(self, name: str, done: Done | None) -> str | None:
        """The SHA-256 of a part that is stored; None without one."""
        path = self._folder / name
        return sha256(path) if path.is_file() else None

    def _store(self, name: str, content: bytes) -> None:
        with new_file(self._folder / name) as temporary:
            temporary.write_bytes(content)

    def _reason(self, chunk: Chunk, done: Done | None, skip_bad: bool) -> str | None:
        """Why a part must be computed, "" if it is not there; None if it counts."""
        digest = self._digest(chunk.part(self._work.suffix), done)
        if digest is None:
            return ""
        if done is None:
            return "the run that wrote it did not log it"
        if done.chunk != chunk.digest():
            return "its images have changed since"
        if done.sha256 != digest:
            return "it is damaged or another file than the one that was written"
        if done.counts.errors and not skip_bad:
            return f"{done.counts.errors} of its images could not be read, and --skip-bad is not given"
        return None


class Appended(Folder):
    """The parts are appended to one file in a folder of its own. In the end that becomes `out`, and the folder goes.

    Where the file is gone and `out` is there, a run was killed between the two.
    """

    in_order = True

    def __init__(self, folder: Path, *of_run: Any, out: Path) -> None:
        super().__init__(folder, *of_run)
        self._out, self._path = Path(os.path.realpath(out)), folder / f"rows{self._work.suffix}"
        self._is_written = self._out.exists() and not self._path.exists() and len(self._done) == len(self._chunks)

    def missing(self, skip_bad: bool) -> list[Chunk]:
        if self._is_written:
            return []
        self._path.touch()
        with self._path.open("rb") as self._rows:
            missing = super().missing(skip_bad)
        os.truncate(self._path, sum(done.size for done in self._done.values()))  # without what was not logged
        return missing

    def finish(self) -> None:
        if not self._is_written:
            assert isinstance(self._work, Classify)
            sizes = (self._done[chunk.part(self._work.suffix)].size for chunk in self._chunks)
            self._work.table.finish(self._path, sizes, self._out)
        (self._folder / LOG).unlink()  # the last file: with it, what a kill leaves is a run that resumes
        with suppress(OSError):  # the next run has begun in it
            self._folder.rmdir()

    def _digest(self, name: str, done: Done | None) -> str | None:
        content = b"" if done is None else self._rows.read(done.size)
        return hashlib.sha256(content).hexdigest() if content else None

    def _store(self, name: str, content: bytes) -> None:
        with room_for(self._path), self._path.open("ab") as file:
            file.write(content)


@contextmanager
def open_parts(out: Path, plan: Mapping[str, Any], chunks: Sequence[Chunk], work: Work) -> Iterator[Folder]:
    """Begin or resume a run that writes `out`, a file if it has a suffix; other runs can't enter meanwhile.

    `check_folder` has been called. Raises FileExistsError while another run writes, IosrFastError for the parts of
    another plan.
    """
    folder = parts_of(out) if out.suffix else out
    folder.mkdir(parents=True, exist_ok=True)
    try:
        lock = lock_folder(folder.resolve())
    except BlockingIOError:
        raise FileExistsError(f"another run is writing to {folder}; wait for it or choose another place") from None
    try:
        with (folder / LOG).open("a+b") as log:
            run = folder, dict(plan), chunks, work, log
            yield Appended(*run, out=out) if out.suffix else Folder(*run)
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
            one = Done.of_json(line)
        except (ValueError, TypeError, KeyError):
            break
        if not line.endswith(b"\n"):
            break
        done[one.part], end = one, end + len(line)
    if log.seek(0, os.SEEK_END) > end:
        log.truncate(end)
    return done


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The entries in which two plans differ, for an error message; "" if none."""
    pairs = [(name, before.get(name), now.get(name)) for name in {**before, **now}]
    return "; ".join(f"{name} (there {old!s:.80}, now {new!s:.80})" for name, old, new in pairs if old != new)
