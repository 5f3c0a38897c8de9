"""Runs of `iosr-fast`."""

from __future__ import annotations

import io
from typing import Any

from typer.testing import CliRunner, Result

from iosr_fast.cli import app


class Terminal(io.StringIO):
    """A stream that says it is one."""

    def isatty(self) -> bool:
        return True


def run(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def done(*words: object) -> str:
    """The standard output of a command that must succeed."""
    result = run(*words)
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(*words: object) -> str:
    """What a command says to its user's mistake, after exit code 2."""
    result = run(*words)
    assert result.exit_code == 2 and "Traceback" not in result.output, result.output
    return result.output


def never(*_: object, **__: object) -> Any:
    raise AssertionError("work has begun")


def main(*words: object) -> None:
    """Run a command in this process, its output on the test's own streams. Raises SystemExit where it fails."""
    try:
        app([str(word) for word in words])
    except SystemExit as end:
        if end.code:
            raise
