"""What the tests of Classifier as an estimator share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from iosr_fast.encoders.opened_model import OpenedModel
from iosr_fast.export import pretrained
from tests.store.live_parts import pictures, pixel_clip

NAMES = [f"motif {c}" for c in range(5)]
GIVEN: dict[str, Any] = {"method": "tip-adapter++", "alpha": 40.0, "beta": 5.0}


@pytest.fixture
def clip(monkeypatch: pytest.MonkeyPatch) -> OpenedModel:
    """The CLIP that every classifier opens; it embeds pixels of 8x8."""
    opened = pixel_clip()
    monkeypatch.setattr(pretrained, "open_shared", lambda **_: opened)
    return opened


@pytest.fixture(scope="module")
def data() -> tuple[np.ndarray, np.ndarray]:
    """30 pictures of 5 classes, and integer labels."""
    return pictures(np.random.default_rng(3), 5, 6)


@pytest.fixture
def paths(data: tuple[np.ndarray, np.ndarray], tmp_path: Path) -> list[str]:
    files = [tmp_path / f"{i}.png" for i in range(len(data[0]))]
    for file, image in zip(files, data[0], strict=True):
        Image.fromarray(image).save(file)
    return [str(file) for file in files]
