"""Runs that write the parts of a plan, in this process or on workers of Ray."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from iosr_fast.encoders.runtimes import open_engine
from iosr_fast.exceptions import IosrFastError
from iosr_fast.files.chunks import run_chunks
from iosr_fast.files.part_folder import Done, PartFolder
from iosr_fast.files.plan import PLANS, make_plan
from iosr_fast.files.ray_workers import Pool, run_on_ray
from iosr_fast.files.resume import complete
from iosr_fast.files.source import Chunk, Source
from iosr_fast.head.rejecting import Rejecting
from iosr_fast.store.bundle import Bundle, load_bundle
from iosr_fast.utils.machine import usable_threads
from iosr_fast.utils.manifest import read_manifest
from iosr_fast.utils.numbers import check_integer
from iosr_fast.utils.require import require
from iosr_fast.utils.verified_folder import VerifiedFolder

MAX_CHUNK = 65536  # a part's keys are one JSON header
CLUSTER_THREADS = 4


@dataclass(frozen=True)
class RunOptions:
    """`chunk` images a part, `batch` encoded at a time; `threads` of this process, or of each worker of the `pool`."""

    chunk: int
    batch: int
    runtime: str
    threads: int
    skip_bad: bool
    pool: Pool | None = None


def check_options(
    *,
    chunk: int,
    batch: int,
    runtime: str,
    threads: int | None,
    skip_bad: bool,
    ray: bool,
    workers: int | None,
    gpus: float,
    address: str | None,
) -> RunOptions:
    """The options of a command line. Raises ValueError for impossible ones, ImportError without Ray."""
    check_integer("--chunk", chunk, 1, MAX_CHUNK)
    check_integer("--batch", batch, 1)
    if not ray and (workers is not None or address is not None or gpus):
        raise IosrFastError("expected --workers, --gpus and --address only with --ray, got them without it")
    workers = 2 if workers is None else workers
    if threads is None:
        cores = usable_threads()
        threads = cores if not ray else CLUSTER_THREADS if address else max(1, cores // max(1, workers))
    check_integer("--threads", threads, 1)
    pool = None
    if ray:
        if workers < 1 or gpus < 0:
            raise IosrFastError(f"expected --workers of at least 1 and --gpus of at least 0, got {workers} and {gpus}")
        require("ray", "ray")
        pool = Pool(workers, gpus, address)
    return RunOptions(chunk, batch, runtime, threads, skip_bad, pool)


def embed(engine: Path, source: Source, out: Path, options: RunOptions, dtype: str) -> dict[str, Any]:
    """Write the missing embeddings of `source` to `out`; returns the manifest."""
    facts = read_manifest(engine, "engine", verify=False)
    return _run(engine, engine, facts, source, out, options, dtype=dtype)


def classify(
    folder: Path, source: Source, out: Path, options: RunOptions, top: int, rejecting: Rejecting | None = None
) -> dict[str, Any]:
    """Write the missing predictions of `source`, by the bundle `folder`, to `out`; returns the manifest."""
    bundle = load_bundle(folder)
    head = bundle.head.one_label("a folder of parts", "give a .csv file for --out")
    if rejecting is not None:
        rejecting.check(head)
    assert bundle.files is not None
    plan: dict[str, Any] = {"bundle": bundle, "top": top, "rejecting": rejecting}
    return _run(folder, bundle.files, bundle.files.manifest, source, out, options, **plan)


def _run(
    folder: Path,
    engine: Path | VerifiedFolder,
    facts: dict[str, Any],
    source: Source,
    out: Path,
    options: RunOptions,
    bundle: Bundle | None = None,
    **of_plan: Any,
) -> dict[str, Any]:
    """Workers open `folder`. This process opens `engine` to run it or to choose a runtime; `facts` is its manifest."""
    encoder, runtime = None, options.runtime
    if options.pool is None or runtime == "auto":  # else this machine may lack the GPU that its workers have
        adapted = bundle is None or bundle.head.needs_adapted
        encoder = open_engine(engine, runtime, verify=bundle is None, threads=options.threads, adapted=adapted)
        runtime = encoder.runtime
    chunks = source.cut(options.chunk)
    plan = make_plan(source, chunks, facts, runtime, chunk=options.chunk, batch=options.batch, bundle=bundle, **of_plan)

    def compute(missing: Sequence[Chunk], advance: Callable[[int], None]) -> Generator[Done, None, None]:
        if options.pool is None:
            assert encoder is not None
            write = plan.writer(bundle)
            yield from run_chunks(plan, missing, out, (encoder, write), options.threads, options.skip_bad, advance)
            return
        for done in run_on_ray(folder, plan, missing, out, options.pool, options.threads, options.skip_bad):
            advance(done.images)  # workers report their progress part by part
            yield done

    parts = PartFolder(out, plan, chunks, options.skip_bad)
    return complete(parts, compute, plan.verb, lambda missing: sum(len(chunk.items) for chunk in missing))


def summary(manifest: dict[str, Any], out: Path, seconds: float) -> str:
    """The last line of a command: readable images, parts, time, unreadable and rejected images."""
    counted = PLANS[manifest["kind"]].counted
    notes = [f"{manifest['errors']:,} unreadable"] if manifest["errors"] else []
    if "rejected" in manifest:
        notes.append(f"{manifest['rejected']:,} rejected as {manifest['unknown_label']!r}")
    return (
        f"{manifest[counted]:,} of {manifest['images']:,} images in {len(manifest['parts'])} parts in {out}, after "
        f"{seconds:.0f} s{''.join(f'; {note}' for note in notes)}"
    )
