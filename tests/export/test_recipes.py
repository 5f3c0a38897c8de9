"""The recipes of docs/export.md and the page for browsers give the library's labels for all kinds of pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from benchmarks.one_file import compared, in_library
from benchmarks.photographs import photograph
from benchmarks.runtimes import Answer, runtimes
from iosr_fast import Classifier
from tests.demo_cache import demo_bundle
from tests.export.recipes import TOOLS
from tests.pictures import encode, turned
from tools.demo.bundle import held_out_queries

pytestmark = pytest.mark.slow
MAX_ERROR = 0.3
# What a runtime can't do as the library does; labels are equal all the same, or the file is not read (None).
INEXACT: dict[str, dict[str, float | None]] = {
    "node": {"large.jpg": 0.01, "grey-16.png": 0.01},
    "wasm": {"large.jpg": 0.01, "grey-16.png": 0.01},
    # Which rounds inks down, and opens no TIFF.
    "chromium": {"large.jpg": 0.02, "grey-16.png": 0.01, "cmyk.jpg": 0.01, "turned.tif": None},
    "c++": {"alpha.webp": None, "turned.tif": None},
}


def kinds_of_pictures() -> dict[str, bytes]:
    images = held_out_queries(12, 5)[0]
    wide, tall = (photograph(images[i], *size, i) for i, size in ((0, (320, 240)), (1, (150, 330))))
    transparent = wide.copy()
    transparent.putalpha(Image.fromarray(np.tile(np.linspace(0, 255, 320).astype(np.uint8), (240, 1))))
    palette = photograph(images[2], 200, 200, 2).quantize(32)
    deep = np.minimum(np.asarray(tall.convert("L")) * np.uint32(257) + 200, 65535).astype(np.uint16)  # rounded up
    inks = Image.merge("CMYK", [*tall.convert("CMYK").split()[:3], Image.linear_gradient("L").resize(tall.size)])
    # A profile with red and blue exchanged; the library ignores profiles.
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    profile = profile.replace(b"rXYZ", b"tmp_").replace(b"bXYZ", b"rXYZ").replace(b"tmp_", b"bXYZ")
    return {
        "plain.jpg": encode(wide, "JPEG", quality=90),
        "profile.jpg": encode(wide, "JPEG", quality=90, icc_profile=profile),
        "grey.jpg": encode(tall.convert("L"), "JPEG"),
        "cmyk.jpg": encode(inks, "JPEG"),
        **{f"turned-{turn}.jpg": turned(wide, turn) for turn in (3, 6, 8)},
        "large.jpg": encode(photograph(images[8], 443, 389, 8), "JPEG"),
        "turned.png": turned(tall, 6, "PNG"),
        "turned.tif": turned(tall.convert("L"), 6, "TIFF"),
        "alpha.png": encode(transparent),
        "alpha.webp": encode(transparent, "WEBP", lossless=True),
        "grey-alpha.png": encode(transparent.convert("LA")),
        "palette.png": encode(palette),
        "clear-palette.png": encode(palette, transparency=int(np.asarray(palette)[0, 0])),
        "grey-16.png": encode(deep),
    }


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path], list[Answer]]:
    """The exported file, pictures, and the library's answers."""
    folder = tmp_path_factory.mktemp("recipes")
    classifier = Classifier.load(demo_bundle(12, 5))
    classifier.export(folder / "pets.onnx", max_error=MAX_ERROR)
    for name, data in kinds_of_pictures().items():
        (folder / name).write_bytes(data)
    paths = [folder / name for name in kinds_of_pictures()]
    return folder / "pets.onnx", paths, in_library(classifier, paths, MAX_ERROR)


@pytest.mark.parametrize("runtime", sorted(runtimes(Path())))
def test_a_recipe_gives_the_labels_of_the_library(runtime: str, place: tuple[Path, list[Path], list[Answer]]) -> None:
    model, paths, truth = place
    inexact = INEXACT.get(runtime, {})
    read = [i for i, path in enumerate(paths) if inexact.get(path.name, 0) is not None]
    tools = TOOLS.get(runtime, Path)()
    answers = runtimes(tools)[runtime](model, [paths[i] for i in read])
    assert len({one["label"] for one in truth}) > 2 and {one["accepted"] for one in truth} == {True, False}
    for i, answer in zip(read, answers, strict=True):
        row = compared([answer], [truth[i]])
        assert row["labels_equal"] == row["accepted_equal"] == 1, paths[i].name
        assert row["max_dp"] <= (inexact.get(paths[i].name) or 1e-3), (paths[i].name, row)
