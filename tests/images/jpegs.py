"""JPEGs put together from segments, as no encoder writes them."""

from __future__ import annotations

import struct

from PIL import Image

from tests.pictures import encode

START, END, SCAN, COMMENT = b"\xff\xd8", b"\xff\xd9", 0xDA, 0xFE


def segment(marker: int, content: bytes = b"") -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content


def scan(*components: int, band: tuple[int, int, int] = (0, 63, 0)) -> bytes:
    """A scan of `components` without data, which decoders take for zeros. `band`: first and last coefficient, bits."""
    parts = b"".join(bytes([component, 0]) for component in components)
    return segment(SCAN, bytes([len(components)]) + parts + bytes(band))


def frame(marker: int, width: int, height: int, components: int = 3) -> bytes:
    parts = b"".join(bytes([i + 1, 0x11, 0]) for i in range(components))
    return segment(marker, struct.pack(">BHHB", 8, height, width, components) + parts)


def tables() -> bytes:
    """Quantisation and Huffman tables, as Pillow writes them."""
    data, at, found = encode(Image.new("L", (8, 8)), "JPEG"), 2, b""
    while data[at + 1] != SCAN:
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4])
        found += data[at:end] if data[at + 1] in (0xDB, 0xC4) else b""
        at = end
    return found


def jpeg(marker: int, width: int, height: int, *rest: bytes, components: int = 3) -> bytes:
    """Tables, a frame header of `marker`, then `rest`."""
    return START + tables() + frame(marker, width, height, components) + b"".join(rest) + END
