"""The one way to pixels: large JPEGs at a fraction of their size, then columns, then rows, by every caller."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, JpegImagePlugin

from benchmarks.photographs import photograph
from iosr_fast.backbones.demo.pictures import load_pictures
from iosr_fast.exceptions import BadImageError
from iosr_fast.images.geometry import Geometry
from iosr_fast.images.preprocess import MARGIN, decode_batch, decode_pixels, open_image, resize_and_crop, to_pixels
from iosr_fast.serving.batching import DecodeLimits
from iosr_fast.serving.batching.decoder import Decoder
from tests.images.geometries import GEOMETRIES
from tests.images.test_formats import stored
from tests.pictures import encode
from tests.serving.batching_fakes import to_decode


@pytest.fixture(scope="module")
def pictures() -> np.ndarray:
    images: np.ndarray = load_pictures("held-out").images
    return images


def one_pass(levels: np.ndarray, size: int, support: float, weight: Any) -> np.ndarray:
    """(n, ...) uint8 resized to (size, ...) along its first axis, with the filter's weights as integers of 22 bits."""
    scale, made = len(levels) / size, []
    wide = max(scale, 1.0)
    for centre in (np.arange(size) + 0.5) * scale:
        first, end = max(0, int(centre - support * wide + 0.5)), min(len(levels), int(centre + support * wide + 0.5))
        weights = weight(np.abs((np.arange(first, end) - centre + 0.5) / wide))
        integers = np.trunc(weights / weights.sum() * 2**22 + np.copysign(0.5, weights)).astype(np.int64)
        total = np.tensordot(integers, levels[first:end].astype(np.int64), 1)
        made.append(np.clip((total + 2**21) >> 22, 0, 255))
    return np.array(made, np.uint8)


