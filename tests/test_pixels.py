"""From every kind of image to the same upright 8-bit RGB, whichever way it comes in."""

from __future__ import annotations

import io
import struct
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image, TiffImagePlugin, features

from iosr_fast import pixels
from iosr_fast.pipeline.decoding import decode_pixels
from iosr_fast.preprocess import BadImageError, as_image_list, find_bad, open_image, resize_and_crop, to_pixels
from tests.images import encode

ORIENTATIONS = range(1, 9)


def rgb(source: Any, **options: Any) -> np.ndarray:
    return np.asarray(open_image(source, **options))


def upright(width: int = 48, height: int = 32) -> np.ndarray:
    """Red, green, blue and white quarters: no turn and no mirror leaves them as they are."""
    made = np.zeros((height, width, 3), np.uint8)
    made[: height // 2, : width // 2, 0] = made[: height // 2, width // 2 :, 1] = 255
    made[height // 2 :, : width // 2, 2] = made[height // 2 :, width // 2 :] = 255
    return made


def stored(image: np.ndarray, orientation: int) -> np.ndarray:
    """An upright picture as a file with this EXIF orientation stores it: EXIF says where its row and column 0 are."""
    ways: dict[int, Callable[[np.ndarray], np.ndarray]] = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: a[:, ::-1].transpose(1, 0, 2),
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: a[::-1].transpose(1, 0, 2),
    }
    return np.ascontiguousarray(ways[orientation](image))


def oriented(kind: str, image: np.ndarray, orientation: int, **options: Any) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    if kind == "TIFF":
        tags = TiffImagePlugin.ImageFileDirectory_v2()
        tags[0x0112] = orientation
        return encode(stored(image, orientation), kind, tiffinfo=tags)
    return encode(stored(image, orientation), kind, exif=exif, **options)


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
        assert np.abs(decode_pixels(data, 8).astype(int) - to_pixels(data, 8)[0]).max() <= 1


def test_a_sixteen_bit_png_is_not_white() -> None:
    for data in (encode(Image.fromarray(RAMP)), png(RAMP, 0)):
        assert (rgb(data) == LEVELS[:, :, None]).all()
    colours = np.stack([RAMP, RAMP[::-1], RAMP[:, ::-1]], 2)
    assert np.abs(rgb(png(colours, 2)).astype(int) - np.rint(colours / 257)).max() <= 1, "Pillow cuts the low bits off"
    (ppm,) = (b"P5 24 16 65535\n" + RAMP.astype(">u2").tobytes(),)
    assert (rgb(ppm) == LEVELS[:, :, None]).all()


def test_sixteen_bits_with_alpha_are_on_white() -> None:
    alpha = np.where(np.arange(24) < 12, 0, 65535).astype(np.uint16) * np.ones_like(RAMP)
    found = rgb(png(np.stack([RAMP, alpha], 2), 4)).astype(int)
    assert (found[:, :12] == 255).all() and np.abs(found[:, 12:, 0] - LEVELS[:, 12:]).max() <= 1
    found = rgb(png(np.stack([RAMP, RAMP, RAMP, alpha], 2), 6)).astype(int)
    assert (found[:, :12] == 255).all() and np.abs(found[:, 12:, 0] - LEVELS[:, 12:]).max() <= 1
    found = rgb(png(RAMP, 0, (b"tRNS", struct.pack(">H", int(RAMP[3, 5])))))
    assert (found[3, 5] == 255).all() and (found[0] == LEVELS[0, :, None]).all()


def test_white_is_zero_and_twelve_bits_are_read_as_the_tiff_says() -> None:
    assert (rgb(tiff(RAMP, 16, 0)) == 255 - LEVELS[:, :, None]).all()
    values = (RAMP >> 4).astype(np.uint32)
    pairs = values.reshape(-1, 2)
    packed = np.stack([pairs[:, 0] >> 4, (pairs[:, 0] & 15) << 4 | pairs[:, 1] >> 8, pairs[:, 1] & 255], 1)
    found = rgb(tiff(RAMP, 12, 1, data=packed.astype(np.uint8).tobytes()))
    assert np.abs(found[:, :, 0].astype(int) - LEVELS).max() <= 1


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
    assert sorted(find_bad([float_tiff(unit), float_tiff(with_nan)])) == [1]


def test_integers_of_an_unknown_range_are_refused() -> None:
    assert (rgb(encode(Image.fromarray(RAMP.astype(np.int32)), "TIFF")) == LEVELS[:, :, None]).all()
    for values in (RAMP.astype(np.int32) * 2, RAMP.astype(np.int32) - 5, LEVELS.astype(np.int32)):
        for source in (Image.fromarray(values), encode(Image.fromarray(values), "TIFF")):
            with pytest.raises(BadImageError, match="expected integers that use the range from 0 to 65,535"):
                open_image(source)


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
        assert decode_pixels(source, 8)[0, 0].min() == 255
    assert np.abs(rgb(half)[0, 7].astype(int) - (227, 142, 157)).max() <= 1
    for source in (
        encode(palette, transparency=transparent),
        encode(palette, "GIF", transparency=transparent),
        encode(image.convert("RGB"), transparency=(200, 30, 60)),
        encode(image.convert("L"), transparency=image.convert("L").getpixel((0, 0))),
    ):
        assert (rgb(source) == 255).all() and decode_pixels(source, 4).min() == 255


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    image = Image.fromarray(upright()).convert(mode)
    expected = np.asarray(image.convert("RGB"))
    assert (rgb(image) == expected).all()
    assert rgb(image).shape == (32, 48, 3)


# Orientation


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP", "AVIF"])
@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_a_rotated_picture_is_turned_upright(kind: str, orientation: int, tmp_path: Path) -> None:
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow reads no AVIF")
    data = oriented(kind, upright(), orientation, **({"lossless": True} if kind == "WEBP" else {}))
    (tmp_path / "picture").write_bytes(data)
    for source in (data, tmp_path / "picture", Image.open(io.BytesIO(data))):
        made = open_image(source)
        assert (
            made.size == (48, 32)
            and np.abs(np.asarray(made)[4::8, 4::8].astype(int) - upright()[4::8, 4::8]).max() < 60
        )
        assert open_image(made).size == (48, 32), "not turned twice"
        assert (decode_pixels(source, 24, exact=True) == resize_and_crop(open_image(source), 24)).all()
    if kind != "TIFF":  # which Pillow turns
        expected = Image.open(io.BytesIO(data)).convert("RGB")
        assert (rgb(data, exif_orientation=False) == np.asarray(expected)).all()
        exact = decode_pixels(data, 24, exact=True, exif_orientation=False)
        assert (exact == resize_and_crop(expected, 24)).all()


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("shape", [(90, 61), (61, 90), (64, 99), (99, 64), (500, 375), (333, 250)])
def test_turning_the_crop_is_cropping_what_is_turned(
    rng: np.random.Generator, shape: tuple[int, int], orientation: int
) -> None:
    """Noise would show a crop that is off by one pixel, which an odd number of cut pixels gives on one of two sides."""
    data = oriented("PNG", rng.integers(0, 256, (*shape, 3), dtype=np.uint8), orientation, compress_level=1)
    found, expected = decode_pixels(data, 64), resize_and_crop(open_image(data), 64)
    assert found.flags.c_contiguous
    error = np.abs(found.astype(int) - expected)
    assert error.mean() < 1 and np.percentile(error, 99) <= 4


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_a_large_rotated_jpeg_is_decoded_at_a_fraction(orientation: int) -> None:
    data = oriented("JPEG", upright(700, 500), orientation, quality=90)
    found = decode_pixels(data, 32)
    assert np.abs(found.astype(int) - resize_and_crop(open_image(data), 32)).mean() <= 1
    turned = Image.open(io.BytesIO(data))
    assert turned.size == ((500, 700) if orientation > 4 else (700, 500))


@pytest.mark.parametrize("value", [0, 9, 255, 65535, "6", (6, 6), b"\x06"])
def test_an_impossible_orientation_is_ignored(value: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    image = Image.fromarray(upright())
    monkeypatch.setattr(image, "getexif", lambda: {0x0112: value})
    assert (rgb(image) == upright()).all()


@pytest.mark.parametrize(
    "block",
    [
        b"Exif\0\0",
        b"Exif\0\0II*\0",
        b"Exif\0\0II*\0\xff\xff\xff\x7f",
        b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12",
        b"Exif\0\0XX*\0\x08\0\0\0",
        b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x02\0\0\0\xff\0\0\0\0",
        b"Exif\0\0" + bytes(range(256)) * 8,
    ],
)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_damaged_exif_is_no_reason_to_refuse_a_picture(block: bytes, kind: str) -> None:
    options: dict[str, Any] = {"lossless": True} if kind == "WEBP" else {"quality": 95} if kind == "JPEG" else {}
    data = encode(upright(), kind, exif=block, **options)
    assert np.abs(rgb(data)[4::8, 4::8].astype(int) - upright()[4::8, 4::8]).max() < 60
    assert decode_pixels(data, 16).shape == (16, 16, 3)


# Formats


def test_a_renamed_eps_starts_no_ghostscript(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[str] = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: started.append("gs"))
    data = encode(upright(), "EPS")
    for name in ("a.jpg", "a.eps", "a.png"):
        (tmp_path / name).write_bytes(data)
        for read in (open_image, lambda path: decode_pixels(path, 8)):
            with pytest.raises(BadImageError, match=r"not an image of a known format \(JPEG, PNG"):
                read(tmp_path / name)
    with pytest.raises(BadImageError):
        open_image(data)
    assert started == []


@pytest.mark.parametrize("kind", ["EPS", "ICO", "TGA", "PCX", "DDS", "SGI", "IM", "JPEG2000", "ICNS", "SPIDER", "BLP"])
def test_other_decoders_of_pillow_are_not_started(kind: str) -> None:
    image = Image.fromarray(upright(64, 64)).convert("F" if kind == "SPIDER" else "P" if kind == "BLP" else "RGB")
    try:
        data = encode(image, kind)
    except (OSError, ValueError, KeyError) as error:
        pytest.skip(f"this Pillow writes no {kind}: {error}")
    with pytest.raises(BadImageError, match="not an image of a known format"):
        open_image(data)


def test_a_phones_jpeg_with_a_second_picture_is_its_first() -> None:
    pictures = [Image.fromarray(upright()), Image.new("RGB", (48, 32), "white")]
    data = encode(pictures[0], "MPO", save_all=True, append_images=pictures[1:], quality=95)
    assert Image.open(io.BytesIO(data)).format == "MPO"
    assert np.abs(rgb(data)[4::8, 4::8].astype(int) - upright()[4::8, 4::8]).max() < 60


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF", "AVIF"])
def test_the_first_frame_counts(kind: str) -> None:
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow reads no AVIF")
    frames = [Image.fromarray(upright()), Image.new("RGB", (48, 32), "black")]
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:])
    assert np.abs(rgb(data)[4::8, 4::8].astype(int) - upright()[4::8, 4::8]).max() < 60


