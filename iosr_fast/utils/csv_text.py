"""Texts in CSV files, which spreadsheets may take for formulas."""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, TextIO

from iosr_fast.exceptions import IosrFastError
from iosr_fast.utils.text import abbreviate

# Spreadsheets skip blanks, quotes and invisible characters, and some read full-width signs too.
_FORMULA = re.compile("[\\s\"'\u200b\u2060\ufeff]*[=+\\-@\uff1d\uff0b\uff0d\uff20]|[\t\r\n]")


def escaped(text: str) -> str:
    """`text`, after an apostrophe if a spreadsheet would interpret it as a formula (OWASP, CSV injection).

    >>> escaped("-cat"), escaped("cat")
    ("'-cat", 'cat')
    """
    return f"'{text}" if _FORMULA.match(text) else text


def recovered(text: str) -> str:
    """The text that `escaped` was given: without an apostrophe before what is such a formula.

    >>> recovered("'-cat"), recovered("'cat'")
    ('-cat', "'cat'")
    """
    return text[1:] if text.startswith("'") and _FORMULA.match(text[1:]) else text


def read_rows(file: Path, opener: Callable[[str, int], int] | None = None) -> tuple[list[str], list[dict[str, str]]]:
    """The columns of a CSV file and its rows, with texts `recovered`; `opener` is that of `open`. Raises IosrFastError
    for no CSV in UTF-8, another separator than a comma, and a row with a text beyond the last column with a name, as of
    a comma in a text without quotes."""
    try:
        with open(file, encoding="utf-8-sig", newline="", opener=opener) as opened:
            reader = csv.reader(opened)
            columns = next(reader, [])
            if len(columns) == 1 and (found := re.search("[;\t]", columns[0])):
                raise IosrFastError(f"expected commas between columns of {file}, got {found[0]!r}: separate by commas")
            rows = []
            width = max((i for i, name in enumerate(columns, 1) if name), default=len(columns))
            for cells in filter(None, reader):
                if any(map(str.strip, cells[width:])):
                    raise IosrFastError(
                        f"expected {width} cells in line {reader.line_num} of {file}, got {len(cells)}, "
                        f'{abbreviate(cells)}: put a text with a comma in quotes, as "salt, fine"'
                    )
                rows.append(dict(zip_longest(columns, map(recovered, cells[: len(columns)]), fillvalue="")))
    except (UnicodeDecodeError, csv.Error) as error:
        raise IosrFastError(f"can't read {file} as CSV in UTF-8: {error}; save it as such") from error
    return columns, rows


def check_columns(columns: Sequence[str], file: Path, needed: Sequence[str], hint: str) -> None:
    """Raise IosrFastError for missing columns, and two of one name, of which csv.DictReader reads the last alone."""
    if missing := [name for name in needed if name not in columns]:
        wanted, add = (" and ".join(names) for names in (needed, missing))
        named = f"column{'s' * (len(needed) > 1)} {wanted}"
        raise IosrFastError(f"expected the {named} in {file}, got {', '.join(columns) or 'no line'}; add {add}{hint}")
    if twice := [name for name, times in Counter(columns).items() if name and times > 1]:
        raise IosrFastError(f"expected columns of different names in {file}, got {abbreviate(twice)} more than once")


class _LineFeeds:
    """Ends rows with a line feed. csv quotes only its own line ends, and file names may contain both kinds."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def write(self, row: str) -> int:
        return self._file.write(row.removesuffix("\r\n") + "\n")


def line_writer(file: TextIO) -> Any:
    """A csv.writer whose rows end in a line feed, and which quotes texts with line ends of both kinds."""
    return csv.writer(_LineFeeds(file), lineterminator="\r\n")
