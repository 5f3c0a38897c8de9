"""The pictures that an engine is calibrated and checked on, and the check, before anything is written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.encoders.runtimes.batched import BatchedEncoder
from iosr_fast.exceptions import IosrFastError
from iosr_fast.export.from_onnx import FP32_MAX_ERROR
from iosr_fast.images.listing import IMAGE_SUFFIXES, list_images
from iosr_fast.images.preprocess import to_pixels

if TYPE_CHECKING:
    from iosr_fast.backbones.load import LoadedModel
    from iosr_fast.export.from_onnx import OnnxModel

MIN_COSINES = {"fp16": 0.999, "bf16": 0.999, "int8": 0.99, "fp8": 0.99}
CHECKED_PICTURES = 8
CALIBRATION_PICTURES, MIN_PICTURES = 256, 8
# By kind of picture: pixels uint8 (N, S, S, 3), and the right embeddings, (N, D) float32 each.
Truth = Mapping[str, tuple[np.ndarray, tuple[np.ndarray, ...]]]


def calibration_pictures(clip: LoadedModel | OnnxModel, folder: str | Path | None = None) -> np.ndarray:
    """At most 256 pictures, evenly spaced in `folder` (with sub-folders), as uint8 (N, S, S, 3).

    Without a folder, the demo's CLIP takes its generic pictures, which show none of the held-out concepts. Raises
    ValueError for another CLIP without a folder and for a folder without pictures, FileNotFoundError for a missing
    folder.
    """
    if folder is None:
        if clip.name != "demo":
            raise IosrFastError(
                f"expected calibration pictures to quantise {clip.name}, got none; give a folder of a few hundred "
                "like those to be classified (iosr-fast build-engine --calibration DIR)"
            )
        from iosr_fast.backbones.demo.pictures import load_pictures

        return evenly(load_pictures("generic").images, CALIBRATION_PICTURES)
    paths = list_images(folder).paths
    if not paths:
        raise IosrFastError(
            f"expected pictures to calibrate on ({', '.join(sorted(IMAGE_SUFFIXES))}) in {folder}, found none"
        )
    chosen = evenly(np.array(paths, dtype=object), CALIBRATION_PICTURES).tolist()
    return to_pixels(chosen, clip.geometry)


def check_calibration(pictures: np.ndarray | None, size: int, precision: str) -> np.ndarray:
    """`pictures`; ValueError unless they are at least MIN_PICTURES as uint8 (N, size, size, 3)."""
    got = "none"
    if pictures is not None:
        if pictures.dtype == np.uint8 and pictures.shape[1:] == (size, size, 3) and len(pictures) >= MIN_PICTURES:
            return pictures
        got = f"{pictures.dtype} {pictures.shape}"
    raise IosrFastError(
        f"expected calibration pictures as uint8 (N, {size}, {size}, 3) with N >= {MIN_PICTURES} for {precision}, "
        f"got {got}; calibration_pictures reads them from a folder, images.preprocess.to_pixels resizes them"
    )


def checked_pictures(size: int, pictures: np.ndarray | None, noise: bool = True) -> dict[str, np.ndarray]:
    """Three random pictures (another batch size than the export's example) and some of the given ones.

    Without `noise`, the given ones replace the random ones: a quantised encoder has the ranges of real pictures.
    """
    checked = {}
    if noise or pictures is None:
        checked["random"] = np.random.default_rng(0).integers(0, 256, (3, size, size, 3), dtype=np.uint8)
    if pictures is not None:
        checked["real"] = evenly(pictures, CHECKED_PICTURES)
    return checked


def evenly(items: np.ndarray, count: int) -> np.ndarray:
    """At most `count` of `items`, evenly spaced from the first to the last, each once."""
    places = np.linspace(0, len(items) - 1, min(count, len(items))).round().astype(int)
    chosen: np.ndarray = items[np.unique(places)]
    return chosen


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
