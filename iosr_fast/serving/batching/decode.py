"""Decoding for BatchingClassifier, within limits, because images may be untrusted."""

from __future__ import annotations

import io
import os
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from iosr_fast.exceptions import BadImageError
from iosr_fast.images.decode import decode_pixels
from iosr_fast.images.geometry import Geometry
from iosr_fast.images.limits import DecodeLimits, claimed_size, work_pixels
from iosr_fast.images.preprocess import ENCODED, open_image


class Decoder:
    """Decodes in the calling thread, which can't be stopped. DecoderProcess overrides all methods, and its `warning`
    says what does not confine it."""

    warning = ""

    def __init__(self, limits: DecodeLimits) -> None:
        self.limits = limits

    def start(self) -> None:
        """Start the decoder unless it runs; called before each image. Raises if it can't decode at all."""

    def decode(
        self, image: Any, position: int, geometry: Geometry | None, deadline: float, exif_orientation: bool = True
    ) -> np.ndarray:
        """An image that open_image takes -> pixels (size, size, 3) uint8; geometry None: all, (height, width, 3).

        `deadline` is on time.monotonic's clock. Raises BadImageError for an image that can't be read or is beyond the
        limits.
        """
        self.check_bytes(image, position)
        if geometry is None:
            return np.asarray(open_image(image, position, exif_orientation))
        return decode_pixels(
            image, geometry, position, limits=self.limits, exact=True, exif_orientation=exif_orientation
        )

    def check_bytes(self, image: Any, position: int) -> None:
        """Raise BadImageError for more encoded bytes than the limits allow."""
        count = 0
        if isinstance(image, ENCODED):
            count = memoryview(image).nbytes
        elif isinstance(image, str | Path) and os.path.isfile(image):
            count = os.path.getsize(image)
        if error := self.limits.bytes_error(count):
            raise BadImageError(Path(image) if isinstance(image, str | Path) else None, position, error)

    def kill(self) -> None:
        """Stop the current image, if possible. May be called from any thread."""

    def close(self) -> None:
        """Release everything; no further calls follow."""


def decoding_cost(image: Any, geometry: Geometry) -> int:
    """Pixels of the largest intermediate image, by the header of encoded bytes; 0 if unknown."""
    claimed = claimed_size(image) if isinstance(image, ENCODED) else None
    return 0 if claimed is None else work_pixels(claimed, geometry)


@cache
def grey_png() -> bytes:
    """An image that every decoder can decode."""
    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", (64, 64), (128, 128, 128)).save(file, "PNG")
    return file.getvalue()
