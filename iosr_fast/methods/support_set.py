"""The support set: a few labelled images a class, encoded once, sorted by class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from iosr_fast.encoders.encoder import Embeddings, Encoder
from iosr_fast.images.preprocess import open_image, random_view, resize_and_crop
from iosr_fast.scoring.plan import Which
from iosr_fast.scoring.reducers import Reducer


@dataclass(frozen=True)
class SupportSet:
    """Embeddings of N support images and of C class names: all that a method sees.

    `embeddings` (N, D), sorted by class; `class_offsets` (C+1,) int64: class c owns rows class_offsets[c] to
    class_offsets[c+1]; `text` (C, D), L2-normalised, or None where only images are known; `tau`, the CLIP's logit
    scale. `queries` (N, D), where given, are the same images as a user would ask for them (one view, not the mean of
    several): what leave-one-out scores.
    """

    embeddings: Embeddings
    class_offsets: np.ndarray
    text: np.ndarray | None
    tau: float
    queries: Embeddings | None = None

    @property
    def n_classes(self) -> int:
        return len(self.class_offsets) - 1

    @property
    def counts(self) -> np.ndarray:
        """(C,) int64, images of each class."""
        return np.diff(self.class_offsets)

    @property
    def labels(self) -> np.ndarray:
        """(N,) int64, non-decreasing."""
        return np.repeat(np.arange(self.n_classes), self.counts)

    def only(self, rows: np.ndarray) -> SupportSet:
        """The support set of some images, `rows` a mask (N,) bool; every class stays, even one left without images."""
        counts = np.bincount(self.labels[rows], minlength=self.n_classes)
        queries = None if self.queries is None else self.queries[rows]
        return replace(self, embeddings=self.embeddings[rows], class_offsets=_offsets(counts), queries=queries)


def image_rows(embeddings: Embeddings, which: Which, reducer: Reducer | None) -> np.ndarray:
    """The embeddings that are compared with other images, (N, D) float32: plain or adapted, after the reducer."""
    rows: np.ndarray = np.asarray(embeddings.plain if which == "plain" else embeddings.adapted, np.float32)
    return rows if reducer is None else reducer(rows)


def _offsets(counts: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


def make_support_set(
    embeddings: Embeddings,
    labels: np.ndarray,
    text: np.ndarray | None,
    tau: float,
    n_classes: int | None = None,
    queries: Embeddings | None = None,
) -> SupportSet:
    """Sort by class (stably) and mark where each class begins. `n_classes` must be given where text is None.

    Raises ValueError where labels and embeddings differ in number, a label names no class, or the widths of image and
    text embeddings differ.
    """
    labels = np.asarray(labels, np.int64)
    if text is not None:
        n_classes = len(text)
    elif n_classes is None:
        raise ValueError("expected text embeddings or n_classes, got neither")
    if labels.shape != (len(embeddings),):
        raise ValueError(f"expected one label for each of {len(embeddings)} embeddings, got shape {labels.shape}")
    if len(labels) and not (labels.min() >= 0 and labels.max() < n_classes):
        raise ValueError(f"expected labels in 0..{n_classes - 1}, got {labels.min()}..{labels.max()}")
    for part in (embeddings.plain, embeddings.adapted):
        if part is not None and text is not None and part.shape[1] != text.shape[1]:
            raise ValueError(f"expected image embeddings as wide as the text's, {text.shape[1]}, got {part.shape[1]}")
    order = np.argsort(labels, kind="stable")
    return SupportSet(
        embeddings[order],
        _offsets(np.bincount(labels, minlength=n_classes)),
        None if text is None else np.ascontiguousarray(text, np.float32),
        tau,
        None if queries is None else queries[order],
    )


def encode_support(
    encoder: Encoder,
    images: Sequence[Any],
    views: int,
    mirror: bool,
    rng: np.random.Generator,
    batch: int = 64,
) -> Embeddings:
    """One row an image: the mean of its views' embeddings, L2-normalised again.

    With `views` 1 the one view is CLIP's resize and centre crop; with more, random crops of half to all of the image
    (mirrored half of the time if asked), as Tip-Adapter builds its cache (Zhang et al., ECCV 2022, section 3.1).
    """
    parts: list[Embeddings] = []
    group = max(1, batch // views)
    for start in range(0, len(images), group):
        pixels = []
        for i, source in enumerate(images[start : start + group], start):
            image = open_image(source, i)
            if views == 1:
                pixels.append(resize_and_crop(image, encoder.image_size))
            else:
                pixels += [random_view(image, encoder.image_size, rng, mirror) for _ in range(views)]
        parts.append(mean_of_views(encoder.encode(np.stack(pixels)), views))
    return Embeddings.concatenate(parts)


def mean_of_views(embeddings: Embeddings, views: int) -> Embeddings:
    """The mean of each `views` rows that follow one another, L2-normalised again."""

    def mean(rows: np.ndarray) -> np.ndarray:
        means = rows.reshape(-1, views, rows.shape[1]).mean(1)
        normalised: np.ndarray = means / np.linalg.norm(means, axis=1, keepdims=True)
        return normalised

    return Embeddings(mean(embeddings.plain), None if embeddings.adapted is None else mean(embeddings.adapted))
