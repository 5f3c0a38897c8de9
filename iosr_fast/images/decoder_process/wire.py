"""Messages to and from a decoder process: headers of fixed size, then bytes."""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import NamedTuple

from iosr_fast.images.geometry import INTERPOLATIONS, RESIZE_MODES, Geometry


class Status(IntEnum):
    OK = 0  # pixels follow, (height, width, 3) uint8
    BAD_IMAGE = 1  # `length` bytes of a message follow


class Request(NamedTuple):
    """So many `parts` and `length` bytes of an encoded image follow. Each part gets an answer, or without parts the
    image. `work_pixels`: of the largest picture during decoding, by the header. Of the geometry come `size`, the
    positions of its modes, and `fill`; `whole` asks for the picture before it is resized."""

    size: int
    resize_mode: int
    interpolation: int
    fill: int
    parts: int
    length: int
    max_pixels: int
    work_pixels: int
    cpu_s: float
    exif_orientation: bool
    whole: bool

    @classmethod
    def of(cls, geometry: Geometry, *rest: float) -> Request:
        mode, interpolation = RESIZE_MODES.index(geometry.resize_mode), INTERPOLATIONS.index(geometry.interpolation)
        return cls(geometry.size, mode, interpolation, geometry.fill, *rest)  # type: ignore[arg-type]

    @property
    def geometry(self) -> Geometry:
        return Geometry(self.size, RESIZE_MODES[self.resize_mode], INTERPOLATIONS[self.interpolation], self.fill)


class Answer(NamedTuple):
    status: int
    height: int
    width: int
    length: int


REQUEST = struct.Struct("<IBBBIQQQd??")
PART = struct.Struct("<dddd?d")  # the box and the margin of a Crop
ANSWER = struct.Struct("<BIII")
READY = struct.Struct("<5s24s")  # sent once, when the process accepts requests: "ready", what its sandbox lacks
MAX_MESSAGE = 2000
BUFFER = 1 << 20  # bytes that a socket should hold: more than a square of 224 pixels has
