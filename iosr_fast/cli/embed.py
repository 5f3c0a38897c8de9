"""Embed a set of images with an engine: a folder, WebDataset shards or Parquet files with a column of paths.

    python tools/embed.py --engine build/b16 --input photos/ --out embeddings
    python tools/embed.py --engine build/b16 --input "shards/train-{000..127}.tar" --out embeddings --format parquet
    python tools/embed.py --engine build/b16 --input list.parquet --path-column file --keep-columns label \\
        --out embeddings --format parquet --ray --workers 8 --address auto

Writes part-*.safetensors or .parquet with keys, plain and adapted embeddings, and manifest.json once all exist
(iosr_fast.pipeline.embedding_files has the format, and read_embeddings to read the folder). Every part exists whole or
not at all: an interrupted run resumes when it is started again with the same options, and every image is embedded once.

With --ray the chunks are spread over workers, here or, with --address, on a running cluster. Its machines need this
package, the input, the engine and --out at the same paths (a shared folder), and one version of Ray.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from iosr_fast.exceptions import BadImageError, IosrFastError
from iosr_fast.pipeline import run as runs
from iosr_fast.pipeline.embedding_files import COLUMNS, DTYPES, FORMATS
from iosr_fast.pipeline.part_folder import check_apart, check_folder
from iosr_fast.pipeline.source import Source, check_carried
from iosr_fast.pipeline.sources import open_source
from iosr_fast.utils.command import stop_message
from iosr_fast.utils.require import require

Input = Annotated[str, typer.Option("--input", help="a folder, .tar shards (folder, glob or braces) or .parquet")]
Out = Annotated[Path, typer.Option(help="the folder to write; an interrupted run there resumes")]
Chunk = Annotated[int, typer.Option(help="images per part")]
Batch = Annotated[int, typer.Option(help="images encoded at a time")]
Kind = Annotated[str, typer.Option(help="folder, webdataset or parquet, for an ambiguous input")]
PathColumn = Annotated[str, typer.Option(help="parquet: the column of paths, relative to the file's folder")]
KeepColumns = Annotated[str, typer.Option(help="parquet to parquet: columns to carry over, separated by commas")]
ImageField = Annotated[str | None, typer.Option(help="webdataset: the member with the image, as in jpg")]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="continue after an unreadable image; its row says why")]
Runtime = Annotated[str, typer.Option(help="auto, onnxruntime, tensorrt, tensorrt_rtx or torch")]
Threads = Annotated[int | None, typer.Option(help="cores of this process, or of each worker [all, on a cluster 4]")]
Ray = Annotated[bool, typer.Option("--ray", help="spread the chunks over workers of Ray")]
Workers = Annotated[int | None, typer.Option(help="with --ray: how many [2]")]
Gpus = Annotated[float, typer.Option(help="with --ray: GPUs per worker, or its share of one")]
Address = Annotated[str | None, typer.Option(help="with --ray: join this cluster ('auto': the one on this machine)")]


def find_engine(engine: str) -> Path:
    """The folder; for "demo" that of the demo's engine, built once and cached."""
    if engine != "demo":
        return Path(engine)
    from iosr_fast.export.pretrained import open_pretrained

    return open_pretrained("demo", None, "auto", "auto", "fp32", None).engine


def run_resumably(
    compute: Callable[[Source, runs.RunOptions], dict[str, Any]],
    columns: Sequence[str],
    *,
    location: str,
    out: Path,
    kind: str,
    path_column: str,
    keep_columns: str,
    image_field: str | None,
    **of_run: Any,
) -> None:
    """Check everything before the work, `compute`, and print its summary. Errors and Ctrl-C say how to resume.

    `columns` are a part's own; `of_run` are the arguments of `check_options`.
    """
    started = time.perf_counter()
    options = runs.check_options(**of_run)
    carried = [name for name in keep_columns.split(",") if name]
    check_carried(carried, columns)
    check_apart(location, out)
    check_folder(out)
    with stop_message(f"stopped; start again with the same options to resume in {out}"):
        try:
            source = open_source(location, kind, path_column=path_column, keep_columns=carried, image_field=image_field)
            source.check_faults(options.skip_bad)
            manifest = compute(source, options)
        except BadImageError as error:
            raise IosrFastError(
                f"{error}; the finished parts are kept. Repair it, or give --skip-bad, and start again"
            ) from error
    print(runs.summary(manifest, out, time.perf_counter() - started))


def embed(
    engine: Annotated[str, typer.Option(help="a folder of tools/build_engine.py, or 'demo'")],
    location: Input,
    out: Out,
    format: Annotated[str, typer.Option(help="safetensors or parquet")] = "safetensors",
    dtype: Annotated[str, typer.Option(help="float32 or float16")] = "float32",
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
    del shared["engine"], shared["format"], shared["dtype"]
    if format not in FORMATS:
        raise IosrFastError(f"expected --format {' or '.join(FORMATS)}, got {format}")
    if dtype not in DTYPES:
        raise IosrFastError(f"expected --dtype {' or '.join(DTYPES)}, got {dtype}")
    if format == "parquet":
        require("pyarrow", "parquet")
    elif keep_columns:
        raise IosrFastError("expected --format parquet with --keep-columns: safetensors holds numbers only")

    def compute(source: Source, options: runs.RunOptions) -> dict[str, Any]:
        return runs.embed(find_engine(engine), source, out, options, dtype, format)

    run_resumably(compute, COLUMNS, **shared)
