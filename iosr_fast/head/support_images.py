"""Support images: each is decoded once, and becomes embeddings of its views and a thumbnail."""

from __future__ import annotations

import hashlib
import io
import logging
from collections.abc import Callable, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np

from iosr_fast.clip.prompts import check_templates
from iosr_fast.encoders.encoder import Embeddings, Encoder
from iosr_fast.exceptions import BadImageError, IosrFastError, printable
from iosr_fast.head.examples import Examples, no_examples
from iosr_fast.images.geometry import Geometry
from iosr_fast.images.preprocess import open_image, random_view, resize_and_crop
from iosr_fast.methods.support_set import mean_of_views
from iosr_fast.scoring.precision import PRECISIONS
from iosr_fast.utils.machine import usable_threads
from iosr_fast.utils.numbers import LARGEST, check_integer
from iosr_fast.utils.ordered import map_ordered

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_VIEWS = 1000  # of a support image
_BATCH = 64  # views that are encoded together
_QUALITY = 80  # of a thumbnail's WebP: at 96 pixels, 2 to 4 KB
_SHOWN = 5
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SupportViews:
    """How a support image becomes a key, at the fit and later.

    views      random views averaged into the key; 1 takes the image as it is
    mirror     half of the views are mirrored
    seed       the views of an image are drawn from a hash of its pixels and this seed
    single     whether a single view is kept beside the mean of several: the query of leave-one-out
    templates  prompts for class names; None: the CLIP's own
    thumbnail  longer side in pixels of the stored picture; 0 stores none
    exif_orientation  whether images are turned upright by EXIF, queries too. False is the default of bundles without
               this field; a fit sets it.
    """

    views: int = 1
    mirror: bool = False
    seed: int = 0
    single: bool = False
    templates: tuple[str, ...] | None = None
    thumbnail: int = 96
    exif_orientation: bool = False

    def __post_init__(self) -> None:
        for name, least, most in (("views", 1, MAX_VIEWS), ("seed", 0, LARGEST), ("thumbnail", 0, 1024)):
            shown = "thumbnails" if name == "thumbnail" else name  # as the parameter of Classifier
            object.__setattr__(self, name, check_integer(shown, getattr(self, name), least, most))
        if self.templates is not None:
            object.__setattr__(self, "templates", check_templates(self.templates))

    @property
    def two_forms(self) -> bool:
        """Whether an image is encoded as a query too, beside the views of its key."""
        return self.single and self.views > 1

    @property
    def forms(self) -> int:
        """How many pictures an image is encoded as."""
        return self.views + self.two_forms

    def pixels(self, image: Image, geometry: Geometry, digest: bytes) -> list[np.ndarray]:
        """The views of a decoded image, each (size, size, 3) uint8, and last the single one where it is kept.

        `digest` is the SHA-256 of the image's pixels: the same image gives the same views in any order of calls.
        """
        if self.views == 1:
            return [resize_and_crop(image, geometry)]
        rng = np.random.default_rng([self.seed, int.from_bytes(digest[:8], "little")])
        views = [random_view(image, geometry, rng, self.mirror) for _ in range(self.views)]
        return [*views, resize_and_crop(image, geometry)] if self.two_forms else views

    def picture(self, image: Image) -> bytes | None:
        """The thumbnail of a decoded image as WebP; shrinks the image itself."""
        from PIL import Image

        if not self.thumbnail:
            return None
        image.thumbnail((self.thumbnail, self.thumbnail), Image.Resampling.BICUBIC)
        file = io.BytesIO()
        image.save(file, "WEBP", quality=_QUALITY)
        return file.getvalue()


def check_support(
    views: int,
    mirror: bool,
    templates: Sequence[str] | None,
    key_precision: str,
    seed: int = 0,
    thumbnails: int = 96,
    exif_orientation: bool = True,
) -> SupportViews:
    """The options of a fit that concern images and prompts. Raises ValueError for one out of range."""
    if key_precision not in PRECISIONS:
        raise IosrFastError(f"expected a key_precision of {', '.join(PRECISIONS)}, got {key_precision!r}")
    return SupportViews(
        views,
        bool(mirror),
        seed,
        False,
        None if templates is None else check_templates(templates),
        thumbnails,
        bool(exif_orientation),
    )


