"""Support images with several labels each, and what a method makes of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.exceptions import IosrFastError
from iosr_fast.scoring.plan import Which


@dataclass(frozen=True, eq=False)
class MultiLabelSet:
    """N support images with any number of C labels each, of D channels: the input of a multi-label method.

    embeddings  (N, D), in any order
    labels      (N, C) bool, an indicator: the classes of each image, several, one or none
    text        (C, D) float32, unit rows; None without class names
    tau         the CLIP's logit scale
    queries     (N, D): the same images with one view each, as queries have; left-out images are scored by these. None:
                the rows of `embeddings`

    Raises IosrFastError for another number of rows or classes.

    >>> images = MultiLabelSet(Embeddings(np.eye(3)), np.array([[1, 1], [0, 1], [0, 0]], bool), text=None, tau=100.0)
    >>> images.counts
    array([1, 2])
    """

    embeddings: Embeddings
    labels: np.ndarray
    text: np.ndarray | None
    tau: float
    queries: Embeddings | None = None

    def __post_init__(self) -> None:
        rows, classes = self.labels.shape
        if rows != len(self.embeddings):
            raise IosrFastError(f"expected a row of labels for each of {len(self.embeddings)} images, got {rows}")
        if self.text is not None and len(self.text) != classes:
            raise IosrFastError(f"expected text for each of {classes} classes, got {len(self.text)} rows")

    @property
    def n_classes(self) -> int:
        return self.labels.shape[1]

    @property
    def counts(self) -> np.ndarray:
        """(C,) int64, images of each class; an image counts for each of its classes."""
        return self.labels.sum(0)

    @property
    def as_queries(self) -> Embeddings:
        """The images as queries."""
        return self.queries or self.embeddings

    def zero_shot(self, queries: bool = False) -> np.ndarray:
        """The cosines (N, C) float64 of the images, or of the same as queries, and the texts; 0 without texts."""
        if self.text is None:
            return np.zeros(self.labels.shape)
        plain = (self.as_queries if queries else self.embeddings).plain
        cosines: np.ndarray = np.asarray(plain, np.float64) @ self.text.T
        return cosines

    def rows(self, which: Which, queries: bool = False) -> np.ndarray:
        """The embeddings (N, D) float32 that are compared with other images."""
        embeddings = self.as_queries if queries else self.embeddings
        return np.asarray(embeddings.plain if which == "plain" else embeddings.adapted, np.float32)


@dataclass(frozen=True)
class KeyTerm:
    """A term sum_j exp(-beta (1 - <x, key[j]>)) values[j, c] of the logits, to be multiplied by a weight.

    values    (N, C) float64, of all support images as keys
    left_out  (N, C) float64: the term of each support image as a query, fitted without it
    """

    values: np.ndarray
    left_out: np.ndarray


@dataclass(frozen=True)
class LinearTerm:
    """A term <x, linear[c]> + bias[c] of the logits, of plain or adapted embeddings x, to be multiplied by a weight.

    linear, bias  (C, D) and (C,) float64
    left_out      (N, C) float64: the term of each support image as a query, fitted without it
    """

    which: Which
    linear: np.ndarray
    bias: np.ndarray
    left_out: np.ndarray


# What a multi-label method is: (images, which, setting) -> its terms, by the parameter that weighs them.
MultiLabelTerms = Mapping[str, KeyTerm | LinearTerm]
