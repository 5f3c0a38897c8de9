"""Encoded images to pixels with little work: only what the crop shows is resized, and a large JPEG is decoded small.

The geometry is that of `iosr_fast.preprocess.resize_and_crop`, which stays the reference. EXIF orientation is not
applied, as CLIP's own transform doesn't.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from iosr_fast.preprocess import BadImageError, open_image

if TYPE_CHECKING:
    from PIL.Image import Image

# libjpeg decodes a JPEG at 1/2, 1/4 or 1/8 by leaving out coefficients. That cuts frequencies off, which the bicubic
# filter would have let fade, and rounds once more. Mean absolute difference to the reference by how many times the
# wanted side is left after it, on textures with a photograph's spectrum (amplitude 1/f, standard deviation 40 levels),
# qualities 75 to 95, 4:4:4 and 4:2:0, at 64 and 224 pixels: 1: 2.2 to 3.8 levels; 1.5: 1.1 to 1.5; 2: 0.8 to 1.1;
# 2.5: 0.6 to 0.9; 3: 0.5 to 0.9. At a deviation of 24 it is 0.36 at 3 and 0.21 at 5: less than a rounding each, and of
# 1,000 such pictures 6 and 11 got another label of 100, all where the first two were within 0.011 in probability.
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

    Within 1 level of resize_and_crop(open_image(source), size) on average over a photograph's pixels. It differs by
    roundings alone where nothing is decoded at a fraction of its size: of all but JPEGs whose shorter side is at least
    2 * MARGIN * size, and of those too with `exact`. What it costs depends on the pixels that are decoded, not on how
    unlike the sides are. `name` is what encoded bytes are called in errors. `check` is asked of the size of encoded
    images before anything is decoded. Raises BadImageError.
    """
    if isinstance(source, str | Path):
        path = Path(source)
        if not path.is_file():
            raise BadImageError(path, position, "no such file")
        return _decode(path, size, position, path, check, exact)
    if isinstance(source, bytes | bytearray | memoryview):
        return _decode(io.BytesIO(source), size, position, name, check, exact)
    return crop_pixels(open_image(source, position), size)


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

    with _naming(name, position), Image.open(source) as opened:
        shape = opened.size
        if check is not None and (told := check(*shape)):
            raise BadImageError(name, position, told)
        return crop_pixels(opened, size, 1 if exact else _draft(opened, size), shape)


def _draft(image: Image, size: int) -> int:
    """Have a large JPEG decoded at a fraction of its size; 1 / that."""
    width, height = image.size
    scale = next((scale for scale in _SCALES if min(width, height) >= MARGIN * size * scale), 1)
    done = image.draft(None, (width // scale, height // scale)) if scale > 1 else None  # None for all but JPEGs
    return 1 if done is None else round(width / done[1][2])


@contextmanager
def _naming(path: Path | None, position: int) -> Iterator[None]:
    """What decoders raise, as BadImageError."""
    from PIL import UnidentifiedImageError

    try:
        yield
    except BadImageError:
        raise
    except UnidentifiedImageError as error:
        raise BadImageError(path, position, "it is not an image of a known format, or it is damaged") from error
    except Exception as error:  # damaged files make decoders raise all sorts: of a TIFF that may be a TypeError
        raise BadImageError(path, position, str(error)) from error
