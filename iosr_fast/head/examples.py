"""The support images of a classifier: embeddings, what is kept of each picture, and their labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.methods.support_set import SupportSet


@dataclass(frozen=True, eq=False)
class Examples:
    """n support images with M labels, M = n where each has one.

    embeddings  (n, D) float32, plain and (where the encoder has an adapter) adapted
    class_ids   (M,) int64: the uid of the class that each label names; non-decreasing in a head
    ids         (n,) int64: each image's own number
    pictures    n thumbnails (WebP); None for an image without one
    queries     (n, D), the same images as they are, where `embeddings` are means of random views, as in saved
                classifiers of earlier versions; None where both are one
    groups      (n,) int64: images of one group are left out together; None where each is its own
    paths       n paths of the files, None for an image without one; () where none is known
    owners      (M,) int64: label i is one of the image owners[i], which may have several labels or none. None: each
                image has one label, and label i is that of image i
    """

    embeddings: Embeddings
    class_ids: np.ndarray
    ids: np.ndarray
    pictures: tuple[bytes | None, ...]
    queries: Embeddings | None = None
    groups: np.ndarray | None = None
    paths: tuple[str | None, ...] = ()
    owners: np.ndarray | None = None

    @classmethod
    def numbered(cls, embeddings: Embeddings, class_ids: np.ndarray, groups: np.ndarray | None = None) -> Examples:
        """Images with one label each, numbered from 0, without pictures."""
        return cls(embeddings, class_ids, np.arange(len(class_ids)), (None,) * len(class_ids), groups=groups)

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

    def labelled(self, indicator: np.ndarray, uids: Sequence[int]) -> Examples:
        """The same images with the labels of an indicator (n, C) bool of the classes `uids`."""
        classes, owners = np.nonzero(indicator.T)
        return replace(self, class_ids=np.array(uids, np.int64)[classes], owners=owners)

    def without_class(self, uid: int) -> Examples:
        """These images without those of a class; where images may have several labels, all without that label."""
        kept = self.class_ids != uid
        if self.owners is None:
            return self.rows(kept)
        return replace(self, class_ids=self.class_ids[kept], owners=self.owners[kept])

    def relabelled(self, images: np.ndarray, uids: Sequence[int]) -> Examples:
        """These images, of which those of a mask (n,) have the labels `uids` instead of theirs."""
        owners, rows = np.arange(len(self)) if self.owners is None else self.owners, np.flatnonzero(images)
        kept = ~images[owners]
        class_ids = np.append(self.class_ids[kept], np.repeat(np.array(uids, np.int64), len(rows)))
        owners = np.append(owners[kept], np.tile(rows, len(uids)))
        if self.owners is None:
            return replace(self, class_ids=class_ids[np.argsort(owners)]).sorted_by_class()
        return replace(self, class_ids=class_ids, owners=owners).sorted_by_class()

    def with_label(self, images: np.ndarray, uid: int) -> Examples:
        """These images, which may have several labels, of which those of a mask (n,) have one more."""
        assert self.owners is not None
        rows = np.flatnonzero(images)
        class_ids, owners = np.append(self.class_ids, np.full(len(rows), uid)), np.append(self.owners, rows)
        return replace(self, class_ids=class_ids, owners=owners).sorted_by_class()

    def rows_of(self, uid: int) -> np.ndarray:
        """The positions of a class's images."""
        labels = np.flatnonzero(self.class_ids == uid)
        return labels if self.owners is None else self.owners[labels]

    def uids_of(self, row: int) -> list[int]:
        """The classes of an image, rising: one, or where images may have several labels any number."""
        labels = slice(row, row + 1) if self.owners is None else self.owners == row
        uids: list[int] = self.class_ids[labels].tolist()
        return uids

    def rows(self, chosen: np.ndarray) -> Examples:
        """Some of the images, by index or mask."""
        picked = np.flatnonzero(chosen) if chosen.dtype == bool else chosen
        labels, owners = picked, None
        if self.owners is not None:
            position = np.full(len(self), -1)
            position[picked] = np.arange(len(picked))
            labels = np.flatnonzero(position[self.owners] >= 0)
            owners = position[self.owners[labels]]
        columns = {name: _picked(getattr(self, name), picked) for name in COLUMNS}
        return Examples(**columns, class_ids=self.class_ids[labels], owners=owners)

    def sorted_by_class(self) -> Examples:
        """The same images by rising class; within a class in their order. Where images may have several labels, only
        the labels are sorted."""
        order = np.argsort(self.class_ids, kind="stable")
        if self.owners is None:
            return self.rows(order)
        return replace(self, class_ids=self.class_ids[order], owners=self.owners[order])

    def joined(self, added: Examples) -> Examples:
        """These images and `added` ones, sorted by class; within a class the added ones come last."""
        if not len(self):
            return added.sorted_by_class()
        both = self, added
        columns = {name: _appended(getattr(self, name), getattr(added, name)) for name in COLUMNS}
        columns["groups"] = _joined_groups(self, added)
        if self.paths or added.paths:
            columns["paths"] = tuple(path for one in both for path in one.paths or (None,) * len(one))
        if self.queries is not None or added.queries is not None:
            columns["queries"] = Embeddings.concatenate([one.as_queries for one in both])
        owners = None
        if self.owners is not None or added.owners is not None:
            first, second = (np.arange(len(one)) if one.owners is None else one.owners for one in both)
            owners = np.append(first, second + len(self))
        class_ids = np.append(self.class_ids, added.class_ids)
        return Examples(**columns, class_ids=class_ids, owners=owners).sorted_by_class()

    def as_support(self, uids: Sequence[int], text: np.ndarray | None, tau: float) -> SupportSet:
        """The support set that methods compile, its classes in the order of `uids`."""
        counts = np.bincount(np.searchsorted(np.array(uids), self.class_ids), minlength=len(uids))
        offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        rows = None if text is None else np.ascontiguousarray(text, np.float32)
        return SupportSet(self.embeddings, offsets, rows, tau, self.queries, self.groups, self.owners)


# What is kept of each image, beside its labels.
COLUMNS = tuple(field.name for field in fields(Examples) if field.name not in ("class_ids", "owners"))


def _picked(column: Any, rows: np.ndarray) -> Any:
    if isinstance(column, tuple):
        return tuple(column[row] for row in rows.tolist()) if column else ()
    return None if column is None else column[rows]


def _appended(column: Any, added: Any) -> Any:
    """Both columns, one after the other; None where one is missing."""
    if column is None or added is None:
        return None
    if isinstance(column, Embeddings):
        return Embeddings.concatenate([column, added])
    return column + added if isinstance(column, tuple) else np.append(column, added)


def _joined_groups(first: Examples, added: Examples) -> np.ndarray | None:
    """The groups of both; none has images of both."""
    if first.groups is None and added.groups is None:
        return None
    before, new = (np.arange(len(one)) if one.groups is None else one.groups for one in (first, added))
    return np.append(before, new + before.max(initial=-1) + 1)
