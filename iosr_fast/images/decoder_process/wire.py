"""Messages to and from a decoder process: headers of fixed size, then bytes. Pixels go through shared memory."""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import NamedTuple

from iosr_fast.images.geometry import INTERPOLATIONS, RESIZE_MODES, Geometry


class Task(IntEnum):
    CROP = 0  # pixels (size, size, 3), as the encoder takes them
    WHOLE = 1  # the whole image, (height, width, 3); the process then drops the block


class Status(IntEnum):
    OK = 0  # the pixels are in the block
    BAD_IMAGE = 1  # the message says why
    NO_MEMORY = 2


class Request(NamedTuple):
    """`length` bytes of an encoded image follow. `block` is the size of a new shared block, sent as a file descriptor
    with this message; 0: the previous block. `work_pixels`: of the largest picture during decoding, by the header. The
    geometry is sent as `size`, the positions of its modes in RESIZE_MODES and INTERPOLATIONS, and `fill`."""

    task: int
    size: int
    resize_mode: int
    interpolation: int
    fill: int
    block: int
    length: int
    max_pixels: int
    work_pixels: int
    cpu_s: float
    exif_orientation: bool

    @property
    def geometry(self) -> Geometry:
        return Geometry(self.size, RESIZE_MODES[self.resize_mode], INTERPOLATIONS[self.interpolation], self.fill)


def geometry_fields(geometry: Geometry) -> tuple[int, int, int, int]:
    """The fields of a Request from `size` to `fill`."""
    mode, interpolation = RESIZE_MODES.index(geometry.resize_mode), INTERPOLATIONS.index(geometry.interpolation)
    return geometry.size, mode, interpolation, geometry.fill


class Answer(NamedTuple):
    """`length` bytes of a message follow."""

    status: int
    height: int
    width: int
    length: int


REQUEST = struct.Struct("<BIBBBQQQQd?")
ANSWER = struct.Struct("<BIII")
READY = b"ready"  # sent once, when the process accepts requests
MAX_MESSAGE = 2000
