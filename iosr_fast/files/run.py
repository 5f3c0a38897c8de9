"""A run: the missing parts of its images are computed, in this process or by a pool, and are printed, or make a file or
a folder."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any, TextIO, TypeAlias

from iosr_fast import __version__
from iosr_fast.files import tables
from iosr_fast.files.chunks import Done, run_chunks
from iosr_fast.files.parts import Printed, check_folder, open_parts, parts_of
from iosr_fast.files.source import Chunk, Source
from iosr_fast.files.stream import ReadOptions
from iosr_fast.files.work import Classify, Counts, Work
from iosr_fast.images.pixels import VERSION
from iosr_fast.sealed.outputs import check_new_file
from iosr_fast.utils.numbers import check_integer
from iosr_fast.utils.progress import progress, say

# Computes chunks of a run elsewhere, as run_chunks does, in order: iosr_fast.ray.Pool.
Pool: TypeAlias = Callable[
    [Work, dict[str, Any], Sequence[Chunk], ReadOptions], Generator[tuple[Done, bytes], None, None]
]
MAX_CHUNK = 65_536  # the keys of an embedding part are one JSON header
_RAY_BATCH = 64  # the cluster's processors are not known here


def check_out(out: Path) -> None:
    """Raise the errors of `run` about its output, before any work."""
    if not out.suffix:
        check_folder(out)
        return
    check_folder(parts_of(out))
    if not parts_of(out).exists():  # else a run began to write it
        check_new_file(out, (*tables.SUFFIXES, ".json"))


def run(
    work: Work,
    source: Source,
    out: Path | TextIO,
    options: ReadOptions,
    chunk: int | None = None,
    pool: Pool | None = None,
) -> Counts:
    """Print the rows as they come, or write `out`, or finish what an interrupted run began: a table if its name has a
    suffix, else a folder of parts of `chunk` images (None: 1,024, of a table 256), with manifest.json when all are
    there.

    The rows of a table are appended to one file in `parts_of(out)`, which gets its name in the end. The bytes do not
    depend on interruptions. They may depend on the number of cores, which changes the sizes of the last batches and so
    the last bit of an embedding. A `pool` computes the parts on other machines.

    Raises FileExistsError for a finished table, a folder of other files, and while another run writes; IosrFastError
    for the parts of a run with other images, options or another classifier; BadImageError for an unreadable image
    unless `skip_bad`. Finished parts stay.
    """
    if chunk is not None:
        check_integer("--chunk", chunk, 1, MAX_CHUNK)
    if isinstance(out, Path):
        check_out(out)
    reader = None if pool is not None else work.open(options)
    runtime, batch = options.runtime, options.batch or _RAY_BATCH
    if reader is not None:
        runtime, batch = reader.encoder.runtime, reader.batch
    images = len(source.paths)
    if isinstance(work, Classify) and work.joint:
        chunk = images
    elif chunk is None:
        chunk = batch if not isinstance(out, Path) else 256 if out.suffix else 1024
    plan: dict[str, Any] = {
        "iosr_fast": __version__,
        **work.facts,
        "images": images,
        "keys_sha256": source.digest(),
        "chunk": chunk,
        "batch": batch,
        "runtime": runtime,
        "pixels": VERSION,
    }
    chunks = source.cut(chunk)
    opened = open_parts(out, plan, chunks, work) if isinstance(out, Path) else nullcontext(Printed(chunks, out))
    shown = isinstance(out, Path) or not out.isatty()
    with opened as parts:
        missing = parts.missing(options.skip_bad)
        left = sum(len(one.keys) for one in missing)
        if left < images:
            say(f"{images - left:,} of {images:,} images are done already")
        if missing:
            with progress(work.verb, left, shown) as advance:
                if pool is not None:
                    results = pool(work, plan, missing, options)
                else:
                    assert reader is not None
                    results = run_chunks(work, reader, missing, images, advance)
                with closing(results):
                    for done, content in results:
                        parts.add(done, content)
                        advance(0 if pool is None else done.counts.images)  # workers report their progress part by part
        parts.finish()
        return parts.counts
