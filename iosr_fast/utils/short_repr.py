"""The repr of results in at most ten lines, whatever their size."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from itertools import islice
from reprlib import Repr
from textwrap import wrap
from typing import Any

import numpy as np

_LINES, _COLUMNS = 10, 110


class _Values(Repr):
    """Of arrays the shape, of collections the first three items, of fractions four digits."""

    def __init__(self) -> None:
        super().__init__()
        self.maxtuple = self.maxlist = self.maxdict = 3
        self.maxstring = self.maxother = 60

    def repr1(self, x: Any, level: int) -> str:
        x = x.item() if isinstance(x, np.generic) else x
        if isinstance(x, np.ndarray):
            return f"array of shape {x.shape}"
        return f"{x:.4g}" if isinstance(x, float) else super().repr1(x, level)


_VALUES = _Values()


def short_repr(self: Any) -> str:
    """The fields of a dataclass: its body has `__repr__ = short_repr`.

    >>> from dataclasses import dataclass
    >>> @dataclass
    ... class Answer:
    ...     logits: np.ndarray
    ...     labels: list
    ...     __repr__ = short_repr
    >>> Answer(np.zeros((2000, 1000)), [f"class {i}" for i in range(2000)])
    Answer(logits=array of shape (2000, 1000), labels=['class 0', 'class 1', 'class 2', ...])
    """
    shown = _named((one.name, getattr(self, one.name)) for one in fields(self) if one.repr)
    return _in_ten_lines([f"{type(self).__name__}({shown})"])


def table_repr(self: Any) -> str:
    """The columns, the summary and the first rows of a html.Result."""
    columns = self._columns()
    count = len(next(iter(columns.values())))
    rows = islice(zip(*columns.values(), strict=True), _LINES)
    lines = [f"{type(self).__name__}: {count:,} rows of {', '.join(columns)}", *self.summary().split("\n")]
    return _in_ten_lines([*filter(None, lines), *(_named(zip(columns, row, strict=True)) for row in rows)])


def _named(values: Iterable[tuple[str, Any]]) -> str:
    return ", ".join(f"{name}={_VALUES.repr(value)}" for name, value in values)


def _in_ten_lines(lines: Iterable[str]) -> str:
    wrapped = [part for line in lines for part in wrap(line, _COLUMNS, subsequent_indent="    ")]
    return "\n".join(wrapped if len(wrapped) <= _LINES else [*wrapped[: _LINES - 1], "..."])
