"""The support images of a classifier, in immutable segments that are each sorted by class."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.methods.support_set import SupportSet


@dataclass(frozen=True, eq=False)
class Examples:
    """n support images.

    embeddings  (n, D) float32, plain and (where the encoder has an adapter) adapted
    class_ids   (n,) int64, non-decreasing: the uid of each image's class
    ids         (n,) int64: each image's own number
    pictures    n thumbnails (WebP); None for an image without one
    queries     (n, D), single views of the same images, where `embeddings` are means of several views
    removed     (n,) bool, removed images whose rows are still stored; None for none
    """

    embeddings: Embeddings
    class_ids: np.ndarray
    ids: np.ndarray
    pictures: tuple[bytes | None, ...]
    queries: Embeddings | None = None
    removed: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def classes(self) -> np.ndarray:
        """The uids of the classes that have a row here, rising."""
        return np.unique(self.class_ids)

    @cached_property
    def sizes(self) -> np.ndarray:
        """(c,) int64, the rows of each of `classes`."""
        sizes: np.ndarray = np.diff(np.append(np.searchsorted(self.class_ids, self.classes), len(self)))
        return sizes

    @cached_property
    def active_sizes(self) -> np.ndarray:
        """(c,) int64, the active rows of each of `classes`."""
        if self.removed is None:
            return self.sizes
        return np.add.reduceat(self.active.astype(np.int64), np.cumsum(self.sizes) - self.sizes)

    @property
    def active(self) -> np.ndarray:
        """(n,) bool."""
        return np.ones(len(self), bool) if self.removed is None else ~self.removed

    def rows(self, chosen: np.ndarray) -> Examples:
        """Some of the images, by index or mask; none of them is marked as removed."""
        picked = np.flatnonzero(chosen) if chosen.dtype == bool else chosen
        return Examples(
            self.embeddings[picked],
            self.class_ids[picked],
            self.ids[picked],
            tuple(self.pictures[i] for i in picked.tolist()),
            None if self.queries is None else self.queries[picked],
        )

    def as_support(self, uids: Sequence[int], text: np.ndarray, tau: float) -> SupportSet:
        """The support set that methods compile, its classes in the order of `uids`. No image may be removed."""
        counts = np.bincount(np.searchsorted(np.array(uids), self.class_ids), minlength=len(uids))
        offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        return SupportSet(self.embeddings, offsets, np.ascontiguousarray(text, np.float32), tau, self.queries)

    def mark_removed(self, gone: np.ndarray) -> Examples:
        """The same rows; those of the mask `gone` (n,) are marked as removed."""
        return replace(self, removed=gone if self.removed is None else self.removed | gone)


def no_examples(width: int) -> Examples:
    """The examples of a classifier that has only class names."""
    nothing, none = np.zeros((0, width), np.float32), np.zeros(0, np.int64)
    return Examples(Embeddings(nothing, nothing), none, none, ())


def join(parts: Sequence[Examples]) -> Examples:
    """The active images of all parts in one segment, sorted by class; within a class in the order of the parts."""
    kept = [part if part.removed is None else part.rows(part.active) for part in parts]
    if len(kept) == 1:
        return kept[0]
    order = np.argsort(np.concatenate([part.class_ids for part in kept]), kind="stable")
    pictures = [picture for part in kept for picture in part.pictures]
    return Examples(
        Embeddings.concatenate([part.embeddings for part in kept])[order],
        np.concatenate([part.class_ids for part in kept])[order],
        np.concatenate([part.ids for part in kept])[order],
        tuple(pictures[i] for i in order.tolist()),
        None
        if any(part.queries is None for part in kept)
        else Embeddings.concatenate([part.queries for part in kept if part.queries is not None])[order],
    )


def absorb(segments: tuple[Examples, ...], small: int) -> tuple[Examples, ...]:
    """Join segments at the end so that few remain and each image is copied a bounded number of times.

    The last two are joined while together they have at most `small` images, or while the last but one is at most twice
    as long as the last: each image is copied at most log2(N) times, so the cost of a change depends on what it adds.
    """
    joined = list(segments)
    while len(joined) > 1 and (len(joined[-2]) + len(joined[-1]) <= small or len(joined[-2]) <= 2 * len(joined[-1])):
        last = joined.pop()
        joined[-1] = join([joined[-1], last])
    return tuple(joined)


def without(
    segments: Sequence[Examples], gone_of: Callable[[Examples], np.ndarray], small: int
) -> tuple[tuple[Examples, ...], Examples | None]:
    """The segments without the images of the masks `gone_of`, and those images.

    Rows of a segment of more than `small` images stay, marked, until half of it is removed: copying all would cost more
    than the change.
    """
    joined, taken = [], []
    for part in segments:
        gone = gone_of(part) & part.active
        if not gone.any():
            joined.append(part)
            continue
        taken.append(part.rows(gone))
        marked = part.mark_removed(gone)
        left = int(marked.active.sum())
        if len(part) <= small or left <= len(part) // 2:
            marked = marked.rows(marked.active)
        if left:
            joined.append(marked)
    return tuple(joined), join(taken) if taken else None
