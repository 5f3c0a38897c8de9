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
