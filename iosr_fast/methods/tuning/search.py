"""The exact search for alpha: which alphas make a sample right, and the one that makes most samples right.

Tip-Adapter's public code (Zhang et al., ECCV 2022) tries a grid of alphas. None is needed: a sample with logits
z + alpha * s is right on one interval of alphas, so the best alpha lies where most intervals overlap. `intervals` and
`cache_intervals` find the intervals, `sweep` the best alpha, `step_curve` the number of right samples at every alpha.

Each runs in C++ (csrc/search) or in NumPy (numpy_search.py), with the same answers: `impl` is "cpp", "numpy" or "auto",
which takes C++ where the extension can be imported, or what IOSR_FAST_IMPL says where that is one of the two. The
results name the path that ran. An argument that is wrong raises ValueError before any work, and "cpp" where it can't
run RuntimeError.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from iosr_fast.methods.tuning import numpy_search
from iosr_fast.methods.tuning.numpy_search import EMPTY, LOWER_OPEN, UPPER_OPEN
from iosr_fast.scoring import dispatch
from iosr_fast.scoring.validation import check_finite, check_unit_rows

__all__ = [
    "EMPTY",
    "LOWER_OPEN",
    "UPPER_OPEN",
    "Best",
    "Intervals",
    "cache_intervals",
    "intervals",
    "step_curve",
    "sweep",
]
_log = logging.getLogger("iosr_fast")


@dataclass(frozen=True, eq=False)
class Intervals:
    """The alphas in [0, inf) at which each of V samples is right, in each of S settings.

    lower, upper (S, V) float64; upper is inf where nothing bounds it
    flags        (S, V) uint8: LOWER_OPEN and UPPER_OPEN where an end doesn't belong to the interval, EMPTY where no
                 alpha makes the sample right (the ends then mean nothing)
    path         what computed them: "cpp", "cpp/avx2", "numpy"
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
                raise ValueError(f"expected lower, upper and flags of one shape (S, V), got {name} of {array.shape}")
            if np.isnan(array).any():
                raise ValueError(
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

    @staticmethod
    def concatenate(parts: Sequence[Intervals]) -> Intervals:
        """The samples of several parts (folds) side by side; ValueError where their settings differ in number."""
        settings = [part.n_settings for part in parts]
        if len(set(settings)) != 1:
            raise ValueError(f"expected at least one part, and all of one number of settings, got {settings}")
        paths = " + ".join(dict.fromkeys(part.path for part in parts))
        lower, upper, flags = (
            np.concatenate([getattr(part, name) for part in parts], axis=1) for name in ("lower", "upper", "flags")
        )
        return Intervals(lower, upper, flags, paths)


@dataclass(frozen=True, eq=False)
class Best:
    """The best alpha of each of S settings: the middle of the widest plateau of the number of right samples.

    alpha, low, high  (S,) float64; the plateau goes from low to high, which are one where it is a single point
    right             (S,) int64, the number of right samples on the plateau
    low_included, high_included  (S,) bool, whether an end belongs to the plateau
    path              what computed them: "cpp" or "numpy"
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

    The first of equal logits wins, as np.argmax has it. With y = labels[v], d = slope[y] - slope[c] and
    e = base[c] - base[y], each other class c asks for
        alpha >= e / d  where d > 0,    alpha <= e / d  where d < 0,    e <= 0  where d == 0,
    the bound itself left out where c < y. Differences and quotients are taken in float64. Where e != 0, slopes that
    differ by no more than 64 roundings of float32 count as equal (d = 0): it takes a huge alpha for such a difference
    to outweigh e, and whether it does is noise.

    base, slope (V, C), converted to float32; labels (V,) integers in [0, C).
    """
    base, slope = (_matrix(name, given) for name, given in (("base", base), ("slope", slope)))
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
    own: Any = None,
    impl: str = "auto",
) -> Intervals:
    """intervals() for a cache at K betas and G gammas at once; setting k * G + g has betas[k] and gammas[g].

    slope[v, c] = sum over keys j of class c: weights[k, j] * exp(-betas[k] * (1 - <query[v], keys[j]>))
    base[v, c] + gammas[g] * extra[v, c] stands in the place of base[v, c]

    Equals intervals() of these without forming the (V, N) affinity or a slope: the product of queries and keys is taken
    once for all betas, and thrown away block by block.

    base, extra    (V, C) float32; extra and gammas (G,) come together, and without them G = 1
    query, keys    (V, D) and (N, D) float32, unit rows, or zero where a reducer leaves nothing; keys sorted by class
    class_offsets  (C + 1,); class c owns keys[class_offsets[c]:class_offsets[c + 1]], which may be none
    labels         (V,) integers in [0, C)
    betas          (K,), finite and >= 0
    weights        (K, N) float32; None stands for all ones
    own            (V,), the row of keys that sample v doesn't meet, or -1: leave-one-out on the support set
    """
    base = _matrix("base", base)
    query, keys = (_matrix(name, given) for name, given in (("query", query), ("keys", keys)))
    n_samples, n_classes = base.shape
    labels = _labels(labels, n_samples, n_classes)
    if len(keys) < 1 or keys.shape[1] < 1:
        raise ValueError(f"expected at least one key with at least one channel, got keys of shape {keys.shape}")
    _check_shape("query", query, (n_samples, keys.shape[1]), "a row for each of base, a channel for each of keys")
    offsets = _offsets(class_offsets, n_classes, len(keys))
    betas = _numbers("betas", betas)
    if (betas < 0).any():
        raise ValueError(f"expected betas >= 0, got {betas.min():.6g}")
    if (extra is None) != (gammas is None):
        raise ValueError("expected extra and gammas together, got one without the other")
    if extra is not None:
        extra, gammas = _matrix("extra", extra), _numbers("gammas", gammas)
        _check_shape("extra", extra, base.shape, "as base has")
    if weights is not None:
        weights = _matrix("weights", weights)
        _check_shape("weights", weights, (len(betas), len(keys)), "a row for each of betas, a column for each of keys")
    if own is not None:
        own = _integers("own", own, n_samples, -1, len(keys), "rows of keys, or -1 for none")
    check_unit_rows("query", query, or_zero=True)
    check_unit_rows("keys", keys, or_zero=True)
    if _choose(impl) == "numpy":
        return Intervals(
            *numpy_search.cache_intervals(base, query, keys, offsets, labels, betas, weights, extra, gammas, own),
            "numpy",
        )
    from iosr_fast import _C

    lower, upper, flags, path = _C.cache_intervals(
        base=base,
        query=query,
        keys=keys,
        class_offsets=offsets,
        labels=labels,
        betas=betas,
        weights=weights,
        extra=extra,
        gammas=gammas,
        own=own,
    )
    return Intervals(lower, upper, flags, f"cpp/{path}")


