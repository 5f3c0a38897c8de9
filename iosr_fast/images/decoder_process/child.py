"""The loop of a decoder process. Its standard input is a socket to the parent; it ends when the socket closes."""

from __future__ import annotations

import importlib
import mmap
import os
import socket
import sys
import warnings

import numpy as np
from PIL import Image

from iosr_fast.exceptions import BadImageError
from iosr_fast.images.decode import decode_pixels
from iosr_fast.images.decoder_process import confinement
from iosr_fast.images.decoder_process.structure import structure_error
from iosr_fast.images.decoder_process.wire import ANSWER, MAX_MESSAGE, READY, REQUEST, Answer, Request, Status, Task
from iosr_fast.images.limits import DecodeLimits
from iosr_fast.images.preprocess import open_image


def main() -> None:
    """Answer requests until the parent closes the socket."""
    # Load all of Pillow's formats before memory is limited; the common ones first, because Pillow tries them in order.
    Image.preinit()
    importlib.import_module("PIL.WebPImagePlugin")
    Image.init()
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    confinement.confine(int(sys.argv[1]))
    with socket.socket(fileno=0) as parent:
        parent.sendall(READY)
        block: mmap.mmap | None = None
        while True:
            head, files, _, _ = socket.recv_fds(parent, REQUEST.size, 1, socket.MSG_WAITALL)
            if len(head) < REQUEST.size:
                return
            request = Request(*REQUEST.unpack(head))
            confinement.limit(request.work_pixels, request.block + 2 * request.length, request.cpu_s)
            if files:
                block = mmap.mmap(files[0], request.block)
                os.close(files[0])
            assert block is not None
            answer, message = _answer(request, _receive(parent, request.length), block)
            if request.task == Task.WHOLE:
                block = None
            parent.sendall(ANSWER.pack(*answer) + message)
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


def _answer(request: Request, data: bytearray, block: mmap.mmap) -> tuple[Answer, bytes]:
    # Pillow refuses more than twice this: a second check, of the size its decoder finds.
    Image.MAX_IMAGE_PIXELS = max(1, request.max_pixels // 2)
    try:
        if error := structure_error(data, request.max_pixels):
            raise BadImageError(None, 0, error)
        height, width = _decode(request, data, block)
        return Answer(Status.OK, height, width, 0), b""
    except MemoryError:
        return Answer(Status.NO_MEMORY, 0, 0, 0), b""
    except BadImageError as bad:
        if isinstance(bad.__cause__, MemoryError):
            return Answer(Status.NO_MEMORY, 0, 0, 0), b""
        message = bad.reason.encode("utf-8", "replace")[:MAX_MESSAGE]
        return Answer(Status.BAD_IMAGE, 0, 0, len(message)), message


def _decode(request: Request, data: bytearray, block: mmap.mmap) -> tuple[int, int]:
    """Write the pixels into the block; return height and width."""
    geometry = request.geometry

    def check(width: int, height: int) -> str:
        return DecodeLimits(max_pixels=request.max_pixels).size_error((width, height), geometry)

    if request.task == Task.CROP:
        pixels = decode_pixels(data, geometry, check=check, exact=True, exif_orientation=request.exif_orientation)
    else:
        pixels = np.asarray(open_image(data, exif_orientation=request.exif_orientation))
    if pixels.nbytes > len(block):
        raise BadImageError(None, 0, "it is larger than its header claims")
    np.frombuffer(block, np.uint8, pixels.size)[:] = pixels.reshape(-1)
    return pixels.shape[0], pixels.shape[1]
