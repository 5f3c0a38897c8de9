"""Pictures with more than 8 bits a value to 8-bit levels, and how many of the bits a file says that it uses.

Cameras and microscopes store 10 to 14 bits in 16. Where the values lie in the low bits, the whole range of 16 would
make such a picture black. Sources: PNG specification, sBIT; TIFF 6.0, MaxSampleValue; OME-XML, SignificantBits.
"""

from __future__ import annotations

import logging
import re
from typing import IO, TYPE_CHECKING

import numpy as np

from iosr_fast.exceptions import IosrFastError
from iosr_fast.utils.text import abbreviate

if TYPE_CHECKING:
    from PIL.Image import Image

_BITS, _PHOTOMETRIC, _DESCRIPTION, _MOST = 258, 262, 270, 281  # TIFF's tags
_PNG_PARTS = 100  # chunks before the pixels
_SLACK = 1e-3  # how far floats may exceed [0, 1]: filters overshoot
_DARK = 16.0  # a maximum between 1 and this is ambiguous: as levels the image would be black
log = logging.getLogger(__name__)
_warned = False


def grey_levels(image: Image) -> np.ndarray:
    """(H, W) uint8 of a loaded grey image with more than 8 bits.

    Integers: value / 65,535 * 255; value / (2^n - 1) * 255 where the file says that it uses n bits and the values lie
    in the low ones. Warns, once in a process, where a file says nothing and all values fit in 12 bits.
    Raises IosrFastError for ranges that are ambiguous (pixels.py).
    """
    values, tags = np.asarray(image), getattr(image, "tag_v2", {})
    if image.mode == "F":
        levels = _float_levels(values)
    else:
        if image.mode == "I":
            _check_integers(values, image.format in ("PNG", "PPM"))
        most = _white(image, values)
        levels = ((values.astype(np.uint32) * 255 + most // 2) // most).astype(np.uint8)
    if tags.get(_PHOTOMETRIC) == 0:  # white is zero; Pillow handles that for 8 bits only
        levels = 255 - levels
    transparent = image.info.get("transparency")  # PNG: one value
    if isinstance(transparent, int):
        levels[values == transparent] = 255
    return levels


def check_deep_colour(image: Image) -> None:
    """Raise IosrFastError for a PNG of 16-bit colour that says that it uses 12 bits or fewer and uses the low ones:
    Pillow gives the high byte of each value, which has next to nothing of them. Warns where the file says nothing."""
    bits = getattr(image, "significant_bits", None)
    if bits is None or bits > 12 or image.mode not in ("RGB", "RGBA", "LA"):
        return
    image.load()
    values = np.asarray(image)
    most = int((values[..., :-1] if image.mode.endswith("A") else values).max(initial=0))
    if bits == 0 and 0 < most < 16:
        _warn_dark(image, 256 * most + 255)
    if bits > 0 and most < 1 << max(bits - 8, 0):
        raise IosrFastError(
            f"expected 16-bit colours that use the range from 0 to 65,535, got {bits} bits in the low part; save the "
            "image with 8 bits a channel"
        )


def png_significant_bits(file: IO[bytes]) -> int | None:
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


def _white(image: Image, values: np.ndarray) -> int:
    """The value that is white: 65,535, or 2^n - 1 of a file that uses the low n bits."""
    bits, most = _said_bits(image), int(values.max(initial=0))
    if bits is None:
        if 0 < most < 4096:
            _warn_dark(image, most)
        return 65535
    # By the standard an n-bit value is shifted to the high bits; then the low ones are all zero in what is this dark.
    low = most < 1 << bits and bool((values & ((1 << 16 - bits) - 1)).any())
    return (1 << bits) - 1 if low else 65535


def _warn_dark(image: Image, most: int) -> None:
    global _warned
    if not _warned:
        _warned = True
        name = abbreviate([str(getattr(image, "filename", "") or "an image")])
        log.warning(
            "%s: its 16-bit values are at most %d, so it is nearly black; if it has 12 bits or fewer, save it with 8 "
            "bits, or with an sBIT chunk if it is grey. Further such images are not named",
            name,
            most,
        )


def _said_bits(image: Image) -> int | None:
    """How many bits the file says that it uses, from 1 to 16; None if it says nothing."""
    tags = getattr(image, "tag_v2", {})
    if tags.get(_BITS) == (12,):
        return 12
    said = getattr(image, "significant_bits", None)
    if not said:
        most, found = tags.get(_MOST), re.search(r'SignificantBits="(\d{1,2})"', str(tags.get(_DESCRIPTION, "")))
        most = most[0] if isinstance(most, tuple) else most
        said = int(found[1]) if found else most.bit_length() if isinstance(most, int) else None
    return said if said is not None and 1 <= said <= 16 else None


def _check_integers(values: np.ndarray, sixteen: bool) -> None:
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535 or (0 < high <= 255 and not sixteen):
        raise IosrFastError(
            f"expected integers that use the range from 0 to 65,535, got {low} to {high} of 32 bits; save the image "
            "with 8 or 16 bits"
        )


def _float_levels(values: np.ndarray) -> np.ndarray:
    low, high = float(values.min()), float(values.max())
    if low >= -_SLACK and high <= 1 + _SLACK:
        scale = 255.0
    elif low >= 0 and _DARK <= high <= 255:
        scale = 1.0
    else:  # also for NaN, whose comparisons are all false
        raise IosrFastError(
            f"expected floats in [0, 1], or levels up to 255, got {low:g} to {high:g}; scale them to one of these"
        )
    levels: np.ndarray = np.clip(np.rint(values * np.float32(scale)), 0, 255).astype(np.uint8)
    return levels
