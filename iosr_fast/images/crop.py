"""A part of a picture: a file, or any other picture, and a box in it."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from decimal import Decimal
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, NamedTuple

from iosr_fast.exceptions import IosrFastError
from iosr_fast.images.listing import refuse_url

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_MARGIN = 5.0
_COLUMNS = ("x", "y", "width", "height")  # of a CSV file
_FRAGMENT = re.compile(r"#xywh=(?:(pixel|percent):)?([^#/]*)\Z")
_LARGEST = 1e9  # no picture has so many pixels on a side, and no sum or product of such numbers overflows
_ROUNDING = 1e-6  # of a pixel: shares of a side are not exact


class Box(NamedTuple):
    """A rectangle of an upright picture: its left upper corner and its sides, in pixels, or in shares of the picture's
    sides if `relative`.

    >>> Box(10, 20, 100, 50).within((640, 480)), Box(0.5, 0.5, 0.6, 0.25, relative=True).within((640, 480))
    ((10, 20, 110, 70), (320, 240, 640, 360))
    """

    x: float
    y: float
    width: float
    height: float
    relative: bool = False

    @classmethod
    def of(cls, values: Iterable[Any], relative: bool | None = None) -> Box:
        """The box of four numbers. With None it is relative if neither side exceeds 1: no picture is so small. Raises
        IosrFastError for other than four finite numbers, and for sides that are not above 0."""
        listed = list(values)
        try:
            x, y, width, height = numbers = [math.nan if isinstance(one, bool) else float(one) for one in listed]
            fits = all(abs(number) <= _LARGEST for number in numbers) and width > 0 and height > 0
        except (TypeError, ValueError, OverflowError):
            fits = False
        if not fits:
            raise IosrFastError(f"expected a box x, y, width, height of numbers, sides above 0, got {listed!s:.100}")
        return cls(x, y, width, height, max(width, height) <= 1 if relative is None else relative)

    def grown(self, margin: float) -> Box:
        """The box with `margin` of its sides more on each side."""
        by = margin * self.width, margin * self.height
        return Box(self.x - by[0], self.y - by[1], self.width + 2 * by[0], self.height + 2 * by[1], self.relative)

    def within(self, size: tuple[int, int]) -> tuple[int, int, int, int]:
        """Left, upper, right and lower edge of the whole pixels that it touches, in a picture of `size`, (width,
        height). Raises IosrFastError for a box that lies outside."""
        edges = []
        for start, length, side in ((self.x, self.width, size[0]), (self.y, self.height, size[1])):
            scale = side if self.relative else 1
            low, high = max(0.0, start * scale), min(float(side), (start + length) * scale)
            if low >= high:
                raise IosrFastError(f"expected a box within the picture of {size[0]} x {size[1]} pixels, got {self}")
            first = min(math.floor(low + _ROUNDING), side - 1)
            edges.append((first, max(first + 1, math.ceil(high - _ROUNDING))))
        (left, right), (upper, lower) = edges
        return left, upper, right, lower

    def __str__(self) -> str:
        """As a media fragment (W3C, Media Fragments URI 1.0): xywh=10,20,100,50 or xywh=percent:50,50,25,25. All digits
        are there, so that it names the same pixels when it is read again."""
        shift = 2 if self.relative else 0
        numbers = (f"{Decimal(repr(float(value))).scaleb(shift).normalize():f}" for value in self[:4])
        return f"xywh={'percent:' if self.relative else ''}{','.join(numbers)}"


@dataclass(frozen=True, eq=False)
class Crop:
    """The part of a picture in a box, wherever a picture is taken; `source` is the path or the picture, `box` a Box or
    the four values of Box.of. What reads it gives it a `margin`, the share of the box's sides beside it that is taken
    too, and `whole`, the picture that it shares with others (Sharing).

    As text it is the path with a fragment, "photo.jpg#xywh=10,20,100,50", which stands for it wherever a path does.
    Raises IosrFastError as Box.of does.

    >>> str(Crop("photo.jpg", (10, 20, 100, 50))), str(Crop.of("photo.jpg#xywh=percent:5,5,50,50").box)
    ('photo.jpg#xywh=10,20,100,50', 'xywh=percent:5,5,50,50')
    """

    source: Any
    box: Box
    margin: float = 0.0
    whole: Whole | None = None

    def __post_init__(self) -> None:
        relative = self.box.relative if isinstance(self.box, Box) else None
        object.__setattr__(self, "box", Box.of(self.box[:4], relative))

    @classmethod
    def of(cls, image: Any) -> Crop | None:
        """The part that an image is, or that a path with a fragment names; None for whole pictures, and for a file of
        that name. Raises IosrFastError for a fragment that is no box."""
        if isinstance(image, Crop):
            return image
        file = picture_of(image)
        if file is image:
            return None
        unit, numbers = _FRAGMENT.fullmatch(str(image), len(file)).groups()  # type: ignore[union-attr]
        values = [f"{number}e-2" if unit == "percent" else number for number in numbers.split(",")]
        try:
            return cls(file, Box.of(values, unit == "percent"))
        except IosrFastError:
            wanted = "#xywh=x,y,width,height of numbers, sides above 0, or #xywh=percent: and such"
            raise IosrFastError(f"expected {wanted}, got {image}") from None

    def opened(self, open_picture: Callable[[Any], Image]) -> Image:
        """Its pixels, by `open_picture` of the source; a shared one is left, so that it is freed after the last part.
        The box without its margin has to lie in the picture."""
        image = (self.whole or Whole()).opened(lambda: open_picture(self.source))
        object.__setattr__(self, "whole", None)
        self.box.within(image.size)
        return image.crop(self.box.grown(self.margin).within(image.size))

    def __str__(self) -> str:
        return f"{self.source}#{self.box}"


def picture_of(image: Any) -> Any:
    """The picture of which an image is a part: the file without the fragment, as text, or the source of a Crop. Of a
    whole picture it is the same object."""
    if isinstance(image, Crop):
        return image.source
    found = _FRAGMENT.search(str(image)) if isinstance(image, str | Path) else None
    return image if found is None or os.path.exists(image) else str(image)[: found.start()]


def path_of(image: Any) -> Path | None:
    """The path of an image, with the fragment of a part; None for a picture in memory."""
    return Path(str(image)) if isinstance(picture_of(image), str | Path) else None


class Whole:
    """A picture that parts share: the first of them that is read opens it, and all get its error."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._opened: Image | Exception | None = None

    def opened(self, open_picture: Callable[[], Image]) -> Image:
        """The upright picture, by `open_picture` at the first call."""
        with self._lock:
            if self._opened is None:
                try:
                    self._opened = open_picture()
                except Exception as error:
                    self._opened = error
        if isinstance(self._opened, Exception):
            raise self._opened.with_traceback(None)  # else it grows with each part
        return self._opened


