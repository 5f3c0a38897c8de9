"""Pixels by the geometry of every model of open_clip: each way to them against open_clip's own transform."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from open_clip import pretrained
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image

from benchmarks.photographs import photograph
from iosr_fast.backbones.demo.pictures import load_pictures
from iosr_fast.exceptions import BadImageError
from iosr_fast.images.geometry import Geometry
from iosr_fast.images.limits import DecodeLimits, scans_factor, work_pixels
from iosr_fast.images.preprocess import decode_pixels, open_image, resize_and_crop
from iosr_fast.serving.batching.decoder import Decoder
from tests.images.geometries import GEOMETRIES
from tests.images.jpegs import jpeg, scan
from tests.pictures import encode
from tests.serving.batching_fakes import to_decode

pytestmark = pytest.mark.slow

SHAPES = {"wide": (900, 200), "tall": (120, 700), "tiny": (20, 13), "even": (640, 480), "huge": (3000, 2000)}


def configurations() -> list[PreprocessCfg]:
    """The distinct preprocessing of all published weights, from the configurations alone, and two that pad."""
    found: dict[str, PreprocessCfg] = {}
    for model, tags in pretrained._PRETRAINED.items():
        size = open_clip.get_model_config(model)["vision_cfg"].get("image_size", 224)
        for tag in tags.values():
            fields = ("mean", "std", "interpolation", "resize_mode", "fill_color")
            cfg = PreprocessCfg(size=size, **{name: tag[name] for name in fields if tag.get(name) is not None})
            found[str(cfg)] = cfg
    padded = [
        PreprocessCfg(resize_mode="longest"),
        PreprocessCfg(size=63, resize_mode="longest", interpolation="bilinear", fill_color=127),
    ]
    return [*found.values(), *padded]


CONFIGURATIONS = configurations()


@functools.cache
def files() -> dict[str, bytes]:
    """JPEGs of each shape, and a PNG."""
    pictures = load_pictures("held-out").images
    made = {
        name: encode(photograph(pictures[i], *shape, deviation=40), "JPEG", quality=90)
        for i, (name, shape) in enumerate(SHAPES.items())
    }
    return made | {"PNG": encode(photograph(pictures[9], 300, 412, deviation=40), "PNG", compress_level=1)}


def of(cfg: PreprocessCfg) -> Geometry:
    return Geometry.from_open_clip(vars(cfg))


def named(cfg: PreprocessCfg) -> str:
    return f"{of(cfg)} {cfg.mean[0]:.2f}"


def levels_off(pixels: np.ndarray, expected: Any, cfg: PreprocessCfg) -> np.ndarray:
    """Between uint8 pixels, normalised, and the output of open_clip's transform, in levels of 1 / 255."""
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (cfg.mean, cfg.std))
    normalised = (torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255 - mean) / std
    return ((normalised - expected).abs() * std * 255).numpy()


@pytest.fixture(scope="module")
def process() -> Iterator[Decoder]:
    decoder = Decoder(DecodeLimits(timeout_s=60), True)
    decoder.start()
    yield decoder
    decoder.close()


@pytest.mark.parametrize("cfg", CONFIGURATIONS, ids=named)
def test_pixels_are_open_clips_in_the_decoder_process_too(cfg: PreprocessCfg, process: Decoder) -> None:
    geometry, transform = of(cfg), image_transform_v2(cfg, is_train=False)
    for name, data in files().items():
        expected = transform(open_image(data))
        most = 10 if name in ("tall", "PNG") else 0.01  # Pillow 13 resizes the rows of tall ones first, and clips
        assert levels_off(resize_and_crop(open_image(data), geometry), expected, cfg).max() < most, name
        decoded = decode_pixels(data, geometry)
        assert levels_off(decoded, expected, cfg).mean() <= 1.5, name
        np.testing.assert_array_equal(process.decode(to_decode(data, geometry))[0], decoded, name)


def test_padding_is_even_and_of_the_fill() -> None:
    white = Image.new("RGB", (40, 31), "white")
    pixels = resize_and_crop(white, Geometry(40, "longest", fill=9))
    assert (pixels[4:35] == 255).all() and (pixels[:4] == 9).all() and (pixels[35:] == 9).all()
    line = resize_and_crop(Image.new("RGB", (2000, 1), "white"), Geometry(32, "longest"))  # open_clip fails on it
    assert (line[15] == 255).all() and line.sum() == 32 * 3 * 255


