"""The loop of a decoder process. Its standard input is a socket to the parent; it ends when the socket closes."""

from __future__ import annotations

import importlib
import socket
import sys
import warnings
from collections.abc import Mapping
from contextlib import suppress

from PIL import Image

from iosr_fast.images.crop import Box, Crop
from iosr_fast.images.decoder_process import confinement, sandbox
from iosr_fast.images.decoder_process.wire import ANSWER, MAX_MESSAGE, PART, READY, REQUEST, Answer, Request, Status
from iosr_fast.images.limits import DecodeLimits
from iosr_fast.images.preprocess import decode_parts


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
            boxes = PART.iter_unpack(_receive(parent, request.parts * PART.size))
            parts = {i: Crop(None, Box(*box), margin) for i, (*box, margin) in enumerate(boxes)}
            _answer(parent, request, parts or {0: None}, _receive(parent, request.length))
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


def _answer(parent: socket.socket, request: Request, parts: Mapping[int, Crop | None], data: bytearray) -> None:
    # Pillow refuses more than twice this: a second check, of the size its decoder finds.
    Image.MAX_IMAGE_PIXELS = max(1, request.max_pixels // 2)
    limits = DecodeLimits(max_pixels=request.max_pixels)
    for result in decode_parts(data, parts, request.exif_orientation, request.geometry, limits, request.whole):
        if not isinstance(result, Exception):
            parent.sendall(ANSWER.pack(*Answer(Status.OK, result.shape[0], result.shape[1], 0)))
            parent.sendall(result.data)
            continue
        reason = str(getattr(result, "reason", ""))
        if MemoryError in (type(result), type(result.__cause__)):
            reason = "it needs more memory to decode than its size allows"
        message = reason.encode("utf-8", "replace")[:MAX_MESSAGE]
        parent.sendall(ANSWER.pack(*Answer(Status.BAD_IMAGE, 0, 0, len(message))) + message)
