"""From every kind of pixels to 8-bit RGB: 16 bits, floats, transparency, modes and arrays."""

from __future__ import annotations

import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from iosr_fast.exceptions import BadImageError
from iosr_fast.images.geometry import Geometry
from iosr_fast.images.preprocess import decode_pixels, open_image
from tests.images.test_formats import rgb
from tests.pictures import encode


def png(values: np.ndarray, colour: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of 16-bit (H, W[, C]) values; Pillow writes grey ones only."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = values.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0))
    middle = b"".join(chunk(*one) for one in chunks)
    return b"\x89PNG\r\n\x1a\n" + header + middle + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def tiff(values: np.ndarray, bits: int, photometric: int, order: str = "<", data: bytes | None = None) -> bytes:
    """An uncompressed TIFF of one channel."""
    height, width = values.shape
    data = values.astype(values.dtype.newbyteorder(order)).tobytes() if data is None else data
    tags = [(256, width), (257, height), (258, bits), (259, 1), (262, photometric), (273, 8), (277, 1), (278, height)]
    entries = b"".join(struct.pack(f"{order}HHIHH", tag, 3, 1, value, 0) for tag, value in tags)
    entries += struct.pack(f"{order}HHII", 279, 4, 1, len(data))
    mark = b"II" if order == "<" else b"MM"
    folder = struct.pack(f"{order}H", len(tags) + 1) + entries + struct.pack(f"{order}I", 0)
    return mark + struct.pack(f"{order}HI", 42, 8 + len(data)) + data + folder


RAMP = (np.arange(16 * 24, dtype=np.uint32).reshape(16, 24) * 65535 // (16 * 24 - 1)).astype(np.uint16)
LEVELS = np.rint(RAMP / 257).astype(np.uint8)

# 16 bits and floats


@pytest.mark.parametrize("order", ["<", ">"])
def test_a_sixteen_bit_tiff_is_not_white(order: str) -> None:
    for data in (tiff(RAMP, 16, 1, order), encode(Image.fromarray(RAMP.astype(f"{order}u2")), "TIFF")):
        assert (rgb(data) == LEVELS[:, :, None]).all()


def test_a_sixteen_bit_png_is_not_white() -> None:
    for data in (encode(Image.fromarray(RAMP)), png(RAMP, 0)):
        assert (rgb(data) == LEVELS[:, :, None]).all()
    colours = np.stack([RAMP, RAMP[::-1], RAMP[:, ::-1]], 2)
    assert np.abs(rgb(png(colours, 2)).astype(int) - np.rint(colours / 257)).max() <= 1, "Pillow cuts the low bits off"
    (ppm,) = (b"P5 24 16 65535\n" + RAMP.astype(">u2").tobytes(),)
    assert (rgb(ppm) == LEVELS[:, :, None]).all()


def test_white_is_zero_and_twelve_bits_are_read_as_the_tiff_says() -> None:
    assert (rgb(tiff(RAMP, 16, 0)) == 255 - LEVELS[:, :, None]).all()
    values = (RAMP >> 4).astype(np.uint32)
    pairs = values.reshape(-1, 2)
    packed = np.stack([pairs[:, 0] >> 4, (pairs[:, 0] & 15) << 4 | pairs[:, 1] >> 8, pairs[:, 1] & 255], 1)
    found = rgb(tiff(RAMP, 12, 1, data=packed.astype(np.uint8).tobytes()))
    assert np.abs(found[:, :, 0].astype(int) - LEVELS).max() <= 1


SBIT = (b"sBIT", bytes([12]))
LOW = RAMP >> 4  # 12-bit values in the low bits


def ome(values: np.ndarray) -> bytes:
    """A TIFF of 16 bits whose OME-XML says that 12 are used."""
    return encode(Image.fromarray(values), "TIFF", description='<OME><Pixels SignificantBits="12"/></OME>')


@pytest.mark.parametrize(
    "data",
    [
        png(LOW, 0, SBIT),
        png(RAMP & 0xFFF0, 0, SBIT),  # shifted to the high bits, as the standard says
        ome(LOW),
        encode(Image.fromarray(LOW), "TIFF", tiffinfo={281: 4095}),
    ],
    ids=["sBIT, low bits", "sBIT, high bits", "OME-XML", "MaxSampleValue"],
)
def test_twelve_bits_in_sixteen_are_scaled_as_the_file_says(data: bytes) -> None:
    assert np.abs(rgb(data)[:, :, 0].astype(int) - LEVELS).max() <= 1
    assert decode_pixels(data, Geometry(8)).max() > 200


COLOURS, BLACK = np.stack([LOW] * 3, 2), np.zeros_like(LOW)
UNCLEAR = {
    "PNG": png(LOW, 0),
    "TIFF": tiff(LOW, 16, 1),
    "white is zero": tiff(LOW, 16, 0),
    "32 bits": encode(Image.fromarray(LOW.astype(np.int32)), "TIFF"),
    "PGM": b"P5 24 16 65535\n" + LOW.astype(">u2").tobytes(),
    "colours": png(COLOURS, 2),
    "colours and alpha": png(np.concatenate([COLOURS, RAMP[:, :, None]], 2), 6),
    "colours of 12 bits": png(COLOURS, 2, (b"sBIT", bytes([12] * 3))),
    "PIL image": Image.fromarray(LOW),
}


@pytest.mark.parametrize("name", UNCLEAR)
def test_what_would_be_black_is_refused(name: str) -> None:
    """Twelve bits in the low part of sixteen, of a file that says nothing or of colours that Pillow cuts."""
    for read in (rgb, lambda data: decode_pixels(data, Geometry(8))):
        with pytest.raises(BadImageError, match=r"from 0 to 65,535, got .*; save the image with 8 bits"):
            read(UNCLEAR[name])


@pytest.mark.parametrize(
    ("data", "level"),
    [
        (png(BLACK, 0), 0),
        (png(np.full_like(LOW, 4095), 0, (b"sBIT", bytes([16]))), 16),
        (png(np.full_like(LOW, 4080), 0, (b"sBIT", bytes([12]))), 16),  # shifted to the high bits, as the standard says
        (png(COLOURS, 2, (b"sBIT", bytes([16] * 3))), 15),
        (png(np.stack([RAMP] * 3, 2), 2, (b"sBIT", bytes([12] * 3))), 255),
    ],
    ids=["black", "all bits", "high bits", "colours of all bits", "bright colours"],
)
def test_what_is_dark_and_says_so_is_read(data: bytes, level: int) -> None:
    assert rgb(data).max() == level


def test_a_float_tiff_is_scaled_or_refused() -> None:
    unit = RAMP.astype(np.float32) / 65535

    def float_tiff(values: np.ndarray) -> bytes:
        return encode(Image.fromarray(values), "TIFF")

    for values in (unit, unit * 255, unit * 1.0005 - 0.0002):
        assert np.abs(rgb(float_tiff(values))[:, :, 0].astype(int) - LEVELS).max() <= 1
    with_nan, with_infinity = unit.copy(), unit.copy()
    with_nan[2, 2], with_infinity[3, 3] = np.nan, np.inf
    for values in (unit * 65535, unit - 0.5, unit * 2, unit * 8, with_nan, with_infinity):
        with pytest.raises(BadImageError, match=r"number 4: expected floats in \[0, 1\], or levels up to 255, got"):
            open_image(float_tiff(values), 4)


# Transparency and colours


def test_what_is_transparent_is_white() -> None:
    hidden = np.full((8, 8, 4), (200, 30, 60, 0), np.uint8)
    hidden[:, 4:, 3] = 255
    half = hidden.copy()
    half[:, 4:, 3] = 128
    image = Image.fromarray(hidden)
    palette = image.convert("RGB").quantize(4)
    transparent = palette.getpixel((0, 0))
    grey = Image.fromarray(hidden[:, :, :1].repeat(2, 2)[:, :, :2], "LA")
    grey.putalpha(image.getchannel("A"))
    sources: list[Any] = [
        image,
        hidden,
        encode(image),
        encode(image, "WEBP", lossless=True),
        encode(image, "TIFF"),
        image.convert("RGBa"),
        grey,
        grey.convert("La"),
        encode(grey),
    ]
    for source in sources:
        found = rgb(source)
        assert (found[:, :4] == 255).all() and (found[:, 4:] != 255).any()
        assert decode_pixels(source, Geometry(8))[0, 0].min() == 255
    assert np.abs(rgb(half)[0, 7].astype(int) - (227, 142, 157)).max() <= 1
    for source in (
        encode(palette, transparency=transparent),
        encode(palette, "GIF", transparency=transparent),
        encode(image.convert("RGB"), transparency=(200, 30, 60)),
        encode(image.convert("L"), transparency=image.convert("L").getpixel((0, 0))),
    ):
        assert (rgb(source) == 255).all() and decode_pixels(source, Geometry(4)).min() == 255


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (np.zeros((4, 4, 3), np.float32), r"array of float32; convert floats in \[0, 1\] with \(array \* 255\)"),
        (np.zeros((4, 4), np.uint16), r"array of uint16; convert 16 bits with \(array / 257\)"),
        (np.zeros((4, 4), np.int64), r"array of int64; .* array\.astype\(np\.uint8\)"),
        (np.zeros((4, 4), bool), r"array of bool; .* array \* np\.uint8\(255\)"),
        (np.zeros((3, 8, 9), np.uint8), r"got \(3, 8, 9\); move the channels to the last axis with np\.moveaxis"),
        (np.zeros((2, 8, 9, 3), np.uint8), r"got \(2, 8, 9, 3\)"),
        (np.zeros(9, np.uint8), r"got \(9,\)"),
        (np.zeros((4, 4, 5), np.uint8), r"got \(4, 4, 5\)"),
        (np.zeros((0, 4, 3), np.uint8), r"got \(0, 4, 3\)"),
        (3.5, "got float"),
    ],
)
def test_other_sources_are_refused_with_what_to_do(source: object, said: str) -> None:
    with pytest.raises(BadImageError, match=f"number 7: .*{said}"):
        open_image(source, 7)
