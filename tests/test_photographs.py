"""Photographs as telephones, scanners and editors store them: one label, whichever way they come in."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import wait
from pathlib import Path
from typing import Any

import numpy as np
import pillow_heif
import pytest
from PIL import Image, features

from iosr_fast.backbones.demo.pictures import load_pictures
from iosr_fast.classifier import Classifier
from iosr_fast.images.preprocess import open_image
from iosr_fast.serving.batching import BatchingClassifier
from tests.demo_cache import shared_cache
from tests.images.test_pixels import png
from tests.pictures import encode, turned
from tests.serving.http_client import serving

pytestmark = pytest.mark.slow
SHOTS = 3
SIZES = ((300, 200), (800, 600), (1203, 801), (450, 600))  # one a class; JPEGs from 384 are decoded at a fraction
TOLERANCE = 1e-4  # of probabilities: batches of other sizes round otherwise


def grey(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("L"))


def hidden(image: Image.Image) -> Image.Image:
    """RGBA whose white is transparent, with noise under it: who looks at the stored colours sees another picture."""
    pixels = np.asarray(image)
    white = (pixels == 255).all(2)
    colours = np.where(white[:, :, None], np.random.default_rng(0).integers(0, 256, pixels.shape), pixels)
    alpha = np.where(white, 0, 255)[:, :, None]
    return Image.fromarray(np.concatenate([colours, alpha], 2).astype(np.uint8))


def palette(image: Image.Image) -> bytes:
    """White is a transparent entry of the palette, and green."""
    made = image.quantize(255, dither=Image.Dither.NONE)
    indices = np.where((np.asarray(image) == 255).all(2), 255, np.asarray(made)).astype(np.uint8)
    stored = Image.fromarray(indices).convert("P")
    stored.putpalette([*(made.getpalette() or [])[:765], 0, 255, 0])
    return encode(stored, transparency=255)


def sixteen_bit(image: Image.Image) -> bytes:
    return png(np.asarray(image).astype(np.uint16) * 257, 2)


def deep_float(image: Image.Image) -> bytes:
    return encode(Image.fromarray(grey(image).astype(np.float32) / 255), "TIFF")


# Each makes a file of an upright RGB picture.
FORMS: dict[str, Callable[[Image.Image], bytes]] = {
    "baseline.jpg": lambda image: encode(image, "JPEG", quality=95),
    "progressive.JPG": lambda image: encode(image, "JPEG", quality=95, progressive=True),
    "turned-3.jpeg": lambda image: turned(image, 3, quality=95),
    "turned-6.JPEG": lambda image: turned(image, 6, quality=95),
    "turned-8.jfif": lambda image: turned(image, 8, quality=95),
    "cmyk.jpg": lambda image: encode(image.convert("CMYK"), "JPEG", quality=95),
    "photograph.heic": lambda image: encode(image, "HEIF", quality=95),
    "photograph.AVIF": lambda image: encode(image, "AVIF", quality=95),
    "turned-6.png": lambda image: turned(image, 6, "PNG"),
    "sixteen-bit.png": sixteen_bit,
    "sixteen-bit-grey.png": lambda image: encode(Image.fromarray(grey(image).astype(np.uint16) * 257)),
    "sixteen-bit-grey.TIF": lambda image: encode(Image.fromarray(grey(image).astype(np.uint16) * 257), "TIFF"),
    "floats-grey.tiff": deep_float,
    "transparent.png": lambda image: encode(hidden(image)),
    "transparent.webp": lambda image: encode(hidden(image), "WEBP", lossless=True, exact=True),
    "palette.png": palette,
}
LOSSY = (".jpg", ".jpeg", ".jfif", ".heic", ".avif", "palette.png")
SERVED = (".jpg", ".jpeg", ".jfif", ".png", ".webp")


class Photographs:
    """A folder of class folders for fitting, one to classify, and of each of its files the upright picture.

    `exact` and `served` say of each file whether it gives the upright picture to the last bit, and whether the server
    takes its format.
    """

    def __init__(self, folder: Path) -> None:
        pillow_heif.register_heif_opener()  # to write HEIC
        pictures = load_pictures("held-out", min_styles=SHOTS + 1)
        chosen = np.linspace(0, len(pictures.names) - 1, len(SIZES)).astype(int)
        self.support, self.queries = folder / "support", folder / "queries"
        self.paths: list[Path] = []
        self.upright: list[np.ndarray] = []
        self.labels: list[str] = []
        self.exact: list[bool] = []
        self.served: list[bool] = []
        for concept, size in zip(chosen, SIZES, strict=True):
            rows = np.flatnonzero(pictures.concepts == concept)[: SHOTS + 1]
            large = [Image.fromarray(pictures.images[row]).resize(size, Image.Resampling.BICUBIC) for row in rows]
            for i, (name, write) in enumerate(FORMS.items()):
                self.write(self.support / pictures.names[concept] / name, write(large[i % SHOTS]))
                path = self.queries / f"{concept}-{name}"
                self.write(path, write(large[SHOTS]))
                self.paths.append(path)
                upright = large[SHOTS].convert("L") if "grey" in name else large[SHOTS]
                self.upright.append(np.asarray(upright.convert("RGB")))
                self.labels.append(pictures.names[concept])
                self.exact.append(not name.lower().endswith(LOSSY))
                self.served.append(name.lower().endswith(SERVED))

    def write(self, path: Path, data: bytes) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Photographs:
    if not features.check("avif"):
        pytest.skip("this Pillow reads no AVIF")
    return Photographs(tmp_path_factory.mktemp("photographs"))


@pytest.fixture(scope="module")
def classifier(photographs: Photographs) -> Classifier:
    with shared_cache():
        classifier = Classifier("demo", runtime="onnxruntime", method="tip-adapter++")
        return classifier.fit_folder(photographs.support)


@pytest.fixture(scope="module")
def said(photographs: Photographs, classifier: Classifier) -> np.ndarray:
    """(N, C) probabilities of the files by their paths: what every other way has to say."""
    return classifier.predict_proba(photographs.paths)


def assert_same(classifier: Classifier, said: np.ndarray, labels: Any, probabilities: Any) -> None:
    assert list(labels) == list(classifier.classes_[said.argmax(1)])
    np.testing.assert_allclose(probabilities, said.max(1), atol=TOLERANCE)


def test_every_file_is_the_upright_picture(photographs: Photographs) -> None:
    for path, upright, exact in zip(photographs.paths, photographs.upright, photographs.exact, strict=True):
        difference = np.abs(np.asarray(open_image(path)).astype(int) - upright)
        assert difference.max() == 0 if exact else difference.mean() < 3, path


def test_the_label_does_not_depend_on_how_a_photograph_is_stored(
    photographs: Photographs, classifier: Classifier, said: np.ndarray
) -> None:
    upright = classifier.predict_proba(photographs.upright)
    assert [path for path, a, b in zip(photographs.paths, said, upright, strict=True) if a.argmax() != b.argmax()] == []
    np.testing.assert_allclose(said[photographs.exact], upright[photographs.exact], atol=TOLERANCE)
    coloured = ["grey" not in str(path) for path in photographs.paths]
    right = classifier.classes_[said.argmax(1)] == np.array(photographs.labels)
    assert right[coloured].mean() > 0.6, "the labels mean something"


def test_the_label_does_not_depend_on_how_a_photograph_is_given(
    photographs: Photographs, classifier: Classifier, said: np.ndarray
) -> None:
    images: list[list[Any]] = [
        [str(path) for path in photographs.paths],
        [path.read_bytes() for path in photographs.paths],
        [memoryview(path.read_bytes()) for path in photographs.paths],
    ]
    for given in images:
        np.testing.assert_allclose(classifier.predict_proba(given), said, atol=TOLERANCE)
    assert list(classifier.predict(images[0])) == list(classifier.classes_[said.argmax(1)])
    told = classifier.explain(images[1], top=1)
    assert_same(classifier, said, [each.label for each in told], [each.probability for each in told])
    with BatchingClassifier(classifier) as batches:
        for given in images:
            futures = batches.submit_many(given)
            wait(futures)
            told = [future.result() for future in futures]
            assert_same(classifier, said, [each.label for each in told], [each.probability for each in told])


def test_a_folder_of_photographs_gets_the_same_labels(
    photographs: Photographs, classifier: Classifier, said: np.ndarray
) -> None:
    found = classifier.predict_folder(photographs.queries)
    assert sorted(found.paths) == sorted(photographs.paths) and found.errors == []
    assert_same(
        classifier, said[[photographs.paths.index(path) for path in found.paths]], found.labels, found.probabilities
    )


def test_the_server_says_the_same_or_names_what_it_takes(
    photographs: Photographs, classifier: Classifier, said: np.ndarray
) -> None:
    with serving(classifier) as client:
        for path, served, expected in zip(photographs.paths, photographs.served, said, strict=True):
            answer = client.predict(path.read_bytes())
            if not served:
                error = answer.json()["predictions"][0]["error"]
                assert (answer.status_code, error["code"]) == (422, "unsupported_type")
                assert "expected a JPEG, PNG or WebP image" in error["message"]
                continue
            assert answer.status_code == 200, answer.text
            (told,) = answer.json()["predictions"]
            assert_same(classifier, expected[None], [told["label"]], [told["probability"]])
