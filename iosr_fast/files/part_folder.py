"""The output folder of a run: plan.json, part files, log.jsonl, and manifest.json once all parts exist.

log.jsonl has a line for each part written: by which process, and in how many seconds. Parts hold no such facts, so that
the same plan gives the same files.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from iosr_fast import __version__
from iosr_fast.exceptions import DamagedFileError, IosrFastError, printable
from iosr_fast.files.plan import Plan
from iosr_fast.files.resume import differences
from iosr_fast.files.source import Chunk
from iosr_fast.utils.files import new_file
from iosr_fast.utils.machine import package_version
from iosr_fast.utils.manifest import MANIFEST, read_manifest, write_manifest
from iosr_fast.utils.temporaries import is_open_at, try_lock

PLAN, LOG, LOCK = "plan.json", "log.jsonl", ".lock"
PACKAGES = ("numpy", "pillow", "onnxruntime", "torch", "safetensors", "pyarrow", "ray")


@dataclass(frozen=True)
class Done:
    """A written part: its images, how many were unreadable, and which process wrote it."""

    part: str
    images: int
    errors: int
    seconds: float
    pid: int
    host: str


def check_folder(out: Path) -> None:
    """Raise FileExistsError if `out` holds other files, NotADirectoryError if it is a file."""
    if out.exists() and not out.is_dir():
        raise NotADirectoryError(f"expected a folder to write to, got the file {out}")
    # A run that is killed at its start leaves only hidden files.
    if out.exists() and not (out / PLAN).exists() and any(not path.name.startswith(".") for path in out.iterdir()):
        raise FileExistsError(f"{out} exists and holds other files than a run's parts ({PLAN}); choose another folder")


def check_apart(location: str, out: Path) -> None:
    """Raise ValueError if the output lies inside the input, where it would be listed as part of it."""
    path = Path(location).resolve()
    if path.is_dir() and (out.resolve() == path or path in out.resolve().parents):
        raise IosrFastError(f"expected --out outside the input, got {out} inside {location}; choose another folder")


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Exclude other runs from the folder. The system releases the lock when the process ends."""
    out.mkdir(parents=True, exist_ok=True)
    lock = out / LOCK
    with lock.open("w") as file:
        # None: a file system without locks. Two runs would do the same work twice and write the same files.
        if try_lock(file.fileno()) is False:
            raise FileExistsError(f"another run is writing to {out}; wait for it or choose another folder")
        if not is_open_at(file.fileno(), lock):  # the run that just ended removed it
            raise FileExistsError(f"another run has just finished in {out}; start again")
        try:
            yield
        finally:
            if is_open_at(file.fileno(), lock):  # `finish` removes it; another one is the next run's
                lock.unlink()


class PartFolder:
    """Output of `complete`: the parts of a plan in the folder `out`."""

    def __init__(self, out: Path, plan: Plan, chunks: Sequence[Chunk], skip_bad: bool) -> None:
        self._out, self._plan, self._chunks, self._skip_bad = out, plan, chunks, skip_bad
        self._errors, self._complete = 0, False

    @contextmanager
    def open(self) -> Iterator[list[Chunk]]:
        """Lock the folder, compare the plan with the one in it, and yield the chunks to compute.

        Raises FileExistsError while another run writes to the folder, ValueError for a different plan.
        """
        with locked(self._out):
            self._enter_plan()
            missing = self._missing()
            self._complete = not missing and (self._out / MANIFEST).is_file()
            if self._complete:
                log(f"all {len(self._chunks)} parts exist")
            else:
                existing = len(self._chunks) - len(missing)
                log(f"{self._plan.images:,} images in {self._plan.chunks} parts, {existing} of them exist")
            yield missing

    def add(self, done: Done) -> None:
        """Log a part that was written."""
        with (self._out / LOG).open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(done)) + "\n")
        self._errors += done.errors

    def finish(self) -> dict[str, Any]:
        """Write manifest.json (counts, versions, every file's SHA-256), or verify an existing one; returns it.

        Raises FileNotFoundError if a part is missing.
        """
        if self._complete:
            try:
                return read_manifest(self._out, self._plan.kind)
            except (ValueError, FileNotFoundError) as error:  # killed while writing it; the parts have been verified
                log(f"{MANIFEST} is written again: {error}")
        out, plan = self._out, self._plan
        parts = [plan.part_name(number) for number in range(plan.chunks)]
        if missing := [name for name in parts if not (out / name).is_file()]:
            raise FileNotFoundError(
                f"expected {len(parts)} parts in {out}, {len(missing)} are missing ({missing[0]}); start again"
            )
        _remove_leftovers(out)
        for name in (MANIFEST, LOCK):  # the manifest lists all files, and must not list these two
            (out / name).unlink(missing_ok=True)
        versions = {"iosr_fast": __version__, **{name: package_version(name) for name in PACKAGES}}
        facts = {
            **{name: value for name, value in asdict(plan).items() if name != "schema"},
            "plan": plan.digest(),
            plan.counted: plan.images - self._errors,
            "errors": self._errors,
            **plan.count([out / name for name in parts]),
            "parts": parts,
            "versions": {name: version for name, version in versions.items() if version is not None},
        }
        return write_manifest(out, plan.kind, facts)

    def _enter_plan(self) -> None:
        path = self._out / PLAN
        if not path.exists():
            with new_file(path) as temporary:
                temporary.write_text(self._plan.to_json(), encoding="utf-8")
            return
        try:
            earlier = dict(json.loads(path.read_text(encoding="utf-8")))
        except ValueError as error:
            raise DamagedFileError(f"{path} is damaged ({error}); choose another folder, or remove this one") from error
        if different := differences(earlier, json.loads(self._plan.to_json())):
            raise IosrFastError(
                f"{self._out} holds parts of another plan, which differs in {different}: resume with the same input "
                "and options, or choose another folder"
            )

    def _missing(self) -> list[Chunk]:
        """The chunks without a valid part. Reads every part and logs which are computed again: damaged, foreign and
        outdated ones and, without `skip_bad`, those with unreadable images."""
        _remove_leftovers(self._out)
        missing: list[Chunk] = []
        for chunk in self._chunks:
            path = self._out / self._plan.part_name(chunk.number)
            if not path.exists():
                missing.append(chunk)
                continue
            reason, unreadable = self._plan.check_part(path, chunk)
            if reason is None and unreadable and not self._skip_bad:
                reason = f"{unreadable} of its images could not be read, and --skip-bad is not given"
            if reason is None:
                self._errors += unreadable
            else:
                log(f"{path.name} is computed again: {reason}")
                missing.append(chunk)
        if missing:
            (self._out / MANIFEST).unlink(missing_ok=True)  # it claims that all parts exist
        return missing


def _remove_leftovers(out: Path) -> None:
    """Remove unfinished files of killed processes and the marks of their attempts."""
    for pattern in (".part-*.tmp", f".{PLAN}.*.tmp"):
        for leftover in out.glob(pattern):
            leftover.unlink(missing_ok=True)


def log(line: str) -> None:
    """Print a line to stderr."""
    print(printable(line), file=sys.stderr, flush=True)
