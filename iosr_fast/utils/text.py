"""Texts in messages and on terminals."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterable, Sequence

from iosr_fast.exceptions import printable


class PrintableFormatter(logging.Formatter):
    """Log lines for a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record), keep="\n")


def abbreviate(values: Sequence[str]) -> str:
    """The first five values, quoted, and how many more there are."""
    shown = ", ".join(repr(value) for value in values[:5])
    return shown if len(values) <= 5 else f"{shown} and {len(values) - 5} more"


def did_you_mean(value: str, known: Iterable[str], most: int = 1) -> str:
    """What a mistyped name is close to, as a question; "" if nothing is.

    >>> did_you_mean("tip-adaptr", ["gda", "tip-adapter"])
    "did you mean 'tip-adapter'? "
    """
    names = {name.casefold(): name for name in known}
    close = difflib.get_close_matches(value.casefold(), names, most, 0.6)
    return f"did you mean {', '.join(repr(names[each]) for each in close)}? " if close else ""
