"""Support images: each is decoded once, and becomes embeddings and a thumbnail."""

from __future__ import annotations

import hashlib
import logging
import os
import stat
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import numpy as np

from iosr_fast.backbones.prompts import check_templates
from iosr_fast.encoders.encoder import Embeddings, Encoder
from iosr_fast.encoders.rows import Rows
from iosr_fast.exceptions import BadImageError, IosrFastError, printable
from iosr_fast.head.examples import Examples
from iosr_fast.images.crop import MAX_MARGIN, Sharing, path_of, picture_of
from iosr_fast.images.geometry import Geometry
from iosr_fast.images.preprocess import ENCODED, open_image, resize_and_crop, thumbnail
from iosr_fast.scoring.validation import check_number
from iosr_fast.sealed.outputs import is_utf8
from iosr_fast.utils.machine import usable_threads
from iosr_fast.utils.numbers import check_integer
from iosr_fast.utils.ordered import map_ordered
from iosr_fast.utils.require import require

NONE_OF_THE_CLASSES = "none of the classes"
_BATCH = 64  # images that are encoded together
_WHOLE = 4  # images of an iterator in memory, whole: 50 megapixels are 150 MB
_SHOWN = 5
_Identity = tuple[tuple[int, int], bytes]  # the size of a decoded image and the SHA-256 of its pixels
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SupportSettings:
    """How a support image becomes a key, at the fit and later.

    templates  prompts for class names; None: the CLIP's own; (): none, classes have descriptions
    thumbnail  longer side in pixels of the stored picture, at most; 0 stores none
    exif_orientation  whether images are turned upright by EXIF, queries too. False is the default of bundles without
               this field; a fit sets it.
    margin     how much of a box's sides is taken beside it, of parts of pictures, queries too
    """

    templates: tuple[str, ...] | None = None
    thumbnail: int = 96
    exif_orientation: bool = False
    margin: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "thumbnail", check_integer("thumbnails", self.thumbnail, 0, 1024))
        object.__setattr__(self, "exif_orientation", bool(self.exif_orientation))
        object.__setattr__(self, "margin", check_number("margin", self.margin, 0.0, MAX_MARGIN))
        if self.templates is not None:
            object.__setattr__(self, "templates", check_templates(self.templates))

    def facts(self) -> dict[str, Any]:
        """The fields of a manifest. `margin` is left out where it is 0, so that earlier versions read it."""
        return {name: value for name, value in asdict(self).items() if name != "margin" or value}


class EncodedImages(NamedTuple):
    """The support images, the embeddings of pictures of no class, if there are any, the errors of unreadable ones."""

    examples: Examples
    unknown: Embeddings | None
    errors: list[BadImageError]


def encode_images(
    encoder: Encoder,
    images: Iterable[Any],
    settings: SupportSettings,
    labels: np.ndarray | None = None,
    names: Sequence[str] = (),
    unknown_images: Sequence[Any] = (),
    skip_bad: bool = False,
    step: Callable[[int], None] = lambda images: None,
    memory: Any = None,
) -> EncodedImages:
    """Decode each image once and encode it, a batch at a time, in the order of the images.

    `labels` (N,) int64, positions in `names`, become the class ids of the examples; None: all are of one class, -1.
    `unknown_images` are pictures of none of the classes. Threads decode ahead of the encoder. An iterator gives one
    image after another: few are in memory at a time, and the first unreadable one is raised as a BadImageError. Of a
    sequence all are named, or left out with `skip_bad`. `step` is called with 1 after each image. `memory` as of
    `encode_remembered`.

    A picture (its pixels, whatever the file) under two labels is refused, and so is one that is a support image and
    unknown: before any work where the files are equal, else once both are decoded. Warns of copies within a class.
    """
    if isinstance(encoder, Rows):
        return _read_rows(encoder, images, labels, unknown_images)
    one_by_one = isinstance(images, Iterator)
    images = images if one_by_one else [*images, *unknown_images]
    none = len(names)
    classes = None if labels is None else np.concatenate([labels, np.full(len(unknown_images), none)])
    if classes is not None and isinstance(images, list):
        _check_files(images, classes, [*names, NONE_OF_THE_CLASSES])
    pictures: list[bytes | None] = []
    paths: list[str | None] = []
    readable: list[int] = []
    errors: list[BadImageError] = []
    given: list[Path | None] = []  # the files of all

    def good_images() -> Generator[np.ndarray, None, None]:
        """The pixels of each image; an error at the end, or no more pixels once it is sure to come."""
        first: dict[_Identity, int] = {}
        copies: list[tuple[int, int]] = []
        refused = False
        ahead = _WHOLE if one_by_one else 2 * _BATCH
        with closing(_prepare_all(images, encoder.geometry, settings, ahead)) as prepared:
            for i, (path, image) in enumerate(prepared):
                given.append(path)
                step(1)
                if isinstance(image, BadImageError):
                    if one_by_one:
                        raise image
                    errors.append(image)
                    refused |= not skip_bad
                    continue
                if (earlier := first.setdefault(image.identity, i)) != i:
                    copies.append((earlier, i))
                    refused |= classes is not None and bool(classes[earlier] != classes[i])
                if not refused:
                    pictures.append(image.picture)
                    paths.append(image.path)
                    readable.append(i)
                    yield image.pixels
        _check_readable(errors, len(given), skip_bad)
        _check_copies(given, classes, copies, [*names, NONE_OF_THE_CLASSES])

    with closing(good_images()) as good:
        keys = _encode(encoder, good, memory)
    ids = np.full(len(readable), -1) if classes is None else classes[readable]
    known = tuple(paths) if any(paths) else ()
    found = Examples(keys, ids, np.arange(len(readable)), tuple(pictures), paths=known)
    unknown = np.array(readable, np.int64) >= len(given) - len(unknown_images)
    if not unknown.any():
        return EncodedImages(found, None, errors)
    return EncodedImages(found.rows(~unknown), keys[unknown], errors)


