"""Ids of classes ("~7") and of support images ("e7"), as callers see them, and the numbers behind them."""

from __future__ import annotations

import re

# One form for each number: "~07" and other scripts' digits, which int() takes, are no ids.
CLASS_ID, EXAMPLE_ID = "~(?:0|[1-9][0-9]{0,17})", "e(?:0|[1-9][0-9]{0,17})"


def class_id(uid: int) -> str:
    """The id of a class by its number: "~7". The sign tells ids from names, which may be "7" or "c7"."""
    return f"~{uid}"


def uid_of(text: str) -> int | None:
    """The number of a class id; None for any other text."""
    return int(text[1:]) if re.fullmatch(CLASS_ID, text) else None


def example_id(number: int) -> str:
    """The id of a support image by its number: "e7"."""
    return f"e{number}"


def example_number(text: str) -> int | None:
    """The number of a support image's id; None for any other text."""
    return int(text[1:]) if re.fullmatch(EXAMPLE_ID, text) else None
