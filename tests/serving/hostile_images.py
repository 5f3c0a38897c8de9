"""Hostile images, and valid unusual ones, with random details."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable

import numpy as np
from PIL import Image

from tests.pictures import encode

Rng = np.random.Generator
_MIB = 1 << 20


def picture(rng: Rng, mode: str = "RGB", side: int | None = None) -> Image.Image:
    """Coarse patches of random colours; random size unless `side` is set."""
    width, height = (side, side) if side else rng.integers(8, 120, 2).tolist()
    channels = {"RGB": 3, "RGBA": 4, "CMYK": 4, "LA": 2, "L": 1, "P": 3}[mode]
    coarse = rng.integers(0, 256, (4, 4, channels), np.uint8)
    pixels = np.kron(coarse, np.ones((height // 4 + 1, width // 4 + 1, 1), np.uint8))[:height, :width]
    if mode == "P":
        return Image.fromarray(pixels).quantize(16)
    return Image.fromarray(pixels[..., 0] if channels == 1 else pixels, mode if mode != "L" else None)


def any_image(rng: Rng) -> bytes:
    """A valid image."""
    return encode(picture(rng), str(rng.choice(["JPEG", "PNG", "WEBP"])))


def chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *extra: bytes, rows: bytes = b"", depth: int = 8, colour: int = 0) -> bytes:
    """A PNG that claims a size, with `extra` chunks, and `rows` as its deflated pixels."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(rows, 9))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(extra) + pixels + chunk(b"IEND", b"")


def webp(kind: bytes, payload: bytes, *extra: bytes) -> bytes:
    chunks = kind + struct.pack("<I", len(payload)) + payload + b"".join(extra)
    return b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WEBP" + chunks


def _truncated(rng: Rng) -> bytes:
    data = any_image(rng)
    return data[: int(rng.integers(1, len(data)))]


def _flipped(rng: Rng) -> bytes:
    data = np.frombuffer(any_image(rng), np.uint8).copy()
    places = rng.integers(0, len(data), int(rng.integers(1, 30)))
    data[places] ^= (1 << rng.integers(0, 8, len(places))).astype(np.uint8)
    return data.tobytes()


def _claimed(rng: Rng) -> int:
    return int(rng.choice([20_000, 60_000]))


def _jpeg_bomb(rng: Rng) -> bytes:
    data = bytearray(encode(picture(rng), "JPEG"))
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = struct.pack(">HH", _claimed(rng), _claimed(rng))
    return bytes(data)


def _webp_bomb(rng: Rng) -> bytes:
    side = min(_claimed(rng), 16_383)
    bits = (side - 1) | (side - 1) << 14
    canvas = struct.pack("<I", _claimed(rng) - 1)[:3] * 2
    images = [
        webp(b"VP8L", b"\x2f" + struct.pack("<I", bits) + rng.bytes(50)),
        webp(b"VP8 ", b"\x10\x00\x00\x9d\x01\x2a" + struct.pack("<HH", side, side) + rng.bytes(50)),
        webp(b"VP8X", b"\x02\x00\x00\x00" + canvas, b"ANIM", struct.pack("<IIH", 6, 0, 0)),
    ]
    return images[int(rng.integers(3))]


def _jpeg_segments(rng: Rng) -> bytes:
    """Fifty to a hundred segments of metadata of the maximum size."""
    data = encode(picture(rng), "JPEG")
    segment = bytes([0xFF, int(rng.integers(0xE1, 0xEF))]) + struct.pack(">H", 65_535) + rng.bytes(65_533)
    return data[:2] + segment * int(rng.integers(50, 100)) + data[2:]


def _jpeg_scans(rng: Rng) -> bytes:
    """A progressive JPEG that repeats its last scan."""
    data = encode(picture(rng), "JPEG", progressive=True)
    last = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + last * 20_000 + data[-2:]


