"""Checks of arrays, in chunks, so that a check of a million keys takes little memory."""

from __future__ import annotations

from typing import Any

import numpy as np

from iosr_fast.exceptions import IosrFastError
from iosr_fast.scoring.key_precision import KeyPrecision, chunks, key_rows
from iosr_fast.utils.numbers import is_tensor, refuse_masked

# The largest difference of a row's norm from 1, by the precision of its channels.
UNIT_NORM_TOLERANCE: dict[KeyPrecision, float] = {"fp32": 1e-3, "fp16": 2e-3, "bf16": 1e-2, "int8": 2e-2}


def check_real(name: str, array: Any) -> None:
    """Raise IosrFastError for an array or tensor of text, objects or complex numbers, and for masked values."""
    refuse_masked(name, array)
    if array.is_complex() if is_tensor(array) else array.dtype.kind in "cSUOmM":
        raise IosrFastError(f"expected {name} of real numbers, got {array.dtype}: convert them to float32")


def frozen(name: str, value: Any, dtype: type) -> np.ndarray:
    """`value` as a C-contiguous read-only array of `dtype`; copied only if it isn't one already. Raises as
    `check_real`."""
    check_real(name, value if is_tensor(value) else np.asanyarray(value))
    if dtype is np.int64 and np.asarray(value).dtype.kind not in "iu":
        raise IosrFastError(f"expected {name} of integers, got {np.asarray(value).dtype}")
    with np.errstate(over="ignore"):  # values beyond float32 become infinite, which check_finite refuses
        array: np.ndarray = np.ascontiguousarray(value, dtype=dtype)
    if array.flags.writeable:
        # The caller may write to its own array later; a converted array has its own memory.
        array = array.copy() if np.may_share_memory(array, value) else array
        array.flags.writeable = False
    return array


def check_number(name: str, value: float, least: float, most: float, fix: str = "") -> float:
    """`value` as a float. Raises IosrFastError, which ends in `fix`, unless it is a number from `least` to `most` (NaN
    is not)."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise IosrFastError(f"expected {name} to be a number, got {value!r}{fix and '; '}{fix}") from None
    if not least <= number <= most:
        raise IosrFastError(f"expected {name} from {least:g} to {most:g}, got {number:g}{fix and '; '}{fix}")
    return number


def check_size(name: str, array: np.ndarray, most: float, fix: str) -> None:
    """Raise ValueError unless every element is finite and at most `most` in magnitude."""
    check_finite(name, array)
    largest = float(max(array.max(initial=0.0), -array.min(initial=0.0)))
    if largest > most:
        raise IosrFastError(f"expected {name} of magnitudes up to {most:g}, got {largest:g}; {fix}")


def check_finite(name: str, array: np.ndarray) -> None:
    """Raise ValueError unless every element is finite, in float32."""
    flat = array.reshape(-1)
    wrong = sum(int(np.count_nonzero(~np.isfinite(flat[part]))) for part in chunks(len(flat), 1))
    if wrong:
        raise IosrFastError(f"expected {name} to be finite, got {wrong} NaN or infinite")


def check_unit_rows(
    name: str,
    rows: np.ndarray,
    scales: np.ndarray | None = None,
    precision: KeyPrecision = "fp32",
    transform: np.ndarray | None = None,
    or_zero: bool = False,
) -> None:
    """Raise ValueError unless each row of (M, D) is finite and has norm 1, to within the tolerance of `precision`, or,
    with `or_zero`, is zero.

    `rows` may be of any key precision, int8 with `scales` (M,). With a `transform` (D, D) the norms of
    rows @ transform are checked.
    """
    tolerance = UNIT_NORM_TOLERANCE[precision]
    wrong, first, first_norm, finite = 0, -1, 0.0, True
    for part in chunks(*rows.shape):
        values = key_rows(rows, scales, part)
        if transform is not None:
            values = values @ transform
        # A value whose square overflows counts as not finite.
        with np.errstate(over="ignore", invalid="ignore"):
            norms = np.sqrt(np.einsum("md,md->m", values, values))
        # NaN compares false and so counts as wrong.
        off = np.flatnonzero(~((np.abs(norms - 1.0) <= tolerance) | (or_zero & (norms == 0.0))))
        if len(off):
            if not wrong:
                first, first_norm = part.start + int(off[0]), float(norms[off[0]])
            wrong += len(off)
            finite = finite and bool(np.isfinite(values[off]).all())
    if wrong:
        raise IosrFastError(unit_norm_message(name, wrong, len(rows), first, first_norm, finite))


def unit_norm_message(name: str, wrong: int, n_rows: int, first: int, first_norm: float, finite: bool) -> str:
    """The error message for `wrong` of n_rows rows; row `first` has norm `first_norm`."""
    fix = f"divide by np.linalg.norm({name}, axis=1, keepdims=True)" if finite else "it holds NaN or infinite values"
    return (
        f"expected {name} rows of unit norm, got {wrong} of {n_rows} that aren't "
        f"(row {first} has norm {first_norm:.6g}); {fix}"
    )
