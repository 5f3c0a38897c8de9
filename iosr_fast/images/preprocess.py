"""Paths, PIL images, arrays and tensors to the uint8 pixels that an encoder takes: the reference implementation.

The geometry is the model's own (`images.geometry.Geometry`). Mean and standard deviation are folded into the encoder,
so pixels stay uint8.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from iosr_fast.exceptions import BadImageError, IosrFastError
from iosr_fast.images.geometry import Geometry
from iosr_fast.images.listing import refuse_url
from iosr_fast.images.pixels import FORMATS, from_array, opened, tensor_array, upright_rgb
from iosr_fast.utils.numbers import is_tensor, refuse_masked
from iosr_fast.utils.text import abbreviate

if TYPE_CHECKING:
    from PIL.Image import Image

ENCODED = (bytes, bytearray, memoryview)  # types of encoded images


def open_image(source: Any, position: int = 0, exif_orientation: bool = True) -> Image:
    """One image as upright 8-bit RGB, by the rules of `iosr_fast.images.pixels`.

    `source`: path, bytes of an encoded image, PIL image, uint8 array (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), or a
    uint8 tensor of PyTorch (H, W), (C, H, W) or (H, W, C). `exif_orientation=False` takes pixels as stored. Raises
    BadImageError.
    """
    from PIL import Image

    if isinstance(source, (str, Path, *ENCODED)):
        with opened_encoded(source, position) as image:
            return upright_rgb(image, exif_orientation)
    if isinstance(source, Image.Image):
        with naming(None, position):
            return upright_rgb(source, exif_orientation)
    array = as_array(source, position)
    if array is None or array.ndim == 0:
        expected = "expected a path, bytes, a PIL image, a uint8 array or a uint8 tensor"
        raise BadImageError(None, position, f"{expected}, got {type(source).__name__}")
    with naming(None, position):
        return from_array(array)


@contextmanager
def opened_encoded(source: Any, position: int) -> Iterator[Image]:
    """`pixels.opened` of a path or of encoded bytes. Errors in the block become BadImageErrors too."""
    path = None if isinstance(source, ENCODED) else Path(source)
    with naming(path, position), opened(source if path is None else check_path(path)) as image:
        yield image


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
    """An RGB image as (size, size, 3) uint8: resized, then cropped or padded.

    Equals open_clip's transform for evaluation, for "shortest" torchvision's Resize(size) and CenterCrop(size).
    """
    size, resized = geometry.size, geometry.resized(*image.size)
    if image.size != resized:
        image = image.resize(resized, resample=geometry.resampling)
    if geometry.resize_mode == "longest":
        return pad(np.asarray(image), geometry)
    left, top = round((image.width - size) / 2), round((image.height - size) / 2)
    return np.asarray(image.crop((left, top, left + size, top + size)))


def pad(pixels: np.ndarray, geometry: Geometry) -> np.ndarray:
    """Pixels (H, W, 3) of at most the geometry's size, in the middle of (size, size, 3) with its fill around them."""
    (height, width), size = pixels.shape[:2], geometry.size
    if height == width == size:
        return pixels
    padded = np.full((size, size, 3), geometry.fill, np.uint8)
    top, left = (size - height) // 2, (size - width) // 2  # an odd pixel more below and to the right
    padded[top : top + height, left : left + width] = pixels
    return padded


def random_view(image: Image, geometry: Geometry, rng: np.random.Generator, mirror: bool) -> np.ndarray:
    """A random crop of half to all of the area, resized to (size, size, 3) uint8; `mirror` mirrors it half of the time.

    Equals the papers' augmentation: torchvision's RandomResizedCrop(scale=(0.5, 1)) and RandomHorizontalFlip, for any
    resize mode, as open_clip trains.
    """
    width, height = image.size
    area = width * height * rng.uniform(0.5, 1.0)
    ratio = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
    crop_width = min(width, max(1, round((area * ratio) ** 0.5)))
    crop_height = min(height, max(1, round((area / ratio) ** 0.5)))
    left, top = int(rng.integers(width - crop_width + 1)), int(rng.integers(height - crop_height + 1))
    box = (left, top, left + crop_width, top + crop_height)
    view = np.asarray(image.resize((geometry.size, geometry.size), resample=geometry.resampling, box=box))
    return np.ascontiguousarray(view[:, ::-1]) if mirror and rng.random() < 0.5 else view


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
    if isinstance(images, (str, Path, *ENCODED)) or hasattr(images, "getbands"):
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
        pixels[i] = resize_and_crop(open_image(image, i, exif_orientation), geometry)
    return pixels
