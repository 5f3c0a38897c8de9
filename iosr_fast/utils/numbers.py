"""Numbers and arrays as callers give them, checked."""

from __future__ import annotations

import operator
import sys
from typing import Any

import numpy as np

from iosr_fast.exceptions import IosrFastError

LARGEST = 2**63 - 1


def check_integer(name: str, value: Any, least: int, most: int = LARGEST) -> int:
    """`value`, of any integer type but bool, as an int. Raises IosrFastError unless it is from `least` to `most`.

    >>> check_integer("top", np.int64(3), 1)
    3
    """
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None:
        raise IosrFastError(f"expected {name} to be a whole number, got {value!r}")
    if not least <= number <= most:
        limits = f"of at least {least}" if most == LARGEST and number < least else f"from {least} to {most}"
        raise IosrFastError(f"expected {name} {limits}, got {number}")
    return number


def check_share(name: str, share: float, like: float = 0.95) -> float:
    """`share` as a float above 0 and below 1. Raises IosrFastError."""
    if not (isinstance(share, int | float | np.floating) and 0.0 < share < 1.0):
        raise IosrFastError(f"expected {name} above 0 and below 1, like {like}, got {share!r}")
    return float(share)


def refuse_masked(name: str, array: Any) -> None:
    """Raise IosrFastError for an array with masked values, whose mask np.asarray would drop without a word."""
    if isinstance(array, np.ma.MaskedArray) and (masked := int(np.ma.count_masked(array))):
        raise IosrFastError(
            f"expected {name} without masked values, got {masked:,} of {array.size:,} masked; fill them with "
            "array.filled(value), or leave their rows out"
        )


def is_tensor(value: Any) -> bool:
    """Whether a value is a PyTorch tensor, without importing torch."""
    torch = sys.modules.get("torch")
    return torch is not None and hasattr(torch, "Tensor") and isinstance(value, torch.Tensor)