def encode_images(
    encoder: Encoder,
    images: Sequence[Any],
    labels: np.ndarray,
    views: SupportViews,
    skip_bad: bool = False,
    names: Sequence[str] = (),
    step: Callable[[int], None] = lambda images: None,
) -> tuple[Examples, list[BadImageError]]:
    """Decode each image once and encode its views; `labels` (N,) int64 become the examples' class ids.

    Threads decode ahead of the encoder. Returns the examples, in the order of the images, and the errors of unreadable
    images, which `skip_bad` leaves out. `step` is called with 1 after each image. Raises ValueError with the names of
    all unreadable images, and for a picture (its pixels, whatever the file) under two labels, `names` of `labels`;
    nothing is encoded once one of these is found. Warns of copies within a class.
    """
    encoding = _Encoding(encoder, views)
    pictures: list[bytes | None] = []
    readable: list[int] = []
    errors: list[BadImageError] = []
    first: dict[tuple[tuple[int, int], bytes], int] = {}
    copies: list[tuple[int, int]] = []
    refused = False
    pil = Lock()  # PIL images load their pixels when they are first read, and one may be given twice

    def prepare(item: tuple[int, Any]) -> _Prepared | BadImageError:
        i, source = item
        try:
            with pil if hasattr(source, "getbands") else nullcontext():
                image = open_image(source, i, views.exif_orientation)
        except BadImageError as error:
            return error
        digest = hashlib.sha256(image.tobytes()).digest()
        identity = image.size, digest
        if refused:
            return _Prepared(identity, [], None)
        return _Prepared(identity, views.pixels(image, encoder.geometry, digest), views.picture(image))

    ahead = 2 * -(-_BATCH // views.forms)
    with closing(map_ordered(enumerate(images), prepare, usable_threads(), ahead)) as prepared:
        for i, image in enumerate(prepared):
            if isinstance(image, BadImageError):
                errors.append(image)
                refused |= not skip_bad
            else:
                earlier = first.setdefault(image.identity, i)
                if earlier != i:
                    copies.append((earlier, i))
                    refused |= bool(labels[earlier] != labels[i])
                if not refused:
                    encoding.add(image.pixels)
                    pictures.append(image.thumbnail)
                    readable.append(i)
            step(1)
    if errors and not skip_bad:
        if len(errors) == 1:
            raise errors[0]
        shown = "; ".join(str(error) for error in errors[:_SHOWN])
        raise IosrFastError(
            f"{len(errors)} of {len(images)} images can't be read (skip_bad, or --skip-bad, leaves them out): {shown}"
        )
    _check_copies(images, labels, copies, names)
    for left_out in errors:
        logger.warning("left out: %s", left_out)
    if not readable:
        return no_examples(encoder.width), errors
    keys, queries = encoding.finish()
    return Examples(keys, labels[readable], np.arange(len(readable)), tuple(pictures), queries), errors


@dataclass(frozen=True)
class _Prepared:
    """A decoded image: its size and the SHA-256 of its pixels, its views (SupportViews.pixels) and its thumbnail."""

    identity: tuple[tuple[int, int], bytes]
    pixels: list[np.ndarray]
    thumbnail: bytes | None


class _Encoding:
    """Encodes images in batches as they come; keeps the mean of each one's views."""

    def __init__(self, encoder: Encoder, views: SupportViews) -> None:
        self._encoder, self._views = encoder, views
        self._waiting: list[np.ndarray] = []
        self._keys: list[Embeddings] = []
        self._queries: list[Embeddings] = []

    def add(self, pixels: list[np.ndarray]) -> None:
        if len(self._waiting) + len(pixels) > _BATCH:
            self._encode()
        self._waiting += pixels

    def finish(self) -> tuple[Embeddings, Embeddings | None]:
        self._encode()
        return Embeddings.concatenate(self._keys), Embeddings.concatenate(self._queries) if self._queries else None

    def _encode(self) -> None:
        if not self._waiting:
            return
        rows, views = self._encoder.encode(np.stack(self._waiting)), self._views
        self._waiting = []
        if views.two_forms:
            single = np.arange(len(rows)) % (views.views + 1) == views.views
            self._queries.append(mean_of_views(rows[single], 1))
            rows = rows[~single]
        self._keys.append(mean_of_views(rows, views.views))
        if views.single and not views.two_forms:
            self._queries.append(self._keys[-1])


def _check_copies(
    images: Sequence[Any], labels: np.ndarray, copies: Sequence[tuple[int, int]], names: Sequence[str]
) -> None:
    across = [pair for pair in copies if labels[pair[0]] != labels[pair[1]]]
    if across:
        pairs = (
            " and ".join(f"{_where(images[i], i)} ({names[labels[i]]!r})" for i in pair) for pair in across[:_SHOWN]
        )
        more = f"; and {len(across) - _SHOWN} more" if len(across) > _SHOWN else ""
        raise IosrFastError(
            f"expected one label for a picture, got the same picture under two: {'; '.join(pairs)}{more}; remove the "
            "wrong ones"
        )
    if copies:
        one, other = copies[0]
        logger.warning(
            "%d of %d pictures are copies of another of their class and count twice; the first is %s, a copy of %s",
            len(copies),
            len(images),
            _where(images[other], other),
            _where(images[one], one),
        )


def _where(image: Any, position: int) -> str:
    return printable(str(image)) if isinstance(image, str | Path) else f"number {position}"
