"""From any kind of image to upright 8-bit RGB, by one set of rules.

formats       FORMATS, AVIF, and HEIC if pillow-heif is installed; Pillow's other decoders never run, whatever the
              suffix of a file
frames        the first one
orientation   EXIF's, unless the caller asks for pixels as stored; an unreadable EXIF block is ignored
16-bit grey   value / 257, so that 65,535 is white; value / (2^n - 1) * 255 where the file says that it uses n bits; a
              file that says nothing and fits in 12 bits is refused (deep_grey.py)
16-bit colour the high byte, which is all that Pillow gives; what lies in the low 12 bits is refused
integers      of 32 bits: from 0 to 65,535 as 16-bit ones; other ranges are refused
floats        in [0, 1]: times 255; larger ones up to 255: as levels; other ranges and infinite values are refused
transparency  composited on white: alpha channels, transparent palette entries and colours
colours       CMYK, YCbCr, LAB and HSV are converted; colour profiles are not applied
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from iosr_fast.exceptions import IosrFastError, MissingPackageError
from iosr_fast.images.deep_grey import check_deep_colour, grey_levels, png_bits
from iosr_fast.utils.numbers import refuse_masked
from iosr_fast.utils.require import require

if TYPE_CHECKING:
    from PIL.Image import Image

VERSION = 4  # increases when the pixels of a file change; caches of derived data depend on it
# JPEG includes phones' files with a second picture (MPO); PPM includes PGM, PBM and PNM.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
# The first box of an ISO base media file has its brands: https://mp4ra.org/registered-types/brands
_AVIF_BRANDS = frozenset({b"avif", b"avis"})
_HEIF_BRANDS = frozenset({b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1"})
_HEAD = 64  # bytes; enough for a first box with a dozen brands
_DEEP = frozenset({"I;16", "I;16L", "I;16B", "I;16N", "I", "F"})  # modes with more than 8 bits
_ALPHA = frozenset({"LA", "La", "PA", "RGBA", "RGBa"})
_ORIENTATION = 0x0112  # a tag of EXIF
# What turns pictures with the orientations 2 to 8 upright.
_TURNS = ("FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_270", "TRANSVERSE", "ROTATE_90")
_CHANNELS = (1, 3, 4)


@contextmanager
def opened(source: Path | bytes | bytearray | memoryview) -> Iterator[Image]:
    """An encoded image of FORMATS, AVIF or HEIC, with its header read. Raises Pillow's errors, and ImportError with the
    pip command for an AVIF or HEIC without a decoder."""
    from PIL import Image, features

    with open(source, "rb") if isinstance(source, Path) else io.BytesIO(source) as file:
        kind = _iso_kind(file.read(_HEAD))
        if kind == "HEIF":
            _register_heif()
        elif kind == "AVIF" and not features.check("avif"):
            raise MissingPackageError("this Pillow can't read AVIF; install one that can: pip install 'pillow>=11.3'")
        bits = png_bits(file)
        file.seek(0)
        with Image.open(file, formats=FORMATS if kind is None else (kind,)) as image:
            image.png_bits = bits  # type: ignore[attr-defined]
            yield image


def _iso_kind(head: bytes) -> str | None:
    """AVIF or HEIF, by the brands in a file's first box; None for other files."""
    if head[4:8] != b"ftyp":
        return None
    box = head[: int.from_bytes(head[:4])]
    brands = {box[8:12], *(box[at : at + 4] for at in range(16, len(box) - 3, 4))}
    return "AVIF" if brands & _AVIF_BRANDS else "HEIF" if brands & _HEIF_BRANDS else None


@cache
def _register_heif() -> None:
    require("pillow_heif", "heic").register_heif_opener()