def heic(image: np.ndarray, orientation: int = 1) -> bytes:
    library = pytest.importorskip("pillow_heif", reason="pillow-heif comes with the heic extra")
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    library.from_pillow(Image.fromarray(stored(image, orientation))).save(file, quality=95, exif=exif.tobytes())
    return file.getvalue()


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_heic_is_read_and_turned_once(orientation: int, tmp_path: Path) -> None:
    data = heic(upright(64, 48), orientation)
    (tmp_path / "a.HEIC").write_bytes(data)
    for source in (data, tmp_path / "a.HEIC"):
        made = open_image(source)
        assert made.size == (64, 48)
        assert np.abs(np.asarray(made)[4::8, 4::8].astype(int) - upright(64, 48)[4::8, 4::8]).max() < 60
        assert np.abs(decode_pixels(source, 16).astype(int) - to_pixels(source, 16)[0]).mean() <= 1


@pytest.mark.parametrize("brand", [b"heic", b"heix", b"mif1", b"msf1", b"hevc"])
def test_heic_without_its_library_names_the_command(
    brand: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels._register_heif.cache_clear()
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    path = tmp_path / "a.heic"
    path.write_bytes(b"\0\0\0\x18ftyp" + brand + b"\0\0\0\0mif1heic" + bytes(64))
    for read in (open_image, lambda path: decode_pixels(path, 8)):
        with pytest.raises(BadImageError, match=r"a\.heic: pillow_heif is needed .* pip install 'iosr_fast\[heic\]'"):
            read(path)


def test_a_container_that_holds_avif_too_is_read_by_pillow() -> None:
    assert not pixels._is_heif(b"\0\0\0\x20ftypmif1\0\0\0\0mif1avifmiaf" + bytes(8))
    assert not pixels._is_heif(b"\0\0\0\x14ftypavif\0\0\0\0heic" + bytes(8))
    assert not pixels._is_heif(b"\0\0\0\x14ftypisom\0\0\0\0" + b"mp42heic"), "behind the box"
    assert not pixels._is_heif(b"") and not pixels._is_heif(b"\xff\xd8\xff")


@pytest.mark.parametrize(
    ("make", "said"), [("mkdir", "it is a folder, not an image"), ("mkfifo", "not a regular file")]
)
def test_what_is_no_file_is_called_what_it_is(make: str, said: str, tmp_path: Path) -> None:
    import os

    getattr(os, make)(tmp_path / "a.jpg")
    for read in (open_image, lambda path: decode_pixels(path, 8)):
        with pytest.raises(BadImageError, match=rf"a\.jpg: it is {said.removeprefix('it is ')}"):
            read(tmp_path / "a.jpg")


# Arrays


def test_arrays_with_one_channel_are_grey() -> None:
    grey = upright()[:, :, 0]
    assert (rgb(grey[:, :, None]) == grey[:, :, None]).all() and (rgb(grey) == grey[:, :, None]).all()
    assert to_pixels(np.stack([grey[:, :, None]] * 3), 16).shape == (3, 16, 16, 3)


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (np.zeros((4, 4, 3), np.float32), r"array of float32: of floats in \[0, 1\], \(array \* 255\)"),
        (np.zeros((4, 4), np.uint16), r"array of uint16: of 16 bits, \(array / 257\)"),
        (np.zeros((4, 4), np.int64), r"array of int64: .* array\.astype\(np\.uint8\)"),
        (np.zeros((4, 4), bool), r"array of bool: array \* np\.uint8\(255\)"),
        (np.zeros((3, 8, 9), np.uint8), r"got \(3, 8, 9\); an array's channels come last: np\.moveaxis"),
        (np.zeros((2, 8, 9, 3), np.uint8), r"got \(2, 8, 9, 3\)"),
        (np.zeros(9, np.uint8), r"got \(9,\)"),
    ],
)
def test_other_arrays_are_refused_with_what_to_do(array: np.ndarray, said: str) -> None:
    with pytest.raises(BadImageError, match=said):
        open_image(array)


def test_anything_with_an_array_is_an_array() -> None:
    class Foreign:
        def __init__(self, array: np.ndarray) -> None:
            self.array = array

        def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
            return self.array

    assert (rgb(Foreign(upright())) == upright()).all()
    assert len(as_image_list(Foreign(upright()))) == 1 and len(as_image_list(Foreign(np.stack([upright()] * 5)))) == 5
    paths = as_image_list(np.array(["a.png", "b.png"]))
    assert paths == ["a.png", "b.png"]
    assert as_image_list(np.array([Path("a.png")], dtype=object)) == [Path("a.png")]
