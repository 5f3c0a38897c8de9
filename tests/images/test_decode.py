"""Fast decoding against the reference, resize_and_crop of the whole picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from benchmarks.photographs import photograph
from iosr_fast.clip.demo.pictures import load_pictures
from iosr_fast.exceptions import BadImageError
from iosr_fast.images import decode
from iosr_fast.images.decode import MARGIN, crop_pixels, decode_pixels
from iosr_fast.images.geometry import Geometry
from iosr_fast.images.preprocess import open_image, resize_and_crop
from tests.pictures import encode


@pytest.fixture(scope="module")
def pictures() -> np.ndarray:
    images: np.ndarray = load_pictures("held-out").images
    return images


def difference(data: bytes, size: int) -> np.ndarray:
    """Of the pixels to the reference's, in levels."""
    geometry = Geometry(size)
    got = decode_pixels(data, geometry)
    assert got.shape == (size, size, 3) and got.dtype == np.uint8 and got.flags.c_contiguous
    return np.abs(got.astype(int) - resize_and_crop(open_image(data), geometry))


@pytest.mark.parametrize(
    ("mode", "kind", "options"),
    [
        ("CMYK", "JPEG", {"quality": 85}),
        ("RGB", "JPEG", {"quality": 85, "progressive": True}),
        ("RGB", "WEBP", {"quality": 85}),
        ("RGBA", "PNG", {"compress_level": 1}),
        ("P", "GIF", {}),
        ("RGB", "TIFF", {}),
    ],
)
@pytest.mark.parametrize("shape", [(333, 250), (700, 525)])
def test_every_kind_of_file_is_within_a_level(
    pictures: np.ndarray, shape: tuple[int, int], mode: str, kind: str, options: dict[str, Any]
) -> None:
    image = photograph(pictures[7], *shape, deviation=40)
    if mode == "RGBA":
        image.putalpha(image.convert("L"))
    error = difference(encode(image.convert(mode), kind, **options), 64)
    assert error.mean() <= 1


def test_a_large_jpeg_is_decoded_at_a_fraction(pictures: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, tuple[int, int]]] = []

    def crop(image: Image.Image, geometry: Geometry, fraction: int, shape: tuple[int, int], *rest: int) -> np.ndarray:
        seen.append((fraction, image.size))
        return crop_pixels(image, geometry, fraction, shape, *rest)

    monkeypatch.setattr(decode, "crop_pixels", crop)
    size = 32
    for short in (int(MARGIN * size * 2) - 1, int(MARGIN * size * 2), int(MARGIN * size * 4), int(MARGIN * size * 8)):
        error = difference(encode(photograph(pictures[3], short + 301, short), "JPEG", quality=90), size)
        assert error.mean() <= 1
    assert [fraction for fraction, _ in seen] == [1, 2, 4, 8]
    assert all(min(shape) >= MARGIN * size for _, shape in seen)
    difference(encode(photograph(pictures[3], 701, 701), "PNG", compress_level=1), size)
    assert seen[-1] == (1, (701, 701))


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
        decode_pixels(np.zeros((4, 4, 3), np.float32), 32)
