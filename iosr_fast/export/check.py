"""The pictures that an engine is checked on, and the check, before anything is written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.encoders.runtimes.batched import BatchedEncoder
from iosr_fast.export.quantize.calibration import QUANTISED, evenly

FP32_MAX_ERROR = 1e-4  # of embeddings that are equal, but for rounding in another runtime or at another place
MIN_COSINES = {"fp16": 0.999, "bf16": 0.999, "int8": 0.99, "fp8": 0.99}
CHECKED_PICTURES = 8
# By kind of picture: pixels uint8 (N, S, S, 3), and the right embeddings, (N, D) float32 each.
Truth = Mapping[str, tuple[np.ndarray, tuple[np.ndarray, ...]]]


def checked_pictures(size: int, pictures: np.ndarray | None, precision: str) -> dict[str, np.ndarray]:
    """Three random pictures (another batch size than the export's example) and some of the given ones.

    The given ones replace the random ones in 8 bits, which have the ranges of real pictures.
    """
    checked = {}
    if precision not in QUANTISED or pictures is None:
        checked["random"] = np.random.default_rng(0).integers(0, 256, (3, size, size, 3), dtype=np.uint8)
    if pictures is not None:
        checked["real"] = evenly(pictures, CHECKED_PICTURES)
    return checked


def check(encoder: BatchedEncoder, truth: Truth, precision: str) -> dict[str, Any]:
    """Largest error and smallest cosine for each kind of picture and embedding: of a batch, and of its first picture
    alone, for which a plan of TensorRT has a profile, and so kernels, of its own.

    Raises ArithmeticError for an error above 1e-4 in fp32, or a cosine below that of MIN_COSINES.
    """
    results: dict[str, Any] = {}
    for kind, (pixels, rows) in truth.items():
        embeddings = Embeddings.concatenate([encoder.encode(part) for part in (pixels, pixels[:1])])
        results[kind] = {"pictures": len(pixels)}
        for name, expected in zip(encoder.outputs, rows[: len(encoder.outputs)], strict=True):  # plain alone, or both
            what = f"{name} embeddings of {kind} pictures by {encoder.runtime}"
            got, expected = getattr(embeddings, name), np.concatenate([expected, expected[:1]])
            results[kind][name] = check_rows(what, got, expected, precision)
    return results


def check_rows(what: str, got: np.ndarray, expected: np.ndarray, precision: str) -> dict[str, float]:
    """The largest error and the smallest cosine of embeddings (N, D). Raises ArithmeticError where the error is too
    large (fp32) or the cosine too small (other precisions), or NaN."""
    error, least = float(np.abs(got - expected).max()), MIN_COSINES.get(precision)
    norms = np.linalg.norm(got, axis=1) * np.linalg.norm(expected, axis=1)
    cosine = float(((got * expected).sum(1) / norms).min())
    # The cosine of a row of zeros is NaN, whatever its error.
    if (error <= FP32_MAX_ERROR and cosine > 0) if least is None else cosine >= least:
        return {"max_abs_error": error, "min_cosine": cosine}
    allowed = f"error <= {FP32_MAX_ERROR}" if least is None else f"cosine >= {least}"
    raise ArithmeticError(
        f"{what} in {precision} are wrong: expected {allowed}, got an error of {error:.2g} and a cosine of "
        f"{cosine:.6f}; nothing was written"
    )
