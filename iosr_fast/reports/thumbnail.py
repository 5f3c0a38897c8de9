"""Small pictures of a report."""

from __future__ import annotations

import io
from typing import Any

from iosr_fast.exceptions import BadImageError
from iosr_fast.images.preprocess import open_image

_QUALITY = 80


def thumbnail(image: Any, side: int, exif_orientation: bool = True) -> bytes | None:
    """An image, as Classifier takes it, as a WebP of at most `side` pixels a side; None if it can't be read any more,
    because a report stands at the end of long work.

    >>> import numpy as np
    >>> thumbnail(np.zeros((40, 80, 3), np.uint8), 16)[:4]
    b'RIFF'
    """
    try:
        small = open_image(image, exif_orientation=exif_orientation)
    except BadImageError:
        return None
    small.thumbnail((side, side))
    file = io.BytesIO()
    small.save(file, "WEBP", quality=_QUALITY)
    return file.getvalue()
