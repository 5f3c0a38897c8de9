"""Pixels by the geometry of every model of open_clip: each way to them against open_clip's own transform."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch")
open_clip = pytest.importorskip("open_clip")
from open_clip import pretrained  # noqa: E402
from open_clip.transform import PreprocessCfg, image_transform_v2  # noqa: E402

from benchmarks.photographs import photograph  # noqa: E402
from iosr_fast.clip.demo.pictures import load_pictures  # noqa: E402
from iosr_fast.exceptions import BadImageError  # noqa: E402
from iosr_fast.images.decode import crop_pixels, decode_pixels  # noqa: E402
from iosr_fast.images.geometry import Geometry  # noqa: E402
from iosr_fast.images.limits import DecodeLimits, work_pixels  # noqa: E402
from iosr_fast.images.preprocess import open_image, random_view, resize_and_crop, to_pixels  # noqa: E402
from iosr_fast.serving.batching.processes import DecoderProcess  # noqa: E402
from tests.images.geometries import GEOMETRIES  # noqa: E402
from tests.pictures import encode  # noqa: E402

pytestmark = pytest.mark.slow

FOREVER = float("inf")
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


@pytest.mark.parametrize("cfg", CONFIGURATIONS, ids=named)
def test_pixels_are_open_clips(cfg: PreprocessCfg) -> None:
    geometry, transform = of(cfg), image_transform_v2(cfg, is_train=False)
    for name, data in files().items():
        expected = transform(open_image(data))
        exact = levels_off(resize_and_crop(open_image(data), geometry), expected, cfg)
        assert exact.max() < 0.01, name
        assert levels_off(decode_pixels(data, geometry, exact=True), expected, cfg).max() < 0.01, name
        assert levels_off(to_pixels([data], geometry)[0], expected, cfg).max() < 0.01, name
        pixels = decode_pixels(data, geometry)
        assert pixels.shape == (geometry.size, geometry.size, 3) and pixels.flags.c_contiguous
        assert levels_off(pixels, expected, cfg).mean() <= 1, name


@pytest.fixture(scope="module")
def process() -> Iterator[DecoderProcess]:
    decoder = DecoderProcess(DecodeLimits(timeout_s=60))
    decoder.start()
    yield decoder
    decoder.close()


@pytest.mark.parametrize("cfg", CONFIGURATIONS, ids=named)
def test_the_decoder_process_has_the_geometry(cfg: PreprocessCfg, process: DecoderProcess) -> None:
    for name, data in files().items():
        expected = resize_and_crop(open_image(data), of(cfg))
        np.testing.assert_array_equal(process.decode(data, 0, of(cfg), FOREVER), expected, name)


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_picture_is_resized_as_an_upright_one(geometry: Geometry, orientation: int) -> None:
    """Noise would show a shift by one pixel; odd margins differ from one side to the other."""
    rng, exif = np.random.default_rng(orientation), Image.Exif()
    exif[0x0112] = orientation
    for width, height in ((201, 90), (90, 201), (64, 63), (31, 64)):
        stored = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        data = encode(stored, "PNG", exif=exif)
        off = np.abs(decode_pixels(data, geometry).astype(int) - resize_and_crop(open_image(data), geometry))
        assert off.mean() < 0.5, (width, height)


def test_padding_is_even_and_of_the_fill() -> None:
    white = Image.new("RGB", (40, 31), "white")
    pixels = resize_and_crop(white, Geometry(40, "longest", fill=9))
    assert (pixels[4:35] == 255).all() and (pixels[:4] == 9).all() and (pixels[35:] == 9).all()
    assert crop_pixels(white.convert("L"), Geometry(40, "longest", fill=9)).tolist() == pixels.tolist()
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
    with pytest.raises(BadImageError, match="aspect ratio too extreme"):
        decode_pixels(encode(Image.new("L", (1, 2000))), Geometry(224), limits=DecodeLimits(max_pixels=99_999))


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
