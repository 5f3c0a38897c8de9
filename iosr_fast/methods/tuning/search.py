"""The exact search for alpha: the alphas at which a sample is right, and the one at which most samples are right.

Tip-Adapter's public code (Zhang et al., ECCV 2022) tries a grid of alphas. None is needed: a sample with logits
z + alpha * s is right on one interval of alphas, so the best alpha lies where most intervals overlap. `intervals` and
`cache_intervals` find the intervals, `sweep` the best alpha.

Each runs in C++ (csrc/search) or in NumPy (numpy_search.py) with the same results: `impl` is "cpp", "numpy" or "auto",
which takes C++ if the extension can be imported, unless IOSR_FAST_IMPL names one of the two. Results name the path that
ran. A wrong argument raises ValueError before any work; "cpp" raises RuntimeError if it can't run.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from iosr_fast.exceptions import IosrFastError, UnavailableError
from iosr_fast.methods.tuning import numpy_search
from iosr_fast.methods.tuning.numpy_search import LOWER_OPEN, UPPER_OPEN
from iosr_fast.scoring import dispatch
from iosr_fast.scoring.validation import check_finite, check_unit_rows

_log = logging.getLogger("iosr_fast")


@dataclass(frozen=True, eq=False)
class Intervals:
    """The alphas in [0, inf) at which each of V samples is right, in each of S settings.

    lower, upper (S, V) float64; upper is inf if nothing bounds it
    flags        (S, V) uint8: LOWER_OPEN and UPPER_OPEN if an end does not belong to the interval, EMPTY if no alpha
                 makes the sample right (the ends then have no meaning)
    path         the implementation that ran: "cpp", "cpp/avx2", "numpy"
    """

    lower: np.ndarray
    upper: np.ndarray
    flags: np.ndarray
    path: str = ""

    def __post_init__(self) -> None:
        for name, dtype in (("lower", np.float64), ("upper", np.float64), ("flags", np.uint8)):
            object.__setattr__(self, name, np.ascontiguousarray(getattr(self, name), dtype=dtype))
            array = getattr(self, name)
            if array.ndim != 2 or array.shape != self.lower.shape:
                raise IosrFastError(f"expected lower, upper and flags of one shape (S, V), got {name} of {array.shape}")
            if np.isnan(array).any():
                raise IosrFastError(
                    f"expected {name} without NaN, got {np.isnan(array).sum()}; mark intervals EMPTY instead"
                )

    @property
    def n_settings(self) -> int:
        """S."""
        return int(self.lower.shape[0])

    @property
    def n_samples(self) -> int:
        """V."""
        return int(self.lower.shape[1])

    def only(self, rows: np.ndarray) -> Intervals:
        """The intervals of some samples, `rows` a mask (V,) or indices."""
        return Intervals(self.lower[:, rows], self.upper[:, rows], self.flags[:, rows], self.path)

    @staticmethod
    def concatenate(parts: Sequence[Intervals]) -> Intervals:
        """The samples of several parts (folds) side by side; ValueError if their numbers of settings differ."""
        settings = [part.n_settings for part in parts]
        if len(set(settings)) != 1:
            raise IosrFastError(f"expected at least one part, and all of one number of settings, got {settings}")
        paths = " + ".join(dict.fromkeys(part.path for part in parts))
        lower, upper, flags = (
            np.concatenate([getattr(part, name) for part in parts], axis=1) for name in ("lower", "upper", "flags")
        )
        return Intervals(lower, upper, flags, paths)


@dataclass(frozen=True, eq=False)
class Best:
    """The best alpha of each of S settings: the middle of the widest plateau of the number of right samples.

    alpha, low, high  (S,) float64; the plateau reaches from low to high, which are equal if it is a single point
    right             (S,) int64, the number of right samples on the plateau
    low_included, high_included  (S,) bool, whether an end belongs to the plateau
    path              the implementation that ran: "cpp" or "numpy"
    """

    alpha: np.ndarray
    low: np.ndarray
    high: np.ndarray
    right: np.ndarray
    low_included: np.ndarray
    high_included: np.ndarray
    path: str = ""


def intervals(base: Any, slope: Any, labels: Any, impl: str = "auto") -> Intervals:
    """The alphas >= 0 at which argmax over c of base[v, c] + alpha * slope[v, c] is labels[v]; S = 1.

    The first of equal logits wins, as in np.argmax. With y = labels[v], d = slope[y] - slope[c] and
    e = base[c] - base[y], each other class c requires
        alpha >= e / d  if d > 0,    alpha <= e / d  if d < 0,    e <= 0  if d == 0,
    without the bound itself if c < y. Differences and quotients are taken in float64. If e != 0, slopes that differ by
    no more than 64 roundings of float32 count as equal (d = 0): only a huge alpha lets such a difference outweigh e,
    and whether it does is noise.

    base, slope (V, C), converted to float32; labels (V,) integers in [0, C).
    """
    base, slope = _matrix("base", base), _matrix("slope", slope)
    _check_shape("slope", slope, base.shape, "as base has")
    labels = _labels(labels, *base.shape)
    path = _choose(impl)
    if path == "numpy":
        lower, upper, flags = numpy_search.intervals(base, slope, labels)
    else:
        from iosr_fast import _C

        lower, upper, flags = _C.intervals(base=base, slope=slope, labels=labels)
    return Intervals(lower[None], upper[None], flags[None], path)


def cache_intervals(
    base: Any,
    query: Any,
    keys: Any,
    class_offsets: Any,
    labels: Any,
    betas: Any,
    weights: Any = None,
    extra: Any = None,
    gammas: Any = None,
    impl: str = "auto",
) -> Intervals:
    """intervals() for a cache at K betas and G gammas at once; setting k * G + g has betas[k] and gammas[g].

    slope[v, c] = sum over keys j of class c: weights[k, j] * exp(-betas[k] * (1 - <query[v], keys[j]>))
    base[v, c] + gammas[g] * extra[v, c] takes the place of base[v, c]

    Equals intervals() of these without forming the (V, N) affinity or a slope: the product of queries and keys is
    computed once for all betas, block by block.

    base, extra    (V, C) float32; extra and gammas (G,) come together, and without them G = 1
    query, keys    (V, D) and (N, D) float32, unit rows, or zero where a reducer leaves nothing; keys sorted by class
    class_offsets  (C + 1,); class c owns keys[class_offsets[c]:class_offsets[c + 1]], which may be empty
    labels         (V,) integers in [0, C)
    betas          (K,), finite and >= 0
    weights        (K, N) float32; None for all ones
    """
    base, query, keys = _matrix("base", base), _matrix("query", query), _matrix("keys", keys)
    n_samples, n_classes = base.shape
    labels = _labels(labels, n_samples, n_classes)
    if len(keys) < 1 or keys.shape[1] < 1:
        raise IosrFastError(f"expected at least one key with at least one channel, got keys of shape {keys.shape}")
    _check_shape("query", query, (n_samples, keys.shape[1]), "a row for each of base, a channel for each of keys")
    offsets = _offsets(class_offsets, n_classes, len(keys))
    betas = _numbers("betas", betas)
    if (betas < 0).any():
        raise IosrFastError(f"expected betas >= 0, got {betas.min():.6g}")
    if (extra is None) != (gammas is None):
        raise IosrFastError("expected extra and gammas together, got one without the other")
    if extra is not None:
        extra, gammas = _matrix("extra", extra), _numbers("gammas", gammas)
        _check_shape("extra", extra, base.shape, "as base has")
    if weights is not None:
        weights = _matrix("weights", weights)
        _check_shape("weights", weights, (len(betas), len(keys)), "a row for each of betas, a column for each of keys")
    check_unit_rows("query", query, or_zero=True)
    check_unit_rows("keys", keys, or_zero=True)
    arguments = {
        "base": base,
        "query": query,
        "keys": keys,
        "class_offsets": offsets,
        "labels": labels,
        "betas": betas,
        "weights": weights,
        "extra": extra,
        "gammas": gammas,
    }
    if _choose(impl) == "numpy":
        return Intervals(*numpy_search.cache_intervals(**arguments), "numpy")
    from iosr_fast import _C

    lower, upper, flags, path = _C.cache_intervals(**arguments)
    return Intervals(lower, upper, flags, f"cpp/{path}")


def sweep(intervals: Intervals, impl: str = "auto") -> Best:
    """The alpha at which most samples are right, for each setting.

    The number of right samples is constant between neighbouring ends of intervals. The result is the middle of its
    widest plateau at the maximum (the first one of equals); a single point wins only if strictly more samples are right
    there than next to it. O(V log V) per setting.

    Alphas range from 0 to twice the largest finite end above 0 of the setting's intervals, or to 2 without one, so that
    an unbounded plateau has a middle. If no sample is right at any alpha, the whole range is the plateau.
    """
    path = _choose(impl)
    rows = {"lower": intervals.lower, "upper": intervals.upper, "flags": intervals.flags}
    if path == "numpy":
        alpha, low, high, ends, right = numpy_search.sweep(**rows)
    else:
        from iosr_fast import _C

        alpha, low, high, ends, right = _C.sweep(**rows)
    return Best(alpha, low, high, right, (ends & LOWER_OPEN) == 0, (ends & UPPER_OPEN) == 0, path)


def _choose(impl: str) -> str:
    """ "cpp" or "numpy"."""
    forced = os.environ.get(dispatch.ENVIRONMENT, "")
    source = f"impl={impl!r}"
    if impl == "auto" and forced in ("cpp", "numpy"):
        impl, source = forced, f"{dispatch.ENVIRONMENT}={forced}"
    if impl not in ("auto", "cpp", "numpy"):
        raise IosrFastError(f"expected an implementation of auto, cpp, numpy, got {source}")
    if impl == "numpy":
        return impl
    reason = dispatch.cpp_unavailable_reason()
    if reason is None:
        return "cpp"
    if impl == "cpp":
        raise UnavailableError(f"{source} can't run here: {reason}")
    _log.info("searching with numpy (unavailable: cpp: %s)", reason)
    return "numpy"


def _check_shape(name: str, array: np.ndarray, shape: tuple[int, ...], why: str) -> None:
    if array.shape != shape:
        raise IosrFastError(f"expected {name} of shape {shape}, {why}, got {array.shape}")


def _matrix(name: str, values: Any) -> np.ndarray:
    array: np.ndarray = np.ascontiguousarray(values, dtype=np.float32)
    if array.ndim != 2:
        raise IosrFastError(f"expected {name} with two axes, got shape {np.shape(values)}")
    check_finite(name, array)
    return array


def _numbers(name: str, values: Any) -> np.ndarray:
    """Constants as float64, in the range of float32 so that none of their products overflows."""
    array: np.ndarray = np.ascontiguousarray(values, dtype=np.float64)
    if array.ndim != 1 or len(array) < 1:
        raise IosrFastError(f"expected {name} of shape (n,) with n >= 1, got {np.shape(values)}")
    if not (np.abs(array) <= np.finfo(np.float32).max).all():
        raise IosrFastError(f"expected {name} finite and in the range of float32, got {array}")
    return array


def _labels(values: Any, n_samples: int, n_classes: int) -> np.ndarray:
    array = np.asarray(values)
    if n_classes < 1:
        raise IosrFastError("expected base of shape (V, C) with C >= 1, got C = 0")
    if array.dtype.kind not in "iu" and array.size > 0:
        raise IosrFastError(f"expected labels of integers, got {array.dtype}")
    if array.shape != (n_samples,):
        raise IosrFastError(f"expected labels of shape {(n_samples,)}, one for each row of base, got {array.shape}")
    outside = (array < 0) | (array >= n_classes)
    if outside.any():
        raise IosrFastError(f"expected labels from 0 to {n_classes - 1} (columns of base), got {array[outside][0]}")
    return np.ascontiguousarray(array, dtype=np.int64)


def _offsets(values: Any, n_classes: int, n_keys: int) -> np.ndarray:
    offsets = np.asarray(values)
    if offsets.dtype.kind not in "iu" or offsets.shape != (n_classes + 1,):
        raise IosrFastError(
            f"expected class_offsets of integers, shape {(n_classes + 1,)}, got {offsets.dtype} of {offsets.shape}"
        )
    offsets = np.ascontiguousarray(offsets, dtype=np.int64)
    if offsets[0] != 0 or offsets[-1] != n_keys or (np.diff(offsets) < 0).any():
        raise IosrFastError(
            f"expected class_offsets to rise from 0 to the number of keys, {n_keys}, "
            f"got {offsets[0]} to {offsets[-1]}; sort keys by class first"
        )
    return offsets
