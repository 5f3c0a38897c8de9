"""The command `iosr-fast info`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from iosr_fast.cli.command import say
from iosr_fast.cli.options import argument


def info(
    folder: Annotated[
        Path | None, argument("PATH", "A saved classifier, an engine or a log of changes, which is verified.")
    ] = None,
) -> None:
    """Describe this machine (versions, runtimes, scoring kernels), a folder and its digest, or the history in a log."""
    if folder is None:
        from iosr_fast.info import format_info

        say(*format_info().split("\n"))
    else:
        from iosr_fast.store.description import describe, describe_log

        for line in describe_log(folder) if folder.is_file() else describe(folder).split("\n"):
            say(line)
