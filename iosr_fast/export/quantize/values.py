"""Values in 8 bits: scales and zero points of activations and matrices, and what rounding leaves of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from iosr_fast.utils.require import require

# What is multiplied. u8s8: activations uint8 with a zero point, weights int8, for CPUs. s8s8 and fp8 (E4M3FN): zero
# point 0, as TensorRT wants it.
Form = Literal["u8s8", "s8s8", "fp8"]
LARGEST = {"s8s8": 127.0, "fp8": 448.0}  # of an activation
# x86 processors without VNNI add two products of uint8 and int8 in int16 (vpmaddubsw): 2 x 255 x 64 fits, 2 x 255 x 127
# does not. Seven bits everywhere, so that an engine computes the same on each processor.
LARGEST_WEIGHT = {"u8s8": 64.0, "s8s8": 64.0, "fp8": 448.0}


@dataclass(frozen=True)
class Quantised:
    """A quantised tensor: `values` (None for an activation), `scale`, `zero`, the axis of the scales."""

    scale: np.ndarray
    zero: np.ndarray
    values: np.ndarray | None = None
    axis: int | None = None


@dataclass(frozen=True)
class QuantisedGroup:
    """The activation of a Group divided by `divisor` (channels,) and quantised; its matrices, multiplied by it."""

    activation: Quantised
    weights: list[Quantised]
    divisor: np.ndarray | None
    error: float  # squared, as a share of the outputs' square


def activation_scale(low: float, high: float, form: Form, dtype: Any) -> Quantised:
    """Scale (of `dtype`) and zero point for values from `low` to `high`, which include zero."""
    if form == "u8s8":
        low, high = min(low, 0.0), max(high, 0.0)
        scale = _at_least(np.asarray((high - low) / 255), dtype)
        return Quantised(scale, np.asarray(np.clip(np.rint(-low / scale.astype(np.float64)), 0, 255), np.uint8))
    scale = _at_least(np.asarray(max(-low, high, 0.0) / LARGEST[form]), dtype)
    return Quantised(scale, np.zeros((), _type(form)))


def quantise_matrix(weight: np.ndarray, transposed: bool, form: Form, dtype: Any) -> Quantised:
    """(inputs, outputs) within LARGEST_WEIGHT, with a scale for each output; `transposed` if the graph stores W'."""
    limit = LARGEST_WEIGHT[form]
    scale = _at_least(np.abs(weight).max(0) / limit, dtype)
    scaled = np.clip(weight / scale.astype(np.float32), -limit, limit)
    values = (scaled if form == "fp8" else np.rint(scaled)).astype(_type(form))
    zero = np.zeros(scale.shape, _type(form))
    return Quantised(scale, zero, values.T if transposed else values, 0 if transposed else 1)


def dequantised(weight: Quantised) -> np.ndarray:
    """DQ of a matrix: (inputs, outputs) float32."""
    assert weight.values is not None
    values = weight.values.astype(np.float32)
    return (values.T if weight.axis == 0 else values) * weight.scale.astype(np.float32)


def rounded(x: np.ndarray, to: Quantised) -> np.ndarray:
    """DQ(Q(x)) of an activation, float32."""
    scale, zero = to.scale.astype(np.float32), to.zero.astype(np.float32)
    if to.zero.dtype.kind in "iu":
        limits = np.iinfo(to.zero.dtype)
        values = np.clip(np.rint(x / scale) + zero, limits.min, limits.max) - zero
    else:
        values = np.clip(x / scale, -LARGEST["fp8"], LARGEST["fp8"]).astype(to.zero.dtype).astype(np.float32)
    return np.asarray(values * scale, np.float32)


def _type(form: Form) -> Any:
    return require("ml_dtypes", "cpu").float8_e4m3fn if form == "fp8" else np.int8


def _at_least(scale: np.ndarray, dtype: Any) -> np.ndarray:
    """Positive scales, rounded up to `dtype` so that the largest value still fits."""
    exact = np.maximum(scale, 1e-30 if dtype == np.float32 else 1e-6)
    near = exact.astype(dtype)
    up = np.nextafter(near, np.asarray(np.inf, dtype))
    return np.asarray(np.where(near.astype(np.float64) < exact, up, near), dtype)