def _read_rows(rows: Rows, given: Iterable[Any], labels: np.ndarray | None, unknown: Sequence[Any]) -> EncodedImages:
    """As encode_images, of rows of embeddings, which have no pictures: a wrong one is an IosrFastError."""
    embeddings = rows.encode(rows.read(given))
    others = rows.encode(rows.read(unknown)) if len(unknown) else None
    class_ids = np.full(len(embeddings), -1) if labels is None else labels
    return EncodedImages(Examples.numbered(embeddings, class_ids), others, [])


class _Prepared(NamedTuple):
    """A decoded image: its file, what tells equal pictures, its pixels (size, size, 3) uint8, its thumbnail."""

    path: str | None
    identity: _Identity
    pixels: np.ndarray
    picture: bytes | None


def _prepare_all(
    images: Iterable[Any], geometry: Geometry, settings: SupportSettings, ahead: int
) -> Generator[tuple[Path | None, _Prepared | BadImageError], None, None]:
    """The file of each image, and what becomes of it; at most `ahead` images are decoded and not yet consumed."""
    pil = Lock()  # PIL images load their pixels when they are first read, and one may be given twice

    def prepare(item: tuple[int, Any]) -> tuple[Path | None, _Prepared | BadImageError]:
        i, source = item
        path = path_of(source)
        try:
            with pil if hasattr(picture_of(source), "getbands") else nullcontext():
                image = open_image(source, i, settings.exif_orientation, geometry)
        except BadImageError as error:
            return path, error
        identity = image.size, hashlib.sha256(image.tobytes()).digest()
        pixels = resize_and_crop(image, geometry)
        picture = thumbnail(image, settings.thumbnail) if settings.thumbnail else None  # shrinks the image itself
        # The absolute path of an image that is a file, or a part of one; None where a CSV file can't hold it, too.
        kept = None if path is None or not is_utf8(str(path.absolute())) else str(path.absolute())
        return path, _Prepared(kept, identity, pixels, picture)

    return map_ordered(enumerate(Sharing(settings.margin)(images)), prepare, usable_threads(), ahead)


def _encode(encoder: Encoder, images: Iterator[np.ndarray], memory: Any) -> Embeddings:
    """The key of each image: its embedding, L2-normalised again in float32."""
    batches = []
    while batch := list(islice(images, _BATCH)):
        batches.append(encode_remembered(encoder, np.stack(batch), memory))
    if not batches:
        nothing = np.zeros((0, encoder.width), np.float32)
        return Embeddings(nothing, nothing)
    found = Embeddings.concatenate(batches)
    rows = (found.plain,) if found.adapted is None else (found.plain, found.adapted)
    return Embeddings(*(each / np.linalg.norm(each, axis=1, keepdims=True) for each in rows))


