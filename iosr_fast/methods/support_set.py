"""The support set: a few labelled images a class, encoded once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.exceptions import IosrFastError
from iosr_fast.scoring.plan import Which
from iosr_fast.scoring.reducers import Reducer
from iosr_fast.utils.machine import usable_memory
from iosr_fast.utils.short_repr import short_repr

# Logits are float32 sums: a difference of at most this share of them may be mere rounding.
ROUNDING = 64 * float(np.finfo(np.float32).eps)


@dataclass(frozen=True, eq=False)
class SupportSet:
    """Embeddings of N support images and of C class names, of D channels: the input of a method.

    embeddings     (N, D), with one label an image sorted by class
    class_offsets  (C + 1,) int64: class c owns the labels class_offsets[c]:class_offsets[c + 1]
    text           (C, D) float32, unit rows; None without class names
    tau            the CLIP's logit scale
    queries        (N, D): the same images with one view each, as queries have; leave-one-out scores these. None: the
                   rows of `embeddings`
    groups         (N,) int64: images of one group are left out together (folds.make_folds); None: each is its own
    owners         (M,) int64: label i is one of the image owners[i], which may have several labels or none. None: each
                   image has one label, and label i is that of image i

    `make_support_set` sorts the rows and makes one.

    >>> support = make_support_set(Embeddings(np.eye(3)), labels=[1, 0, 1], text=None, tau=100.0, n_classes=2)
    >>> support.counts, support.labels
    (array([1, 2]), array([0, 1, 1]))
    """

    embeddings: Embeddings
    class_offsets: np.ndarray
    text: np.ndarray | None
    tau: float
    queries: Embeddings | None = None
    groups: np.ndarray | None = None
    owners: np.ndarray | None = None
    __repr__ = short_repr

    @property
    def n_classes(self) -> int:
        return len(self.class_offsets) - 1

    @property
    def counts(self) -> np.ndarray:
        """(C,) int64, images of each class; an image counts for each of its classes."""
        return np.diff(self.class_offsets)

    @property
    def labels(self) -> np.ndarray:
        """(M,) int64, the class of each label, non-decreasing; M is N with one label an image."""
        return np.repeat(np.arange(self.n_classes), self.counts)

    @property
    def one_hot(self) -> np.ndarray:
        """(M, C) float64, each label as an indicator."""
        self.check_memory()
        return np.eye(self.n_classes)[self.labels]

    @property
    def indicator(self) -> np.ndarray:
        """(N, C) bool, the classes of each image."""
        indicator = np.zeros((len(self.embeddings), self.n_classes), bool)
        indicator[self.of_labels(np.arange(len(self.embeddings))), self.labels] = True
        return indicator

    def of_labels(self, rows: np.ndarray) -> np.ndarray:
        """The rows (M, ...) of the images that the labels are of, of rows (N, ...) of images."""
        return rows if self.owners is None else rows[self.owners]

    def pairs(self) -> tuple[SupportSet, np.ndarray]:
        """A support set of plain embeddings with an image for each label, and one of a last class, "no label", for each
        image without any; and which image each of them is. Images of a class are compared by it."""
        images = np.arange(len(self.embeddings))
        owners = self.of_labels(images)
        without = np.setdiff1d(images, owners)
        rows, classes = np.append(owners, without), np.append(self.labels, np.full(len(without), self.n_classes))
        groups = rows if self.groups is None else self.groups[rows]
        plain = Embeddings(self.embeddings.plain[rows])
        return make_support_set(plain, classes, None, self.tau, self.n_classes + 1, groups=groups), rows

    def check_memory(self) -> None:
        """Raise IosrFastError where (N, C) numbers, as the logits of all images are, take more memory than there is."""
        images, needed = len(self.embeddings), 8 * len(self.embeddings) * self.n_classes
        if needed > (usable := usable_memory()):
            raise IosrFastError(
                f"expected support images whose logits, float64, fit into {usable / 2**30:.1f} GiB of memory, got "
                f"{images:,} images of {self.n_classes:,} classes, whose logits take {needed / 2**30:.1f} GiB: give "
                "fewer, or name a method that needs none with tune='none', like method='tip-adapter'"
            )

    @property
    def as_queries(self) -> Embeddings:
        """The images as queries are, with one view each."""
        return self.queries or self.embeddings

    def only(self, rows: np.ndarray) -> SupportSet:
        """The support set of some images, `rows` a mask (N,) bool; every class stays, even one left without images."""
        kept = self.of_labels(rows)
        offsets = _offsets(np.bincount(self.labels[kept], minlength=self.n_classes))
        queries = None if self.queries is None else self.queries[rows]
        groups = None if self.groups is None else self.groups[rows]
        owners = None if self.owners is None else (np.cumsum(rows) - 1)[self.owners[kept]]
        return SupportSet(self.embeddings[rows], offsets, self.text, self.tau, queries, groups, owners)

    def of_classes(self, classes: np.ndarray) -> SupportSet:
        """The support set of the classes in a mask (C,), which are numbered anew, and of their images."""
        text = None if self.text is None else self.text[classes]
        return replace(self.only(classes[self.labels]), class_offsets=_offsets(self.counts[classes]), text=text)


def class_weights(counts: np.ndarray) -> np.ndarray:
    """(C,) float64: the mean number of images of the classes that have any, over that of each class; 1 without images.

    A sum over the keys of a class, times its weight, does not grow with the class. Without weights a class of more
    images than others gets their queries.
    """
    present = counts[counts > 0]
    return np.where(counts > 0, (present.mean() if len(present) else 1.0) / np.maximum(counts, 1), 1.0)


def image_rows(embeddings: Embeddings, which: Which, reducer: Reducer | None) -> np.ndarray:
    """The embeddings that are compared with other images, (N, D) float32: plain or adapted, after the reducer."""
    rows: np.ndarray = np.asarray(embeddings.plain if which == "plain" else embeddings.adapted, np.float32)
    return rows if reducer is None else reducer(rows)


def blocks(n_rows: int, size: int) -> Iterator[slice]:
    """Slices of up to `size` consecutive rows, at least one, so that memory stays bounded."""
    size = max(1, size)
    return (slice(first, min(first + size, n_rows)) for first in range(0, n_rows, size))


def _offsets(counts: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


def make_support_set(
    embeddings: Embeddings,
    labels: np.ndarray,
    text: np.ndarray | None,
    tau: float,
    n_classes: int | None = None,
    queries: Embeddings | None = None,
    groups: np.ndarray | None = None,
) -> SupportSet:
    """A support set from rows in any order; rows of one class keep their order.

    `embeddings` are (N, D), `text` (C, D) or None. `labels` are (N,) integers from 0 to C - 1, and `n_classes` is C,
    required if `text` is None; or an indicator (N, C) bool of the classes of each image, several, one or none: rows
    then keep their order. `tau`, `queries` and `groups` as in SupportSet.

    Raises IosrFastError if labels and embeddings or text differ in number, a label names no class, or the widths of
    image and text embeddings differ.

    >>> support = make_support_set(Embeddings(np.eye(3)), labels=[1, 0, 1], text=np.eye(2, 3), tau=100.0)
    >>> support.embeddings.plain
    array([[0., 1., 0.],
           [1., 0., 0.],
           [0., 0., 1.]])
    >>> support.class_offsets
    array([0, 1, 3])
    >>> tags = np.array([[1, 1], [0, 1], [0, 0]], bool)
    >>> make_support_set(Embeddings(np.eye(3)), tags, text=None, tau=100.0).counts
    array([1, 2])
    """
    owners = None
    order: np.ndarray | slice = slice(None)
    if np.ndim(labels) == 2:
        n_classes = _check_indicator(labels, len(embeddings), text)
        labels, owners = np.nonzero(labels.T)
    else:
        n_classes = n_classes if text is None else len(text)
        if n_classes is None:
            raise IosrFastError("expected text embeddings or n_classes, got neither")
        labels = check_labels(labels, len(embeddings), n_classes)
        order = np.argsort(labels, kind="stable")
    for part in (embeddings.plain, embeddings.adapted):
        if part is not None and text is not None and part.shape[1] != text.shape[1]:
            raise IosrFastError(
                f"expected image embeddings as wide as the text's, {text.shape[1]}, got {part.shape[1]}"
            )
    return SupportSet(
        embeddings[order],
        _offsets(np.bincount(labels, minlength=n_classes)),
        None if text is None else np.ascontiguousarray(text, np.float32),
        tau,
        None if queries is None else queries[order],
        None if groups is None else groups[order],
        owners,
    )


def _check_indicator(labels: np.ndarray, n_images: int, text: np.ndarray | None) -> int:
    """C of an indicator (N, C). Raises IosrFastError for another number of images, or of classes than texts."""
    rows, n_classes = labels.shape
    if rows != n_images:
        raise IosrFastError(f"expected a row of labels for each of {n_images} images, got {rows}")
    if text is not None and len(text) != n_classes:
        raise IosrFastError(f"expected text for each of {n_classes} classes, got {len(text)} rows")
    return n_classes


def check_labels(labels: np.ndarray, n_images: int, n_classes: int) -> np.ndarray:
    """The labels as (n_images,) int64. Raises IosrFastError for another number, or a label that names no class."""
    labels = np.asarray(labels, np.int64)
    if labels.shape != (n_images,):
        raise IosrFastError(f"expected one label for each of {n_images} images, got labels of shape {labels.shape}")
    if len(labels) and not (labels.min() >= 0 and labels.max() < n_classes):
        raise IosrFastError(f"expected labels in 0..{n_classes - 1}, got {labels.min()}..{labels.max()}")
    return labels
