"""An encoder's embeddings against the two literal passes in fp32 PyTorch, before anything is written."""

from __future__ import annotations

from typing import Any

import numpy as np

from iosr_fast.encoders.runtimes.batched import BatchedEncoder

FP32_MAX_ERROR = 1e-4
MIN_COSINES = {"fp16": 0.999, "bf16": 0.999, "int8": 0.99, "fp8": 0.99}
CHECKED_PICTURES = 8


def pictures_of(size: int, real_images: np.ndarray | None, noise: bool = True) -> dict[str, np.ndarray]:
    """An odd number of random pictures, which no batch of the export has, and some of the real ones.

    Without `noise` random pictures are left out where there are real ones: a quantised encoder has the ranges of real
    pictures, and is asked for no more.
    """
    pictures = {}
    if noise or real_images is None:
        pictures["random"] = np.random.default_rng(0).integers(0, 256, (3, size, size, 3), dtype=np.uint8)
    if real_images is not None:
        chosen = np.unique(np.linspace(0, len(real_images) - 1, CHECKED_PICTURES).astype(int))
        pictures["real"] = real_images[chosen]
    return pictures


def check(
    encoder: BatchedEncoder, pictures: dict[str, np.ndarray], truth: dict[str, tuple[np.ndarray, ...]], precision: str
) -> dict[str, Any]:
    """Largest error and smallest cosine of each kind of picture and embedding; ArithmeticError where one is too bad."""
    made: dict[str, Any] = {}
    for kind, pixels in pictures.items():
        embeddings = encoder.encode(pixels)
        made[kind] = {"pictures": len(pixels)}
        for name, expected in zip(encoder.outputs, truth[kind], strict=True):
            got = getattr(embeddings, name)
            error = float(np.abs(got - expected).max())
            norms = np.linalg.norm(got, axis=1) * np.linalg.norm(expected, axis=1)
            cosine = float(((got * expected).sum(1) / norms).min())
            made[kind][name] = {"max_abs_error": error, "min_cosine": cosine}
            # Written so that a NaN is refused too.
            if not (error <= FP32_MAX_ERROR if precision == "fp32" else cosine >= MIN_COSINES[precision]):
                allowed = f"cosine >= {MIN_COSINES.get(precision)}"
                allowed = f"error <= {FP32_MAX_ERROR}" if precision == "fp32" else allowed
                raise ArithmeticError(
                    f"{name} embeddings of {kind} pictures by {encoder.runtime} in {precision} are wrong: expected "
                    f"{allowed}, got an error of {error:.2g} and a cosine of {cosine:.6f}; nothing was written"
                )
    return made
