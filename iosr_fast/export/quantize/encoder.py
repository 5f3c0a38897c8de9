"""INT8 and FP8 encoders from an ONNX file of export_onnx: 8-bit products, everything between them in float.

Each product with a constant matrix, y = x W, becomes y = DQ(Q(x)) DQ(W_q), with one scale for the activation, from its
range on calibration pictures, and one for each output of W. Trained CLIPs have a few channels far above the others,
which would set the scale of all. If that costs more than SMOOTHED_ABOVE, the channels are balanced first, exactly:

    x W = (x / s) (diag(s) W)

with 1/s in the gain and bias of the LayerNorm before x, or, where there is none, in a product with x (SmoothQuant,
arXiv 2211.10438). s is max|x|^a / max|W|^(1-a) per channel, with the exponent a of EXPONENTS that leaves the smallest
error of y.

The errors that remain are measured where they matter, in the embeddings: the products that cost most stay in float
(quantize.sensitivity). Ranges reach from the smallest to the largest value; they are not clipped.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from iosr_fast.exceptions import IosrFastError
from iosr_fast.export.onnx import save_onnx
from iosr_fast.export.quantize.calibration import NO_PRODUCTS, evenly
from iosr_fast.export.quantize.graph import Activation, EncoderGraph, Group
from iosr_fast.export.quantize.sensitivity import EmbeddingError, choose_float
from iosr_fast.export.quantize.values import (
    Form,
    QuantisedGroup,
    activation_scale,
    dequantised,
    quantise_matrix,
    rounded,
)
from iosr_fast.utils.require import require

RANGE_PIXELS = 6_000_000  # of the pictures on which ranges are measured: 119 of 224 pixels, 1,464 of 64
JUDGED_PICTURES = 16
EXPONENTS = (0.25, 0.5, 0.75, 1.0)
SMOOTHED_ABOVE = 0.002  # error of a product; 0.0001 to 0.001 is usual without outliers
LARGEST_ERROR = 0.05  # of a product; above, it stays in float without a measurement of the embeddings
# Of the variance, for the worst of the judged pictures.
LARGEST_EMBEDDING_ERROR = {"u8s8": 0.005, "s8s8": 0.005, "fp8": 0.02}


def quantize_onnx(source: Path, target: Path, pictures: np.ndarray, form: Form = "u8s8") -> dict[str, Any]:
    """Write `source`, an encoder of export_onnx in fp32 or fp16, as `target` with quantised products.

    `pictures` uint8 (N, S, S, 3), N >= 8, calibrate the ranges: real pictures like those to be classified, and none of
    a test set. Matrices are symmetric, with a scale for each output, in the graph's float type. "u8s8" is for ONNX
    Runtime and OpenVINO, "s8s8" and "fp8" (E4M3FN) for strongly typed networks of TensorRT and TensorRT-RTX.

    These products stay in float: those of attention, which have no constant factor; the last block's matrices per head;
    the last projection, which is cheap and whose error is the embedding's; but in "u8s8" the patch projection, since
    only uint8 fits the 256 levels of pixels; products whose own error exceeds 5%; and, while the worst of 16
    calibration pictures has an error of its embeddings above 0.5% of their variance (fp8: 2%), those that contribute
    most to it for the time they take.

    Returns JSON values: form, calibration_pictures, products (number quantised) of total_products, smoothed (number of
    activations), embedding_error (share of the variance) and kept (the products in float: {name: reason}).

    Raises FileNotFoundError for a missing file, IosrFastError for a graph without products to quantise, and
    ArithmeticError if no product is accurate enough.
    """
    graph = EncoderGraph(source)
    groups, kept = graph.groups()
    total = graph.count_products()
    reasons = {len(groups) - 1: "the last projection"}
    if form != "u8s8":
        reasons[0] = "the patch projection"
    tried = [i for i in range(len(groups)) if i not in reasons]
    if not tried:
        raise IosrFastError(f"expected products to quantise, got none in {source.name}: {NO_PRODUCTS}")
    activations = graph.activations(
        [groups[i].tensor for i in tried], evenly(pictures, RANGE_PIXELS // pictures[0, :, :, 0].size)
    )
    attempts: list[QuantisedGroup | None] = [None] * len(groups)
    work = [0] * len(groups)
    for i in tried:
        activation = activations[groups[i].tensor]
        attempt = _quantise(graph, groups[i], activation, form)
        work[i] = len(activation.rows) * sum(weight.scale.size for weight in attempt.weights) * len(activation.low)
        if attempt.error <= LARGEST_ERROR:
            attempts[i] = attempt
        else:
            reasons[i] = f"its squared error would be {attempt.error:.1%} of its square (at most {LARGEST_ERROR:.0%})"
    error_of = EmbeddingError(source, attempts, evenly(pictures, JUDGED_PICTURES))
    floats, error = choose_float(error_of, attempts, work, LARGEST_EMBEDDING_ERROR[form])
    for i, alone in floats.items():
        attempts[i] = None
        reasons[i] = f"alone it would move the embeddings by {alone:.2%} of their variance"
    used = [(group, chosen) for group, chosen in zip(groups, attempts, strict=True) if chosen is not None]
    if not used:
        raise ArithmeticError(
            "expected products that are accurate enough in 8 bits (embeddings off by at most "
            f"{LARGEST_EMBEDDING_ERROR[form]:.1%} of their variance on {len(pictures)} calibration pictures), got 0 of "
            f"{total}; calibrate on more pictures like those to be classified, or build the engine in fp32"
        )
    for group, chosen in used:
        graph.insert(group, chosen)
    save_onnx(graph.load(), target)
    require("onnx", "cpu").checker.check_model(str(target))  # by path, for more than 2 GB
    return {
        "form": form,
        "calibration_pictures": len(pictures),
        "products": sum(len(group.products) for group, _ in used),
        "total_products": total,
        "smoothed": sum(chosen.divisor is not None for _, chosen in used),
        "embedding_error": round(error, 6),
        "kept": kept | {product.name: reason for i, reason in reasons.items() for product in groups[i].products},
    }


def _quantise(graph: EncoderGraph, group: Group, measured: Activation, form: Form) -> QuantisedGroup:
    """The attempt with the smallest error: without smoothing, and, if that is too rough, with each of EXPONENTS."""
    stored = [graph.weight(product) for product in group.products]
    parts, dtype = [np.asarray(part, np.float32) for part in stored], stored[0].dtype
    whole = np.concatenate(parts, axis=1)
    exact = measured.rows @ whole
    # Around the mean, because a constant is no information; of each row, because few rows may be far above the others.
    energy = ((exact - exact.mean(0)) ** 2).sum(1)
    energy = np.maximum(energy, max(float(np.median(energy)), 1e-30))

    def attempt(divisor: np.ndarray | None) -> QuantisedGroup:
        by = np.ones(len(measured.low), np.float32) if divisor is None else divisor
        low, high = float((measured.low / by).min()), float((measured.high / by).max())
        activation = activation_scale(low, high, form, dtype)
        weights = [
            quantise_matrix(part * by[:, None], product.transposed, form, dtype)
            for part, product in zip(parts, group.products, strict=True)
        ]
        matrix = np.concatenate([dequantised(weight) for weight in weights], axis=1)
        off = ((rounded(measured.rows / by, activation) @ matrix - exact) ** 2).sum(1)
        return QuantisedGroup(activation, weights, divisor, float((off / energy).mean()))

    best = attempt(None)
    if best.error <= SMOOTHED_ABOVE:
        return best
    largest_x = np.maximum(np.maximum(np.abs(measured.low), np.abs(measured.high)), 1e-6)
    largest_w = np.maximum(np.abs(whole).max(1), 1e-6)
    for exponent in EXPONENTS:
        divisor = largest_x**exponent / largest_w ** (1 - exponent)
        smoothed = attempt((divisor / np.exp(np.log(divisor).mean())).astype(np.float32))
        if not best.error <= smoothed.error:
            best = smoothed
    return best
