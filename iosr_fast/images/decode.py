"""Images to an encoder's pixels, on the CPU: only the crop is resized, and large JPEGs are decoded at a fraction.

`preprocess.resize_and_crop(preprocess.open_image(source), geometry)` is the reference for the geometry.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from iosr_fast.exceptions import BadImageError, IosrFastError
from iosr_fast.images.geometry import Geometry
from iosr_fast.images.limits import DecodeLimits
from iosr_fast.images.pixels import is_plain, orientation_of, to_rgb, turn, upright_rgb
from iosr_fast.images.preprocess import ENCODED, open_image, opened_encoded, pad, resize_and_crop

if TYPE_CHECKING:
    from PIL.Image import Image

DECODERS = ("cpu", "cpu-exact")
# libjpeg decodes a JPEG at 1/2, 1/4 or 1/8 of its size by omitting coefficients: a sharp cut-off and one more rounding.
# With MARGIN times the target size left, the mean difference to the reference is below 1 level on textures with a
# photograph's spectrum (2 to 4 levels at a margin of 1). No margin protects labels that are nearly tied.
MARGIN = 3.0
_SCALES = (8, 4, 2)
_REVERSED_X, _REVERSED_Y = frozenset({2, 3, 7, 8}), frozenset({3, 4, 6, 7})  # EXIF orientations that reverse an axis


@dataclass(frozen=True)
class DecodedBatch:
    """`errors`: for each source, in order, its error or None. `pixels`: uint8 (n, size, size, 3) of the n readable
    sources, in order; None if there are none."""

    errors: list[BadImageError | None]
    pixels: np.ndarray | None


@dataclass(frozen=True)
class Decoder:
    """Decodes batches of images as `open_image` takes them, with Pillow, in the calling thread. Threads may share one.

    `name` is one of DECODERS; pixels of "cpu-exact" equal the reference to the last bit. Raises IosrFastError for
    another name.
    """

    name: str = "cpu"
    exif_orientation: bool = True

    def __post_init__(self) -> None:
        if self.name not in DECODERS:
            raise IosrFastError(f"expected decoder to be one of {', '.join(DECODERS)}, got {self.name!r}")

    def decode(self, sources: Sequence[Any], geometry: Geometry, start: int = 0) -> DecodedBatch:
        """The pixels of the readable sources. Positions in errors count from `start`."""
        errors: list[BadImageError | None] = [None] * len(sources)
        readable = []
        for i, source in enumerate(sources):
            try:
                exact = self.name == "cpu-exact"
                pixels = decode_pixels(source, geometry, start + i, exact=exact, exif_orientation=self.exif_orientation)
                readable.append(pixels)
            except BadImageError as error:
                errors[i] = error
        return DecodedBatch(errors, np.stack(readable) if readable else None)


def decode_pixels(
    source: Any,
    geometry: Geometry,
    position: int = 0,
    limits: DecodeLimits | None = None,
    exact: bool = False,
    exif_orientation: bool = True,
) -> np.ndarray:
    """One image, as `open_image` takes it, as (size, size, 3) uint8, C-contiguous.

    On average over a photograph's pixels the result is within 1 level of the reference; it differs by rounding and, for
    JPEGs of at least 2 * MARGIN times the size that they are resized to, by decoding at a fraction of the size. The
    work depends on the decoded pixels, not on the aspect ratio. `exact` gives the reference to the last bit. The size
    of an encoded image is compared with `limits` before it is decoded. Raises BadImageError.
    """
    if isinstance(source, (str, Path, *ENCODED)):
        with opened_encoded(source, position) as image:
            shape = image.size
            if limits is not None and (reason := limits.size_error(shape, geometry)):
                raise IosrFastError(reason)
            if exact:
                return resize_and_crop(upright_rgb(image, exif_orientation), geometry)
            fraction = _draft(image, geometry)
            image.load()
            return crop_pixels(image, geometry, fraction, shape, orientation_of(image) if exif_orientation else 1)
    image = open_image(source, position, exif_orientation)
    if limits is not None and (reason := limits.size_error(image.size, geometry)):
        raise BadImageError(None, position, reason)
    return resize_and_crop(image, geometry) if exact else crop_pixels(image, geometry)


def crop_pixels(
    image: Image, geometry: Geometry, fraction: int = 1, shape: tuple[int, int] | None = None, orientation: int = 1
) -> np.ndarray:
    """`resize_and_crop` of an image stored with this EXIF orientation: (size, size, 3) uint8.

    Only the crop is resized, and then turned. `image` may be decoded at 1 / `fraction` of its own size `shape`,
    (width, height).
    """
    width, height = shape or image.size
    if not is_plain(image):
        image = to_rgb(image)
    resized = geometry.resized(width, height)  # the size from which resize_and_crop crops
    cropped = min(geometry.size, resized[0]), min(geometry.size, resized[1])
    left, top = (
        # The upright image rounds an odd excess; a reversed axis must round it the other way.
        excess - round(excess / 2) if orientation in reversed_by else round(excess / 2)
        for excess, reversed_by in (
            (resized[0] - cropped[0], _REVERSED_X),
            (resized[1] - cropped[1], _REVERSED_Y),
        )
    )
    if image.size == resized:
        image = image.crop((left, top, left + cropped[0], top + cropped[1]))
    else:
        x, y = width / resized[0] / fraction, height / resized[1] / fraction
        right, bottom = min((left + cropped[0]) * x, image.width), min((top + cropped[1]) * y, image.height)
        image = image.resize(cropped, geometry.resampling, box=(left * x, top * y, right, bottom))
    pixels = np.asarray(turn(image, orientation))
    return pad(np.repeat(pixels[:, :, None], 3, 2) if pixels.ndim == 2 else pixels, geometry)


def _draft(image: Image, geometry: Geometry) -> int:
    """Set a large JPEG to be decoded at 1 / n of its size; returns n.

    Both sides keep MARGIN times the pixels that they are resized to: a squashed one is shrunk more on its longer side.
    """
    (width, height), resized = image.size, geometry.resized(*image.size)
    least = min(width / resized[0], height / resized[1])
    scale = next((scale for scale in _SCALES if least >= MARGIN * scale), 1)
    draft = image.draft(None, (width // scale, height // scale)) if scale > 1 else None  # None for all but JPEGs
    return 1 if draft is None else round(width / draft[1][2])
