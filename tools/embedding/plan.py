"""The folder that a run writes: its plan, which of its parts are there, and its manifest when all are.

plan.json fixes what decides a part's bytes (input, membership of chunks, engine, batch, dtype, format; what
tools/classify.py adds), so that a run that was stopped goes on with the same plan or not at all. log.jsonl has a line
for each part written: who wrote it and how long it took; parts themselves hold nothing of the kind, so the same plan
gives the same files.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, ClassVar

from iosr_fast import __version__
from iosr_fast.images.pixels import VERSION
from iosr_fast.pipeline.embedding_files import KIND, Format, Part, read_part
from iosr_fast.utils.files import new_file
from iosr_fast.utils.manifest import MANIFEST, write_manifest
from tools.embedding.items import Chunk, Source

PLAN, LOG, LOCK = "plan.json", "log.jsonl", ".lock"
SCHEMA = 1
PACKAGES = ("numpy", "pillow", "onnxruntime", "torch", "safetensors", "pyarrow", "webdataset", "ray")


@dataclass(frozen=True)
class Plan:
    """All that decides a part's bytes but the images themselves, whose stamps stand in the parts.

    `kind` is that of the manifest, `counted` what the manifest calls the images that were read.
    """

    kind: ClassVar[str] = KIND
    counted: ClassVar[str] = "embedded"

    input: dict[str, Any]
    images: int
    keys_sha256: str
    chunk: int
    chunks: int
    batch: int
    engine: str  # fingerprint
    runtime: str
    image_size: int
    width: int
    adapted: bool
    dtype: str
    format: Format
    exif_orientation: bool = True
    pixels: int = VERSION
    schema: int = SCHEMA

    def digest(self) -> str:
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2)

    def part_name(self, number: int) -> str:
        return f"part-{number:0{max(5, len(str(self.chunks - 1)))}d}.{self.format}"

    def part_facts(self, chunk: Chunk) -> dict[str, Any]:
        """What a part of this plan says of itself, whoever computes it."""
        return {
            "plan": self.digest(),
            "part": chunk.number,
            "chunk": chunk.digest(),
            "engine": self.engine,
            "iosr_fast": __version__,
        }

    def read(self, path: Path) -> Any:
        """A part with `keys`, `errors` and `facts`. Raises OSError or ValueError where it can't be read."""
        return read_part(path)

    def unfit(self, part: Part) -> str | None:
        """What of a part's content is not as this plan has it; None: nothing."""
        plain, adapted = part.embeddings.plain, part.embeddings.adapted
        if plain.shape[1] == self.width and str(plain.dtype) == self.dtype and (adapted is not None) == self.adapted:
            return None
        return f"expected embeddings of width {self.width} and {self.dtype}, got {plain.shape[1]} and {plain.dtype}"


@dataclass(frozen=True)
class Done:
    """A part that was written: how many images it has and could not read, and by whom it was made."""

    part: str
    images: int
    errors: int
    seconds: float
    pid: int
    host: str


def make_plan(
    source: Source,
    chunks: Sequence[Chunk],
    engine: dict[str, Any],
    runtime: str,
    *,
    chunk: int,
    batch: int,
    dtype: str,
    file_format: Format,
    exif_orientation: bool = True,
) -> Plan:
    """`engine` is the manifest of the engine's folder, `runtime` what will execute it."""
    return Plan(
        input=source.described,
        images=len(source.items),
        keys_sha256=source.keys_digest(),
        chunk=chunk,
        chunks=len(chunks),
        batch=batch,
        engine=engine["fingerprint"],
        runtime=runtime,
        image_size=engine["image_size"],
        width=engine["width"],
        adapted=engine["first_adapted_block"] is not None,
        dtype=dtype,
        format=file_format,
        exif_orientation=exif_orientation,
    )


def check_folder(out: Path) -> None:
    """Raise FileExistsError where `out` is somebody's other files, NotADirectoryError where it is no folder."""
    if out.exists() and not out.is_dir():
        raise NotADirectoryError(f"expected a folder to write to, got the file {out}")
    # A run that was killed at its very beginning leaves hidden files only.
    if out.exists() and not (out / PLAN).exists() and any(not path.name.startswith(".") for path in out.iterdir()):
        raise FileExistsError(f"{out} exists and holds other things than a run's parts ({PLAN}); choose another folder")


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Keep a second run out of the folder while this one lives; the system lets go of it whatever this one dies of."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / LOCK).open("w") as file:
        mine = os.fstat(file.fileno())
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise FileExistsError(f"another run is writing to {out}; wait for it or choose another folder") from error
        except OSError:
            pass  # a file system without locks: two runs would do the same work twice, and write the same files
        if not _is(out / LOCK, mine):  # a run that just ended took it away, and one that begins may have put another
            raise FileExistsError(f"another run has just finished in {out}; start again")
        try:
            yield
        finally:
            if _is(out / LOCK, mine):  # `finish` removes it, and then it may be the next run's
                (out / LOCK).unlink()


