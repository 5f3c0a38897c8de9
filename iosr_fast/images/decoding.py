"""Encoded images to pixels with little work: only what the crop shows is resized, and a large JPEG is decoded small.

The geometry is that of `preprocess.resize_and_crop` on what `preprocess.open_image` gives, which stay the reference.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from iosr_fast.images.pixels import is_plain, opened, orientation_of, to_rgb, turn, upright_rgb
from iosr_fast.images.preprocess import ENCODED, BadImageError, check_path, naming, open_image, resize_and_crop

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
_REVERSED = frozenset({2, 3, 7, 8}), frozenset({3, 4, 6, 7})  # orientations that reverse the stored x, and y
# Of (width, height): what is wrong with them, or nothing.
Check = Callable[[int, int], str]


def decode_pixels(
    source: Any,
    size: int,
    position: int = 0,
    name: Path | None = None,
    check: Check | None = None,
    exact: bool = False,
    exif_orientation: bool = True,
) -> np.ndarray:
    """One image as open_image takes it -> (size, size, 3) uint8, C-contiguous.

    Within 1 level of resize_and_crop(open_image(source), size) on average over a photograph's pixels: it differs by
    roundings, and by what decoding at a fraction of the size costs, which is done to JPEGs whose shorter side is at
    least 2 * MARGIN * size. Work depends on the pixels that are decoded, not on how unlike the sides are. `exact` is
    resize_and_crop itself, to the last bit. `name` is what encoded bytes are called in errors. `check` is asked of the
    size of encoded images before anything is decoded. `exif_orientation` as for open_image. Raises BadImageError.
    """
    if isinstance(source, str | Path):
        path = Path(source)
        with naming(path, position):
            return _decode(check_path(path), size, position, path, check, exact, exif_orientation)
    if isinstance(source, ENCODED):
        with naming(name, position):
            return _decode(source, size, position, name, check, exact, exif_orientation)
    image = open_image(source, position, exif_orientation)
    return resize_and_crop(image, size) if exact else crop_pixels(image, size)


def crop_pixels(
    image: Image, size: int, fraction: int = 1, shape: tuple[int, int] | None = None, orientation: int = 1
) -> np.ndarray:
    """resize_and_crop of an image stored by an EXIF `orientation` as (size, size, 3) uint8, of which only the crop is
    computed, and that is turned.

    `image` may be decoded at 1 / `fraction` of `shape`, (width, height), its own size.
    """
    from PIL.Image import Resampling

    width, height = shape or image.size
    short = min(width, height)
    if not is_plain(image):
        image = to_rgb(image)
    whole = int(size * width / short), int(size * height / short)  # what resize_and_crop makes first, and then crops
    left, top = (
        # Where an odd number of pixels is cut off, the crop is off the middle: by the rounding of the upright picture.
        beyond - round(beyond / 2) if orientation in reverses else round(beyond / 2)
        for beyond, reverses in zip((whole[0] - size, whole[1] - size), _REVERSED, strict=True)
    )
    if image.size == whole:
        image = image.crop((left, top, left + size, top + size))
    else:
        x, y = width / whole[0] / fraction, height / whole[1] / fraction
        right, bottom = min((left + size) * x, image.width), min((top + size) * y, image.height)
        image = image.resize((size, size), Resampling.BICUBIC, box=(left * x, top * y, right, bottom))
    pixels = np.asarray(turn(image, orientation))
    return np.repeat(pixels[:, :, None], 3, 2) if pixels.ndim == 2 else pixels


def _decode(
    source: Path | bytes | bytearray | memoryview,
    size: int,
    position: int,
    name: Path | None,
    check: Check | None,
    exact: bool,
    exif_orientation: bool,
) -> np.ndarray:
    with opened(source) as image:
        shape = image.size
        if check is not None and (told := check(*shape)):
            raise BadImageError(name, position, told)
        if exact:
            return resize_and_crop(upright_rgb(image, exif_orientation), size)
        fraction = _draft(image, size)
        image.load()
        return crop_pixels(image, size, fraction, shape, orientation_of(image) if exif_orientation else 1)


def _draft(image: Image, size: int) -> int:
    """Have a large JPEG decoded at a fraction of its size; 1 / that."""
    width, height = image.size
    scale = next((scale for scale in _SCALES if min(width, height) >= MARGIN * size * scale), 1)
    done = image.draft(None, (width // scale, height // scale)) if scale > 1 else None  # None for all but JPEGs
    return 1 if done is None else round(width / done[1][2])
