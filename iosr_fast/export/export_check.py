"""Compare an encoder's embeddings with the two literal passes in fp32 PyTorch, before anything is written."""

from __future__ import annotations

from typing import Any

import numpy as np

from iosr_fast.encoders.runtimes.batched import BatchedEncoder
from iosr_fast.export.calibration import evenly

FP32_MAX_ERROR = 1e-4
MIN_COSINES = {"fp16": 0.999, "bf16": 0.999, "int8": 0.99, "fp8": 0.99}
CHECKED_PICTURES = 8


def checked_pictures(size: int, real_images: np.ndarray | None, noise: bool = True) -> dict[str, np.ndarray]:
    """Three random pictures (another batch size than the export's example) and some of the real ones.

    Without `noise`, real pictures replace the random ones: a quantised encoder has the ranges of real pictures.
    """
    pictures = {}
    if noise or real_images is None:
        pictures["random"] = np.random.default_rng(0).integers(0, 256, (3, size, size, 3), dtype=np.uint8)
    if real_images is not None:
        pictures["real"] = evenly(real_images, CHECKED_PICTURES)
    return pictures


def check(
    encoder: BatchedEncoder,
    pictures: dict[str, np.ndarray],
    truth: dict[str, tuple[np.ndarray, ...]],
    precision: str,
) -> dict[str, Any]:
    """Largest error and smallest cosine for each kind of picture and embedding.

    Raises ArithmeticError for an error above 1e-4 in fp32, or a cosine below that of MIN_COSINES.
    """
    results: dict[str, Any] = {}
    for kind, pixels in pictures.items():
        embeddings = encoder.encode(pixels)
        results[kind] = {"pictures": len(pixels)}
        expected_rows = truth[kind][: len(encoder.outputs)]  # a plain form has no adapted ones
        for name, expected in zip(encoder.outputs, expected_rows, strict=True):
            got = getattr(embeddings, name)
            error = float(np.abs(got - expected).max())
            norms = np.linalg.norm(got, axis=1) * np.linalg.norm(expected, axis=1)
            cosine = float(((got * expected).sum(1) / norms).min())
            results[kind][name] = {"max_abs_error": error, "min_cosine": cosine}
            what = f"{name} embeddings of {kind} pictures by {encoder.runtime}"
            require_accuracy(what, error, cosine, precision)
    return results


def require_accuracy(what: str, error: float, cosine: float, precision: str, least: float | None = None) -> None:
    """Raise ArithmeticError if `cosine` is too small (`least`; None: MIN_COSINES, and in fp32 `error` too large), or
    NaN."""
    by_error = precision == "fp32" and least is None
    least = MIN_COSINES.get(precision, 0.0) if least is None else least
    if error <= FP32_MAX_ERROR if by_error else cosine >= least:
        return
    allowed = f"error <= {FP32_MAX_ERROR}" if by_error else f"cosine >= {least}"
    raise ArithmeticError(
        f"{what} in {precision} are wrong: expected {allowed}, got an error of {error:.2g} and a cosine of "
        f"{cosine:.6f}; nothing was written"
    )
