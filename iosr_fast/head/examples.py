"""The support images of a classifier: embeddings and what is kept of each picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.methods.support_set import SupportSet


@dataclass(frozen=True, eq=False)
class Examples:
    """n support images.

    embeddings  (n, D) float32, plain and (where the encoder has an adapter) adapted
    class_ids   (n,) int64: the uid of each image's class; non-decreasing in a head
    ids         (n,) int64: each image's own number
    pictures    n thumbnails (WebP); None for an image without one
    queries     (n, D), the same images as they are, where `embeddings` are means of random views, as in saved
                classifiers of earlier versions; None where both are one
    groups      (n,) int64: images of one group are left out together; None where each is its own
    paths       n paths of the files, None for an image without one; () where none is known
    """

    embeddings: Embeddings
    class_ids: np.ndarray
    ids: np.ndarray
    pictures: tuple[bytes | None, ...]
    queries: Embeddings | None = None
    groups: np.ndarray | None = None
    paths: tuple[str | None, ...] = ()

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def width(self) -> int:
        """D."""
        width: int = self.embeddings.plain.shape[1]
        return width

    @property
    def as_queries(self) -> Embeddings:
        """The embeddings of the images as they are, as queries have them."""
        return self.embeddings if self.queries is None else self.queries

    def rows(self, chosen: np.ndarray) -> Examples:
        """Some of the images, by index or mask."""
        picked = np.flatnonzero(chosen) if chosen.dtype == bool else chosen
        return Examples(
            self.embeddings[picked],
            self.class_ids[picked],
            self.ids[picked],
            tuple(self.pictures[i] for i in picked.tolist()),
            None if self.queries is None else self.queries[picked],
            None if self.groups is None else self.groups[picked],
            tuple(self.paths[i] for i in picked.tolist()) if self.paths else (),
        )

    def sorted_by_class(self) -> Examples:
        """The same images by rising class; within a class in their order."""
        return self.rows(np.argsort(self.class_ids, kind="stable"))

    def joined(self, added: Examples) -> Examples:
        """These images and `added` ones, sorted by class; within a class the added ones come last."""
        if not len(self):
            return added.sorted_by_class()
        both = self, added
        single = any(one.queries is not None for one in both)
        paths = [path for one in both for path in one.paths or (None,) * len(one)]
        return Examples(
            Embeddings.concatenate([self.embeddings, added.embeddings]),
            np.append(self.class_ids, added.class_ids),
            np.append(self.ids, added.ids),
            self.pictures + added.pictures,
            Embeddings.concatenate([one.as_queries for one in both]) if single else None,
            _joined_groups(self, added),
            tuple(paths) if any(paths) else (),
        ).sorted_by_class()

    def as_support(self, uids: Sequence[int], text: np.ndarray | None, tau: float) -> SupportSet:
        """The support set that methods compile, its classes in the order of `uids`."""
        counts = np.bincount(np.searchsorted(np.array(uids), self.class_ids), minlength=len(uids))
        offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        rows = None if text is None else np.ascontiguousarray(text, np.float32)
        return SupportSet(self.embeddings, offsets, rows, tau, self.queries, self.groups)


def _joined_groups(first: Examples, added: Examples) -> np.ndarray | None:
    """The groups of both; none has images of both."""
    if first.groups is None and added.groups is None:
        return None
    before, new = (np.arange(len(one)) if one.groups is None else one.groups for one in (first, added))
    return np.append(before, new + before.max(initial=-1) + 1)
