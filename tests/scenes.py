"""Scenes: pictures of one to three of the demo's drawings side by side, or of none, with a label for each."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from iosr_fast import Classifier
from iosr_fast.clip.demo.pictures import load_pictures
from tests.demo_cache import build_once, demo_cache, demo_engine

CLASSES = 6


def scenes(n: int, seed: int) -> tuple[list[np.ndarray], list[set[str]]]:
    """Pictures (64, 64 k, 3), and the classes in them; the classes of a scene differ. Each drawing is mirrored, cropped
    and tinted by chance. Scenes of seed 0 share no drawing with those of other seeds."""
    rng = np.random.default_rng(seed)
    drawn = load_pictures("held-out")
    chosen = np.flatnonzero(np.bincount(drawn.concepts) == 7)[::12][:CLASSES]
    of_class = [drawn.images[drawn.concepts == concept][seed > 0 :: 2] for concept in chosen]
    pictures, labels = [], []
    for _ in range(n):
        classes = rng.choice(CLASSES, rng.choice(4, p=[0.1, 0.5, 0.3, 0.1]), replace=False)
        parts = [_varied(of_class[c][rng.integers(len(of_class[c]))], rng) for c in classes]
        pictures.append(np.concatenate(parts or [rng.integers(0, 256, (64, 64, 3), np.uint8)], axis=1))
        labels.append({drawn.names[chosen[c]] for c in classes})
    return pictures, labels


def _varied(drawing: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    top, left = rng.integers(0, 16, 2)
    cropped = Image.fromarray(drawing).crop((left, top, left + 48 + rng.integers(17), top + 48 + rng.integers(17)))
    varied = np.asarray(cropped.resize((64, 64)), float)[:, :: rng.choice([-1, 1])]
    return (varied * rng.uniform(0.5, 1.0, 3)).astype(np.uint8)


def scene_bundle() -> Path:
    """A saved classifier of 120 scenes, fitted once for all tests. Read it, never change it."""

    def build(folder: Path) -> None:
        classifier = Classifier("demo", engine=demo_engine(), runtime="onnxruntime", look_alikes=False)
        classifier.fit(*scenes(120, seed=0)).save(folder / "saved")

    return build_once("scenes", [Path(__file__)], [demo_cache().name], build) / "saved"
