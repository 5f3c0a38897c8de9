"""Texts in CSV files, which spreadsheets may take for formulas."""

from __future__ import annotations

import re

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
