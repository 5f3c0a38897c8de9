"""INT8 and FP8 encoders from an ONNX file of export_onnx: 8-bit products, everything between them in float.

Each product with a constant matrix, y = x W, becomes y = DQ(Q(x)) DQ(W_q), with one scale for the activation, from its
range on calibration pictures, and one for each output of W. Before that, the scales of channels are balanced, exactly:

    LN(u) W = (LN(u) / s) (diag(s) W),  1/s in the gain and bias of the LayerNorm

so that one large channel does not set the scale of all (SmoothQuant, arXiv 2211.10438). s is max|x|^a / max|W|^(1-a)
per channel, with the exponent a of EXPONENTS that leaves the smallest error of y. If none halves the error, s is 1.

Ranges reach from the smallest to the largest value; they are not clipped.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from iosr_fast.exceptions import IosrFastError
from iosr_fast.export.onnx_files import save_onnx
from iosr_fast.export.quantize_graph import Activation, EncoderGraph, Group, Quantised
from iosr_fast.utils.require import require

Kind = Literal["int8", "fp8"]
Scheme = Literal["cpu", "tensorrt"]
MIN_PICTURES = 8
EXPONENTS = (0.25, 0.5, 0.75, 1.0)
WORTH = 0.5  # largest share of the unsmoothed error; smaller gains in a product do not improve the embeddings
LARGEST_ERROR = 0.01  # of |y|^2; 0.01% is usual, 1% means channels or tokens that no scale fits
_LIMITS = {"int8": 127.0, "fp8": 448.0}


def quantize_onnx(
    source: Path, target: Path, pictures: np.ndarray, kind: Kind = "int8", scheme: Scheme = "cpu"
) -> dict[str, Any]:
    """Write `source`, an encoder of export_onnx in fp32 or fp16, as `target` with quantised products.

    `pictures` uint8 (N, S, S, 3), N >= 8, calibrate the ranges: real pictures like those to be classified, and none of
    a test set. Matrices are symmetric, with a scale for each output. "cpu": activations uint8 with a zero point, as
    VNNI multiplies them in ONNX Runtime and OpenVINO. "tensorrt": activations int8 or E4M3FN ("fp8") with zero point 0,
    scales in the graph's float type, for strongly typed networks of TensorRT and TensorRT-RTX.

    These products stay in float: those of attention, which have no constant factor; the last block's matrices per head;
    the last projection, which is cheap and whose error is the embedding's; for "tensorrt" the patch projection, since
    only uint8 fits the 256 levels of pixels; products whose squared error exceeds 1% of their square.

    Returns JSON values: kind, scheme, calibration_pictures, products (number quantised), smoothed (number of
    LayerNorms) and kept (the products in float: {name: reason}).

    Raises ValueError for another kind or scheme, fp8 for a CPU, pictures of another dtype, shape or number, and a file
    that is not an encoder or has nothing to quantise; FileNotFoundError for a missing file.
    """
    if kind not in _LIMITS or scheme not in ("cpu", "tensorrt"):
        raise IosrFastError(
            f"expected kind 'int8' or 'fp8' and scheme 'cpu' or 'tensorrt', got {kind!r} and {scheme!r}"
        )
    if kind == "fp8" and scheme == "cpu":
        raise IosrFastError("expected kind 'int8' for a CPU, which has no products in fp8, got 'fp8'")
    graph = _open(source, pictures)
    groups, kept = graph.groups()
    if len(groups) < 3:
        raise IosrFastError(f"expected an encoder of export_onnx in {source}, found no products with constant matrices")
    kept |= _names(groups.pop(), "the last projection")
    if scheme == "tensorrt":
        kept |= _names(groups.pop(0), "the patch projection")
    activations = graph.activations([group.tensor for group in groups], pictures)
    products = smoothed = 0
    for group in groups:
        best = _quantise(group, activations[group.tensor], kind, scheme, graph.dtype(group))
        if not best.error <= LARGEST_ERROR:
            reason = f"its squared error would be {best.error:.1%} of its square (at most {LARGEST_ERROR:.0%})"
            kept |= _names(group, reason)
            continue
        if best.divisor is not None:
            graph.divide(group.norm, best.divisor)
            smoothed += 1
        graph.insert(group, best.activation, best.weights)
        products += len(best.weights)
    save_onnx(graph.finish(), target)
    return {
        "kind": kind,
        "scheme": scheme,
        "calibration_pictures": len(pictures),
        "products": products,
        "smoothed": smoothed,
        "kept": kept,
    }


def _open(source: Path, pictures: np.ndarray) -> EncoderGraph:
    onnx = require("onnx", "cpu")
    if not source.is_file():
        raise FileNotFoundError(f"expected an ONNX file of export_onnx, found no {source}")
    model = onnx.load(source)
    inputs = {value.name: value.type.tensor_type for value in model.graph.input}
    if set(inputs) != {"pixels"} or len(inputs["pixels"].shape.dim) != 4:
        raise IosrFastError(
            f"expected the one input 'pixels' (batch, S, S, 3) of export_onnx in {source}, got {list(inputs)}"
        )
    shape = tuple(dim.dim_value for dim in inputs["pixels"].shape.dim[1:])
    expected = f"calibration pictures as uint8 (N, {', '.join(map(str, shape))}) with N >= {MIN_PICTURES}"
    if not isinstance(pictures, np.ndarray) or pictures.dtype != np.uint8:
        got = pictures.dtype if isinstance(pictures, np.ndarray) else type(pictures).__name__
        raise IosrFastError(
            f"expected {expected}, got {got}; pass the pixels as bytes, the encoder normalises them itself"
        )
    if pictures.ndim != 4 or pictures.shape[1:] != shape or len(pictures) < MIN_PICTURES:
        raise IosrFastError(
            f"expected {expected}, got shape {pictures.shape}; iosr_fast.images.preprocess resizes them"
        )
    return EncoderGraph(model)


def _names(group: Group, reason: str) -> dict[str, str]:
    return {product.name: reason for product in group.products}


class _Attempt(NamedTuple):
    activation: Quantised
    weights: list[Quantised]
    divisor: np.ndarray | None  # of the activation's channels
    error: float  # |y - y_quantised|^2 / |y|^2 on the sampled rows


def _quantise(group: Group, measured: Activation, kind: Kind, scheme: Scheme, dtype: Any) -> _Attempt:
    """The best attempt: without smoothing, or, if the group can be smoothed, with one of EXPONENTS."""
    exact = measured.rows @ group.weight
    norm = float((exact**2).sum()) or 1.0

    def attempt(divisor: np.ndarray | None) -> _Attempt:
        by = np.ones(len(measured.low), np.float32) if divisor is None else divisor
        low, high = float((measured.low / by).min()), float((measured.high / by).max())
        activation = activation_scale(low, high, kind, scheme, dtype)
        weights = [quantise_matrix(p.weight * by[:, None], p.transposed, kind, dtype) for p in group.products]
        matrix = np.concatenate([dequantised(weight) for weight in weights], axis=1)
        error = float(((rounded(measured.rows / by, activation) @ matrix - exact) ** 2).sum()) / norm
        return _Attempt(activation, weights, divisor, error)

    best = attempt(None)
    if group.norm is None:
        return best
    limit = WORTH * best.error
    largest_x = np.maximum(np.maximum(np.abs(measured.low), np.abs(measured.high)), 1e-6)
    largest_w = np.maximum(np.abs(group.weight).max(1), 1e-6)
    for exponent in EXPONENTS:
        divisor = largest_x**exponent / largest_w ** (1 - exponent)
        smoothed = attempt((divisor / np.exp(np.log(divisor).mean())).astype(np.float32))
        if smoothed.error <= min(limit, best.error):
            best = smoothed
    return best


def activation_scale(low: float, high: float, kind: Kind, scheme: Scheme, dtype: Any) -> Quantised:
    """Scale (of `dtype`) and zero point for values from `low` to `high`, which include zero."""
    if scheme == "cpu":
        low, high = min(low, 0.0), max(high, 0.0)
        scale = _at_least(np.asarray((high - low) / 255), dtype)
        return Quantised(scale, np.asarray(np.clip(np.rint(-low / scale.astype(np.float64)), 0, 255), np.uint8))
    scale = _at_least(np.asarray(max(-low, high, 0.0) / _LIMITS[kind]), dtype)
    return Quantised(scale, np.zeros((), _type(kind)))


def quantise_matrix(weight: np.ndarray, transposed: bool, kind: Kind, dtype: Any) -> Quantised:
    """(inputs, outputs) in 8 bits, symmetric, with a scale for each output; `transposed` if the graph stores W'."""
    scale = _at_least(np.abs(weight).max(0) / _LIMITS[kind], dtype)
    scaled = np.clip(weight / scale.astype(np.float32), -_LIMITS[kind], _LIMITS[kind])
    values = (np.rint(scaled) if kind == "int8" else scaled).astype(_type(kind))
    zero = np.zeros(scale.shape, _type(kind))
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
        values = np.clip(x / scale, -_LIMITS["fp8"], _LIMITS["fp8"]).astype(to.zero.dtype).astype(np.float32)
    return np.asarray(values * scale, np.float32)


def _type(kind: Kind) -> Any:
    return np.int8 if kind == "int8" else require("ml_dtypes", "cpu").float8_e4m3fn


def _at_least(scale: np.ndarray, dtype: Any) -> np.ndarray:
    """Positive scales, rounded up to `dtype` so that the largest value still fits."""
    exact = np.maximum(scale, 1e-30 if dtype == np.float32 else 1e-6)
    near = exact.astype(dtype)
    up = np.nextafter(near, np.asarray(np.inf, dtype))
    return np.asarray(np.where(near.astype(np.float64) < exact, up, near), dtype)
