"""What the load sends: pictures of the demo as PNG, each with the label that the classifier itself gives it."""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from iosr_fast.classifier import Classifier
from tools.demo.bundle import held_out_queries, make_demo_bundle


@dataclass(frozen=True)
class Queries:
    """`images[i]` is a PNG; `labels[i]` is what Classifier.predict says of its bytes."""

    images: list[bytes] = field(repr=False)
    labels: list[str] = field(repr=False)

    def __len__(self) -> int:
        return len(self.images)


def make_queries(classifier: Classifier, count: int) -> Queries:
    """`count` of the demo's held-out pictures, spread over all of them."""
    pictures = held_out_queries()[0]
    chosen = pictures[np.linspace(0, len(pictures) - 1, count).astype(int)]
    images = [_png(picture) for picture in chosen]
    return Queries(images, [str(label) for label in classifier.predict(images)])


def open_bundle(given: Path | None, default: Path) -> tuple[Path, Classifier]:
    """The bundle to serve: `given` as it is; else the demo's at `default`, made where there is none that loads."""
    if given is not None:
        return given, Classifier.load(given)
    try:
        return default, Classifier.load(default)
    except (ValueError, OSError):
        make_demo_bundle(default)
        return default, Classifier.load(default)


def _png(picture: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(picture).save(out, "PNG")
    return out.getvalue()
