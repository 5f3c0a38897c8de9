"""The loop of a decoder process. Its standard input is a socket to the parent; it ends when the socket closes."""

from __future__ import annotations

import importlib
import socket
import sys
import warnings
from contextlib import suppress

import numpy as np
from PIL import Image

from iosr_fast.exceptions import BadImageError
from iosr_fast.images.decoder_process import confinement, sandbox
from iosr_fast.images.decoder_process.wire import ANSWER, MAX_MESSAGE, READY, REQUEST, Answer, Request, Status
from iosr_fast.images.limits import DecodeLimits
from iosr_fast.images.preprocess import open_image, resize_and_crop


def main() -> None:
    """Answer requests until the parent closes the socket."""
    # Import everything now: no file can be opened later. The common formats come first, as Pillow tries them in order.
    Image.preinit()
    importlib.import_module("PIL.WebPImagePlugin")
    Image.init()
    for name in ("PIL.ImageCms", "pillow_heif"):
        with suppress(ImportError):
            importlib.import_module(name)
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    confinement.confine(int(sys.argv[1]))
    with socket.socket(fileno=0) as parent:
        parent.sendall(READY.pack(b"ready", sandbox.enter().encode()))
        while True:
            request = Request(*REQUEST.unpack(_receive(parent, REQUEST.size)))
            confinement.limit(request.work_pixels, 2 * request.length, request.cpu_s)
            _answer(parent, request, _receive(parent, request.length))
            confinement.give_back(request.work_pixels)


def _receive(parent: socket.socket, count: int) -> bytearray:
    data = bytearray(count)
    left = memoryview(data)
    while left:
        received = parent.recv_into(left)
        if not received:
            sys.exit()
        left = left[received:]
    return data


def _answer(parent: socket.socket, request: Request, data: bytearray) -> None:
    # Pillow refuses more than twice this: a second check, of the size its decoder finds.
    Image.MAX_IMAGE_PIXELS = max(1, request.max_pixels // 2)
    try:
        pixels = _decode(request, data)
    except (MemoryError, BadImageError) as error:
        reason = str(getattr(error, "reason", ""))
        if MemoryError in (type(error), type(error.__cause__)):
            reason = "it needs more memory to decode than its size allows"
        message = reason.encode("utf-8", "replace")[:MAX_MESSAGE]
        parent.sendall(ANSWER.pack(*Answer(Status.BAD_IMAGE, 0, 0, len(message))) + message)
    else:
        parent.sendall(ANSWER.pack(*Answer(Status.OK, pixels.shape[0], pixels.shape[1], 0)))
        parent.sendall(pixels.data)


def _decode(request: Request, data: bytearray) -> np.ndarray:
    """C-contiguous pixels."""
    limits = DecodeLimits(max_pixels=request.max_pixels)
    image = open_image(data, 0, request.exif_orientation, request.geometry, limits)
    return np.ascontiguousarray(image) if request.whole else resize_and_crop(image, request.geometry)
