"""A fitted classifier on an engine of random weights, which are as fast as trained ones.

Pictures stand in for class names, and each class has 16 keys near the embedding of one. The keys are centred, as random
weights leave all pictures near one another.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from iosr_fast.classifier import Classifier
from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.encoders.opened_clip import OpenedClip
from iosr_fast.encoders.runtimes import open_engine
from iosr_fast.images.preprocess import open_image, resize_and_crop
from iosr_fast.state.examples import Examples
from iosr_fast.state.fit import Fit
from iosr_fast.state.method_config import MethodConfig
from iosr_fast.state.state import State
from iosr_fast.state.support_images import SupportViews

CLASSES, SHOTS = 100, 16


def fit(engine: Path, paths: list[Path], threads: int) -> Classifier:
    """A tip-adapter++ of CLASSES classes with SHOTS keys each, around the embeddings of CLASSES of the pictures."""
    encoder = open_engine(engine, verify=False, threads=threads)
    classes = min(CLASSES, len(paths))
    pixels = np.stack([resize_and_crop(open_image(path), encoder.geometry) for path in paths[:classes]])
    centres = encoder.encode(pixels)
    rng = np.random.default_rng(0)

    def near(rows: Any) -> np.ndarray:
        # Noise of a fifth of the distance between two pictures, in place of 16 views of each.
        apart = float(np.linalg.norm(rows - rows.mean(0), axis=1).mean())
        noise = rng.standard_normal((classes * SHOTS, rows.shape[1])) * 0.2 * apart / rows.shape[1] ** 0.5
        keys = np.repeat(rows, SHOTS, 0) + noise
        return np.asarray(keys / np.linalg.norm(keys, axis=1, keepdims=True), np.float32)

    count = classes * SHOTS
    embeddings = Embeddings(near(centres.plain), near(centres.adapted))
    examples = Examples(embeddings, np.repeat(np.arange(classes), SHOTS), np.arange(count), (None,) * count)
    support = examples.as_support(range(classes), centres.plain, 100.0)
    config = MethodConfig("tip-adapter++", {"alpha": 1.0, "beta": 5.5}, "centre").fitted(support)
    clip = OpenedClip(encoder, engine, None, 100.0)
    classifier = Classifier._with_clip(clip)
    state = State.first([f"picture {c}" for c in range(classes)], centres.plain, 100.0, examples, config)
    classifier._replace(Fit(clip, state, SupportViews()))
    return classifier
