"""A folder of classes; a classifier of several labels a picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from iosr_fast import Classifier
from tests.store.live_parts import pictures


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    images, labels = pictures(np.random.default_rng(0), 3, 3)
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        path = tmp_path / "in" / f"class_{label}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return tmp_path / "in"


@pytest.fixture(scope="session")
def of_several_labels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved classifier that can't be exported."""
    images, classes = pictures(np.random.default_rng(0), 2, 4)
    labels = [{"dark", f"class_{label}"} if i % 2 else {f"class_{label}"} for i, label in enumerate(classes)]
    path = tmp_path_factory.mktemp("several-labels") / "classifier"
    Classifier("demo", runtime="onnxruntime").fit(images, labels).save(path)
    return path
