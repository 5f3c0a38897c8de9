"""Embed a set of images with an engine: a folder, WebDataset shards or Parquet files with a column of paths.

    python tools/embed.py --engine build/b16 --input photos/ --out embeddings
    python tools/embed.py --engine build/b16 --input "shards/train-{000..127}.tar" --out embeddings --format parquet
    python tools/embed.py --engine build/b16 --input list.parquet --path-column file --keep-columns label \\
        --out embeddings --format parquet --ray --workers 8 --address auto

Writes part-*.safetensors or .parquet with keys, plain and adapted embeddings, and manifest.json when all are there
(iosr_fast.pipeline.embedding_files says what is in them; its read_embeddings reads the folder). The list is cut into
chunks of fixed membership, and a part exists whole or not at all: a run that was stopped goes on when it is started
again with the same options, and every image is embedded exactly once.

With --ray the chunks are spread over workers, here or, with --address, on a cluster that is running. Its machines need
this tree, the input, the engine and --out at the same paths (a shared folder), and one version of Ray.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import typer

from iosr_fast.encoders.runtimes import open_engine
from iosr_fast.pipeline.embedding_files import DTYPES, FORMATS, Format
from iosr_fast.utils.command import run
from iosr_fast.utils.manifest import read_manifest
from iosr_fast.utils.require import require
from tools.embedding import plan as plans
from tools.embedding.cluster import Pool, run_on_ray
from tools.embedding.inputs import check_apart, open_source
from tools.embedding.items import Chunk, Source
from tools.embedding.local import run_chunks
from tools.embedding.plan import Done
from tools.embedding.run import advancing, check_faults, check_sizes, complete, make_pool, summary, told_errors


@dataclass(frozen=True)
class Options:
    """What decides the bytes (chunk to runtime), and what only decides who computes them."""

    chunk: int
    batch: int
    format: Format
    dtype: str
    runtime: str
    threads: int
    skip_bad: bool
    pool: Pool | None


def find_engine(engine: str) -> Path:
    """The folder; for "demo" that of the demo's engine, built once and kept."""
    if engine != "demo":
        return Path(engine)
    from iosr_fast.export.pretrained import open_pretrained

    return open_pretrained("demo", None, "auto", "auto", "fp32", None).engine


def embed(engine: Path, source: Source, out: Path, options: Options) -> dict[str, Any]:
    """Compute the parts that are missing in `out`, write its manifest and return it."""
    facts = read_manifest(engine, "engine", verify=False)
    if options.pool is not None and options.runtime != "auto":
        encoder, runtime = None, options.runtime  # this machine may have no GPU where its workers do
    else:
        encoder = open_engine(engine, options.runtime, threads=options.threads)
        runtime = encoder.runtime
    chunks = source.cut(options.chunk)
    plan = plans.make_plan(
        source,
        chunks,
        facts,
        runtime,
        chunk=options.chunk,
        batch=options.batch,
        dtype=options.dtype,
        file_format=options.format,
    )

    def compute(missing: Sequence[Chunk], advance: Callable[[int], None]) -> Iterator[Done]:
        if options.pool is not None:
            return advancing(run_on_ray(engine, plan, missing, out, options.pool, options.skip_bad), advance)
        assert encoder is not None
        return run_chunks(encoder, plan, missing, out, options.threads, options.skip_bad, advance)

    return complete(out, plan, chunks, compute, options.skip_bad, "embed")


def check(options: Options) -> None:
    """Raise ValueError for options that can't be, ImportError for packages they need; before any work."""
    check_sizes(options.chunk, options.batch)
    if options.format not in FORMATS:
        raise ValueError(f"expected --format {' or '.join(FORMATS)}, got {options.format}")
    if options.dtype not in DTYPES:
        raise ValueError(f"expected --dtype {' or '.join(DTYPES)}, got {options.dtype}")
    if options.format == "parquet":
        require("pyarrow", "parquet")


def main(
    engine: str = typer.Option(..., help="a folder of tools/build_engine.py, or 'demo'"),
    given: str = typer.Option(..., "--input", help="a folder, .tar shards (folder, glob or braces) or .parquet"),
    out: Path = typer.Option(..., help="the folder to write; one that this run began is finished"),
    format: str = typer.Option("safetensors", help="safetensors or parquet"),
    dtype: str = typer.Option("float32", help="float32 or float16"),
    chunk: int = typer.Option(1024, help="images of a part"),
    batch: int = typer.Option(64, help="images encoded at a time"),
    kind: str = typer.Option("auto", help="folder, webdataset or parquet, where the input could be several"),
    path_column: str = typer.Option("path", help="parquet: the column of paths, relative to the file's folder"),
    keep_columns: str = typer.Option("", help="parquet to parquet: columns to carry over, separated by commas"),
    image_field: str | None = typer.Option(None, help="webdataset: the member with the image, as in jpg"),
    skip_bad: bool = typer.Option(False, "--skip-bad", help="go on after an unreadable image, and say why in its row"),
    runtime: str = typer.Option("auto", help="auto, onnxruntime, tensorrt, tensorrt_rtx or torch"),
    threads: int | None = typer.Option(None, help="cores of this process, or of each worker [all, on a cluster 4]"),
    ray: bool = typer.Option(False, "--ray", help="spread the chunks over workers of Ray"),
    workers: int | None = typer.Option(None, help="with --ray: how many [2]"),
    gpus: float = typer.Option(0, help="with --ray: of each worker, or its share of one"),
    address: str | None = typer.Option(None, help="with --ray: join this cluster ('auto': the one on this machine)"),
) -> None:
    started = time.perf_counter()
    with told_errors(out):
        threads, pool = make_pool(ray, workers, threads, gpus, address)
        options = Options(chunk, batch, cast(Format, format), dtype, runtime, threads, skip_bad, pool)
        check(options)
        kept = [name for name in keep_columns.split(",") if name]
        if kept and format != "parquet":
            raise ValueError("expected --format parquet with --keep-columns: safetensors holds numbers only")
        check_apart(given, out)
        plans.check_folder(out)
        source = open_source(given, kind, path_column=path_column, keep_columns=kept, image_field=image_field)
        check_faults(source, skip_bad)
        manifest = embed(find_engine(engine), source, out, options)
        print(summary(manifest, "embedded", out, time.perf_counter() - started))


if __name__ == "__main__":
    run(main)