def _is(path: Path, status: os.stat_result) -> bool:
    try:
        return os.path.samestat(os.stat(path), status)
    except FileNotFoundError:
        return False


def enter_plan(out: Path, plan: Plan) -> None:
    """Write the plan, or compare it with the one that is there. Raises ValueError where they differ, saying in what."""
    path = out / PLAN
    if not path.exists():
        with new_file(path) as temporary:
            temporary.write_text(plan.to_json(), encoding="utf-8")
        return
    try:
        there = dict(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); choose another folder, or remove this one") from error
    wanted = json.loads(plan.to_json())
    different = [
        f"{name} (there {_shorten(there.get(name))}, now {_shorten(wanted.get(name))})"
        for name in {**there, **wanted}
        if there.get(name) != wanted.get(name)
    ]
    if different:
        raise ValueError(
            f"{out} holds parts of another plan, which differs in {'; '.join(different)}: go on with the same "
            "input and options, or choose another folder"
        )


def _shorten(value: Any) -> str:
    told = str(value)
    return told if len(told) <= 80 else f"{told[:77]}..."


def missing_parts(
    out: Path, plan: Plan, chunks: Sequence[Chunk], accept_errors: bool, say: Callable[[str], None]
) -> tuple[list[Chunk], int]:
    """The chunks still to be computed, and how many images of the finished parts could not be read.

    Reads every part that is there: damaged, foreign and outdated ones are named and computed again, and so are parts
    with unreadable images where `accept_errors` is false. Leftovers of a run that was killed are removed.
    """
    remove_leftovers(out)
    missing: list[Chunk] = []
    errors = 0
    for chunk in chunks:
        path = out / plan.part_name(chunk.number)
        if not path.exists():
            missing.append(chunk)
            continue
        reason, unread = check_part(path, plan, chunk)
        if reason is None and unread and not accept_errors:
            reason = f"{unread} of its images could not be read, and --skip-bad is not given"
        if reason is None:
            errors += unread
        else:
            say(f"{path.name} is computed again: {reason}")
            missing.append(chunk)
    if missing:
        (out / MANIFEST).unlink(missing_ok=True)  # it says that all is there
    return missing, errors


def remove_leftovers(out: Path) -> None:
    """What processes that were killed had not finished writing, and the marks of their attempts."""
    for pattern in (".part-*.tmp", f".{PLAN}.*.tmp"):
        for leftover in out.glob(pattern):
            leftover.unlink(missing_ok=True)


def check_part(path: Path, plan: Plan, chunk: Chunk) -> tuple[str | None, int]:
    """Why a part can't be kept (None: it can), and how many of its images could not be read."""
    try:
        part = plan.read(path)
    except (ValueError, OSError) as error:
        return str(error), 0
    facts, expected = part.facts or {}, plan.part_facts(chunk)
    told = {"plan": "it is of another plan", "engine": "another engine made it", "part": "it is another part"}
    told |= {"chunk": "its images have changed since", "iosr_fast": "another version of iosr_fast made it"}
    for name in ("engine", "plan", "part", "chunk", "iosr_fast"):
        if facts.get(name) != expected[name]:
            return told[name], 0
    if part.keys != [item.key for item in chunk.items]:
        return "it holds other images", 0
    if (unfit := plan.unfit(part)) is not None:
        return unfit, 0
    return None, sum(error is not None for error in part.errors)


def log_done(out: Path, done: Done) -> None:
    with (out / LOG).open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(done)) + "\n")


def finish(out: Path, plan: Plan, errors: int) -> dict[str, Any]:
    """Write manifest.json (iosr_fast.utils.files): counts, versions, every file's SHA-256. Raises if a part is gone."""
    parts = [plan.part_name(number) for number in range(plan.chunks)]
    if gone := [name for name in parts if not (out / name).is_file()]:
        raise FileNotFoundError(f"expected {len(parts)} parts in {out}, {len(gone)} are gone ({gone[0]}); start again")
    remove_leftovers(out)
    for name in (MANIFEST, LOCK):  # the manifest lists whatever is there, and these two do not stay as they are
        (out / name).unlink(missing_ok=True)
    facts = {
        **{name: value for name, value in asdict(plan).items() if name != "schema"},
        "plan": plan.digest(),
        plan.counted: plan.images - errors,
        "errors": errors,
        "parts": parts,
        "versions": _versions(),
    }
    return write_manifest(out, plan.kind, facts)


def _versions() -> dict[str, str]:
    found = {"iosr_fast": __version__}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