def columns_then_rows(levels: np.ndarray, geometry: Geometry) -> np.ndarray:
    """The formula of an exported file: two products, uint8 between them, then the crop or the border."""

    def bicubic(at: np.ndarray) -> np.ndarray:
        near, far = (1.5 * at - 2.5) * at**2 + 1, ((-0.5 * at + 2.5) * at - 4) * at + 2
        return np.where(at < 1, near, np.where(at < 2, far, 0.0))

    def bilinear(at: np.ndarray) -> np.ndarray:
        return np.maximum(1 - at, 0)

    kernel: Any = (2.0, bicubic) if geometry.interpolation == "bicubic" else (1.0, bilinear)
    width, height = geometry.resized(levels.shape[1], levels.shape[0])
    for axis, size in ((1, width), (0, height)):
        if levels.shape[axis] != size:
            levels = np.moveaxis(one_pass(np.moveaxis(levels, axis, 0), size, *kernel), 0, axis)
    top, left = (round(max(0, side - geometry.size) / 2) for side in (height, width))
    levels = levels[top : top + geometry.size, left : left + geometry.size]
    made = np.full((geometry.size, geometry.size, 3), geometry.fill, np.uint8)
    top, left = ((geometry.size - side) // 2 for side in levels.shape[:2])
    made[top : top + levels.shape[0], left : left + levels.shape[1]] = levels
    return made


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("shape", [(150, 101), (20, 13), (64, 64), (31, 250), (250, 70)])
def test_columns_are_resized_before_rows_whatever_the_shape(geometry: Geometry, shape: tuple[int, int]) -> None:
    """Tall pictures are where the order of Pillow 13 changes the pixels."""
    noise = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    found = decode_pixels(noise, geometry)
    assert found.flags.c_contiguous and found.dtype == np.uint8
    np.testing.assert_array_equal(found, columns_then_rows(noise, geometry))


@pytest.mark.parametrize(("mode", "progressive"), [("RGB", False), ("L", True), ("CMYK", False)])
def test_a_large_jpeg_is_decoded_at_a_fraction(
    pictures: np.ndarray, mode: str, progressive: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    drafted: list[tuple[int, int]] = []
    load = JpegImagePlugin.JpegImageFile.load
    monkeypatch.setattr(JpegImagePlugin.JpegImageFile, "load", lambda self: (drafted.append(self.size), load(self))[1])
    geometry = Geometry(32)
    least = int(MARGIN * geometry.size)
    for short, fraction in ((2 * least - 8, 1), (2 * least, 2), (4 * least, 4), (8 * least, 8)):
        image = photograph(pictures[3], short + 304, short).convert(mode)
        data = encode(image, "JPEG", quality=90, progressive=progressive)
        off = np.abs(decode_pixels(data, geometry).astype(int) - resize_and_crop(open_image(data), geometry))
        assert off.mean() <= 1 and off.any() == (fraction > 1)
        full, decoded = drafted[-1], next(size for size in drafted if size != drafted[-1] or fraction == 1)
        assert full == (short + 304, short) and decoded == (full[0] // fraction, full[1] // fraction)
        assert min(decoded) >= least
        drafted.clear()


def jpegs(pictures: np.ndarray) -> Iterator[bytes]:
    """Of phones, cameras and scanners: drafted or not, turned or not."""
    sizes = ((800, 600), (600, 800), (1203, 801), (1600, 1201), (500, 375), (2049, 900))
    for i in range(24):
        exif = Image.Exif()
        exif[0x0112] = 1 + i % 8
        image = photograph(pictures[i], *sizes[i % len(sizes)], deviation=30)
        yield encode(image, "JPEG", quality=70 + i, subsampling=i % 3, progressive=i % 2 == 1, exif=exif)


def test_every_caller_has_the_same_pixels(pictures: np.ndarray, tmp_path: Path) -> None:
    files, geometry, paths = list(jpegs(pictures)), Geometry(64), list[Path]()
    for i, data in enumerate(files):
        paths.append(tmp_path / f"{i}.jpg")
        paths[-1].write_bytes(data)
    expected = to_pixels(paths, geometry)
    assert (expected != [resize_and_crop(open_image(path), geometry) for path in paths]).any((1, 2, 3)).sum() == 20
    errors, batch = decode_batch(paths, geometry)
    assert errors == [None] * len(files)
    found = {"bytes": to_pixels(files, geometry), "folders": batch}
    for isolated in (False, True):
        decoder = Decoder(DecodeLimits(), isolated)
        decoder.start()
        whole = [decoder.decode(to_decode(data, geometry, whole=True))[0] for data in files]
        found[f"support, {isolated}"] = to_pixels(whole, geometry)
        found[f"queries, {isolated}"] = np.stack([decoder.decode(to_decode(data, geometry))[0] for data in files])
        decoder.close()
    for way, pixels in found.items():
        np.testing.assert_array_equal(pixels, expected, way)


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_the_upright_picture_is_resized(pictures: np.ndarray, geometry: Geometry) -> None:
    """Odd margins differ from one side to the other."""
    for i, data in enumerate(islice(jpegs(pictures), 8)):
        upright = open_image(data, geometry=geometry)
        raw = np.asarray(open_image(data, exif_orientation=False, geometry=geometry))
        np.testing.assert_array_equal(stored(np.asarray(upright), 1 + i), raw)
        np.testing.assert_array_equal(decode_pixels(data, geometry), resize_and_crop(upright, geometry))


def test_errors_name_the_file(pictures: np.ndarray, tmp_path: Path) -> None:
    data = encode(photograph(pictures[5], 500, 375), "JPEG")
    text, cut, nowhere = tmp_path / "text.jpg", tmp_path / "cut.jpg", tmp_path / "nowhere.jpg"
    text.write_text("this is no image")
    cut.write_bytes(data[: len(data) // 2])
    for path, said in ((text, "not an image of a known format"), (cut, "truncated"), (nowhere, "no such file")):
        with pytest.raises(BadImageError, match=said) as raised:
            decode_pixels(path, Geometry(32), 4)
        assert raised.value.path == path and raised.value.position == 4
    with pytest.raises(BadImageError, match="number 4"):
        decode_pixels(data[:500], Geometry(32), 4)
    with pytest.raises(BadImageError, match="float32"):
        decode_pixels(np.zeros((4, 4, 3), np.float32), Geometry(32))
