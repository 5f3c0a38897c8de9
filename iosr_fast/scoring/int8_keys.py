"""int8 keys in a basis fitted to the keys: channels with little energy give their bytes to those with much."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from iosr_fast.exceptions import IosrFastError
from iosr_fast.scoring.precision import (
    LARGEST_CODE,
    chunks,
    key_rows,
    quantize_int8,
    round_channels,
    second_moment,
    upper_factor,
)

_SAMPLE = 2048
_NARROW = 32  # channels; below, no channel can be spared


@dataclass(frozen=True)
class _Basis:
    """Orthonormal columns: `main` (D, D - r), coded once, and `top` (D, r), whose error is coded again in finer steps.

    `gain` is the ratio of the fine step to the coarse one; `moment` and `factor` are the arguments of round_channels
    for `main`.
    """

    main: np.ndarray
    top: np.ndarray
    moment: np.ndarray
    factor: np.ndarray
    gain: float = 1.0

    @property
    def transform(self) -> np.ndarray:
        """(D, D): <transform @ query, codes> * scale approximates <query, key>."""
        return np.concatenate([self.main.T, self.gain * self.top.T]).astype(np.float32)


def compact_int8(
    keys: np.ndarray, key_scales: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """codes (N, D) int8, scales (N,) float32 and a query transform T (D, D) float32 or None, read-only.

    key[j] is approximately scales[j] * codes[j] @ T, so <query, key[j]> is about scales[j] * <T @ query, codes[j]>.

    Let H be the keys' second moment. An error e of a key changes its cosine by <query, e>, and queries vary like keys:
    strongly along H's leading eigenvectors, hardly along its last ones. So the last r eigenvectors are dropped, and the
    r freed channels store the rounding error along the first r, in steps fine enough to remove it. The other D - r
    channels are those of a random rotation, which spreads the keys evenly over them, rounded with compensation
    (precision.quantize_int8) for H without its first r eigenvectors. r, and the choice to transform at all, minimise
    the mean e' H e of a sample of the keys. The result depends on the keys only.

    keys: (N, D) of any precision, key_scales with int8. Raises ValueError for a row that is zero or not finite.
    """
    n_keys, width = keys.shape
    if width < _NARROW:
        return (*quantize_int8(keys, key_scales), None)
    moment = second_moment(keys, key_scales)
    sample = key_rows(keys, key_scales, slice(0, n_keys, max(1, n_keys // _SAMPLE)))
    if not np.isfinite(moment).all() or not sample.any(axis=1).all():
        return (*quantize_int8(keys, key_scales), None)  # raises the ValueError
    spectrum = np.linalg.eigh(moment)
    bases = [_basis(moment, *spectrum, sample, r) for r in range(width // 32, width // 3, width // 32)]
    costs = [_cost(_decoded(sample, basis) - sample, moment) for basis in bases]
    codes, scales = quantize_int8(sample)
    if _cost(scales[:, None] * codes - sample, moment) <= min(costs):
        return (*quantize_int8(keys, key_scales), None)
    basis = bases[int(np.argmin(costs))]
    codes, scales = np.empty(keys.shape, np.int8), np.empty(n_keys, np.float32)
    for part in chunks(n_keys, width):
        codes[part], scales[part] = _encode(key_rows(keys, key_scales, part), basis)
    transform = basis.transform
    for array in (codes, scales, transform):
        array.flags.writeable = False
    return codes, scales, transform


def _basis(moment: np.ndarray, values: np.ndarray, vectors: np.ndarray, sample: np.ndarray, r: int) -> _Basis:
    """The basis with r top channels; values and vectors are those of `moment`, in ascending order."""
    width = len(moment)
    values, vectors = values[::-1], vectors[:, ::-1]
    top = vectors[:, :r]
    rotation = np.linalg.qr(np.random.default_rng(0).standard_normal((width - r, width - r)))[0]
    main = vectors[:, : width - r] @ rotation
    # Compensate for H without its first r eigenvectors; their eigenvalues become the smallest one.
    rest = moment - (top * (values[:r] - values[-1])) @ top.T
    inner = main.T @ rest @ main
    basis = _Basis(main.astype(np.float32), top.astype(np.float32), inner, upper_factor(inner))
    _, step, residual = _round_main(sample, basis)
    return replace(basis, gain=float(np.abs(residual / step[:, None]).max() / LARGEST_CODE))


def _round_main(rows: np.ndarray, basis: _Basis) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes (M, D - r) of `rows` in the main basis, their steps (M,), and their error along `top`, (M, r)."""
    target = np.ascontiguousarray((rows @ basis.main).T)
    largest = np.abs(target).max(axis=0)
    step = np.maximum(largest, np.finfo(np.float32).tiny) / np.float32(LARGEST_CODE)
    codes = round_channels(target, step, basis.moment, basis.factor)[0].T
    return codes, step, rows @ basis.top - (codes * step[:, None]) @ (basis.main.T @ basis.top)


def _encode(rows: np.ndarray, basis: _Basis) -> tuple[np.ndarray, np.ndarray]:
    codes, step, residual = _round_main(rows, basis)
    fine = np.clip(np.rint(residual / (step[:, None] * basis.gain)), -LARGEST_CODE, LARGEST_CODE)
    combined = np.concatenate([codes, fine], axis=1)
    # The scale that makes a key's error orthogonal to the key, as in quantize_int8.
    decoded = combined @ basis.transform
    along = np.einsum("md,md->m", decoded, rows)
    norms = np.einsum("md,md->m", rows, rows)
    if not (np.isfinite(norms) & (norms > 0)).all():
        raise IosrFastError("expected keys without zero rows, NaN or infinity, got such a row")
    return combined.astype(np.int8), norms / along


def _decoded(rows: np.ndarray, basis: _Basis) -> np.ndarray:
    codes, scales = _encode(rows, basis)
    decoded: np.ndarray = (codes * scales[:, None]) @ basis.transform
    return decoded


def _cost(error: np.ndarray, moment: np.ndarray) -> float:
    return float(np.einsum("md,md->m", error @ moment, error).mean())
