"""Classify a set of images with a saved classifier: a folder, WebDataset shards or Parquet files with paths.

    python tools/classify.py --bundle build/demo-bundle --input photos/ --out labels
    python tools/classify.py --bundle build/demo-bundle --input "shards/train-{000..127}.tar" --out labels --top 3
    python tools/classify.py --bundle /share/bundle --input list.parquet --keep-columns price --out labels \\
        --ray --workers 8 --address auto

Writes part-*.parquet with each image's key, its label and class id, probability, the parts of its logit from the texts
(zero_shot) and from the support images (cache), and the same for the `--top` best classes; and manifest.json once all
exist (iosr_fast.pipeline.prediction_files has the format). Chunks, resuming and --ray are as in tools/embed.py; with
--ray the machines need the bundle at the same path. Every image is classified once, by one and the same classifier.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from iosr_fast.cli.embed import (
    Address,
    Batch,
    Chunk,
    Gpus,
    ImageField,
    Input,
    KeepColumns,
    Kind,
    Out,
    PathColumn,
    Ray,
    Runtime,
    SkipBad,
    Threads,
    Workers,
    run_resumably,
)
from iosr_fast.pipeline import run as runs
from iosr_fast.pipeline.prediction_files import COLUMNS
from iosr_fast.utils.command import run
from iosr_fast.utils.require import require


def main(
    bundle: Annotated[Path, typer.Option(help="a folder that `iosr-fast fit` or Classifier.save wrote")],
    location: Input,
    out: Out,
    top: Annotated[int, typer.Option(help="classes to report per image")] = 5,
    chunk: Chunk = 1024,
    batch: Batch = 64,
    kind: Kind = "auto",
    path_column: PathColumn = "path",
    keep_columns: KeepColumns = "",
    image_field: ImageField = None,
    skip_bad: SkipBad = False,
    runtime: Runtime = "auto",
    threads: Threads = None,
    ray: Ray = False,
    workers: Workers = None,
    gpus: Gpus = 0,
    address: Address = None,
) -> None:
    shared = {**locals()}
    del shared["bundle"], shared["top"]
    if top < 1:
        raise ValueError(f"expected --top of at least 1, got {top}")
    require("pyarrow", "parquet")
    run_resumably(lambda source, options: runs.classify(bundle, source, out, options, top), COLUMNS, **shared)


if __name__ == "__main__":
    run(main)
