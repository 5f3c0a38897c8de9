"""Messages to and from a decoder process: headers of fixed size, then bytes. Pixels go through shared memory."""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import NamedTuple


class Task(IntEnum):
    CROP = 0  # pixels (side, side, 3), as the encoder takes them
    WHOLE = 1  # the whole image, (height, width, 3); the process then drops the block


class Status(IntEnum):
    OK = 0  # the pixels are in the block
    BAD_IMAGE = 1  # the message says why
    NO_MEMORY = 2


class Request(NamedTuple):
    """`length` bytes of an encoded image follow. `block` is the size of a new shared block, sent as a file descriptor
    with this message; 0: the previous block. `work_pixels`: of the largest picture during decoding, by the header."""

    task: int
    side: int
    block: int
    length: int
    max_pixels: int
    work_pixels: int
    cpu_s: float
    exif_orientation: bool


class Answer(NamedTuple):
    """`length` bytes of a message follow."""

    status: int
    height: int
    width: int
    length: int


REQUEST = struct.Struct("<BIQQQQd?")
ANSWER = struct.Struct("<BIII")
READY = b"ready"  # sent once, when the process accepts requests
MAX_MESSAGE = 2000
