"""From whatever users hold (paths, PIL images, arrays) to the uint8 pixels an encoder takes.

The geometry is CLIP's: resize the shorter side (bicubic, antialiased), crop the centre. Mean and standard deviation are
folded into the encoder, so pixels stay uint8.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"})


class BadImageError(ValueError):
    """An image that is missing or can't be decoded; `where` names it by path, or by position where it has none."""

    def __init__(self, path: Path | None, position: int, reason: str) -> None:
        self.path, self.position, self.reason = path, position, reason
        self.where = f"number {position}" if path is None else str(path)
        super().__init__(f"can't read image {self.where}: {reason}")

    def __reduce__(self) -> tuple[type[BadImageError], tuple[Path | None, int, str]]:
        """So that one raised in a worker process arrives as it was: an exception is pickled by its message alone."""
        return BadImageError, (self.path, self.position, self.reason)

    def moved(self, offset: int) -> BadImageError:
        """The same error where the image's position counts from `offset`."""
        return BadImageError(self.path, self.position + offset, self.reason)


def open_image(source: Any, position: int = 0) -> Image:
    """One image as RGB, decoded. `source`: path, bytes of an encoded image, PIL image, or uint8 array (H, W), (H, W, 3)
    or (H, W, 4)."""
    from PIL import Image

    if isinstance(source, (str, Path)):
        path = Path(source)
        if not path.is_file():
            raise BadImageError(path, position, "no such file")
        return _decode(path, path, position)
    if isinstance(source, bytes | bytearray | memoryview):
        return _decode(io.BytesIO(source), None, position)
    if isinstance(source, Image.Image):
        return source.convert("RGB")
    array = np.asarray(source)
    if array.dtype != np.uint8:
        raise BadImageError(
            None, position, f"expected a path, bytes, a PIL image or a uint8 array, got {_describe(source, array)}"
        )
    if array.ndim == 3 and array.shape[2] in (3, 4) and min(array.shape[:2]) > 0:
        return Image.fromarray(array).convert("RGB")
    if array.ndim == 2 and array.size > 0:
        return Image.fromarray(array).convert("RGB")
    raise BadImageError(None, position, f"expected shape (H, W), (H, W, 3) or (H, W, 4), got {array.shape}")


def open_bytes(data: bytes, path: Path, position: int = 0) -> Image:
    """An encoded image as RGB, decoded. `path` is what BadImageError calls it: it may lie within an archive."""
    return _decode(io.BytesIO(data), path, position)


def _decode(source: Path | io.BytesIO, path: Path | None, position: int) -> Image:
    from PIL import Image

    with naming(path, position), Image.open(source) as opened:
        return opened.convert("RGB")


@contextmanager
def naming(path: Path | None, position: int) -> Iterator[None]:
    """What decoders raise within the block, as BadImageError of this image."""
    from PIL import UnidentifiedImageError

    try:
        yield
    except BadImageError:
        raise
    except UnidentifiedImageError as error:
        raise BadImageError(path, position, "it is not an image of a known format, or it is damaged") from error
    except Exception as error:  # damaged files make decoders raise all sorts: of a TIFF that may be a TypeError
        raise BadImageError(path, position, str(error)) from error


def _describe(source: Any, array: np.ndarray) -> str:
    return f"an array of {array.dtype}" if isinstance(source, np.ndarray) else type(source).__name__


def resize_and_crop(image: Image, size: int) -> np.ndarray:
    """CLIP's geometry: (size, size, 3) uint8. Equals torchvision's Resize(size, bicubic) and CenterCrop(size)."""
    from PIL import Image

    width, height = image.size
    short = min(width, height)
    if short != size:
        # torchvision truncates the longer side; rounding instead would shift the crop by half a pixel.
        image = image.resize((int(size * width / short), int(size * height / short)), resample=Image.Resampling.BICUBIC)
    left, top = round((image.width - size) / 2), round((image.height - size) / 2)
    return np.asarray(image.crop((left, top, left + size, top + size)))


def random_view(image: Image, size: int, rng: np.random.Generator, mirror: bool) -> np.ndarray:
    """A random crop of half to all of the area, resized to (size, size, 3) uint8, mirrored half of the time if asked.

    The augmented view of the papers (torchvision's RandomResizedCrop(scale=(0.5, 1)) and RandomHorizontalFlip).
    """
    from PIL import Image

    width, height = image.size
    area = width * height * rng.uniform(0.5, 1.0)
    ratio = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
    crop_width = min(width, max(1, round((area * ratio) ** 0.5)))
    crop_height = min(height, max(1, round((area / ratio) ** 0.5)))
    left, top = int(rng.integers(width - crop_width + 1)), int(rng.integers(height - crop_height + 1))
    box = (left, top, left + crop_width, top + crop_height)
    view = np.asarray(image.resize((size, size), resample=Image.Resampling.BICUBIC, box=box))
    return np.ascontiguousarray(view[:, ::-1]) if mirror and rng.random() < 0.5 else view


def as_image_list(images: Any) -> Sequence[Any]:
    """One image or many, as a sequence. An array (B, H, W, C) is many; a path, bytes, a PIL image or (H, W[, C]) is
    one."""
    if isinstance(images, (str, Path, bytes, bytearray, memoryview)) or hasattr(images, "getbands"):
        return [images]
    if isinstance(images, np.ndarray):
        return list(images) if images.ndim == 4 else [images]
    if not isinstance(images, Iterable):
        raise TypeError(f"expected an image or a sequence of images, got {type(images).__name__}")
    return list(images)


def to_pixels(images: Any, size: int) -> np.ndarray:
    """One image or many -> (B, size, size, 3) uint8, in order. Raises BadImageError for the first unreadable one."""
    if isinstance(images, np.ndarray) and images.dtype == np.uint8 and images.shape[1:] == (size, size, 3):
        return images
    listed = as_image_list(images)
    pixels = np.empty((len(listed), size, size, 3), np.uint8)
    for i, image in enumerate(listed):
        pixels[i] = resize_and_crop(open_image(image, i), size)
    return pixels


def list_folder(folder: str | Path) -> tuple[list[Path], list[str], list[str]]:
    """Images of a folder with one sub-folder a class: paths, the class name of each, and all class names, sorted.

    Raises FileNotFoundError without the folder, ValueError for fewer than two classes or a class without images.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"expected a folder with one sub-folder of images a class, found no folder {folder}")
    classes = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if len(classes) < 2:
        raise ValueError(f"expected at least two class folders in {folder}, found {len(classes)}: {classes}")
    paths: list[Path] = []
    names: list[str] = []
    for name in classes:
        found = sorted(p for p in (folder / name).rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
        if not found:
            raise ValueError(f"the class folder {folder / name} has no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
        paths += found
        names += [name] * len(found)
    return paths, names, classes


def find_bad(images: Sequence[Any]) -> dict[int, BadImageError]:
    """Decode every image and return the errors by position."""
    bad: dict[int, BadImageError] = {}
    for i, image in enumerate(images):
        try:
            open_image(image, i)
        except BadImageError as error:
            bad[i] = error
    return bad
