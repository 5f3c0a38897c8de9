"""Images in, uint8 pixels out: equal to torchvision's transform, and bad ones named."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from iosr_fast.exceptions import BadImageError
from iosr_fast.images.geometry import Geometry
from iosr_fast.images.listing import list_folder
from iosr_fast.images.preprocess import open_image, random_view, resize_and_crop, to_pixels


def picture(rng: np.random.Generator, height: int, width: int) -> Image.Image:
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("shape", [(64, 64), (65, 97), (200, 31), (333, 500), (32, 33), (1, 7)])
def test_geometry_equals_torchvision(rng: np.random.Generator, shape: tuple[int, int]) -> None:
    transforms = pytest.importorskip("torchvision.transforms", reason="torchvision comes with the train extra")
    image = picture(rng, *shape)
    reference = transforms.Compose(
        [transforms.Resize(32, transforms.InterpolationMode.BICUBIC), transforms.CenterCrop(32)]
    )
    np.testing.assert_array_equal(resize_and_crop(image, Geometry(32)), np.asarray(reference(image)))


def test_every_kind_of_source_gives_the_same_pixels(rng: np.random.Generator, tmp_path: Path) -> None:
    image = picture(rng, 40, 50)
    image.save(tmp_path / "a.png")
    expected = to_pixels(image, Geometry(32))
    assert expected.shape == (1, 32, 32, 3) and expected.dtype == np.uint8
    for source in (tmp_path / "a.png", str(tmp_path / "a.png"), np.asarray(image), [image], np.asarray(image)[None]):
        np.testing.assert_array_equal(to_pixels(source, Geometry(32)), expected)


def test_grey_and_alpha_become_rgb(rng: np.random.Generator) -> None:
    grey = rng.integers(0, 256, (32, 32), dtype=np.uint8)
    np.testing.assert_array_equal(to_pixels(grey, Geometry(32))[0], np.repeat(grey[:, :, None], 3, 2))
    assert to_pixels(rng.integers(0, 256, (32, 32, 4), dtype=np.uint8), Geometry(32)).shape == (1, 32, 32, 3)


def test_pixels_of_the_right_size_are_not_copied(rng: np.random.Generator) -> None:
    pixels = rng.integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    assert to_pixels(pixels, Geometry(32)) is pixels


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("nowhere.png", "nowhere.png: no such file"),
        (np.zeros((4, 4, 3), np.float32), "number 7: .* got an array of float32"),
        (np.zeros((4, 4, 5), np.uint8), r"got \(4, 4, 5\)"),
        (np.zeros((0, 4, 3), np.uint8), r"got \(0, 4, 3\)"),
        (3.5, "got float"),
    ],
)
def test_bad_sources_are_named(source: object, said: str) -> None:
    with pytest.raises(BadImageError, match=said):
        open_image(source, 7)


def test_views_differ_repeat_with_the_seed_and_mirror_only_if_asked() -> None:
    ramp = Image.fromarray(np.broadcast_to(np.arange(64, dtype=np.uint8)[None, :, None] * 4, (64, 64, 3)).copy())
    views = [random_view(ramp, Geometry(16), np.random.default_rng(0), mirror=False) for _ in range(2)]
    np.testing.assert_array_equal(views[0], views[1])
    rng = np.random.default_rng(0)
    rises = [
        (np.diff(random_view(ramp, Geometry(16), rng, mirror=False)[8, :, 0].astype(int)) >= 0).all() for _ in range(20)
    ]
    assert all(rises)
    mirrored = [
        (np.diff(random_view(ramp, Geometry(16), rng, mirror=True)[8, :, 0].astype(int)) <= 0).all() for _ in range(20)
    ]
    assert 0 < sum(mirrored) < 20


def test_folders(rng: np.random.Generator, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="found no folder"):
        list_folder(tmp_path / "nowhere")
    (tmp_path / "cat").mkdir()
    with pytest.raises(ValueError, match="at least two class folders"):
        list_folder(tmp_path)
    (tmp_path / "dog" / "more").mkdir(parents=True)
    picture(rng, 8, 8).save(tmp_path / "dog" / "more" / "x.PNG")
    with pytest.raises(ValueError, match="cat, found none"):
        list_folder(tmp_path)
    picture(rng, 8, 8).save(tmp_path / "cat" / "y.png")
    (tmp_path / "cat" / "notes.txt").write_text("not an image")
    paths, names, classes = list_folder(tmp_path)
    assert [path.name for path in paths] == ["y.png", "x.PNG"]
    assert names == ["cat", "dog"] and classes == ["cat", "dog"]


def test_a_bad_image_is_told_across_processes(tmp_path: Path) -> None:
    error = BadImageError(tmp_path / "a.jpg", 3, "no such file")
    again = copy.copy(error)  # by __reduce__, as it passes from one process to another
    assert (again.path, again.position, again.reason, str(again)) == (error.path, 3, "no such file", str(error))
