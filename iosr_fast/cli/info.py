"""The command `iosr-fast info`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from iosr_fast.cli.options import argument
from iosr_fast.utils.command import say


def info(
    folder: Annotated[Path | None, argument("FOLDER", "A saved classifier or an engine, which is verified.")] = None,
) -> None:
    """Describe this machine (versions, runtimes, scoring kernels), or the contents of a folder and its digest."""
    if folder is None:
        from iosr_fast.info import format_info

        say(*format_info().split("\n"))
    else:
        from iosr_fast.store.description import describe

        say(*describe(folder).split("\n"))
