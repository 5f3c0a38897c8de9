"""Keys in fewer bits: float16, bfloat16 (as uint16, since NumPy has no bfloat16) and int8 with one scale per key.

Conversions process the keys in chunks, so that they need little memory besides the result.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Literal

import numpy as np

from iosr_fast.exceptions import IosrFastError

KeyPrecision = Literal["fp32", "fp16", "bf16", "int8"]

PRECISIONS: tuple[KeyPrecision, ...] = ("fp32", "fp16", "bf16", "int8")
_BY_DTYPE: dict[np.dtype, KeyPrecision] = {
    np.dtype(np.float32): "fp32",
    np.dtype(np.float16): "fp16",
    np.dtype(np.uint16): "bf16",
    np.dtype(np.int8): "int8",
}
_CHUNK = 1 << 20  # elements: 4 MB of float32
_LARGEST_CODE = 127


def precision_of(dtype: np.dtype) -> KeyPrecision | None:
    """The precision of keys of this dtype; None if keys can't have it."""
    return _BY_DTYPE.get(np.dtype(dtype))


def check_precision(precision: str) -> KeyPrecision:
    """`precision` itself. Raises IosrFastError for an unknown one."""
    if precision not in PRECISIONS:
        raise IosrFastError(f"expected a key precision of {', '.join(PRECISIONS)}, got {precision!r}")
    return precision


def chunks(n_rows: int, width: int) -> Iterator[slice]:
    """Slices that cover n_rows rows, about 4 MB of float32 each."""
    step = max(1, _CHUNK // max(1, width))
    for begin in range(0, n_rows, step):
        yield slice(begin, min(begin + step, n_rows))


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """float32 values rounded to bfloat16, to nearest and ties to even: its bits as uint16, in the same shape.

    Infinities and values that round beyond the largest bfloat16 become infinite; NaN stays NaN.
    """
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = ((bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(16)).astype(
        np.uint16
    )
    # Rounding could carry a NaN's mantissa into its sign; setting the quiet bit keeps it NaN.
    nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    return np.where(nan, ((bits >> np.uint32(16)) | np.uint32(0x40)).astype(np.uint16), rounded).reshape(values.shape)


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    """The float32 values of bfloat16 bits (uint16), exactly."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def key_rows(keys: np.ndarray, key_scales: np.ndarray | None, rows: slice) -> np.ndarray:
    """keys[rows] as float32 (M, D); a view if they are stored in float32."""
    stored = keys[rows]
    if stored.dtype == np.uint16:
        return from_bfloat16(stored)
    values: np.ndarray = stored.astype(np.float32, copy=False)
    if key_scales is not None:
        values *= key_scales[rows, None]
    return values


def convert_keys(keys: np.ndarray, precision: KeyPrecision) -> np.ndarray:
    """Keys (N, D) of another precision than int8 in "fp32", "fp16" or "bf16", read-only."""
    if precision_of(keys.dtype) == precision:
        return keys
    converted = np.empty(keys.shape, {"fp32": np.float32, "fp16": np.float16, "bf16": np.uint16}[precision])
    for rows in chunks(*keys.shape):
        values = key_rows(keys, None, rows)
        converted[rows] = to_bfloat16(values) if precision == "bf16" else values
    converted.flags.writeable = False
    return converted


def int8_keys(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """codes (N, D) int8 in -127..127, scales (N,) float32 and a rotation R (D, D) float32, read-only.

    key[j] is approximately scales[j] * codes[j] @ R, so <query, key[j]> is about scales[j] * <R @ query, codes[j]>.

    A few channels of CLIP's embeddings are far above the others and would set the step of all. A random rotation
    spreads a key evenly over its channels, which then are rounded to the nearest code. The scale makes a key's error
    orthogonal to the key. The rotation is the same for all keys of a width.

    keys: (N, D) of another precision than int8. Raises IosrFastError if a row is zero or not finite.
    """
    n_keys, width = keys.shape
    rotation = _rotation(width)
    codes, scales = np.empty((n_keys, width), np.int8), np.empty(n_keys, np.float32)
    for rows in chunks(n_keys, width):
        turned = key_rows(keys, None, rows) @ rotation.T
        largest = np.abs(turned).max(axis=1, keepdims=True)
        good = np.isfinite(largest) & (largest > 0)
        if not good.all():
            row = rows.start + int(np.flatnonzero(~good)[0])
            raise IosrFastError(f"expected keys without zero rows, NaN or infinity, got such a row at {row}")
        rounded = np.rint(turned * (_LARGEST_CODE / largest))
        codes[rows] = rounded
        scales[rows] = np.einsum("md,md->m", turned, turned) / np.einsum("md,md->m", rounded, turned)
    codes.flags.writeable = scales.flags.writeable = False
    return codes, scales, rotation


def half_values(values: np.ndarray) -> np.ndarray:
    """Values (N, C) of keys in float16, (N, C): each is rounded together with what the rounding of the key before has
    left, so that the errors of a column never add up to more than one rounding.

    Most keys have nearly the same affinity to a query, and values of both signs whose sum is small: errors of one sign
    would add up over all keys. Of the labels of ProKeR with 16 images a class (CLIP ViT-B/32, Flowers) 3 of 2,463
    change, and 45 if each value is rounded by itself.
    """
    rounded, left = np.empty(values.shape, np.float16), np.zeros(values.shape[1], np.float32)
    for j, row in enumerate(values.astype(np.float32, copy=False)):
        wanted = row + left
        rounded[j] = wanted
        left = wanted - rounded[j]
    rounded.flags.writeable = False
    return rounded


@functools.cache
def _rotation(width: int) -> np.ndarray:
    """A random orthogonal matrix (D, D) float32, the same in every process."""
    rotation: np.ndarray = np.linalg.qr(np.random.default_rng(0).standard_normal((width, width)))[0].astype(np.float32)
    rotation.flags.writeable = False
    return rotation
