"""Pictures as the bytes of an image file."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import Image


def encode(image: np.ndarray | Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """`options` are those of Pillow's writer of that kind."""
    file = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(file, kind, **options)
    return file.getvalue()


def turned(image: Image.Image, orientation: int, kind: str = "JPEG", **options: Any) -> bytes:
    """An upright picture as a telephone stores it that was held otherwise: turned, with EXIF orientation 3, 6 or 8."""
    stored = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(image.transpose(stored[orientation]), kind, exif=exif, **options)


GREY = encode(np.full((64, 64, 3), 128, np.uint8))
