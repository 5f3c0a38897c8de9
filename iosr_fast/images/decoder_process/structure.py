"""The decoding cost of an encoded image, read from its structure: segments, every claimed size, scans over the pixels.

The walk follows the segments' lengths, as decoders do, so that comments hide nothing. It takes up to a second for
megabytes of hostile data, so it runs in a process that can be killed.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from iosr_fast.images.limits import (
    DAMAGED,
    JPEG_ALONE,
    JPEG_FRAMES,
    Encoded,
    Size,
    claimed_size,
    image_kind,
    webp_size,
)

# Files beyond these are hostile: decoders take tens of microseconds per part, and a pass over all pixels per scan.
_PARTS = 1000  # markers of a JPEG; chunks of a PNG or WebP beside one for each KiB
_SCANS = 64  # of a progressive JPEG, which has about ten
_PASSES = 12  # scans of an image with the most pixels allowed
_PROGRESSIVE = frozenset({0xC2, 0xCA})
_SEQUENTIAL = frozenset({0xC0, 0xC1, 0xC9})  # baseline, extended, arithmetic
_COMPONENTS = 4  # of a JPEG; a sequential one has at most one scan for each
# The next marker from any position, also within a scan: not FF 00, which encodes FF in a scan's data, and not a restart
# marker; the last one of a run of fill bytes FF.
_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]", re.DOTALL)


def structure_error(data: Encoded, max_pixels: int) -> str:
    """Why an image must not be decoded; "" if it may be decoded, and for other formats."""
    check = {"PNG": _check_png, "JPEG": _check_jpeg, "WEBP": _check_webp}.get(image_kind(data))
    if check is None:
        return ""
    size = claimed_size(data)
    return DAMAGED if size is None else check(data, size, max_pixels)


def _check_jpeg(data: Encoded, size: Size, max_pixels: int) -> str:
    frame, scans, at = 0, 0, 2
    for _ in range(_PARTS):
        match = _MARKER.search(data, at)
        if match is None:
            return ""  # truncated: decoders pad or refuse it
        at, marker = match.end(), data[match.end() - 1]
        if marker == 0xD9:
            return ""
        if marker in JPEG_ALONE:
            continue
        length = int.from_bytes(data[at : at + 2])
        if length < 2:
            return f"expected segments of at least 2 bytes, got one of {length}"
        if marker in JPEG_FRAMES or marker == 0xDE:  # DE: hierarchical frames
            if frame or marker not in _PROGRESSIVE | _SEQUENTIAL:
                return "expected one frame, baseline, extended or progressive; save it as an ordinary JPEG"
            frame = marker
        elif marker == 0xDC:
            return "expected its height in the frame's header, got a later definition"
        elif marker == 0xDA:
            scans += 1
            if error := _too_many_scans(scans, frame, size, max_pixels):
                return error
        at += length
    return f"expected at most {_PARTS} segments, got more"


def _too_many_scans(scans: int, frame: int, size: Size, max_pixels: int) -> str:
    most = _SCANS if frame in _PROGRESSIVE else _COMPONENTS
    most = min(most, max(_COMPONENTS, _PASSES * max_pixels // (size[0] * size[1])))
    return f"expected at most {most} scans over {size[0]} x {size[1]} pixels, got more" if scans > most else ""


def _check_png(data: Encoded, size: Size, max_pixels: int) -> str:
    def check(kind: bytes, at: int) -> str:
        if kind == b"IHDR":
            return "expected one header, got two; decoders use the last one"
        if kind == b"fcTL":
            frame = int.from_bytes(data[at + 12 : at + 16]), int.from_bytes(data[at + 16 : at + 20])
            return _larger(frame, size)
        return ""

    return _walk(data, 33, 4, check, lambda at: 12 + int.from_bytes(data[at : at + 4]), b"IEND")


def _check_webp(data: Encoded, size: Size, max_pixels: int) -> str:
    def check(kind: bytes, at: int) -> str:
        if kind == b"ANMF":
            sides = data[at + 14 : at + 20]
            frame = int.from_bytes(sides[:3], "little") + 1, int.from_bytes(sides[3:], "little") + 1
            inner = webp_size(data, at + 24)
            return _larger(frame, size) or (_larger(inner, frame) if inner is not None else "")
        frame_size = webp_size(data, at)
        return _larger(frame_size, size) if frame_size is not None else ""

    def step(at: int) -> int:
        length = int.from_bytes(data[at + 4 : at + 8], "little")
        return 8 + length + length % 2

    return _walk(data, 12, 0, check, step, b"")


def _larger(frame: Size, size: Size) -> str:
    if frame[0] > size[0] or frame[1] > size[1]:
        return f"expected frames within {size[0]} x {size[1]} pixels, got one of {frame[0]} x {frame[1]}"
    return ""


def _walk(
    data: Encoded, at: int, name_at: int, check: Callable[[bytes, int], str], step: Callable[[int], int], last: bytes
) -> str:
    """Check the chunks from `at` on. A chunk has its name at `name_at` and `step(position)` bytes."""
    most = _PARTS + len(data) // 1024
    for _ in range(most):
        kind = bytes(data[at + name_at : at + name_at + 4])
        if len(kind) < 4 or kind == last:
            return ""
        if error := check(kind, at):
            return error
        at += step(at)
    return f"expected at most {most} chunks in {len(data)} bytes, got more"
