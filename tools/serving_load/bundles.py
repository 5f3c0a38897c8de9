"""Saved classifiers of a ViT-B/32 with random weights, which is as fast as a trained one: as fitted, and optimized."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.photographs import photograph
from iosr_fast.classifier import Classifier
from iosr_fast.clip.adapter import random_adapter, save_adapter
from iosr_fast.clip.demo.pictures import load_pictures
from iosr_fast.clip.load import load_clip

MODEL, FIRST_ADAPTED_BLOCK, BOTTLENECK = "ViT-B-32", 8, 256
CLASSES, SHOTS = 25, 4
FORMS = ("fp32", "optimized")


def make_bundles(folder: Path) -> dict[str, Path]:
    """{"fp32", "optimized"}: the folders of two classifiers that give both embeddings; made, in minutes, unless they
    load. "optimized" is what Classifier.optimize makes of the other on this machine."""
    bundles = {form: folder / form for form in FORMS}
    if not all(map(_loads, bundles.values())):
        print(f"fitting two classifiers of {MODEL} in {folder}", file=sys.stderr, flush=True)
        images, labels = _support()
        with tempfile.TemporaryDirectory() as name:
            adapter = Path(name) / "adapter.safetensors"
            save_adapter(random_adapter(load_clip(MODEL, "none"), FIRST_ADAPTED_BLOCK, BOTTLENECK), adapter)
            classifier = Classifier(MODEL, "none", adapter, method="tip-adapter++", views=1, precision="fp32")
            classifier.fit(images, labels)
            classifier.save(bundles["fp32"])
            classifier.optimize(images, labels, objective="throughput")
            classifier.save(bundles["optimized"])
    return bundles


def _loads(folder: Path) -> bool:
    try:
        Classifier.load(folder)
    except (ValueError, OSError):
        return False
    return True


def _support() -> tuple[list[np.ndarray], list[str]]:
    """SHOTS photographs of each of CLASSES pictures, whose textures differ."""
    pictures = load_pictures("held-out")
    rows = np.linspace(0, len(pictures.images) - 1, CLASSES).astype(int)
    images = [np.asarray(photograph(pictures.images[row], seed=shot)) for row in rows for shot in range(SHOTS)]
    return images, [f"picture {number // SHOTS}" for number in range(len(images))]
