"""Values in messages."""

from __future__ import annotations

from collections.abc import Sequence


def abbreviate(values: Sequence[str]) -> str:
    """The first five values, quoted, and how many more there are."""
    shown = ", ".join(repr(value) for value in values[:5])
    return shown if len(values) <= 5 else f"{shown} and {len(values) - 5} more"
