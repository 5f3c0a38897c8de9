"""Classify a set of images with a saved classifier: a folder, WebDataset shards or Parquet files with paths.

    python tools/classify.py --bundle build/demo-bundle --input photos/ --out labels
    python tools/classify.py --bundle build/demo-bundle --input "shards/train-{000..127}.tar" --out labels --top 3
    python tools/classify.py --bundle /share/bundle --input list.parquet --keep-columns price --out labels \\
        --ray --workers 8 --address auto

Writes part-*.parquet with each image's key, its label and class id, probability, what of the logit the texts say
(zero_shot) and what the support images add (cache), and the same of the `--top` best classes; and manifest.json when
all are there (tools.classification.parts says what is in them). Like tools/embed.py it cuts the list of images into
chunks of fixed membership: a run that was stopped goes on when it is started again with the same options, and every
image is classified exactly once, by one and the same classifier.

With --ray the chunks are spread over workers, here or, with --address, on a cluster that is running. Its machines need
this tree, the input, the bundle and --out at the same paths (a shared folder), and one version of Ray.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from iosr_fast.state.bundle import load_bundle
from iosr_fast.utils.command import run
from iosr_fast.utils.require import require
from tools.classification.parts import check_names
from tools.classification.plan import classify_plan
from tools.classification.worker import ClassifyWorker, open_encoder, writer
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
    top: int
    runtime: str
    threads: int
    skip_bad: bool
    pool: Pool | None


def classify(folder: Path, source: Source, out: Path, options: Options) -> dict[str, Any]:
    """Compute the parts that are missing in `out`, write its manifest and return it."""
    bundle = load_bundle(folder)
    assert bundle.files is not None
    if options.pool is not None and options.runtime != "auto":
        encoder, runtime = None, options.runtime  # this machine may have no GPU where its workers do
    else:
        encoder = open_encoder(bundle, options.runtime, options.threads)
        runtime = encoder.runtime
    chunks = source.cut(options.chunk)
    plan = classify_plan(
        source,
        chunks,
        bundle,
        bundle.files.manifest,
        runtime,
        chunk=options.chunk,
        batch=options.batch,
        top=options.top,
    )

    def compute(missing: Sequence[Chunk], advance: Callable[[int], None]) -> Iterator[Done]:
        if options.pool is not None:
            found = run_on_ray(folder, plan, missing, out, options.pool, options.skip_bad, ClassifyWorker)
            return advancing(found, advance)
        assert encoder is not None
        write = writer(bundle.state, plan)
        return run_chunks(encoder, plan, missing, out, options.threads, options.skip_bad, advance, write)

    return complete(out, plan, chunks, compute, options.skip_bad, "classify")


def main(
    bundle: Path = typer.Option(..., help="a folder that `iosr-fast fit` or Classifier.save wrote"),
    given: str = typer.Option(..., "--input", help="a folder, .tar shards (folder, glob or braces) or .parquet"),
    out: Path = typer.Option(..., help="the folder to write; one that this run began is finished"),
    top: int = typer.Option(5, help="classes to tell of"),
    chunk: int = typer.Option(1024, help="images of a part"),
    batch: int = typer.Option(64, help="images encoded at a time"),
    kind: str = typer.Option("auto", help="folder, webdataset or parquet, where the input could be several"),
    path_column: str = typer.Option("path", help="parquet: the column of paths, relative to the file's folder"),
    keep_columns: str = typer.Option("", help="parquet: columns to carry over, separated by commas"),
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
        check_sizes(chunk, batch)
        if top < 1:
            raise ValueError(f"expected --top of at least 1, got {top}")
        require("pyarrow", "parquet")
        kept = [name for name in keep_columns.split(",") if name]
        check_names(kept)
        check_apart(given, out)
        plans.check_folder(out)
        source = open_source(given, kind, path_column=path_column, keep_columns=kept, image_field=image_field)
        check_faults(source, skip_bad)
        manifest = classify(bundle, source, out, Options(chunk, batch, top, runtime, threads, skip_bad, pool))
        print(summary(manifest, "classified", out, time.perf_counter() - started))


if __name__ == "__main__":
    run(main)
