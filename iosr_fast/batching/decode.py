"""An image of BatchingClassifier to pixels, within limits: strangers send them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from iosr_fast.pipeline.decoding import decode_pixels
from iosr_fast.preprocess import ENCODED, BadImageError, as_array


class Limits(Protocol):
    """What decode() reads of limits; None where there is none."""

    @property
    def max_bytes(self) -> int | None: ...
    @property
    def max_pixels(self) -> int | None: ...


@dataclass(frozen=True)
class DecodeLimits:
    """`max_bytes` of a file or of encoded bytes; `max_pixels` of an image, as it is and once its shorter side is
    resized: one of 1 x 60,000 pixels would become huge. None: no limit."""

    max_bytes: int | None = None
    max_pixels: int | None = 100_000_000


def is_pixels(image: Any, size: int) -> bool:
    """Whether an image is what the encoder takes, as it is."""
    return isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.shape == (size, size, 3)


def decode(image: Any, position: int, size: int, limits: Limits, exif_orientation: bool = True) -> np.ndarray:
    """An image as open_image takes it -> pixels (size, size, 3) uint8. Raises BadImageError, also beyond the limits."""
    if is_pixels(image, size):
        pixels: np.ndarray = image
        return pixels
    path = Path(image) if isinstance(image, str | Path) else None
    count = _encoded_bytes(image)
    if limits.max_bytes is not None and count > limits.max_bytes:
        told = f"expected at most {limits.max_bytes} encoded bytes, got {count}; send a smaller one"
        raise BadImageError(path, position, told)

    def beyond(width: int, height: int) -> str:
        return _beyond(width, height, size, limits.max_pixels)

    if path is None and not isinstance(image, ENCODED):
        array = as_array(image, position)  # of a tensor, with the channels last
        image = image if array is None or hasattr(image, "getbands") else array
        if told := beyond(*_dimensions(image)):
            raise BadImageError(None, position, told)
    return decode_pixels(image, size, position, check=beyond, exact=True, exif_orientation=exif_orientation)


def _beyond(width: int, height: int, size: int, max_pixels: int | None) -> str:
    """Which limit an image is beyond, by its header alone: a few hundred bytes can claim billions of pixels."""
    short, long = min(width, height), max(width, height)
    if max_pixels is None:
        return ""
    if short * long > max_pixels:
        return f"expected at most {max_pixels} pixels, got {width} x {height}; send a smaller one"
    if size * size * long > max_pixels * short:
        return f"expected sides that are less unlike, got {width} x {height}; crop what matters"
    return ""


def _encoded_bytes(image: Any) -> int:
    if isinstance(image, ENCODED):
        return memoryview(image).nbytes
    if isinstance(image, str | Path) and os.path.isfile(image):
        return os.path.getsize(image)
    return 0


def _dimensions(image: Any) -> tuple[int, int]:
    """(width, height) of what is no file; (0, 0) where open_image will say what is wrong."""
    from PIL import Image

    if isinstance(image, Image.Image):
        return image.size
    if isinstance(image, np.ndarray) and image.ndim >= 2:
        return image.shape[1], image.shape[0]
    return 0, 0
