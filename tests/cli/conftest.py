"""A folder of classes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.store.live_parts import pictures


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    images, labels = pictures(np.random.default_rng(0), 3, 3)
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        path = tmp_path / "in" / f"class_{label}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return tmp_path / "in"
