"""Encoded images to pixels with little work: only what the crop shows is resized, and a large JPEG is decoded small.

The geometry is that of `iosr_fast.preprocess.resize_and_crop`, which stays the reference. EXIF orientation is not
applied, as CLIP's own transform doesn't.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from iosr_fast.preprocess import BadImageError, naming, open_image, resize_and_crop

if TYPE_CHECKING:
    from PIL.Image import Image

# libjpeg decodes a JPEG at 1/2, 1/4 or 1/8 by leaving out coefficients. That cuts frequencies off, which the bicubic
# filter would have let fade, and rounds once more. Mean absolute difference to the reference by how many times the
# wanted side is left after it, on textures with a photograph's spectrum (amplitude 1/f, standard deviation 40 levels),
# qualities 75 to 95, 4:4:4 and 4:2:0, at 64 and 224 pixels: 1: 2.2 to 3.8 levels; 1.5: 1.1 to 1.5; 2: 0.8 to 1.1;
# 2.5: 0.6 to 0.9; 3: 0.5 to 0.9. Much rougher textures (1/f^0.6) are off by 0.9 to 1.9 at 3. At a deviation of 24 it is
# 0.36 at 3; of 1,000 such pictures 6 then got another of 100 labels (8 at 2.5, 4 at 4, 11 at 5), all of them where the
# first two were within 0.011 in probability: no margin helps labels that are as good as tied.
MARGIN = 3.0
_SCALES = (8, 4, 2)
# Of (width, height): what is wrong with them, or nothing.
Check = Callable[[int, int], str]


def decode_pixels(
    source: Any,
    size: int,
    position: int = 0,
    name: Path | None = None,
    check: Check | None = None,
    exact: bool = False,
) -> np.ndarray:
    """One image as open_image takes it -> (size, size, 3) uint8, C-contiguous.

    Within 1 level of resize_and_crop(open_image(source), size) on average over a photograph's pixels: it differs by
    roundings, and by what decoding at a fraction of the size costs, which is done to JPEGs whose shorter side is at
    least 2 * MARGIN * size. Work depends on the pixels that are decoded, not on how unlike the sides are. `exact` is
    resize_and_crop itself, to the last bit. `name` is what encoded bytes are called in errors. `check` is asked of the
    size of encoded images before anything is decoded. Raises BadImageError.
    """
    if isinstance(source, str | Path):
        path = Path(source)
        if not path.is_file():
            raise BadImageError(path, position, "no such file")
        return _decode(path, size, position, path, check, exact)
    if isinstance(source, bytes | bytearray | memoryview):
        return _decode(io.BytesIO(source), size, position, name, check, exact)
    image = open_image(source, position)
    return resize_and_crop(image, size) if exact else crop_pixels(image, size)


def crop_pixels(image: Image, size: int, fraction: int = 1, shape: tuple[int, int] | None = None) -> np.ndarray:
    """resize_and_crop(image, size) as (size, size, 3) uint8, of which only the crop is computed.

    `image` may be decoded at 1 / `fraction` of `shape`, (width, height), its own size.
    """
    from PIL.Image import Resampling

    width, height = shape or image.size
    short = min(width, height)
    if image.mode not in ("RGB", "L"):
        image = image.convert("RGB")
    whole = int(size * width / short), int(size * height / short)  # what resize_and_crop makes first, and then crops
    left, top = round((whole[0] - size) / 2), round((whole[1] - size) / 2)
    if image.size == whole:
        image = image.crop((left, top, left + size, top + size))
    else:
        x, y = width / whole[0] / fraction, height / whole[1] / fraction
        right, bottom = min((left + size) * x, image.width), min((top + size) * y, image.height)
        image = image.resize((size, size), Resampling.BICUBIC, box=(left * x, top * y, right, bottom))
    pixels = np.asarray(image)
    return np.repeat(pixels[:, :, None], 3, 2) if pixels.ndim == 2 else pixels


def _decode(
    source: Path | io.BytesIO, size: int, position: int, name: Path | None, check: Check | None, exact: bool
) -> np.ndarray:
    from PIL import Image

    with naming(name, position), Image.open(source) as opened:
        shape = opened.size
        if check is not None and (told := check(*shape)):
            raise BadImageError(name, position, told)
        if exact:
            return resize_and_crop(opened.convert("RGB"), size)
        return crop_pixels(opened, size, _draft(opened, size), shape)


def _draft(image: Image, size: int) -> int:
    """Have a large JPEG decoded at a fraction of its size; 1 / that."""
    width, height = image.size
    scale = next((scale for scale in _SCALES if min(width, height) >= MARGIN * size * scale), 1)
    done = image.draft(None, (width // scale, height // scale)) if scale > 1 else None  # None for all but JPEGs
    return 1 if done is None else round(width / done[1][2])