def sweep(intervals: Intervals, alpha_max: float | None = None, impl: str = "auto") -> Best:
    """The alpha in [0, alpha_max] at which most samples are right, for each setting.

    The number of right samples is constant between neighbouring ends of intervals. Of its plateaus at the maximum the
    widest is taken, the first of equals, and of that the middle; a single point wins only where strictly more samples
    are right there than beside it. O(V log V) a setting.

    Without alpha_max, each setting takes twice the largest finite end above 0 of its intervals, or 2 where there is
    none, so that a plateau without end has a middle. Where no sample is ever right, [0, alpha_max] is the plateau.
    """
    alpha_max = _alpha_max(alpha_max)
    path = _choose(impl)
    given = (intervals.lower, intervals.upper, intervals.flags)
    if path == "numpy":
        alpha, low, high, ends, right = numpy_search.sweep(*given, alpha_max)
    else:
        from iosr_fast import _C

        lower, upper, flags = given
        alpha, low, high, ends, right = _C.sweep(lower=lower, upper=upper, flags=flags, alpha_max=alpha_max)
    return Best(alpha, low, high, right, (ends & LOWER_OPEN) == 0, (ends & UPPER_OPEN) == 0, path)


def step_curve(intervals: Intervals, setting: int, alpha_max: float | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(edges (E + 1,) float64, right (E,) int64): right[i] samples are right at any alpha between edges[i] and [i + 1].

    Exact, with each end of an interval an edge, from 0 to alpha_max (as in sweep). The counts at the edges themselves,
    where a sample may be right or wrong at that very alpha, are not in the curve.
    """
    if not 0 <= setting < intervals.n_settings:
        raise ValueError(f"expected a setting from 0 to {intervals.n_settings - 1}, got {setting}")
    lower, upper, flags = intervals.lower[setting], intervals.upper[setting], intervals.flags[setting]
    return numpy_search.step_curve(lower, upper, flags, _alpha_max(alpha_max))


def _choose(impl: str) -> str:
    """ "cpp" or "numpy"."""
    forced = os.environ.get(dispatch.ENVIRONMENT, "")
    asked_by = f"impl={impl!r}"
    if impl == "auto" and forced in ("cpp", "numpy"):
        impl, asked_by = forced, f"{dispatch.ENVIRONMENT}={forced}"
    if impl not in ("auto", "cpp", "numpy"):
        raise ValueError(f"expected an implementation out of auto, cpp, numpy, got {asked_by}")
    if impl == "numpy":
        return impl
    unavailable_reason = dispatch.cpp_unavailable_reason()
    if unavailable_reason is None:
        return "cpp"
    if impl == "cpp":
        raise RuntimeError(f"{asked_by} can't run here: {unavailable_reason}")
    _log.info("searching with numpy (unavailable: cpp: %s)", unavailable_reason)
    return "numpy"


def _check_shape(name: str, array: np.ndarray, shape: tuple[int, ...], why: str) -> None:
    if array.shape != shape:
        raise ValueError(f"expected {name} of shape {shape}, {why}, got {array.shape}")


def _matrix(name: str, given: Any) -> np.ndarray:
    array: np.ndarray = np.ascontiguousarray(given, dtype=np.float32)
    if array.ndim != 2:
        raise ValueError(f"expected {name} with two axes, got shape {np.shape(given)}")
    check_finite(name, array)
    return array


def _numbers(name: str, given: Any) -> np.ndarray:
    """Constants as float64, in the range of float32 so that no product of theirs overflows."""
    array: np.ndarray = np.ascontiguousarray(given, dtype=np.float64)
    if array.ndim != 1 or len(array) < 1:
        raise ValueError(f"expected {name} of shape (n,) with n >= 1, got {np.shape(given)}")
    if not (np.abs(array) <= np.finfo(np.float32).max).all():
        raise ValueError(f"expected {name} finite and in the range of float32, got {array}")
    return array


def _integers(name: str, given: Any, length: int, low: int, end: int, what: str) -> np.ndarray:
    array = np.asarray(given)
    if array.dtype.kind not in "iu" and array.size > 0:
        raise ValueError(f"expected {name} of integers, got {array.dtype}")
    if array.shape != (length,):
        raise ValueError(f"expected {name} of shape {(length,)}, one for each row of base, got {array.shape}")
    outside = (array < low) | (array >= end)
    if outside.any():
        raise ValueError(f"expected {name} from {low} to {end - 1} ({what}), got {array[outside][0]}")
    return np.ascontiguousarray(array, dtype=np.int64)


def _labels(given: Any, n_samples: int, n_classes: int) -> np.ndarray:
    if n_classes < 1:
        raise ValueError("expected base of shape (V, C) with C >= 1, got C = 0")
    return _integers("labels", given, n_samples, 0, n_classes, "columns of base")


def _offsets(given: Any, n_classes: int, n_keys: int) -> np.ndarray:
    offsets = np.asarray(given)
    if offsets.dtype.kind not in "iu" or offsets.shape != (n_classes + 1,):
        raise ValueError(
            f"expected class_offsets of integers, shape {(n_classes + 1,)}, got {offsets.dtype} of {offsets.shape}"
        )
    offsets = np.ascontiguousarray(offsets, dtype=np.int64)
    if offsets[0] != 0 or offsets[-1] != n_keys or (np.diff(offsets) < 0).any():
        raise ValueError(
            f"expected class_offsets to rise from 0 to the number of keys, {n_keys}, "
            f"got {offsets[0]} to {offsets[-1]}; sort keys by class first"
        )
    return offsets


def _alpha_max(given: float | None) -> float | None:
    if given is None:
        return None
    if not (np.isfinite(given) and given >= 0):
        raise ValueError(f"expected alpha_max finite and >= 0, or None to have it found, got {given}")
    return float(given)
