"""What an encoded image is and how large, read from its first bytes: nothing is decoded, nothing is allocated.

A few hundred bytes can claim billions of pixels, so the claim is read before a decoder sees the file. The resized
image is bounded as well: one of 1 x 60,000 pixels, whose shorter side is resized to 224, would have three billion.
"""

from __future__ import annotations

from dataclasses import dataclass

_PNG = b"\x89PNG\r\n\x1a\n"
# Markers of JPEG's frame headers, which hold the size: C0 to CF but for DHT, JPG and DAC.
_JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_JPEG_PROGRESSIVE = frozenset({0xC2, 0xC6, 0xCA, 0xCE})
_JPEG_ALONE = frozenset({0x01, *range(0xD0, 0xD9)})  # markers without a length
# Beyond these a file is made to cost: decoders take tens of microseconds a chunk, and a pass over all pixels a scan.
_PARTS = 1000  # markers before a JPEG's first scan; chunks of a PNG beside one for each KiB
_SCANS = 64  # of a progressive JPEG, which has about ten


@dataclass(frozen=True)
class ImageLimits:
    """`max_bytes` encoded; `max_pixels`, as it is and once its shorter side has `side` pixels."""

    max_bytes: int
    max_pixels: int
    side: int


@dataclass(frozen=True)
class Refusal:
    """Why an image is not classified: one of the codes too_large, unsupported_type, bad_image, too_many_pixels."""

    code: str
    message: str


def check_image(data: bytes, limits: ImageLimits) -> Refusal | None:
    """None where `data` may go to a decoder, which may still find it damaged."""
    if len(data) > limits.max_bytes:
        return too_large(len(data), limits.max_bytes)
    if data.startswith(_PNG):
        size = _png_size(data)
    elif data.startswith(b"\xff\xd8\xff"):
        size = _jpeg_size(data)
    elif data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        size = _webp_size(data)
    else:
        got = f"{len(data)} bytes that begin with {data[:8]!r}" if data else "nothing"
        return Refusal("unsupported_type", f"expected a JPEG, PNG or WebP image, got {got}")
    if size is None or min(size) < 1:
        return Refusal("bad_image", "its headers are damaged, end too soon, or are far too many")
    short, long = min(size), max(size)
    if short * long > limits.max_pixels:
        return Refusal(
            "too_many_pixels",
            f"expected at most {limits.max_pixels} pixels, got {size[0]} x {size[1]}; send a smaller one",
        )
    if limits.side * limits.side * long > limits.max_pixels * short:
        return Refusal(
            "too_many_pixels", f"expected sides that are less unlike, got {size[0]} x {size[1]}; crop what matters"
        )
    return None


def too_large(count: int, limit: int) -> Refusal:
    return Refusal("too_large", f"expected at most {limit} bytes an image, got {count}; send a smaller one")


def _png_size(data: bytes) -> tuple[int, int] | None:
    """(width, height) of the one header; None for two, of which decoders believe the last."""
    if len(data) < 33 or data[12:16] != b"IHDR":
        return None
    at = 33
    for _ in range(_PARTS + len(data) // 1024):
        kind = data[at + 4 : at + 8]
        if kind == b"IHDR":
            return None
        if len(kind) < 4 or kind == b"IEND":
            return int.from_bytes(data[16:20]), int.from_bytes(data[20:24])
        at += 12 + int.from_bytes(data[at : at + 4])
    return None


def _webp_size(data: bytes) -> tuple[int, int] | None:
    if len(data) < 30:
        return None
    kind = data[12:16]
    if kind == b"VP8X":
        return int.from_bytes(data[24:27], "little") + 1, int.from_bytes(data[27:30], "little") + 1
    if kind == b"VP8L" and data[20] == 0x2F:
        bits = int.from_bytes(data[21:25], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind == b"VP8 " and data[23:26] == b"\x9d\x01\x2a":
        return int.from_bytes(data[26:28], "little") & 0x3FFF, int.from_bytes(data[28:30], "little") & 0x3FFF
    return None


def _jpeg_size(data: bytes) -> tuple[int, int] | None:
    """The largest (width, height) of the frame headers before the first scan: there should be one. None without it, or
    with very many scans."""
    found: tuple[int, int] | None = None
    progressive = False
    at, end = 2, len(data) - 1
    for _ in range(_PARTS):
        if at >= end or data[at] != 0xFF:
            return found
        marker = data[at + 1]
        if marker == 0xFF:  # a fill byte
            at += 1
        elif marker in _JPEG_ALONE:
            at += 2
        elif marker in (0xDA, 0xD9):  # the scan, or the end
            return None if progressive and _count_scans(data, at) > _SCANS else found
        else:
            if marker in _JPEG_FRAMES and at + 9 <= len(data):
                size = int.from_bytes(data[at + 7 : at + 9]), int.from_bytes(data[at + 5 : at + 7])
                progressive = progressive or marker in _JPEG_PROGRESSIVE
                found = max(found or size, size, key=lambda sides: sides[0] * sides[1])
            at += 2 + int.from_bytes(data[at + 2 : at + 4])
    return None


def _count_scans(data: bytes, at: int) -> int:
    """Scans up to the end of the image. Its two bytes are not found within a scan, where FF is followed by 00."""
    stop = data.find(b"\xff\xd9", at)
    return data.count(b"\xff\xda", at, stop if stop >= 0 else len(data))