def orientation_of(image: Image) -> int:
    """EXIF's orientation of an image, 1 (upright) to 8; 1 without one, for an invalid one and for unreadable EXIF.

    Call it after loading the image: Pillow turns TIFFs when it loads them.
    """
    try:
        orientation = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # Pillow raises many types for damaged EXIF; the picture is still good
        return 1
    return orientation if isinstance(orientation, int) and 1 <= orientation <= 8 else 1


def upright_rgb(image: Image, exif_orientation: bool = True) -> Image:
    """A PIL image as RGB, loaded, and turned upright unless `exif_orientation` is False. Raises ValueError for values
    outside the known ranges."""
    from PIL.Image import Transpose

    image.load()
    rgb, orientation = to_rgb(image), orientation_of(image) if exif_orientation else 1
    return rgb if orientation == 1 else rgb.transpose(Transpose[_TURNS[orientation - 2]])


def to_rgb(image: Image) -> Image:
    """A new RGB image from a PIL image, as stored. It has no EXIF, so it can't be turned twice."""
    from PIL import Image

    check_deep_colour(image)
    if image.mode in _DEEP:
        rgb = Image.fromarray(grey_levels(image)).convert("RGB")
    elif image.mode in _ALPHA or (image.mode in ("1", "L", "P", "RGB") and "transparency" in image.info):
        rgb = _on_white(image)
    else:
        rgb = image.convert("RGB")
    rgb.info = {}
    return rgb


def _on_white(image: Image) -> Image:
    from PIL import Image

    layer = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
    canvas = Image.new("RGB", layer.size, "white")
    canvas.paste(layer, mask=layer.getchannel("A"))
    return canvas


def from_array(array: np.ndarray) -> Image:
    """uint8 (H, W), (H, W, 1), (H, W, 3) or (H, W, 4) as RGB. Raises ValueError for anything else."""
    from PIL import Image

    refuse_masked("pixels", array)
    if array.dtype != np.uint8:
        raise IosrFastError(f"expected uint8 pixels, got an array of {array.dtype}{_ADVICE.get(array.dtype.kind, '')}")
    if array.size and (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in _CHANNELS)):
        return to_rgb(Image.fromarray(array[:, :, 0] if array.ndim == 3 and array.shape[2] == 1 else array))
    first = array.ndim == 3 and array.shape[0] in _CHANNELS
    advice = "; move the channels to the last axis with np.moveaxis(array, 0, -1)" if first else ""
    raise IosrFastError(f"expected shape (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), got {array.shape}{advice}")


_ADVICE = {
    "f": "; convert floats in [0, 1] with (array * 255).round().astype(np.uint8)",
    "u": "; convert 16 bits with (array / 257).round().astype(np.uint8)",
    "i": "; convert levels from 0 to 255 with array.astype(np.uint8)",
    "b": "; convert them with array * np.uint8(255)",
}


def tensor_array(tensor: Any) -> np.ndarray:
    """A PyTorch tensor of uint8 pixels, on any device, as a NumPy array with the channels last.

    Takes (H, W), (C, H, W) or (H, W, C), and batches of the last two, with C of 1, 3 or 4. If both axes could be the
    channels, the first one is, by PyTorch's convention. Raises ValueError for other shapes and types.
    """
    if str(tensor.dtype) != "torch.uint8":
        raise IosrFastError(
            f"expected uint8 pixels, got a tensor of {tensor.dtype}; undo a normalisation, then convert floats in "
            "[0, 1] with (tensor * 255).round().to(torch.uint8)"
        )
    array: np.ndarray = tensor.detach().cpu().numpy()
    if array.ndim in (3, 4) and array.shape[-3] in _CHANNELS:
        return np.ascontiguousarray(np.moveaxis(array, -3, -1))
    if array.ndim == 2 or (array.ndim in (3, 4) and array.shape[-1] in _CHANNELS):
        return array
    raise IosrFastError(
        f"expected a tensor (H, W), (C, H, W), (H, W, C) or a batch (B, C, H, W) or (B, H, W, C) with C of 1, 3 or 4, "
        f"got {tuple(array.shape)}"
    )
