"""A run: the missing parts of its images are computed, in this process or by Ray, and make a file or a folder."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

from iosr_fast import __version__
from iosr_fast.files import tables
from iosr_fast.files.chunks import run_chunks
from iosr_fast.files.parts import check_folder, open_parts, say
from iosr_fast.files.ray_workers import Pool, run_on_ray
from iosr_fast.files.source import Source
from iosr_fast.files.work import Classify, ReadOptions, Work
from iosr_fast.images.pixels import VERSION
from iosr_fast.sealed.outputs import check_new_file
from iosr_fast.utils.numbers import check_integer
from iosr_fast.utils.progress import progress
from iosr_fast.utils.require import require

MAX_CHUNK = 65_536  # the keys of an embedding part are one JSON header
_RAY_BATCH = 64  # the cluster's processors are not known here


class Counts(NamedTuple):
    """How many images a run had, how many of them are unreadable, how many belong to none of the classes, and how many
    labels are accepted."""

    images: int
    unread: int = 0
    rejected: int = 0
    accepted: int = 0


def check_out(out: Path) -> None:
    """Raise the errors of `run` about its output, before any work."""
    if not out.suffix:
        check_folder(out)
        return
    check_new_file(out, tables.SUFFIXES)
    if out.suffix == ".parquet":
        require("pyarrow.parquet", "parquet")
    check_folder(parts_of(out))
    if out.exists() and not parts_of(out).exists():
        raise FileExistsError(f"{out} exists already; remove it or choose another name")


def parts_of(out: Path) -> Path:
    """The folder of parts that become a file."""
    return out.with_name(f"{out.name}.parts")


def run(
    work: Work, source: Source, out: Path, options: ReadOptions, chunk: int | None = None, pool: Pool | None = None
) -> Counts:
    """Write `out`, or finish what an interrupted run began: a table if its name has a suffix, else a folder of parts
    of `chunk` images (None: 1,024, of a table 256), with manifest.json when all are there.

    The parts of a table lie in `parts_of(out)` until it is written. The bytes do not depend on interruptions. They
    may depend on the number of cores, which changes the sizes of the last batches and so the last bit of an embedding.
    A `pool` (ray_workers.Pool) computes the parts on other machines.

    Raises FileExistsError for a finished table, a folder of other files, and while another run writes; IosrFastError
    for the parts of a run with other images, options or another classifier; BadImageError for an unreadable image
    unless `skip_bad`. Finished parts stay.
    """
    if chunk is None:
        chunk = 256 if out.suffix else 1024
    check_integer("--chunk", chunk, 1, MAX_CHUNK)
    check_out(out)
    chunks = source.cut(chunk)
    reader = None if pool is not None else work.open(options)
    runtime, batch = options.runtime, options.batch or _RAY_BATCH
    if reader is not None:
        runtime, batch = reader.encoder.runtime, reader.batch
    plan: dict[str, Any] = {
        "iosr_fast": __version__,
        **work.facts,
        "images": len(source.paths),
        "keys_sha256": source.digest(),
        "chunk": chunk,
        "batch": batch,
        "runtime": runtime,
        "pixels": VERSION,
    }
    with open_parts(parts_of(out) if out.suffix else out, plan, chunks, work.suffix) as parts:
        missing = parts.missing(options.skip_bad)
        images = sum(len(one.keys) for one in missing)
        if len(missing) < len(chunks):
            say(f"{len(source.paths) - images:,} of {len(source.paths):,} images are done already")
        if missing:
            with progress(work.verb, images) as advance:
                if pool is not None:
                    results = run_on_ray(work, plan, missing, parts.folder, pool, options)
                else:
                    assert reader is not None
                    results = run_chunks(work, reader, missing, len(source.paths), parts.folder, advance)
                with closing(results):
                    for done in results:
                        parts.add(done)
                        advance(0 if pool is None else done.images)  # workers report their progress part by part
        counts = Counts(len(source.paths), *map(parts.total, ("errors", "rejected", "accepted")))
        if not out.suffix:
            parts.seal(work.kind, work.readable)
        elif isinstance(work, Classify):
            work.table.write(out, map(work.table.load, parts.paths))
            parts.remove()
    return counts
