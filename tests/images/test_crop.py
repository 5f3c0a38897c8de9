"""Parts of pictures: boxes, their text, the pixels, and one decoding for all parts of a file."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from iosr_fast.exceptions import BadImageError, IosrFastError
from iosr_fast.images.crop import Box, Crop, Sharing
from iosr_fast.images.geometry import Geometry
from iosr_fast.images.preprocess import decode_batch, open_image, to_pixels

NAN, INF = float("nan"), float("inf")


def test_a_box_has_the_pixels_that_it_touches() -> None:
    rng = np.random.default_rng(0)
    for _ in range(3000):
        width, height = (int(side) for side in rng.integers(1, 50, 2))
        x, y, w, h = (float(value) for value in np.round(rng.uniform(-60, 60, 4), int(rng.integers(0, 4))))
        box, outside = Box(x, y, abs(w) + 0.01, abs(h) + 0.01), (x >= width or y >= height)
        outside |= x + box.width <= 0 or y + box.height <= 0
        relative = Box(x / width, y / height, box.width / width, box.height / height, relative=True)
        for one in (box, relative, Crop.of(f"a.png#{relative}").box):  # type: ignore[union-attr]
            if outside:
                with pytest.raises(ValueError, match="expected a box within the picture"):
                    one.within((width, height))
                continue
            left, upper, right, lower = one.within((width, height))
            assert 0 <= left < right <= width and 0 <= upper < lower <= height
            assert max(0, x) - 1 < left <= max(0, x) + 1e-5
            assert min(width, x + box.width) - 1e-5 <= right < min(width, x + box.width) + 1


WRONG = [(NAN, 0, 1, 1), (0, 0, INF, 1), (0, 0, 1e308, 1), (10**400, 0, 1, 1), (0, 0, 0, 1), (0, 0, 1, -1)]


@pytest.mark.parametrize("values", [*WRONG, (0, 0, 1), (0, 0, 1, 1, 1), ("", 0, 1, 1), ("1e400", 0, 1, 1)])
def test_wrong_boxes_are_refused(values: tuple[Any, ...]) -> None:
    for make in (Box.of, lambda values: Crop("a.png", values), lambda values: Crop("a.png", Box(*values))):
        if len(values) == 4 or make is Box.of:
            with pytest.raises(IosrFastError, match="expected a box x, y, width, height of numbers"):
                make(values)
    with pytest.raises(IosrFastError, match=r"expected #xywh=x,y,width,height of numbers, .* got a\.png#xywh="):
        Crop.of("a.png#xywh=" + ",".join(map(str, values)))
    for value in (True, None):
        with pytest.raises(IosrFastError, match="expected a box"):
            Box.of([value, 0, 1, 1])


def test_shares_of_a_side_are_whole_pixels_despite_rounding() -> None:
    assert Box(0.1 * 3, 0.1, 0.3, 0.1 * 7, relative=True).within((10, 10)) == (3, 1, 6, 8)
    assert Box(-1, -1, 102, 51).within((100, 50)) == (0, 0, 100, 50)
    assert Box(3, 3, 1e-9, 1e-9).within((10, 10)) == (3, 3, 4, 4)
    assert not Box.of([1, 1, 2, 0.5]).relative and Box.of([0.5, 0.5, 1, 1]).relative


def test_the_text_of_a_part_has_all_digits() -> None:
    rng = np.random.default_rng(1)
    for relative in (False, True):
        for values in rng.uniform(0, 1, (500, 4)) * 10.0 ** rng.integers(-8, 1 if relative else 8, (500, 1)):
            crop = Crop("a b#c/d,e.png", Box(*map(float, values), relative=relative))
            read = Crop.of(str(crop))
            assert read is not None and read.box == crop.box and read.source == crop.source
    assert str(Crop("a.png", np.array([10, 20, 100, 50]))) == "a.png#xywh=10,20,100,50"
    assert Crop.of("a.png#xywh=pixel:1,2,3,4").box == (1, 2, 3, 4, False)  # type: ignore[union-attr]


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """40 x 20 pixels as stored, 20 x 40 upright, all of them different."""
    pixels = np.arange(2400).reshape(20, 40, 3).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "photo.png", exif=exif)
    return tmp_path / "photo.png"


def test_a_box_is_of_the_picture_as_it_is_read(photo: Path) -> None:
    for upright in (True, False):
        whole = np.asarray(open_image(photo, exif_orientation=upright))
        for source in (photo, photo.read_bytes(), Image.open(photo), *([whole] if upright else [])):
            part = open_image(Crop(source, (2, 3, 10, 15)), exif_orientation=upright)
            np.testing.assert_array_equal(part, whole[3:18, 2:12])
        text = f"{photo}#xywh=percent:50,50,60,25"
        height, width = whole.shape[:2]
        part = open_image(text, exif_orientation=upright)
        np.testing.assert_array_equal(part, whole[height // 2 : height * 3 // 4, width // 2 :])
    (wide,) = Sharing(0.25)([f"{photo}#xywh=2,3,10,16"])
    np.testing.assert_array_equal(open_image(wide), np.asarray(open_image(photo))[0:23, 0:15])
    assert str(wide) == f"{photo}#xywh=2,3,10,16"
    for box, margin in (((20, 0, 5, 5), 0.0), ((20, 0, 5, 5), 1.0)):  # a margin does not make a wrong box right
        with pytest.raises(BadImageError, match=r"photo\.png#xywh=20,0,5,5: expected a box within .* 20 x 40"):
            open_image(Crop(photo, box, margin))


def test_a_file_may_have_the_name_of_a_part(photo: Path) -> None:
    other = Image.new("RGB", (7, 7))
    other.save(photo.with_name("photo.png#xywh=0,0,2,2"), "PNG")
    other.save(photo.with_name("a#b.png"))
    assert open_image(f"{photo}#xywh=0,0,2,2").size == (7, 7) and open_image(f"{photo}#xywh=0,0,2,3").size == (2, 3)
    assert open_image(f"{photo.parent}/a#b.png#xywh=1,1,5,6").size == (5, 6)
    assert open_image(f"{photo}#xywh=0,0,2,2#xywh=1,1,5,5").size == (5, 5)
    for text, reason in (("#xywh=1,2,3", "expected #xywh=x,y"), ("#t=1", "no such file")):
        with pytest.raises(BadImageError, match=reason):
            open_image(f"{photo}{text}")


def test_parts_of_a_damaged_picture_keep_no_frames(photo: Path) -> None:
    photo.write_bytes(photo.read_bytes()[:100])
    errors = decode_batch([*Sharing()([f"{photo}#xywh=0,0,{side},5" for side in range(1, 101)])], Geometry(8)).errors
    assert all(f"#xywh=0,0,{side},5" in str(error) for side, error in enumerate(errors, 1))
    assert len([*traceback.walk_tb(errors[-1].__cause__.__traceback__)]) < 20  # type: ignore[union-attr]


def test_a_thin_box_is_no_bomb(tmp_path: Path) -> None:
    Image.new("L", (60_000, 3)).save(tmp_path / "wide.png")
    with pytest.raises(BadImageError, match=r"aspect ratio too extreme \(60000 x 1\)"):
        to_pixels([f"{tmp_path}/wide.png#xywh=0,1,60000,1"], Geometry(224))
