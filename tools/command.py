"""How a tool starts: plain help, one line for what the user got wrong, exit code 2 for it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer

from iosr_fast.utils.outputs import check_new_file


def new_app(**options: Any) -> typer.Typer:
    """An app whose help shows `[...]` as it is: rich would take it for markup."""
    return typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None, **options)


def run(main: Callable[..., None]) -> None:
    """`start` a tool of one command."""
    app = new_app()
    app.command()(main)
    start(app)


def start(app: typer.Typer) -> None:
    """Run a tool. What it raises of bad input, files and missing packages is a line on stderr and exit code 2."""
    try:
        app()
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error


def new_file(path: Path | None) -> Path | None:
    """A callback of options that name a file to write: checked before any work."""
    if path is not None:
        try:
            check_new_file(path)
        except OSError as error:
            raise typer.BadParameter(str(error)) from error
    return path
