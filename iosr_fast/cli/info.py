"""The command `iosr-fast info`."""

from __future__ import annotations

from pathlib import Path

import typer


def info(
    folder: Path | None = typer.Argument(None, help="a saved classifier or an engine: its contents and its digest"),
) -> None:
    """Versions, runtimes and scoring kernels of this machine, or the contents of a saved classifier, verified."""
    if folder is None:
        from iosr_fast.info import format_info

        typer.echo(format_info())
    else:
        from iosr_fast.state.bundle import describe

        typer.echo(describe(folder))