def _png_text(rng: Rng) -> bytes:
    """Text and profiles of some kilobytes that inflate to many megabytes."""
    bomb = zlib.compress(bytes(48 * _MIB), 9)
    kinds = [
        chunk(b"zTXt", b"Comment\0\0" + bomb),
        chunk(b"iTXt", b"Comment\0\1\0\0\0" + bomb),
        chunk(b"iCCP", b"profile\0\0" + bomb),
    ]
    return png(2, 2, kinds[int(rng.integers(3))], rows=b"\0ab" * 2)


IMAGES: dict[str, Callable[[Rng], bytes]] = {
    "truncated": _truncated,
    "flipped": _flipped,
    "PNG bomb": lambda rng: png(_claimed(rng), _claimed(rng), rows=bytes(1000)),
    "PNG with two headers": lambda rng: png(
        8, 8, chunk(b"IHDR", struct.pack(">IIBBBBB", _claimed(rng), _claimed(rng), 8, 2, 0, 0, 0)), rows=bytes(1000)
    ),
    "PNG bomb that is true": lambda rng: png(8_000, 8_000, rows=bytes(8_000 * 1_001), depth=1),
    "thin PNG": lambda rng: png(1, 60_000, rows=bytes(120_000)),
    "PNG of no size": lambda rng: png(0, int(rng.integers(0, 9)), rows=b"\0"),
    "PNG of many chunks": lambda rng: png(4, 4, chunk(b"teSt", b"") * 50_000, rows=bytes(20)),
    "PNG text": _png_text,
    "JPEG bomb": _jpeg_bomb,
    "JPEG of many markers": lambda rng: b"\xff\xd8" + b"\xff\xe0\x00\x02" * 100_000 + encode(picture(rng), "JPEG")[2:],
    "JPEG of many scans": _jpeg_scans,
    "WebP bomb": _webp_bomb,
    "too many bytes": lambda rng: any_image(rng) + bytes(9 * _MIB),
    "empty": lambda rng: b"",
    "zip": lambda rng: b"PK\x03\x04" + rng.bytes(500),
    "GIF": lambda rng: _frames(rng, "GIF"),
    "SVG": lambda rng: (
        b'<svg xmlns="http://www.w3.org/2000/svg" onload="alert(1)"><image href="file:///etc/passwd"/></svg>'
    ),
}


def _frames(rng: Rng, kind: str) -> bytes:
    rest = [picture(rng, side=40) for _ in range(int(rng.integers(2, 30)))]
    return encode(picture(rng, side=40), kind, save_all=True, append_images=rest, duration=10)


def _deep(rng: Rng, colour: int) -> bytes:
    """16 bits a channel; colour types of PNG: 0 grey, 2 RGB, 6 RGBA."""
    channels = {0: 1, 2: 3, 6: 4}[colour]
    return png(6, 5, rows=b"".join(b"\0" + rng.bytes(12 * channels) for _ in range(5)), depth=16, colour=colour)


FAIR: dict[str, Callable[[Rng], bytes]] = {
    "animated WebP": lambda rng: _frames(rng, "WEBP"),
    "animated PNG": lambda rng: _frames(rng, "PNG"),
    "CMYK JPEG": lambda rng: encode(picture(rng, "CMYK"), "JPEG"),
    "grey JPEG": lambda rng: encode(picture(rng, "L"), "JPEG"),
    "progressive JPEG": lambda rng: encode(picture(rng), "JPEG", progressive=True),
    "JPEG of many segments": _jpeg_segments,
    "16-bit PNG": lambda rng: _deep(rng, int(rng.choice([0, 2, 6]))),
    "palette PNG": lambda rng: encode(picture(rng, "P"), "PNG", transparency=0),
    "PNG with alpha": lambda rng: encode(picture(rng, str(rng.choice(["RGBA", "LA"]))), "PNG"),
    "1x1": lambda rng: encode(picture(rng, side=1), str(rng.choice(["JPEG", "PNG", "WEBP"]))),
    "long PNG": lambda rng: encode(picture(rng).resize((3, 900)), "PNG"),
}
