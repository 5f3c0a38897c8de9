"""A saved classifier, labelled images, and pages in a browser."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from iosr_fast import Classifier
from iosr_fast.export import pretrained
from iosr_fast.files import work
from iosr_fast.store.bundle import Bundle
from tests import browser as chromium
from tests.store.live_parts import engine_folder, pictures, pixel_clip

browser = chromium.browser  # pytest finds the fixture by this name

NAMES = ["<b>one</b>", "two", "three", "four", "five"]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a saved classifier of 30 images, one label of them wrong, and 18 unlabelled images."""
    clip = pixel_clip(engine_folder(tmp_path / "engine"))
    monkeypatch.setattr(pretrained, "open_shared", lambda *_, **__: clip)
    images, labels = pictures(np.random.default_rng(3), 5, 6)
    names = [NAMES[c] for c in labels]
    names[7] = NAMES[3]
    classifier = Classifier(method="gda", alpha=1.0).fit(images, names)
    monkeypatch.setattr(Classifier, "load", classmethod(lambda *_, **__: classifier))
    monkeypatch.setattr(work, "load", lambda *_: Bundle.of(classifier._fit))
    monkeypatch.setattr(Bundle, "open", lambda *_: classifier._fit)
    for name in ("unlabelled", "classifier"):
        (tmp_path / name).mkdir()
    for i, image in enumerate(pictures(np.random.default_rng(4), 6, 3)[0]):
        Image.fromarray(image).save(tmp_path / "unlabelled" / f"{i}.png")
    return tmp_path


@pytest.fixture
def tags(place: Path) -> Path:
    """The place, whose classifier has several labels a picture now, some of them sure enough to promise errors of 20%;
    and a CSV file of 30 images, one of which has no label."""
    rng = np.random.default_rng(3)
    motifs, _ = pictures(rng, 5, 1)

    def made(n: int) -> tuple[np.ndarray, np.ndarray]:
        truth = rng.random((n, 5)) < 0.35
        truth[0] = False
        images = np.einsum("nc,c...->n...", truth, motifs) / np.maximum(truth.sum(1), 1)[:, None, None, None]
        return (0.6 * images + 0.4 * rng.integers(0, 256, images.shape)).astype(np.uint8), truth

    images, truth = made(200)
    of_rows = [{NAMES[c] for c in np.flatnonzero(row)} for row in truth]
    Classifier.load("").set_params(method="auto", alpha=None, look_alikes=False).fit(images, of_rows)
    (place / "tagged").mkdir()
    images, truth = made(30)
    with (place / "tags.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "labels"])
        for i, (image, row) in enumerate(zip(images, truth, strict=True)):
            Image.fromarray(image).save(place / "tagged" / f"{i:02d}.png")
            writer.writerow([f"tagged/{i:02d}.png", ";".join(NAMES[c] for c in np.flatnonzero(row))])
    return place


@pytest.fixture
def labelled(place: Path) -> Path:
    """A CSV file of labelled images; two of them have wrong labels."""
    images, labels = pictures(np.random.default_rng(5), 5, 2)
    names = [NAMES[c] for c in labels]
    names[0], names[9] = NAMES[1], NAMES[0]
    with (place / "test.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label"])
        for i, (image, name) in enumerate(zip(images, names, strict=True)):
            Image.fromarray(image).resize((400, 300)).save(place / f"<i>{i}.png")
            writer.writerow([f"<i>{i}.png", name])
    return place / "test.csv"


def opened(browser: Any, file: Path, width: int = 390) -> Any:
    """The page, which must not be wider than the screen, log anything, ask for anything, or show a broken picture."""
    page = browser.new_page(viewport={"width": width, "height": 800}, accept_downloads=True)
    faults: list[str] = []
    page.on("console", lambda message: faults.append(message.text))
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("request", lambda it: it.url.startswith(("file:", "data:", "blob:")) or faults.append(it.url))
    page.goto(file.as_uri())
    page.evaluate("document.querySelectorAll('details').forEach((one) => one.open = true)")
    assert not faults and page.evaluate("document.documentElement.scrollWidth") == width
    assert page.evaluate("[...document.images].every((image) => image.complete && image.naturalWidth > 0)")
    return page
