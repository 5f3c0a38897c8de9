"""Limits of images from untrusted sources, checked by the file's header: nothing is decoded or allocated.

A few hundred bytes can claim billions of pixels, so the claim is checked before a decoder reads the file. Resizing is
bounded too: an image of 1 x 60,000 pixels, with its shorter side resized to 224, would have three billion.

These checks take microseconds. What a file has beyond its header is bounded by the memory and CPU time of the process
that decodes it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from iosr_fast.images.geometry import Geometry

EncodedBytes = bytes | bytearray | memoryview
Size = tuple[int, int]  # width, height

DAMAGED = "its headers are damaged, truncated or far too many"
# Markers of JPEG frame headers, which hold the size: C0 to CF without DHT, JPG and DAC.
_JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_JPEG_ALONE = frozenset({0x01, *range(0xD0, 0xD9)})  # markers without a length
_RESIZED = 100_000_000
_USUAL_SCANS = 10  # of a progressive JPEG in colour
_BEFORE_FRAME = 400  # segments and fill bytes; files of cameras have up to a hundred segments


@dataclass(frozen=True)
class DecodeLimits:
    """Bounds of one image; None: no limit.

    max_bytes            encoded
    max_pixels           of the image, and of what resizing makes of it; without a limit resizing may make 100 million,
                         or as many as the image has
    max_pixels_together  of all images above 16 million pixels that are decoded at the same time
    timeout_s            CPU seconds for decoding one, or twice as long by the clock; enforced in a process only
    """

    max_bytes: int | None = None
    max_pixels: int | None = 100_000_000
    max_pixels_together: int = 100_000_000
    timeout_s: float = 4.0

    def bytes_error(self, count: int) -> str:
        """Why `count` encoded bytes are refused; "" if they are not."""
        if self.max_bytes is None or count <= self.max_bytes:
            return ""
        return f"expected at most {self.max_bytes} encoded bytes, got {count}; send a smaller image"

    def size_error(self, size: Size, geometry: Geometry | None) -> str:
        """Why an image of `size`, which becomes pixels by `geometry` (None: is not resized), is refused; "" if it is
        not."""
        width, height = size
        most = max(_RESIZED, width * height) if self.max_pixels is None else self.max_pixels
        if width * height > most:
            return f"expected at most {most} pixels, got {width} x {height}; send a smaller one"
        if geometry is not None and min(size) > 0 and work_pixels(size, geometry) > most:
            return f"aspect ratio too extreme ({width} x {height}); crop the image"
        return ""


UNLIMITED = DecodeLimits(max_pixels=None)  # for images of the caller's own


def image_kind(data: EncodedBytes) -> str:
    """ "PNG", "JPEG", "WEBP", or "" for other formats."""
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return "PNG"
    if data[:3] == b"\xff\xd8\xff":
        return "JPEG"
    return "WEBP" if data[:4] == b"RIFF" and data[8:12] == b"WEBP" else ""


def claimed_size(data: EncodedBytes) -> Size | None:
    """(width, height) in the first header; None for other formats and without a size of at least 1 x 1."""
    reader = {"PNG": _png_size, "JPEG": _jpeg_size, "WEBP": _webp_size}.get(image_kind(data))
    size = None if reader is None else reader(data)
    return size if size is not None and min(size) > 0 else None


def work_pixels(size: Size, geometry: Geometry) -> int:
    """A bound of the pixels of each picture on the way from `size` to the geometry's: the image, what is resized in one
    direction (EXIF may turn it), and in both."""
    (width, height), (columns, rows) = size, geometry.resized(*size)
    return max(width * height, columns * height, width * rows, columns * rows)


def scans_factor(data: EncodedBytes) -> float:
    """How many times as long as a usual one a JPEG may take for its scans; each goes over all pixels. 1 for others."""
    if image_kind(data) != "JPEG":
        return 1.0
    values = np.frombuffer(data, np.uint8)  # bytes.count takes three times as long, and holds the GIL
    # The marker of a scan; compressed data has none, because 0 follows 0xFF there.
    return max(1.0, np.count_nonzero((values[:-1] == 0xFF) & (values[1:] == 0xDA)) / _USUAL_SCANS)


def _png_size(data: EncodedBytes) -> Size | None:
    if len(data) < 33 or data[12:16] != b"IHDR":
        return None
    return int.from_bytes(data[16:20]), int.from_bytes(data[20:24])


def _webp_size(data: EncodedBytes) -> Size | None:
    """The size in the first chunk: of the canvas (VP8X) or of the only frame."""
    kind, content = data[12:16], data[20:30]
    if len(content) < 5:
        return None
    if kind == b"VP8L" and content[0] == 0x2F:
        bits = int.from_bytes(content[1:5], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if len(content) < 10:
        return None
    if kind == b"VP8X":
        return int.from_bytes(content[4:7], "little") + 1, int.from_bytes(content[7:10], "little") + 1
    if kind == b"VP8 " and content[3:6] == b"\x9d\x01\x2a":
        return int.from_bytes(content[6:8], "little") & 0x3FFF, int.from_bytes(content[8:10], "little") & 0x3FFF
    return None


def _jpeg_size(data: EncodedBytes) -> Size | None:
    """The size in the first frame header, which precedes the first scan."""
    at, end = 2, len(data) - 9
    for _ in range(_BEFORE_FRAME):
        if at > end or data[at] != 0xFF:
            return None
        marker = data[at + 1]
        if marker in _JPEG_FRAMES:
            return int.from_bytes(data[at + 7 : at + 9]), int.from_bytes(data[at + 5 : at + 7])
        if marker in (0xDA, 0xD9):  # a scan, or the end
            return None
        if marker == 0xFF:  # a fill byte
            at += 1
        else:
            at += 2 if marker in _JPEG_ALONE else 2 + int.from_bytes(data[at + 2 : at + 4])
    return None
