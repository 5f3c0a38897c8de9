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
    several, medians = _medians(support)
    if not len(several):
        return groups
    usual = np.clip(medians, np.median(medians) / 2, np.median(medians))
    for c, distance in zip(several.tolist(), usual.tolist(), strict=True):
        count = 0
        for rows in _blocks(int(offsets[c]), int(offsets[c + 1])):
            inside = _leaders(1.0 - plain[rows] @ plain[rows].T <= _SHARE * distance + _ROUNDING)
            groups[rows] = count + inside
            count += int(inside.max()) + 1
    return groups


def near_support(support: SupportSet, plain: np.ndarray) -> np.ndarray:
    """(B,) bool: the plain embeddings (B, D) of images that are near duplicates of a support image of any class, which
    say little about new images. The usual distance is that of the median class; without a class of two images, only
    equal rows are near.

    >>> from iosr_fast import Embeddings
    >>> from iosr_fast.methods.support_set import make_support_set
    >>> support = make_support_set(Embeddings(np.eye(4, dtype=np.float32)), [0, 0, 1, 1], None, 1.0, 2)
    >>> near_support(support, np.float32([[0, 0, 1, 0], [0, 0, 0.8, 0.6]]))
    array([ True, False])
    """
    keys = np.asarray(support.embeddings.plain, np.float32)
    if not len(keys):
        return np.zeros(len(plain), bool)
    several, medians = _medians(support)
    limit = _SHARE * float(np.median(medians)) if len(several) else 0.0
    blocks = [plain[start : start + _BLOCK] for start in range(0, len(plain), _BLOCK)]
    nearest = np.concatenate([(block @ keys.T).max(1) for block in blocks]) if blocks else np.zeros(0)
    near: np.ndarray = 1.0 - nearest <= limit + _ROUNDING
    return near


def _medians(support: SupportSet) -> tuple[np.ndarray, np.ndarray]:
    """The classes that have two images or more, and of each the median distance of two images."""
    plain, offsets = np.asarray(support.embeddings.plain, np.float32), support.class_offsets
    several = np.flatnonzero(support.counts > 1)
    return several, np.array([_median(plain[offsets[c] : offsets[c + 1]][:_BLOCK]) for c in several])


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
