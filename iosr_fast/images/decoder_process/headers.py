"""What kind an encoded image is of and how large, read from its first bytes: nothing is decoded, nothing is allocated.

A few hundred bytes can claim billions of pixels, so the claim is read before a decoder sees the file. The resized
image is bounded as well: one of 1 x 60,000 pixels, whose shorter side is resized to 224, would have three billion.

This costs microseconds. What takes a walk through the whole file is in `structure`, for a process of its own.
"""

from __future__ import annotations

Encoded = bytes | bytearray | memoryview
Size = tuple[int, int]  # width, height

DAMAGED = "its headers are damaged, end too soon, or are far too many"
PNG = b"\x89PNG\r\n\x1a\n"
# Markers of JPEG's frame headers, which hold the size: C0 to CF but for DHT, JPG and DAC.
JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
JPEG_ALONE = frozenset({0x01, *range(0xD0, 0xD9)})  # markers without a length
_BEFORE_FRAME = 400  # segments and fill bytes; files of cameras have up to a hundred segments


def image_kind(data: Encoded) -> str:
    """ "PNG", "JPEG", "WEBP", or "" for anything else."""
    if data[:8] == PNG:
        return "PNG"
    if data[:3] == b"\xff\xd8\xff":
        return "JPEG"
    return "WEBP" if data[:4] == b"RIFF" and data[8:12] == b"WEBP" else ""


def claimed_size(data: Encoded) -> Size | None:
    """(width, height) as the first header says; None for other kinds and where no size of at least 1 x 1 is found."""
    read = {"PNG": _png_size, "JPEG": _jpeg_size, "WEBP": webp_size}.get(image_kind(data))
    size = None if read is None else read(data)
    return size if size is not None and min(size) > 0 else None


def work_pixels(size: Size, side: int) -> int:
    """The largest picture that is made of one of `size` on its way to `side` x `side`: itself, or the resized one."""
    short, long = min(size), max(size)
    return max(short * long, side * side * long // short)


def beyond(size: Size, side: int, max_pixels: int) -> str:
    """Which limit an image of `size`, whose shorter side is resized to `side`, is beyond; "" where none."""
    width, height = size
    if width * height > max_pixels:
        return f"expected at most {max_pixels} pixels, got {width} x {height}; send a smaller one"
    if min(size) > 0 and side * side * max(size) > max_pixels * min(size):
        return f"expected sides that are less unlike, got {width} x {height}; crop what matters"
    return ""


def _png_size(data: Encoded) -> Size | None:
    if len(data) < 33 or data[12:16] != b"IHDR":
        return None
    return int.from_bytes(data[16:20]), int.from_bytes(data[20:24])


def webp_size(data: Encoded, at: int = 12) -> Size | None:
    """The size in the chunk at `at`: of the canvas (VP8X), or of a frame."""
    kind, content = data[at : at + 4], data[at + 8 : at + 18]
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


def _jpeg_size(data: Encoded) -> Size | None:
    """Of the first frame header; there should be one, before the first scan."""
    at, end = 2, len(data) - 9
    for _ in range(_BEFORE_FRAME):
        if at > end or data[at] != 0xFF:
            return None
        marker = data[at + 1]
        if marker in JPEG_FRAMES:
            return int.from_bytes(data[at + 7 : at + 9]), int.from_bytes(data[at + 5 : at + 7])
        if marker in (0xDA, 0xD9):  # a scan, or the end
            return None
        if marker == 0xFF:  # a fill byte
            at += 1
        else:
            at += 2 if marker in JPEG_ALONE else 2 + int.from_bytes(data[at + 2 : at + 4])
    return None
