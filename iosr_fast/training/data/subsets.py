"""Parts of a source of pictures: chosen rows, and a split that holds back a share of every class."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from iosr_fast.training.data._files import digest
from iosr_fast.training.data.sources import PictureSource


class SubsetPictures:
    """The `rows` (K,) int64 of another source, in that order, as a source of their own with the same class names.

    An epoch's order is that of the whole source without the others, so shards are still read from start to end.
    Raises ValueError for rows that are no rows of the source or come twice.
    """

    def __init__(self, source: PictureSource, rows: torch.Tensor) -> None:
        total = len(source.labels)
        rows = torch.as_tensor(rows, dtype=torch.int64)
        if len(rows) and (int(rows.min()) < 0 or int(rows.max()) >= total):
            raise ValueError(
                f"expected rows from 0 to {total - 1}, got some from {int(rows.min())} to {int(rows.max())}"
            )
        self._position = torch.full((total,), -1)
        self._position[rows] = torch.arange(len(rows))
        if int((self._position >= 0).sum()) != len(rows):
            raise ValueError(f"expected each row once, got {len(rows)} rows with repeats among them")
        self.source, self.rows = source, rows
        self.labels, self.class_names = source.labels[rows], source.class_names

    @property
    def fingerprint(self) -> str:
        return digest((self.source.fingerprint, self.rows.numpy()))

    def order(self, generator: torch.Generator) -> torch.Tensor:
        positions = self._position[self.source.order(generator)]
        return positions[positions >= 0]

    def iterate(self, order: torch.Tensor, batch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for rows, pixels in self.source.iterate(self.rows[order], batch):
            yield self._position[rows], pixels


def split(source: PictureSource, share: float, seed: int) -> tuple[SubsetPictures, SubsetPictures]:
    """(train, held out): `share` of each class held out at random, at least two pictures of it and at most half.

    Two is what a measure of pairs needs. A class of fewer than four pictures stays in training. Raises ValueError
    unless 0 < share < 1.
    """
    if not 0 < share < 1:
        raise ValueError(f"expected a share between 0 and 1 (both excluded), got {share}")
    rng = np.random.default_rng(seed)
    labels = source.labels.numpy()
    held = np.zeros(len(labels), bool)
    by_class = np.argsort(labels, kind="stable")
    for rows in np.split(by_class, np.flatnonzero(np.diff(labels[by_class])) + 1):
        if len(rows) >= 4:
            count = min(max(round(share * len(rows)), 2), len(rows) // 2)
            held[rng.choice(rows, count, replace=False)] = True
    train, out = torch.from_numpy(np.flatnonzero(~held)), torch.from_numpy(np.flatnonzero(held))
    return SubsetPictures(source, train), SubsetPictures(source, out)