def test_limits_follow_from_what_resizing_makes() -> None:
    limits = DecodeLimits(max_pixels=20_000_000)
    column = (1, 60_000)
    assert "aspect ratio too extreme" in limits.size_error(column, Geometry(224))
    assert (
        limits.size_error(column, Geometry(224, "squash")) == limits.size_error(column, Geometry(224, "longest")) == ""
    )
    assert (
        work_pixels(column, Geometry(224, "squash"))
        == work_pixels(column[::-1], Geometry(224, "squash"))
        == 224 * 60_000
    )
    assert work_pixels(column, Geometry(224, "longest")) <= 60_000 * 2
    assert "aspect ratio too extreme" in limits.size_error((1, 100_000), Geometry(224, "squash"))
    large = (15_000, 15_000)
    assert DecodeLimits(max_pixels=None).size_error(large, Geometry(224)) == ""
    for source in (encode(Image.new("L", (1, 2500))), Image.new("L", (2500, 1)), np.zeros((2500, 1), np.uint8)):
        with pytest.raises(BadImageError, match="aspect ratio too extreme"):
            decode_pixels(source, Geometry(224))  # a hundred million pixels, whatever the caller


@pytest.mark.parametrize("scans", [1, 10, 100, 1000])
def test_a_jpeg_is_as_much_work_as_its_scans(scans: int) -> None:
    data = jpeg(0xC2, 64, 64, scan(1, 2, 3, band=(0, 0, 0)), *[scan(1, band=(1, 63, 0))] * (scans - 1))
    assert scans_factor(data) == max(1, scans / 10)
    assert scans_factor(encode(Image.effect_noise((90, 70), 50).convert("RGB"), "JPEG", progressive=True)) == 1
    assert scans_factor(encode(Image.new("L", (9, 9))) + data) == 1  # no JPEG


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("size", [(1, 900), (900, 1), (3, 1400), (2000, 1200), (333, 64), (20, 13)])
def test_no_picture_on_the_way_has_more_pixels_than_its_bound(
    geometry: Geometry, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, core = [0], Image.Image._new
    monkeypatch.setattr(Image.Image, "_new", lambda self, im: (made.append(im.size[0] * im.size[1]), core(self, im))[1])
    for data in (encode(Image.new("L", size)), encode(Image.new("L", size), "JPEG")):
        decode_pixels(data, geometry)
    assert 0 < max(made) <= max(work_pixels(size, geometry), geometry.size**2)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"resize_mode": "stretch"}, "expected a resize_mode of shortest, longest, squash, got 'stretch'"),
        ({"interpolation": "lanczos"}, "expected interpolation bicubic or bilinear, got 'lanczos'"),
        ({"fill_color": 300, "resize_mode": "longest"}, "expected a fill of one level from 0 to 255, got 300"),
        ({"fill_color": (1, 2, 3), "resize_mode": "longest"}, r"one level from 0 to 255, got \(1, 2, 3\)"),
        ({"size": (224, 256)}, "expected a model of square pictures, got one of 224x256"),
    ],
)
def test_other_preprocessing_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Geometry.from_open_clip({"size": 224, **fields})


def test_open_clips_fields_and_a_manifests() -> None:
    assert Geometry.from_open_clip({"size": (224, 224), "interpolation": "random", "fill_color": 7}) == Geometry(224)
    assert Geometry.from_facts({"image_size": 64, "interpolation": "bicubic", "mean": 0}) == Geometry(64)
    assert Geometry(64).facts() == {"image_size": 64, "interpolation": "bicubic"}  # as ever
    for geometry in GEOMETRIES:
        assert Geometry.from_facts(geometry.facts()) == geometry
    assert len({str(geometry) for geometry in GEOMETRIES}) == len(GEOMETRIES) and str(Geometry(64)) == "64"
    with pytest.raises(ValueError, match="only with resize_mode longest"):
        Geometry(64, fill=3)
