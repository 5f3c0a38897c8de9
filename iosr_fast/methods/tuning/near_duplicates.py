"""Near duplicates in a support set: images of one class that show the same thing twice, as a series of shots does.

If one of them is left out and the other stays, the fit has seen the image that it is judged on. So they are left out
together (held_out.HeldOutSet.leave_one_out).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from iosr_fast.methods.support_set import SupportSet

# A tenth of the usual distance. Of Caltech-101 and Flowers at 16 images a class, in CLIP ViT-B/32, under 1% are closer.
_SHARE = 0.1
# Cosines of rows that are equal but for float32 rounding differ from 1 by less.
_ROUNDING = 1e-6
# Images of a class that are compared with one another; of a larger class those that follow one another.
_BLOCK = 512


def group_near_duplicates(support: SupportSet) -> np.ndarray:
    """(N,) int64: the group of each support image within its class, numbered from 0 in the order of their first images.

    Two images of a class are near duplicates if the distance 1 - cosine of their plain embeddings is at most a tenth
    of the usual one; a group has the images that are near its first one, so a chain of images makes no group. The usual
    distance is the median over the pairs of the class, but at least half, and at most the whole, of the median class's:
    a class of duplicates alone has no distance of its own to compare with, and a class of varied images no reason for
    wider groups. Images of a class of more than 512 are compared with those of their block of 512: O(N D) operations.

    >>> from iosr_fast import Embeddings
    >>> from iosr_fast.methods.support_set import make_support_set
    >>> rows = np.array([[1, 0, 0], [0, 1, 0], [1, 1e-3, 0], [0, 0, 1], [1, 0, 0]])
    >>> rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    >>> group_near_duplicates(make_support_set(Embeddings(rows), [0, 0, 0, 1, 1], None, 1.0, 2))
    array([0, 1, 0, 0, 1])
    """
    plain, offsets = np.asarray(support.embeddings.plain, np.float32), support.class_offsets
    groups = np.zeros(len(plain), np.int64)
    several = np.flatnonzero(support.counts > 1)
    if not len(several):
        return groups
    medians = np.array([_median(plain[offsets[c] : offsets[c + 1]][:_BLOCK]) for c in several])
    usual = np.clip(medians, np.median(medians) / 2, np.median(medians))
    for c, distance in zip(several.tolist(), usual.tolist(), strict=True):
        count = 0
        for rows in _blocks(int(offsets[c]), int(offsets[c + 1])):
            inside = _leaders(1.0 - plain[rows] @ plain[rows].T <= _SHARE * distance + _ROUNDING)
            groups[rows] = count + inside
            count += int(inside.max()) + 1
    return groups


def _median(rows: np.ndarray) -> float:
    """The median of 1 - cosine over the pairs of rows (n, D)."""
    return float(np.median((1.0 - rows @ rows.T)[np.triu_indices(len(rows), 1)]))


def _blocks(first: int, last: int) -> Iterator[slice]:
    for start in range(first, last, _BLOCK):
        yield slice(start, min(start + _BLOCK, last))


def _leaders(close: np.ndarray) -> np.ndarray:
    """The group (n,) of each of n images; close (n, n) bool. The first image without a group leads the next one, of all
    images without a group that are close to it."""
    groups = np.full(len(close), -1)
    count = 0
    for leader in range(len(close)):
        if groups[leader] < 0:
            groups[close[leader] & (groups < 0)] = count
            groups[leader] = count
            count += 1
    return groups
