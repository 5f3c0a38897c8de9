"""What `embed` and `classify` share: runs that write a folder of parts, in this process or on Ray."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from iosr_fast.cli.options import PartsOption, RayOption
from iosr_fast.exceptions import BadImageError, IosrFastError
from iosr_fast.utils.command import say, stop_message

if TYPE_CHECKING:
    from iosr_fast.pipeline.run import RunOptions
    from iosr_fast.pipeline.source import Source

Chunk = Annotated[int, PartsOption(help="Images of a part.")]
Kind = Annotated[
    Literal["auto", "folder", "webdataset", "parquet"],
    PartsOption(metavar="NAME", help="Kind of the input: auto, folder, webdataset or parquet."),
]
PathColumn = Annotated[str, PartsOption(help="Of a .parquet input: the column of paths, relative to its folder.")]
KeepColumns = Annotated[str, PartsOption(help="Of a .parquet input: columns to copy, separated by commas.")]
ImageField = Annotated[str | None, PartsOption(help="Of .tar shards: the member with the image, jpg for example.")]
Threads = Annotated[int | None, typer.Option(help="CPU threads of this process [default: all], or of each Ray worker.")]
Ray = Annotated[bool, RayOption("--ray", help="Spread the parts over Ray workers.")]
Workers = Annotated[int | None, RayOption(help="Number of workers [default: 2].")]
Gpus = Annotated[float, RayOption(help="GPUs of each worker, or its share of one.")]


def write_parts(
    compute: Callable[[Source, RunOptions], dict[str, Any]],
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
    from iosr_fast.pipeline import run as runs
    from iosr_fast.pipeline.part_folder import check_apart, check_folder
    from iosr_fast.pipeline.source import check_carried
    from iosr_fast.pipeline.sources import open_source

    started = time.perf_counter()
    options = runs.check_options(**of_run)
    carried = [name for name in keep_columns.split(",") if name]
    check_carried(carried, columns)
    check_apart(location, out)
    check_folder(out)
    with stop_message(f"stopped; start again with the same options to resume in {out}", "iosr-fast"):
        try:
            source = open_source(location, kind, path_column=path_column, keep_columns=carried, image_field=image_field)
            source.check_faults(options.skip_bad)
            manifest = compute(source, options)
        except BadImageError as error:
            raise IosrFastError(
                f"{error}; the finished parts are kept. Repair it, or give --skip-bad, and start again"
            ) from error
    say(*runs.summary(manifest, out, time.perf_counter() - started).split("\n"))
