"""Pictures of a class that look alike, as those of one session, burst or object do: they are left out together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from iosr_fast.methods.support_set import SupportSet, blocks, image_rows

# The mean centred cosine of two groups from which on they are one. In CLIP ViT-B/32 12 / 21 / 32% of the images of
# Caltech-101 and Flowers are in a group with others at 4 / 8 / 16 a class.
LEAST_COSINE = 0.3
_RIDGE = 3.0
# An image looks like another from this centred cosine on. Taken independently, at most this share of a class of n does,
# times log2(n): of Caltech-101, Flowers and made-up images at 3 to 64 a class at most 0.026; of made-up bursts 0.08
# and more.
_ALIKE = 0.5
_USUAL = 0.03
# Images of a class that are compared with one another; of a larger class those that follow one another. 64 MB.
_BLOCK = 4096


@dataclass(frozen=True, eq=False)
class LookAlikes:
    """Of N support images:

    groups   (N,) int64, the same for images of a class that look alike
    nearest  (N,) float32, the centred cosine of the most similar other image of its class, 0 where there is none
    usual    how many images look like another one, at most, where all were taken independently
    """

    groups: np.ndarray
    nearest: np.ndarray
    usual: float

    @property
    def siblings(self) -> int:
        """How many images share their group with others."""
        return int((np.bincount(self.groups)[self.groups] > 1).sum())

    @property
    def many(self) -> bool:
        """Whether more images look like another one of their class than of images that were taken independently, by two
        standard errors of this number."""
        return bool((self.nearest > _ALIKE).sum() > self.usual + 2.0 * self.usual**0.5)

    @property
    def warning(self) -> tuple[str, ...]:
        """What is wrong and what to do, a sentence each; none where there are few."""
        if not self.many:
            return ()
        share = f"{self.siblings:,} of {len(self.groups):,} pictures"
        return (
            f"{share} look like another one of their class, as in bursts: new pictures may be right less often, and "
            "promises may break",
            "let promises rest on labelled pictures from production (calibrate_on, iosr-fast fit --calibrate-on)",
        )


def find_look_alikes(support: SupportSet) -> LookAlikes:
    """Images of a class that look alike, by average linkage of their centred cosines: the two groups whose images have
    the largest mean cosine are joined while that is at least LEAST_COSINE.

    Centred cosines are those of whitened embeddings after the class mean is taken off. Encoders differ in how alike
    they find any two pictures of a class, and in how many directions these differ; centred cosines of unrelated
    pictures are 0 on the mean, and small, whatever the encoder. They say nothing of a class of two images, or of one
    session: near duplicates (folds.group_near_duplicates) are left out together besides.

    O(N D (n + D) + D^3) operations for classes of n images, and at most _BLOCK^2 cosines in memory.
    """
    plain = image_rows(support.embeddings, "plain", None)
    groups = np.arange(len(plain))
    nearest = np.zeros(len(plain), np.float32)
    classes = [slice(*ends) for ends in pairwise(support.class_offsets.tolist()) if ends[1] - ends[0] > 1]
    root = _whitening([plain[rows] for rows in classes])
    for rows in classes:
        centred = (plain[rows] - plain[rows].mean(0)) @ root
        centred /= np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-9)
        for block in blocks(len(centred), _BLOCK):
            # What is added makes the mean cosine of unrelated images 0, which is -1 / (n - 1) about their mean.
            cosines = centred[block] @ centred[block].T + np.float32(1 / (len(centred) - 1))
            np.fill_diagonal(cosines, -np.inf)
            nearest[rows][block] = cosines.max(1)
            groups[rows][block] = rows.start + block.start + average_linkage(cosines, LEAST_COSINE)
    sizes = support.counts[support.counts > 1]
    return LookAlikes(groups, nearest, _USUAL * float((sizes * np.log2(sizes)).sum()))


def _whitening(classes: Sequence[np.ndarray]) -> np.ndarray:
    """(D, D) float32 R with R R' = inv(S + (1 / D + _RIDGE / (N - C)) tr(S) I), S the covariance of N rows (n, D) about
    the means of their C classes: with few rows it knows few directions, and the others would count too much."""
    width = classes[0].shape[1] if classes else 0
    free = sum(len(rows) - 1 for rows in classes)
    scatter = np.zeros((width, width))
    for rows in classes:
        centred = rows - rows.mean(0)
        scatter += centred.T @ centred
    if (scale := np.trace(scatter) / max(width, 1)) <= 0:
        return np.eye(width, dtype=np.float32)
    ridge = (1.0 + _RIDGE * width / free) * np.eye(width)
    return np.linalg.cholesky(np.linalg.inv(scatter / scale + ridge)).astype(np.float32)


def average_linkage(cosines: np.ndarray, least: float) -> np.ndarray:
    """(n,) int64, the group of each of n images, numbered by one of its images; cosines (n, n) are overwritten.

    The nearest-neighbour chain (Benzecri, 1982) finds the groups of average linkage in O(n^2) operations: each image
    of the chain is followed by the one nearest to it, until two are nearest to each other; these are joined. A group
    whose nearest one is farther than `least` is complete, as joining others brings them no nearer.

    >>> average_linkage(np.array([[1, 0.1, 0.9], [0.1, 1, 0.2], [0.9, 0.2, 1]]), 0.4)
    array([2, 1, 2])
    """
    n = len(cosines)
    groups = np.arange(n)
    sizes = np.ones(n)
    chain = list[int]()
    np.fill_diagonal(cosines, -np.inf)
    waiting = dict.fromkeys(range(n))
    while waiting:
        last = chain[-1] if chain else next(iter(waiting))
        chain = chain or [last]
        nearest = int(cosines[last].argmax())
        if cosines[last, nearest] < least:
            del waiting[last]
            chain.pop()
        elif nearest not in chain:
            chain.append(nearest)
        else:
            joined = sizes[last] * cosines[last] + sizes[nearest] * cosines[nearest]
            sizes[last] += sizes[nearest]
            cosines[last] = cosines[:, last] = joined / sizes[last]
            cosines[last, last] = -np.inf
            cosines[nearest] = cosines[:, nearest] = -np.inf
            groups[groups == nearest] = last
            del waiting[nearest], chain[chain.index(nearest) :]
    return groups
