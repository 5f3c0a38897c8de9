"""Keys in fewer bits: float16, bfloat16 (as uint16, since NumPy has no bfloat16) and int8 with one scale per key.

Conversions process the keys in chunks, so that they need little memory besides the result.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import numpy as np

from iosr_fast.exceptions import IosrFastError

Precision = Literal["fp32", "fp16", "bf16", "int8"]

PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "bf16", "int8")
_BY_DTYPE: dict[np.dtype, Precision] = {
    np.dtype(np.float32): "fp32",
    np.dtype(np.float16): "fp16",
    np.dtype(np.uint16): "bf16",
    np.dtype(np.int8): "int8",
}
# Elements of a chunk: 4 MB of float32.
_CHUNK = 1 << 20
# Number of channels that are rounded one by one before a matrix product carries their errors to all later channels.
_BLOCK = 64
LARGEST_CODE = 127
# Headroom for compensated codes, which may exceed the nearest ones.
HEADROOM = 1.05
_DAMPING = 1e-3


def precision_of(dtype: np.dtype) -> Precision | None:
    """The precision of keys of this dtype; None if keys can't have it."""
    return _BY_DTYPE.get(np.dtype(dtype))


def check_precision(precision: str) -> Precision:
    """`precision` itself. Raises ValueError for an unknown one."""
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


def convert_keys(
    keys: np.ndarray,
    key_scales: np.ndarray | None,
    precision: Precision,
    *,
    compensate: bool = True,
    unit: bool = False,
) -> tuple[np.ndarray, np.ndarray | None]:
    """Convert keys (N, D): returns keys in `precision` and, for int8, scales (N,) float32 (else None), read-only.

    `compensate` applies to int8: see quantize_int8. `unit` normalises each key when converting to a finer precision,
    because the rounding of the coarser one may exceed the finer one's tolerance. Raises ValueError for an unknown
    precision.
    """
    check_precision(precision)
    if precision_of(keys.dtype) == precision:
        return keys, key_scales
    if precision == "int8":
        return quantize_int8(keys, key_scales, compensate=compensate)
    finer = unit and precision_of(keys.dtype) in PRECISIONS[PRECISIONS.index(precision) + 1 :]
    dtype = {"fp32": np.float32, "fp16": np.float16, "bf16": np.uint16}[precision]
    converted: np.ndarray = np.empty(keys.shape, dtype)
    for rows in chunks(*keys.shape):
        values = key_rows(keys, key_scales, rows)
        if finer:
            values = values / np.linalg.norm(values, axis=1, keepdims=True)
        converted[rows] = to_bfloat16(values) if precision == "bf16" else values
    converted.flags.writeable = False
    return converted, None


