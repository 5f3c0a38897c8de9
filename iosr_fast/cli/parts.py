"""What `embed` and `classify` share: runs that write a folder of parts, in this process or on Ray."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from iosr_fast.cli.options import PartsOption, RayOption
from iosr_fast.exceptions import BadImageError, IosrFastError
from iosr_fast.utils.command import note, stop_message

if TYPE_CHECKING:
    from iosr_fast.files.run import RunOptions
    from iosr_fast.files.source import Source

Chunk = Annotated[int, PartsOption(help="Images of a part.")]
Threads = Annotated[int | None, typer.Option(help="CPU threads of this process [default: all], or of each Ray worker.")]
Ray = Annotated[bool, RayOption("--ray", help="Spread the parts over Ray workers.")]
Workers = Annotated[int | None, RayOption(help="Number of workers [default: 2].")]
Gpus = Annotated[float, RayOption(help="GPUs of each worker, or its share of one.")]


def write_parts(
    compute: Callable[[Source, RunOptions], dict[str, Any]],
    *,
    location: str,
    out: Path,
    **of_run: Any,
) -> None:
    """Check everything before the work, `compute`, and print its summary. Errors and Ctrl-C say how to resume.

    `of_run` are the arguments of `check_options`.
    """
    from iosr_fast.files import run as runs
    from iosr_fast.files.part_folder import check_apart, check_folder
    from iosr_fast.files.sources import folder_source
    from iosr_fast.images.listing import refuse_url

    started = time.perf_counter()
    options = runs.check_options(**of_run)
    refuse_url(location)
    check_apart(location, out)
    check_folder(out)
    with stop_message(f"stopped; start again with the same options to resume in {out}", "iosr-fast"):
        try:
            manifest = compute(folder_source(Path(location)), options)
        except BadImageError as error:
            raise IosrFastError(
                f"{error}; the finished parts are kept. Repair it, or give --skip-bad, and start again"
            ) from error
    note(*runs.summary(manifest, out, time.perf_counter() - started).split("\n"), err=False)
