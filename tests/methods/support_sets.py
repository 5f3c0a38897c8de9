"""Random images of clustered classes, and support sets of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.methods.support_set import SupportSet, make_support_set


def unit(rows: np.ndarray) -> np.ndarray:
    """Rows of unit length, float32."""
    scaled: np.ndarray = rows / np.linalg.norm(rows, axis=-1, keepdims=True)
    return scaled.astype(np.float32)


class Clusters:
    """Images about a random centre a class, and texts further away from it; adapted embeddings have half the noise.

    `noise` is the deviation of a channel, a number or one for each of `width` channels; centres deviate by 1.
    """

    def __init__(
        self, classes: int, width: int = 24, noise: float | np.ndarray = 0.8, adapted: bool = False, seed: int = 99
    ) -> None:
        rng = np.random.default_rng(seed)
        self.centres = rng.standard_normal((classes, width))
        self.texts = unit(self.centres + rng.standard_normal((classes, width)))
        self.noise, self.adapted = noise, adapted

    def images(self, labels: np.ndarray, seed: int) -> Embeddings:
        plain, adapted = np.random.default_rng(seed).standard_normal((2, len(labels), self.centres.shape[1]))
        near = unit(self.centres[labels] + 0.5 * self.noise * adapted) if self.adapted else None
        return Embeddings(unit(self.centres[labels] + self.noise * plain), near)

    def support(
        self, counts: Sequence[int], seed: int = 1, text: bool = True, views: bool = False, tau: float = 30.0
    ) -> SupportSet:
        """counts[c] images of class c of the first classes; with `views` other ones of them as queries."""
        labels = np.repeat(np.arange(len(counts)), counts)
        own = self.images(labels, seed + 1000) if views else None
        texts = self.texts[: len(counts)] if text else None
        return make_support_set(self.images(labels, seed), labels, texts, tau, len(counts), own)

    def queries(self, each: int, seed: int = 2, classes: int | None = None) -> tuple[Embeddings, np.ndarray]:
        """`each` images of every class, or of the first `classes`, with their labels."""
        labels = np.repeat(np.arange(classes or len(self.centres)), each)
        return self.images(labels, seed), labels