def quantize_int8(
    keys: np.ndarray, key_scales: np.ndarray | None = None, *, compensate: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """codes (N, D) int8 in -127..127 and scales (N,) float32 with key[j] approximately scales[j] * codes[j].

    Rounding to nearest gives equal errors in all directions. An error e_j changes a cosine by <query, e_j>, and queries
    are distributed much like keys, so its expected square is e_j' H e_j with H = K'K/N, plus 1e-3 of its mean diagonal.
    Channels are rounded one after another, and each error is compensated in the channels that follow:

        z_i = round(w_i / s) * s,   w_k -= (w_i - z_i) * U_ik / U_ii for k > i,   inv(H) = U'U

    This is GPTQ's recursion (Frantar et al., ICLR 2023, section 3), or Babai's nearest plane in the lattice of codes
    under H. Each key takes whichever of compensated and nearest codes has the smaller e' H e. The scale, initially
    1.05 * max|key| / 127, is multiplied by <key, key> / <z, key>, so that the error is orthogonal to the key.
    `compensate=False` takes the nearest codes for all keys.

    keys: (N, D) of any precision. Raises ValueError if a row is zero or not finite.
    """
    n_keys, width = keys.shape
    codes = np.empty((n_keys, width), np.int8)
    scales = np.empty(n_keys, np.float32)
    moment = second_moment(keys, key_scales) if compensate else None
    factor = None if moment is None else upper_factor(moment)
    for rows in chunks(n_keys, width):
        # Channels by keys, because a step reads and writes one channel of every key.
        target = np.ascontiguousarray(key_rows(keys, key_scales, rows).T)
        largest = np.abs(target).max(axis=0)
        if not (np.isfinite(largest) & (largest > 0)).all():
            row = rows.start + int(np.flatnonzero(~(np.isfinite(largest) & (largest > 0)))[0])
            raise IosrFastError(f"expected keys without zero rows, NaN or infinity, got such a row at {row}")
        best, scale = round_channels(target, largest * np.float32(HEADROOM / LARGEST_CODE), moment, factor)
        codes[rows] = best.T
        scales[rows] = scale
    codes.flags.writeable = scales.flags.writeable = False
    return codes, scales


def upper_factor(moment: np.ndarray) -> np.ndarray:
    """U (D, D) float32, upper triangular, with inv(H) = U'U."""
    factor: np.ndarray = np.linalg.cholesky(np.linalg.inv(moment)).T.astype(np.float32)
    return factor


def round_channels(
    target: np.ndarray, step: np.ndarray, moment: np.ndarray | None, factor: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Codes (D, M) and scales (M,) of keys with their channels first, (D, M), as in quantize_int8."""
    best = np.rint(target / step)
    scale, error = _fit_scale(best, target, step, moment)
    if factor is not None:
        shaped = _compensated_codes(target, step, factor)
        shaped_scale, shaped_error = _fit_scale(shaped, target, step, moment)
        better = shaped_error < error
        best[:, better] = shaped[:, better]
        scale = np.where(better, shaped_scale, scale)
    return best, scale


def second_moment(keys: np.ndarray, key_scales: np.ndarray | None) -> np.ndarray:
    """H = K'K / N, plus 1e-3 of its mean diagonal, in float64. keys (N, D) of any precision."""
    n_keys, width = keys.shape
    moment = np.zeros((width, width))
    for rows in chunks(n_keys, width):
        chunk = key_rows(keys, key_scales, rows).astype(np.float64)
        moment += chunk.T @ chunk
    moment /= n_keys
    moment[np.diag_indices(width)] += _DAMPING * np.trace(moment) / width
    return moment


def _compensated_codes(target: np.ndarray, step: np.ndarray, factor: np.ndarray) -> np.ndarray:
    """Codes (D, M) float32 of target (D, M): the recursion of quantize_int8 in blocks of channels."""
    width = len(target)
    work = target.copy()
    errors = np.empty((_BLOCK, target.shape[1]), np.float32)
    for begin in range(0, width, _BLOCK):
        end = min(begin + _BLOCK, width)
        for i in range(begin, end):
            channel = work[i]
            channel -= factor[begin:i, i] @ errors[: i - begin]
            code = np.clip(np.rint(channel / step), -LARGEST_CODE, LARGEST_CODE)
            errors[i - begin] = (channel - code * step) / factor[i, i]
            work[i] = code
        work[end:] -= factor[begin:end, end:].T @ errors[: end - begin]
    return work


def _fit_scale(
    codes: np.ndarray, target: np.ndarray, step: np.ndarray, moment: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """The scale that makes each key's error orthogonal to the key, and the resulting e' H e (0 without H)."""
    along = np.einsum("dm,dm->m", codes, target)
    # Compensation may reverse a key's direction. Then no such scale exists, and an infinite cost rejects the codes.
    valid = along > 0
    scale = np.where(valid, np.einsum("dm,dm->m", target, target) / np.where(valid, along, 1.0), step)
    if moment is None:
        return scale, np.zeros_like(scale)
    error = codes * scale - target
    cost = np.einsum("dm,dm->m", moment.astype(np.float32) @ error, error)
    return scale, np.where(valid, cost, np.inf)