class Sharing:
    """Called with the images of a run, part after part of it, gives what is read in their place: parts have a `margin`,
    and those of one picture that follow one another share it, so that a file with ten boxes is decoded once, whatever
    batches and threads they come to. It is freed with the last of them (Crop.opened)."""

    def __init__(self, margin: float = 0.0) -> None:
        self._margin = margin
        self._source, self._whole = None, Whole()

    def __call__(self, images: Iterable[Any]) -> Iterator[Any]:
        for image in images:
            with suppress(IosrFastError):  # of a wrong box, which is raised where it is opened
                image = Crop.of(image) or image
            source = image.source if isinstance(image, Crop) else None
            is_path = isinstance(source, str | Path)
            if source is not self._source and not (is_path and str(source) == str(self._source)):
                self._source, self._whole = source, Whole()
            yield image if source is None else replace(image, margin=self._margin, whole=self._whole)


def listed_paths(file: Path, columns: Sequence[str], rows: Iterable[Mapping[str, str]], skip_bad: bool) -> list[str]:
    """For each row of a CSV file the path in its column `path`, which is relative to the file; "" for a row without
    one. The columns x, y, width and height, where the file and the row have them, become its fragment.

    Raises IosrFastError for a URL, for some of these columns without the others (a width and a height alone are those
    of the picture), and for a wrong box, which with `skip_bad` can't be read when it is opened.
    """
    lacking = [name for name in _COLUMNS if name not in columns]
    if lacking and ("x" in columns or "y" in columns):
        raise IosrFastError(f"expected the columns x, y, width and height of boxes in {file}, got no {lacking[0]}")
    paths = []
    for number, row in enumerate(rows, 2):
        refuse_url(row["path"])
        path = row["path"] and str(file.parent / row["path"])
        values = [row[name].strip() for name in _COLUMNS] if path and not lacking else []
        try:
            crop = Crop.of(path)
            if any(values):
                if crop is not None:
                    raise IosrFastError(f"expected a box in columns or in the path, got both for {path}")
                crop = Crop(path, values)  # type: ignore[arg-type]
            paths.append(str(crop or path))
        except IosrFastError as error:
            if not skip_bad:
                raise IosrFastError(f"row {number} of {file}: {error}") from None
            paths.append(f"{path}#xywh={','.join(values)}" if any(values) else path)
    return paths
