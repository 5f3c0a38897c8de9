"""What tools/embed.py and tools/classify.py have in common: one run over the parts of a plan, here or on Ray."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer

from iosr_fast.images.preprocess import BadImageError
from iosr_fast.utils.manifest import MANIFEST, read_manifest
from iosr_fast.utils.progress import progress
from iosr_fast.utils.require import require
from tools.embedding import plan as plans
from tools.embedding.cluster import Pool
from tools.embedding.items import Chunk, Source
from tools.embedding.plan import Done, Plan

MAX_CHUNK = 65536  # keys of a part stand in one JSON header
CLUSTER_THREADS = 4
Compute = Callable[[Sequence[Chunk], Callable[[int], None]], Iterator[Done]]


def say(told: str) -> None:
    print(told, file=sys.stderr, flush=True)


def complete(
    out: Path, plan: Plan, chunks: Sequence[Chunk], compute: Compute, skip_bad: bool, verb: str
) -> dict[str, Any]:
    """Have `compute` make the parts that are missing in `out`, write its manifest and return it.

    `compute` takes the missing chunks, and what to call with the number of images that were done; it yields each part
    when its file is there.
    """
    with plans.locked(out):
        plans.enter_plan(out, plan)
        missing, errors = plans.missing_parts(out, plan, chunks, skip_bad, say)
        if not missing and (out / MANIFEST).is_file():
            say(f"all {len(chunks)} parts are there")
            try:
                return read_manifest(out, plan.kind)
            except (ValueError, FileNotFoundError) as error:  # a kill while it was written; the parts have been read
                say(f"{MANIFEST} is written again: {error}")
                return plans.finish(out, plan, errors)
        say(f"{plan.images:,} images in {plan.chunks} parts, {len(chunks) - len(missing)} of them there already")
        with progress(verb, sum(len(chunk.items) for chunk in missing)) as advance:
            for done in compute(missing, advance) if missing else ():
                plans.log_done(out, done)
                errors += done.errors
        return plans.finish(out, plan, errors)


def advancing(found: Iterator[Done], advance: Callable[[int], None]) -> Iterator[Done]:
    """The same, part by part: of what workers do elsewhere no more is seen."""
    for done in found:
        advance(done.images)
        yield done


def make_pool(
    ray: bool, workers: int | None, threads: int | None, gpus: float, address: str | None
) -> tuple[int, Pool | None]:
    """Threads of this process or of each worker, and the workers, where --ray is given. Raises ValueError for options
    that can't be, ImportError without Ray."""
    if not ray and (workers is not None or address is not None or gpus):
        raise ValueError("expected --ray with --workers, --gpus and --address")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = 2 if workers is None else workers
    if threads is None:
        threads = cores if not ray else CLUSTER_THREADS if address else max(1, cores // max(1, workers))
    if threads < 1:
        raise ValueError(f"expected --threads of at least 1, got {threads}")
    if not ray:
        return threads, None
    if workers < 1 or gpus < 0:
        raise ValueError(f"expected --workers of at least 1 and --gpus of at least 0, got {workers} and {gpus}")
    require("ray", "ray")
    return threads, Pool(workers, threads, gpus, address)


def check_sizes(chunk: int, batch: int) -> None:
    if not 1 <= chunk <= MAX_CHUNK:
        raise ValueError(f"expected --chunk from 1 to {MAX_CHUNK}, got {chunk}")
    if batch < 1:
        raise ValueError(f"expected --batch of at least 1, got {batch}")


def check_faults(source: Source, skip_bad: bool) -> None:
    """Raise ValueError where the listing already shows images that can't be had."""
    if (faults := source.faults()) and not skip_bad:
        raise ValueError(
            f"{len(faults)} of {len(source.items)} images can't be had, the first is {faults[0].key}: "
            f"{faults[0].fault}; mend the input, or give --skip-bad"
        )


@contextmanager
def told_errors(out: Path) -> Iterator[None]:
    """What a run may raise as a line on stderr and an exit code."""
    try:
        yield
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        more = "; the parts written so far are kept. Mend it and start again, or give --skip-bad"
        say(f"error: {error}{more if isinstance(error, BadImageError) else ''}")
        raise typer.Exit(2) from error
    except KeyboardInterrupt:
        say(f"stopped; start again with the same options to go on in {out}")
        raise typer.Exit(130) from None


def summary(manifest: dict[str, Any], counted: str, out: Path, seconds: float) -> str:
    unread = f"; {manifest['errors']:,} unread" if manifest["errors"] else ""
    return (
        f"{manifest[counted]:,} of {manifest['images']:,} images in {len(manifest['parts'])} parts in {out}, after "
        f"{seconds:.0f} s{unread}"
    )
