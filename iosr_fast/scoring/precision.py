"""Keys in fewer bits: float16, bfloat16 (as uint16, since NumPy has no bfloat16) and int8 with one scale a key.

A conversion works through the keys in chunks, so that it needs little memory beside its result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    from iosr_fast.scoring.plan import ScoringPlan

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
# Channels that are rounded one after another before one product carries their errors to all later channels.
_BLOCK = 64
LARGEST_CODE = 127
# Room for codes to move away from the nearest value without being clipped.
HEADROOM = 1.05
_DAMPING = 1e-3


def precision_of(dtype: np.dtype) -> Precision | None:
    """The precision that keys of this dtype have, None where it is none of keys' dtypes."""
    return _BY_DTYPE.get(np.dtype(dtype))


def chunks(n_rows: int, width: int) -> Iterator[slice]:
    """Slices that cover n_rows rows, of about 4 MB of float32 each."""
    step = max(1, _CHUNK // max(1, width))
    for begin in range(0, n_rows, step):
        yield slice(begin, min(begin + step, n_rows))


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """The bits of float32 values rounded to bfloat16, to nearest and ties to even: uint16 of the same shape.

    Infinities and values that round beyond the largest bfloat16 become infinite; a NaN stays one.
    """
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = ((bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(16)).astype(
        np.uint16
    )
    # Rounding could carry a NaN's mantissa over into the sign; its quiet bit keeps it a NaN.
    nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    return np.where(nan, ((bits >> np.uint32(16)) | np.uint32(0x40)).astype(np.uint16), rounded).reshape(values.shape)


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    """The float32 values of bfloat16 bits (uint16), exactly."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def key_rows(keys: np.ndarray, key_scales: np.ndarray | None, rows: slice) -> np.ndarray:
    """keys[rows] as float32 (M, D), whatever precision they are stored in; a view where that is float32 already."""
    stored = keys[rows]
    if stored.dtype == np.uint16:
        return from_bfloat16(stored)
    values: np.ndarray = stored.astype(np.float32, copy=False)
    if key_scales is not None:
        values *= key_scales[rows, None]
    return values


def dequantize(plan: ScoringPlan) -> np.ndarray:
    """The float32 keys (N, D) that a plan's stored keys stand for, where its query_transform is undone.

    <query @ query_transform', stored> = <query, stored @ query_transform>. Raises ValueError without keys.
    """
    if plan.keys is None:
        raise ValueError("expected a plan with keys, got one without a cache term")
    keys = convert_keys(plan.keys, plan.key_scales, "fp32")[0]
    return keys if plan.query_transform is None else keys @ plan.query_transform


def convert_keys(
    keys: np.ndarray,
    key_scales: np.ndarray | None,
    precision: Precision,
    *,
    compensate: bool = True,
    unit: bool = False,
) -> tuple[np.ndarray, np.ndarray | None]:
    """Keys (N, D) of any precision to `precision`: (keys, scales (N,) float32 for int8, or else None), read-only.

    `compensate` is for int8 only: see quantize_int8. `unit` divides each key by its norm on the way to a finer
    precision, for which the coarser one's rounding would leave it too far from 1. Raises ValueError for an unknown
    precision.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"expected a key precision of {', '.join(PRECISIONS)}, got {precision!r}")
    if precision_of(keys.dtype) == precision:
        return keys, key_scales
    if precision == "int8":
        return _quantize(lambda rows: key_rows(keys, key_scales, rows), keys.shape[0], keys.shape[1], compensate)
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


def quantize_int8(keys: np.ndarray, *, compensate: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """codes (N, D) int8 in -127..127 and scales (N,) float32 with key[j] = scales[j] * codes[j], nearly.

    Plain rounding errs alike in all directions. What scoring sees of an error e_j is <query, e_j>, and queries are
    distributed much like keys, so its expected square is e_j' H e_j with H = K'K/N, plus 1e-3 of its mean diagonal.
    Channels are rounded one after another, and each error is made up for in the channels still to come:

        z_i = round(w_i / s) * s,   w_k -= (w_i - z_i) * U_ik / U_ii for k > i,   inv(H) = U'U

    which is GPTQ's recursion (Frantar et al., ICLR 2023, section 3), or Babai's nearest plane in the lattice of codes
    under H. A key keeps whichever of compensated and nearest codes has the smaller e' H e. The scale, at first
    1.05 * max|key| / 127, is then <key, key> / <z, key> times that, so that the error is orthogonal to the key.
    `compensate=False` takes the nearest codes for all keys.

    keys: (N, D) float32, no row of zeros. Raises ValueError where the shape is another or a row is zero or not finite.
    """
    keys = np.ascontiguousarray(keys, dtype=np.float32)
    if keys.ndim != 2 or 0 in keys.shape:
        raise ValueError(f"expected keys of shape (N, D) with N, D >= 1, got {keys.shape}")
    return _quantize(lambda rows: keys[rows], keys.shape[0], keys.shape[1], compensate)


def _quantize(
    rows_of: Callable[[slice], np.ndarray], n_keys: int, width: int, compensate: bool
) -> tuple[np.ndarray, np.ndarray]:
    codes = np.empty((n_keys, width), np.int8)
    scales = np.empty(n_keys, np.float32)
    moment = second_moment(rows_of, n_keys, width) if compensate else None
    factor = None if moment is None else upper_factor(moment)
    for rows in chunks(n_keys, width):
        # Channels by keys: a step reads and writes one channel of every key, contiguous this way.
        target = np.ascontiguousarray(rows_of(rows).T)
        largest = np.abs(target).max(axis=0)
        if not (np.isfinite(largest) & (largest > 0)).all():
            row = rows.start + int(np.flatnonzero(~(np.isfinite(largest) & (largest > 0)))[0])
            raise ValueError(f"expected keys without zero rows, NaN or infinity, got such a row at {row}")
        best, scale = round_channels(target, largest * np.float32(HEADROOM / LARGEST_CODE), moment, factor)
        codes[rows] = best.T
        scales[rows] = scale
    codes.flags.writeable = scales.flags.writeable = False
    return codes, scales


def upper_factor(moment: np.ndarray) -> np.ndarray:
    """U (D, D) float32 with inv(H) = U'U, upper triangular."""
    factor: np.ndarray = np.linalg.cholesky(np.linalg.inv(moment)).T.astype(np.float32)
    return factor


def round_channels(
    target: np.ndarray, step: np.ndarray, moment: np.ndarray | None, factor: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Codes (D, M) and scales (M,) of keys given channel by channel, (D, M), as quantize_int8 describes them."""
    best = np.rint(target / step)
    scale, error = _fit_scale(best, target, step, moment)
    if factor is not None:
        shaped = _compensated_codes(target, step, factor)
        shaped_scale, shaped_error = _fit_scale(shaped, target, step, moment)
        better = shaped_error < error
        best[:, better] = shaped[:, better]
        scale = np.where(better, shaped_scale, scale)
    return best, scale


def second_moment(rows_of: Callable[[slice], np.ndarray], n_keys: int, width: int) -> np.ndarray:
    """H = K'K / N, plus 1e-3 of its mean diagonal, in float64."""
    moment = np.zeros((width, width))
    for rows in chunks(n_keys, width):
        chunk = rows_of(rows).astype(np.float64)
        moment += chunk.T @ chunk
    moment /= n_keys
    moment[np.diag_indices(width)] += _DAMPING * np.trace(moment) / width
    return moment


def _compensated_codes(target: np.ndarray, step: np.ndarray, factor: np.ndarray) -> np.ndarray:
    """Codes (D, M) float32 for target (D, M), by the recursion of quantize_int8 in blocks of channels."""
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
    """The scale that makes each key's error orthogonal to the key, and e' H e with it (0 where H is None)."""
    along = np.einsum("dm,dm->m", codes, target)
    # Where compensation has turned a key round there is no such scale, and the codes must not be taken.
    sound = along > 0
    scale = np.where(sound, np.einsum("dm,dm->m", target, target) / np.where(sound, along, 1.0), step)
    if moment is None:
        return scale, np.zeros_like(scale)
    error = codes * scale - target
    cost = np.einsum("dm,dm->m", moment.astype(np.float32) @ error, error)
    return scale, np.where(sound, cost, np.inf)