def encode_remembered(encoder: Encoder, pixels: np.ndarray, memory: Any) -> Embeddings:
    """As Encoder.encode, of each image once for all calls with this `memory`: a path, a joblib.Memory, or None."""
    if memory is None:
        return encoder.encode(pixels)
    pixels = np.ascontiguousarray(pixels)  # joblib hashes strides, too
    memory = os.fspath(memory) if isinstance(memory, os.PathLike) else memory
    remembered = require("sklearn.utils.validation", "sklearn").check_memory(memory).cache(_row, ignore=["make"])
    of_encoder = encoder.fingerprint, encoder.runtime, encoder.adapted
    new = [i for i, one in enumerate(pixels) if not remembered.check_call_in_cache(*of_encoder, one, None)]
    encoded: dict[int, Embeddings] = {}
    if new:  # together
        rows = encoder.encode(pixels[new])
        encoded = {i: rows[k : k + 1] for k, i in enumerate(new)}

    def make(i: int) -> Embeddings:
        return encoded[i] if i in encoded else encoder.encode(pixels[i : i + 1])  # it went since it was looked for

    return Embeddings.concatenate([remembered(*of_encoder, one, partial(make, i)) for i, one in enumerate(pixels)])


def _row(
    fingerprint: str, runtime: str, adapted: bool, pixels: np.ndarray, make: Callable[[], Embeddings]
) -> Embeddings:
    """What a memory has of an image."""
    return make()


def _check_readable(errors: Sequence[BadImageError], count: int, skip_bad: bool) -> None:
    """Raise an error for unreadable images, or warn of those that are left out."""
    if skip_bad:
        for error in errors:
            logger.warning("left out: %s", error)
    elif len(errors) == 1:
        raise errors[0]
    elif errors:
        shown = "; ".join(str(error) for error in errors[:_SHOWN])
        raise IosrFastError(
            f"{len(errors)} of {count} images can't be read (skip_bad, or --skip-bad, leaves them out): {shown}"
        )


def _check_files(images: Sequence[Any], classes: np.ndarray, names: Sequence[str]) -> None:
    """Raise IosrFastError for equal files under two labels. Only files of equal size are read, only pictures count."""
    by_size: dict[int, list[int]] = {}
    for i, image in enumerate(images):
        if (size := _size_of(image)) is not None:
            by_size.setdefault(size, []).append(i)
    across: list[tuple[int, int]] = []
    for rows in by_size.values():
        first: dict[bytes, int] = {}
        for i in rows if len(np.unique(classes[rows])) > 1 else ():
            if classes[earlier := first.setdefault(_digest_of(images[i]), i)] != classes[i]:
                across.append((earlier, i))
    if across := [pair for pair in across if _is_readable(images[pair[0]])]:
        _check_copies([path_of(image) for image in images], classes, sorted(across), names)


def _size_of(source: Any) -> int | None:
    """The bytes of an encoded image; None for what is no file, and for a path that can't be read."""
    if isinstance(source, ENCODED):
        return memoryview(source).nbytes
    try:
        found = os.stat(source) if isinstance(source, str | Path) else None
    except (OSError, ValueError):
        return None
    return found.st_size if found is not None and stat.S_ISREG(found.st_mode) and os.access(source, os.R_OK) else None


def _digest_of(source: Any) -> bytes:
    if isinstance(source, ENCODED):
        return hashlib.sha256(source).digest()
    with open(source, "rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def _is_readable(source: Any) -> bool:
    try:
        open_image(source)
    except BadImageError:
        return False
    return True


def _check_copies(
    paths: Sequence[Path | None], classes: np.ndarray | None, copies: Sequence[tuple[int, int]], names: Sequence[str]
) -> None:
    """Raise IosrFastError for a picture under two labels; warn of copies within a class."""

    def place(i: int) -> str:
        return f"number {i}" if paths[i] is None else printable(str(paths[i]))

    if classes is not None and (across := [pair for pair in copies if classes[pair[0]] != classes[pair[1]]]):
        pairs = (" and ".join(f"{place(i)} ({names[classes[i]]!r})" for i in pair) for pair in across[:_SHOWN])
        more = f"; and {len(across) - _SHOWN} more" if len(across) > _SHOWN else ""
        raise IosrFastError(
            f"expected one label for a picture, got the same picture under two: {'; '.join(pairs)}{more}; remove the "
            "wrong ones"
        )
    if copies:
        one, other = map(place, copies[0])
        text = "%d of %d pictures are copies of another of their class and count twice; the first is %s, a copy of %s"
        logger.warning(text, len(copies), len(paths), other, one)
