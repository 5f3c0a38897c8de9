"""Paths, encoded images, PIL images, arrays and tensors to the uint8 pixels that an encoder takes: the one way there.

The geometry is the model's own (`images.geometry.Geometry`). Mean and standard deviation are folded into the encoder,
so pixels stay uint8.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np

from iosr_fast.exceptions import BadImageError, IosrFastError
from iosr_fast.images.crop import Crop, Whole, path_of
from iosr_fast.images.geometry import Geometry
from iosr_fast.images.limits import UNLIMITED, DecodeLimits
from iosr_fast.images.listing import refuse_url
from iosr_fast.images.pixels import FORMATS, from_array, opened, tensor_array, upright_rgb
from iosr_fast.utils.numbers import is_tensor, refuse_masked
from iosr_fast.utils.text import abbreviate

if TYPE_CHECKING:
    from PIL.Image import Image

ENCODED = (bytes, bytearray, memoryview)  # types of encoded images
# libjpeg decodes a JPEG at 1/2, 1/4 or 1/8 of its size by omitting coefficients: a sharp cut-off and one more rounding.
# With MARGIN times the target size left, the mean difference to full size is below 1 level on textures with a
# photograph's spectrum (2 to 4 levels at a margin of 1). No margin protects labels that are nearly tied.
MARGIN = 3.0


def open_image(
    source: Any,
    position: int = 0,
    exif_orientation: bool = True,
    geometry: Geometry | None = None,
    limits: DecodeLimits = UNLIMITED,
) -> Image:
    """One image as upright 8-bit RGB, by the rules of `iosr_fast.images.pixels`.

    `source`: path, bytes of an encoded image, PIL image, uint8 array (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), uint8
    tensor of PyTorch (H, W), (C, H, W) or (H, W, C); or a part of one of these, a Crop or a path with its fragment, of
    the upright picture. `exif_orientation=False` takes pixels as stored. With a `geometry` it is what resize_and_crop
    takes: a large JPEG in a path or bytes is decoded at a fraction of its size, unless for a part. One beyond the
    `limits` is refused before that. Raises BadImageError.
    """
    with naming(path_of(source), position):
        crop = Crop.of(source)
        if crop is None:
            return _open_whole(source, position, exif_orientation, geometry, limits)
        part = crop.opened(lambda whole: _open_whole(whole, position, exif_orientation, None, limits))
        _check_size(part, geometry, limits)
        return part


def thumbnail(image: Image, side: int) -> bytes:
    """An image of at most `side` pixels a side as WebP. Shrinks the image itself."""
    image.thumbnail((side, side))
    file = io.BytesIO()
    image.save(file, "WEBP", quality=75, method=1)  # as small as by method 4 at 80, in a third of the time
    return file.getvalue()


def _open_whole(
    source: Any, position: int, exif_orientation: bool, geometry: Geometry | None, limits: DecodeLimits
) -> Image:
    """As `open_image`, of a picture that is no part of another; raises what the decoder raises."""
    from PIL import Image

    if isinstance(source, (str, Path, *ENCODED)):
        with opened(check_path(Path(source)) if isinstance(source, str | Path) else source) as image:
            _check_size(image, geometry, limits)
            if geometry is not None:
                _draft(image, geometry)
            return upright_rgb(image, exif_orientation)
    if isinstance(source, Image.Image):
        _check_size(source, geometry, limits)
        return upright_rgb(source, exif_orientation)
    array = as_array(source, position)
    if array is None or array.ndim == 0:
        expected = "expected a path, bytes, a PIL image, a uint8 array or a uint8 tensor"
        raise IosrFastError(f"{expected}, got {type(source).__name__}")
    image = from_array(array)
    _check_size(image, geometry, limits)
    return image


def _check_size(image: Image, geometry: Geometry | None, limits: DecodeLimits) -> None:
    if reason := limits.size_error(image.size, geometry):
        raise IosrFastError(reason)


def _draft(image: Image, geometry: Geometry) -> None:
    """Set a large JPEG to be decoded at a half, a quarter or an eighth of its size, rounded up; others stay.

    Both sides keep MARGIN times the pixels that they are resized to: a squashed one is shrunk more on its longer side.
    """
    (width, height), resized = image.size, geometry.resized(*image.size)
    least = min(width / resized[0], height / resized[1])
    scale = next((scale for scale in (8, 4, 2) if least >= MARGIN * scale), 1)
    if scale > 1:
        image.draft(None, (width // scale, height // scale))


def check_path(path: Path) -> Path:
    """The path of a file. Raises ValueError for a folder, a special file and a missing one."""
    refuse_url(path)
    if path.is_dir():
        raise IosrFastError("it is a folder; use fit_folder, predict_folder or `iosr-fast classify` for folders")
    if not path.is_file():
        raise IosrFastError("it is not a regular file" if path.exists() else "no such file")
    return path


@contextmanager
def naming(path: Path | None, position: int) -> Iterator[None]:
    """Turn any error in the block into a BadImageError of this image."""
    from PIL import UnidentifiedImageError

    try:
        yield
    except BadImageError:
        raise
    except UnidentifiedImageError as error:
        reason = f"it is not an image of a known format ({', '.join(FORMATS)}, AVIF, HEIC), or it is damaged"
        raise BadImageError(path, position, reason) from error
    except Exception as error:  # decoders raise many types for damaged files, even TypeError for a TIFF
        raise BadImageError(path, position, str(error)) from error


def resize_and_crop(image: Image, geometry: Geometry) -> np.ndarray:
    """An RGB image as (size, size, 3) uint8, C-contiguous: resized, then cropped or padded.

    Columns are resized first and rounded to uint8, then rows: Pillow's own order depends on its version and the shape.
    Else it equals open_clip's transform for evaluation, for "shortest" torchvision's Resize(size) and CenterCrop(size).
    """
    from PIL import Image

    size, (width, height) = geometry.size, geometry.resized(*image.size)
    if image.width != width:
        image = image.resize((width, image.height), geometry.resampling)
    if width > size:
        left = round((width - size) / 2)
        image = image.crop((left, 0, left + size, image.height))
    if image.height != height:
        image = image.resize((image.width, height), geometry.resampling)
    if height > size:
        top = round((height - size) / 2)
        image = image.crop((0, top, image.width, top + size))
    if image.size != (size, size):
        canvas = Image.new("RGB", (size, size), (geometry.fill,) * 3)
        canvas.paste(image, ((size - image.width) // 2, (size - image.height) // 2))  # an odd pixel more at the end
        image = canvas
    return np.asarray(image)


def as_array(images: Any, position: int = 0) -> np.ndarray | None:
    """An array, a tensor (with the channels last: `pixels.tensor_array`) or another array-like as a NumPy array of
    numbers; None for anything else, such as a path. Raises BadImageError for a tensor without uint8 pixels."""
    if is_tensor(images):
        with naming(None, position):
            return tensor_array(images)
    if isinstance(images, list | tuple) or not hasattr(images, "__array__"):
        return None
    refuse_masked("pixels", images)
    array = np.asarray(images)
    return array if array.dtype.kind in "biufc" else None


def as_image_list(images: Any) -> Sequence[Any]:
    """One image or many, as a sequence.

    A path, bytes, a PIL image, an array (H, W[, C]) or a tensor (H, W), (C, H, W) or (H, W, C) is one image; an array
    (B, H, W, C), a tensor (B, C, H, W) or (B, H, W, C), and any other iterable are many.
    """
    if isinstance(images, (str, Path, Crop, *ENCODED)) or hasattr(images, "getbands"):
        return [images]
    array = as_array(images)
    if array is not None:
        return list(array) if array.ndim == 4 else [array]
    if hasattr(images, "columns"):  # iterating over a table would give its columns' names
        columns = abbreviate([str(name) for name in images.columns])
        raise IosrFastError(
            f"expected one column of images, got a table with the columns {columns}; give the column of their paths, "
            "like table['path']"
        )
    if not isinstance(images, Iterable):
        raise IosrFastError(f"expected an image or a sequence of images, got {type(images).__name__}")
    return list(images)


def decode_pixels(source: Any, geometry: Geometry, position: int = 0, exif_orientation: bool = True) -> np.ndarray:
    """One image, as `open_image` takes it -> (size, size, 3) uint8. Raises BadImageError."""
    return resize_and_crop(open_image(source, position, exif_orientation, geometry), geometry)


def decode_parts(
    source: Any, parts: Mapping[int, Crop | None], upright: bool, geometry: Geometry, limits: DecodeLimits, whole: bool
) -> Iterator[np.ndarray | Exception]:
    """The pixels (size, size, 3), uint8 and C-contiguous, of each of the `parts` of a picture, by their positions, None
    being all of it, or the error in its place; or those of a `whole` picture (height, width, 3), before it is resized.
    The picture is decoded once.
    """
    shared = Whole()
    for position, part in parts.items():
        image = source if part is None else replace(part, source=source, whole=shared)
        try:
            opened = open_image(image, position, upright, geometry, limits)
            yield np.ascontiguousarray(opened) if whole else resize_and_crop(opened, geometry)
        except (BadImageError, MemoryError) as error:
            yield error


def to_pixels(images: Any, geometry: Geometry, exif_orientation: bool = True) -> np.ndarray:
    """One image or many -> (B, size, size, 3) uint8, in order. Raises BadImageError for the first unreadable one.

    >>> to_pixels(np.zeros((2, 30, 40, 3), np.uint8), Geometry(24)).shape
    (2, 24, 24, 3)
    """
    size = geometry.size
    refuse_masked("pixels", images)
    if isinstance(images, np.ndarray) and images.dtype == np.uint8 and images.shape[1:] == (size, size, 3):
        return images
    listed = as_image_list(images)
    pixels = np.empty((len(listed), size, size, 3), np.uint8)
    for i, image in enumerate(listed):
        pixels[i] = decode_pixels(image, geometry, i, exif_orientation)
    return pixels


class DecodedBatch(NamedTuple):
    """`errors`: for each source, in order, its error or None. `pixels`: uint8 (n, size, size, 3) of the n readable
    sources, in order; None if there are none."""

    errors: list[BadImageError | None]
    pixels: np.ndarray | None


Decode: TypeAlias = Callable[[Sequence[Any], Geometry, int], DecodedBatch]


def decode_batch(
    sources: Sequence[Any], geometry: Geometry, start: int = 0, exif_orientation: bool = True
) -> DecodedBatch:
    """The pixels of the readable sources. Positions in errors count from `start`."""
    errors: list[BadImageError | None] = [None] * len(sources)
    readable = []
    for i, source in enumerate(sources):
        try:
            readable.append(decode_pixels(source, geometry, start + i, exif_orientation))
        except BadImageError as error:
            errors[i] = error
    return DecodedBatch(errors, np.stack(readable) if readable else None)
