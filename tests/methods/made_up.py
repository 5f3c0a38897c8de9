"""A made-up population of embeddings: classes, their sub-types, sessions of images that look alike, and noise."""

from __future__ import annotations

import numpy as np

from iosr_fast.encoders.encoder import Embeddings
from tests.methods.support_sets import unit


class Population:
    """Images x = m + a_c + k_t + s_b + e of class c, sub-type t and session b, as unit rows of D dimensions.

    What all images share is m, as encoders have it. All terms are normal, of a covariance with the eigenvalues
    1 / (1 + 64 i / D), i from 0 to D - 1, scaled to the sum 1, in random directions: about 0.7 D of them are
    independent. m, a, k deviate by 1, s by `session`, e by `noise`. Images of one session have cosines of about
    session^2 / (session^2 + noise^2) beside their sub-type; images of a session each are independent ones of the class.
    """

    KINDS = 6

    def __init__(
        self, classes: int, dimensions: int, session: float = 1.0, noise: float = 0.5, kinds: float = 1.0, seed: int = 0
    ) -> None:
        rng = np.random.default_rng(seed)
        rotation = np.linalg.qr(rng.standard_normal((dimensions, dimensions)))[0]
        spectrum = 1.0 / (1.0 + 64.0 * np.arange(dimensions) / dimensions)
        self._root = rotation * (spectrum / spectrum.sum()) ** 0.5
        self.classes, self.session, self.noise = classes, session, noise
        self._means = self._normal(rng, 1) + self._normal(rng, classes)
        self._kinds = kinds * self._normal(rng, classes * self.KINDS)

    def _normal(self, rng: np.random.Generator, rows: int) -> np.ndarray:
        normal: np.ndarray = rng.standard_normal((rows, len(self._root))) @ self._root.T
        return normal

    def sessions(self, rng: np.random.Generator, per_class: int) -> np.ndarray:
        """(C, per_class, D): the centres of new sessions, each of a random sub-type of its class."""
        kinds = self.KINDS * np.arange(self.classes)[:, None] + rng.integers(self.KINDS, size=(self.classes, per_class))
        shared = self._normal(rng, kinds.size).reshape(*kinds.shape, -1)
        centres: np.ndarray = self._means[:, None] + self._kinds[kinds] + self.session * shared
        return centres

    def images(self, rng: np.random.Generator, sessions: np.ndarray, each: int) -> tuple[Embeddings, np.ndarray]:
        """`each` new images of every session (C, S, D), one after another, and their labels. Images of sessions that
        were drawn from before are siblings of those.

        >>> rng, population = np.random.default_rng(0), Population(classes=2, dimensions=16)
        >>> sessions = population.sessions(rng, 2)
        >>> (support, labels), (siblings, _) = (population.images(rng, sessions, each) for each in (2, 1))
        >>> support.plain.shape, siblings.plain.shape, labels
        ((8, 16), (4, 16), array([0, 0, 0, 0, 1, 1, 1, 1]))
        """
        rows = np.repeat(sessions.reshape(-1, sessions.shape[-1]), each, 0)
        labels = np.repeat(np.arange(self.classes), sessions.shape[1] * each)
        return Embeddings(unit(rows + self.noise * self._normal(rng, len(rows)))), labels
