"""An image of BatchingClassifier to pixels, within limits: strangers send them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from iosr_fast.images.decoder_process.headers import beyond, claimed_size, image_kind, work_pixels
from iosr_fast.images.decoding import decode_pixels
from iosr_fast.images.preprocess import ENCODED, BadImageError, as_array, open_image


class Limits(Protocol):
    """What decoders read of limits; None where there is none."""

    @property
    def max_bytes(self) -> int | None: ...
    @property
    def max_pixels(self) -> int | None: ...
    @property
    def max_pixels_together(self) -> int: ...
    @property
    def timeout_s(self) -> float: ...


@dataclass(frozen=True)
class DecodeLimits:
    """`max_bytes` of a file or of encoded bytes; `max_pixels` of an image, as it is and once its shorter side is
    resized: one of 1 x 60,000 pixels would become huge. None: no limit. `max_pixels_together` of the images above 16
    million that are decoded at a time. `timeout_s` of a core, or twice as long by the clock, for decoding one, where
    that can be stopped: in a process."""

    max_bytes: int | None = None
    max_pixels: int | None = 100_000_000
    max_pixels_together: int = 100_000_000
    timeout_s: float = 4.0


class Decoder(Protocol):
    """What a decoding thread decodes with. Deadlines are on time.monotonic's clock."""

    def start(self) -> None:
        """Called before each image, and quick where there is nothing to do. Raises where it can't decode at all."""

    def pixels(
        self, image: Any, position: int, size: int, deadline: float, exif_orientation: bool = True
    ) -> np.ndarray:
        """As `decode`."""

    def whole(self, image: Any, position: int, deadline: float, exif_orientation: bool = True) -> np.ndarray:
        """As `whole_image`."""

    def kill(self) -> None:
        """Stop what it does at this moment, if that can be stopped. From any thread."""

    def close(self) -> None:
        """It is not used any more."""


class ThreadDecoder:
    """Decodes in the thread that asks: nothing can stop it."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits

    def start(self) -> None: ...

    def pixels(
        self, image: Any, position: int, size: int, deadline: float, exif_orientation: bool = True
    ) -> np.ndarray:
        return decode(image, position, size, self._limits, exif_orientation)

    def whole(self, image: Any, position: int, deadline: float, exif_orientation: bool = True) -> np.ndarray:
        return whole_image(image, position, self._limits, exif_orientation)

    def kill(self) -> None: ...

    def close(self) -> None: ...


def is_pixels(image: Any, size: int) -> bool:
    """Whether an image is what the encoder takes, as it is."""
    return isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.shape == (size, size, 3)


def decode(image: Any, position: int, size: int, limits: Limits, exif_orientation: bool = True) -> np.ndarray:
    """An image as open_image takes it -> pixels (size, size, 3) uint8. Raises BadImageError, also beyond the limits."""
    if is_pixels(image, size):
        pixels: np.ndarray = image
        return pixels
    check_bytes(image, position, limits)

    def check(width: int, height: int) -> str:
        return "" if limits.max_pixels is None else beyond((width, height), size, limits.max_pixels)

    if not isinstance(image, (str, Path, *ENCODED)):
        array = as_array(image, position)  # of a tensor, with the channels last
        image = image if array is None or hasattr(image, "getbands") else array
        if told := check(*_dimensions(image)):
            raise BadImageError(None, position, told)
    return decode_pixels(image, size, position, check=check, exact=True, exif_orientation=exif_orientation)


def whole_image(image: Any, position: int, limits: Limits, exif_orientation: bool = True) -> np.ndarray:
    """An image as open_image takes it -> all of its pixels, (height, width, 3) uint8."""
    check_bytes(image, position, limits)
    return np.asarray(open_image(image, position, exif_orientation))


def check_bytes(image: Any, position: int, limits: Limits) -> None:
    """Raise BadImageError for more encoded bytes than the limits allow."""
    count = _encoded_bytes(image)
    if limits.max_bytes is not None and count > limits.max_bytes:
        told = f"expected at most {limits.max_bytes} encoded bytes, got {count}; send a smaller one"
        raise BadImageError(Path(image) if isinstance(image, str | Path) else None, position, told)


def decoding_cost(image: Any, size: int) -> int:
    """Pixels of the largest picture that decoding makes, by the header of encoded bytes; 0 where that says nothing."""
    if not isinstance(image, ENCODED) or not image_kind(image):
        return 0
    claimed = claimed_size(image)
    return 0 if claimed is None else work_pixels(claimed, size)


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
