"""Pictures with more than 8 bits a value: what is white, and which files do not say it.

Cameras and microscopes store 10 to 14 bits in 16, often in the low ones, where the range of 16 bits would make the
picture black. A file that neither uses that range nor says how many bits it uses is refused. Sources: PNG
specification, sBIT; TIFF 6.0, MaxSampleValue; OME-XML, SignificantBits.
"""

from __future__ import annotations

import re
from typing import IO, TYPE_CHECKING

import numpy as np

from iosr_fast.exceptions import IosrFastError

if TYPE_CHECKING:
    from PIL.Image import Image

_BITS, _PHOTOMETRIC, _DESCRIPTION, _MOST = 258, 262, 270, 281  # TIFF's tags
_PNG_PARTS = 100  # chunks before the pixels
_SLACK = 1e-3  # how far floats may exceed [0, 1]: filters overshoot
_DARK = 4096  # values below are 12 bits in the low part of 16, or a picture that is nearly black


def grey_levels(image: Image) -> np.ndarray:
    """(H, W) uint8 of a loaded grey image with more than 8 bits: value / white * 255.

    White is 65,535 for integers, or 2^n - 1 where the file says that it uses n bits and they are the low ones; 1 for
    floats in [0, 1] and 255 for others. Raises IosrFastError for ranges that could mean something else.
    """
    values, bits, tags = np.asarray(image), _bits(image), getattr(image, "tag_v2", {})
    low, high, white = values.min(), values.max(), 65535
    if image.mode == "F":
        white = 1 if high <= 1 + _SLACK else 255
        clear = (-_SLACK <= low <= high <= 1 + _SLACK) or (low >= 0 and 16 <= high <= 255)  # false for NaN
        expected, fix = "floats in [0, 1], or levels up to 255", "scale them to one of these"
    else:
        # A value of n bits is shifted to the high ones by the standard; then the low ones are all zero.
        if bits and high < 1 << bits and (values & (1 << 16 - bits) - 1).any():
            white = (1 << bits) - 1
        clear = low >= 0 and high <= 65535 and (bits > 0 or high == 0 or high >= _DARK)
        expected, fix = "integers that use the range from 0 to 65,535", "save the image with 8 bits, or with its sBIT"
    if not clear:
        raise IosrFastError(f"expected {expected}, got {low:g} to {high:g}; {fix}")
    levels: np.ndarray = np.clip(np.rint(values * np.float32(255 / white)), 0, 255).astype(np.uint8)
    if tags.get(_PHOTOMETRIC) == 0:  # white is zero; Pillow handles that for 8 bits only
        levels = 255 - levels
    transparent = image.info.get("transparency")  # PNG: one value
    if isinstance(transparent, int):
        levels[values == transparent] = 255
    return levels


def check_deep_colour(image: Image) -> None:
    """Raise IosrFastError for 16-bit colours in the low 12 bits, of which Pillow's high byte has next to nothing,
    unless the file says that it uses more."""
    deep = getattr(image, "png_bits", None) is not None or 16 in getattr(image, "tag_v2", {}).get(_BITS, ())
    if not deep or image.mode not in ("RGB", "RGBA", "LA") or _bits(image) > 12:
        return
    values = np.asarray(image)
    most = int((values[..., :-1] if image.mode.endswith("A") else values).max(initial=0))
    if most < _DARK >> 8:
        raise IosrFastError(
            f"expected 16-bit colours that use the range from 0 to 65,535, got at most {256 * most + 255}; save the "
            "image with 8 bits a channel"
        )


def png_bits(file: IO[bytes]) -> int | None:
    """The largest number in the sBIT chunk of a PNG of 16 bits a value, 0 without that chunk; None for other files.
    Reads from the beginning."""
    file.seek(0)
    head = file.read(33)
    if head[:8] != b"\x89PNG\r\n\x1a\n" or head[24:25] != b"\x10":
        return None
    for _ in range(_PNG_PARTS):
        length, kind = int.from_bytes(file.read(4)), file.read(4)
        if kind in (b"IDAT", b"IEND", b""):
            break
        if kind == b"sBIT" and 1 <= length <= 4:
            return max(file.read(length))
        file.seek(length + 4, 1)
    return 0


def _bits(image: Image) -> int:
    """How many bits the file says that it uses, from 1 to 16; 0 if it says nothing."""
    tags = getattr(image, "tag_v2", {})
    described = re.search(r'SignificantBits="(\d{1,2})"', str(tags.get(_DESCRIPTION, "")))
    most = np.max(tags.get(_MOST, 0))
    said = 12 if tags.get(_BITS) == (12,) else getattr(image, "png_bits", None)
    said = said or (int(described[1]) if described else int(most).bit_length())
    return said if said <= 16 else 0
