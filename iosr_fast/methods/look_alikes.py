"""Pictures of a class that look alike, as those of one session, burst or object do: they are left out together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from iosr_fast.methods.support_set import SupportSet, blocks, image_rows

_RIDGE = 3.0
# An image looks like another from a centred cosine of _ALIKE (_DIRECTIONS / d)^(1/4) on, and at least _ALIKE; d is
# LookAlikes.directions. Independent images share sub-types, which differ in few directions, and an encoder of few lacks
# the others: of Caltech-101 and Flowers at 4 to 16 a class, in CLIP ViT-B/32 and in projections of it, more than usual
# do from 0.43 on at d = 358, 0.49 at 224, 0.56 at 113, 0.63 at 55, 0.73 at 27 and 0.86 at 14.
_ALIKE = 0.5
_DIRECTIONS = 220.0
# The mean cosine of two groups from which on they are one, as a share of that of look-alikes; where these are many, of
# _ALIKE, so that no burst is torn. In CLIP ViT-B/32 12 / 21 / 32% of the images of Caltech-101 and Flowers are in a
# group with others at 4 / 8 / 16 a class.
_JOINED = 0.6
# Taken independently, at most this share of a class of n looks like another, times log2(n): of Caltech-101, Flowers and
# made-up images at 3 to 64 a class at most 0.026; of made-up bursts 0.08 and more. Of images beside others classes may
# be of any size: of Caltech-101 as it is 0.041, of images of one shop visit or session 0.08.
_USUAL = 0.03
_USUAL_BESIDE = 0.045
# With fewer directions than these up to this share of all images does: of the demo's drawings, whose fonts copy from
# one another, it is 0.08 to 0.20. Of bursts of them it is 0.24 to 0.38, but of bursts of photographs 0.07 to 0.17.
_FEW_DIRECTIONS = 30.0
_USUAL_SHARE = 0.2
# Standard errors of their usual number that look-alikes must exceed it by.
_ERRORS = 2.0
# Images, evenly spread over the classes, whose pairs tell the independent directions.
_SAMPLE = 1024
# Images of a class that are compared with one another; of a larger class those that follow one another. 64 MB.
_BLOCK = 4096


@dataclass(frozen=True, eq=False)
class LookAlikes:
    """Of N support images:

    groups      (N,) int64, the same for images of a class that look alike
    nearest     (N,) float32, the centred cosine of the most similar other image of its class, 0 where none is; it may
                exceed 1, as 1 / (n - 1) is added for a class of n
    usual       how many images look like another one, at most, where all were taken independently
    directions  of how many independent directions the embeddings are: cosines of unrelated images are 1 / sqrt of it
    """

    groups: np.ndarray
    nearest: np.ndarray
    usual: float
    directions: float = np.inf

    @property
    def told(self) -> bool:
        """Whether bursts can be told from independent images: of few directions only where look-alikes are `many`. If
        not, each image is its own group, and near duplicates alone (folds.group_near_duplicates) are left out
        together."""
        return self.directions >= _FEW_DIRECTIONS or self.many

    @property
    def alike(self) -> float:
        """The centred cosine from which on an image looks like another one; of few directions it exceeds 1."""
        return _ALIKE * max(1.0, (_DIRECTIONS / self.directions) ** 0.25)

    @property
    def siblings(self) -> int:
        """How many images share their group with others."""
        return int((np.bincount(self.groups)[self.groups] > 1).sum())

    @property
    def many(self) -> bool:
        """Whether more images look like another one of their class than of images that were taken independently."""
        return bool((self.nearest > self.alike).sum() > self.usual + _ERRORS * self.usual**0.5)

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

    @property
    def doubt(self) -> tuple[str, ...]:
        """What is not known where bursts can't be told, and what to do, in a sentence."""
        if self.told or not len(self.groups):
            return ()
        return (
            f"embeddings of {self.directions:.0f} independent directions do not tell bursts from other pictures: if "
            "there are bursts, promises may break; name them by groups",
        )


def find_look_alikes(support: SupportSet, beside: np.ndarray | None = None) -> LookAlikes:
    """Images of a class that look alike, by average linkage of their centred cosines: the two groups whose images have
    the largest mean cosine are joined while that is large enough (_JOINED).

    Centred cosines are those of whitened embeddings after the class mean is taken off. Encoders differ in how alike
    they find any two pictures of a class, and in how many directions these differ; centred cosines of unrelated
    pictures are 0 on the mean, whatever the encoder, and as small as its directions are many. They say nothing of a
    class of two images, or of one session: near duplicates (folds.group_near_duplicates) are left out together besides.

    With `beside`, a mask (N,), `nearest`, `usual` and `many` are of its images alone, each compared with the images of
    its class that are not in it: of images of calibrate_on, beside those of the support set, `many` are siblings. The
    others alone whiten: many siblings of few sessions would pass for directions in which any images differ.

    O(N D (n + D) + D^3) operations for classes of n images, and at most _BLOCK^2 cosines in memory.
    """
    plain = image_rows(support.embeddings, "plain", None)
    classes = [slice(*ends) for ends in pairwise(support.class_offsets.tolist()) if ends[1] - ends[0] > 1]
    compared = np.ones(len(plain), bool) if beside is None else beside
    others = compared if beside is None else ~beside
    root = _whitening([plain[rows][others[rows]] for rows in classes])
    centred = np.zeros_like(plain)
    for rows in classes:
        whitened = (plain[rows] - plain[rows].mean(0)) @ root
        centred[rows] = whitened / np.maximum(np.linalg.norm(whitened, axis=1, keepdims=True), 1e-9)
    groups, nearest = np.arange(len(plain)), np.zeros(len(plain), np.float32)
    directions = independent_directions(centred, support)
    usual = _usual_number(support, compared, others)
    if directions < _FEW_DIRECTIONS:
        usual = max(usual, _USUAL_SHARE * float(compared.sum()))
    found = LookAlikes(groups, nearest, usual, directions)
    for block, cosines in _cosines(centred, classes):
        most_similar = cosines[:, others[block]].max(1, initial=0.0)
        nearest[block] = np.where(compared[block], most_similar, 0.0)
    least = _JOINED * (_ALIKE if found.many else found.alike)
    for block, cosines in _cosines(centred, classes) if found.told else ():
        groups[block] = block.start + average_linkage(cosines, least)
    return found


def _cosines(centred: np.ndarray, classes: Sequence[slice]) -> Iterator[tuple[slice, np.ndarray]]:
    """The rows of up to _BLOCK images of a class, and their cosines (n, n); -inf of an image with itself."""
    for rows in classes:
        n = rows.stop - rows.start
        for block in blocks(n, _BLOCK):
            part = slice(rows.start + block.start, rows.start + block.stop)
            # What is added makes the mean cosine of unrelated images 0, which is -1 / (n - 1) about their mean.
            cosines = centred[part] @ centred[part].T + np.float32(1 / (n - 1))
            np.fill_diagonal(cosines, -np.inf)
            yield part, cosines


def _usual_number(support: SupportSet, compared: np.ndarray, others: np.ndarray) -> float:
    """How many images of the mask `compared` (N,) look like one of `others`, at most, where all are independent."""
    images, candidates = (np.bincount(support.labels[mask], minlength=support.n_classes) for mask in (compared, others))
    usual = _USUAL if compared is others else _USUAL_BESIDE
    return usual * float(images @ np.log2(np.maximum(candidates + (compared is not others), 1)))


def independent_directions(centred: np.ndarray, support: SupportSet) -> float:
    """1 / E cos^2 of unrelated images with the `centred` unit rows (N, D), at most D. Of normal rows with the
    covariance S it is (tr S)^2 / tr S^2: that many directions of equal variance have cosines as large.

    E cos^2 is the median of cos^2 over all pairs, over 0.4549, the median of chi^2 with one degree of freedom. Few
    pairs are of one burst, which hardly change a median; pairs of different classes count, so classes may be small.
    """
    counts = support.counts[support.labels]
    rows = np.flatnonzero(counts > 1)
    rows = rows[:: max(1, -(-len(rows) // _SAMPLE))]
    labels, width = support.labels[rows], float(centred.shape[1])
    cosines = centred[rows] @ centred[rows].T + (labels[:, None] == labels) / (counts[rows] - 1)
    squares = cosines[np.triu_indices(len(rows), 1)] ** 2
    return min(0.4549 / max(float(np.median(squares)), 1e-9), width) if len(squares) else width


def _whitening(classes: Sequence[np.ndarray]) -> np.ndarray:
    """(D, D) float32 R with R R' = inv(S + (1 / D + _RIDGE / (N - C)) tr(S) I), S the covariance of N rows (n, D) about
    the means of their C classes: with few rows it knows few directions, and the others would count too much."""
    width = classes[0].shape[1] if classes else 0
    classes = [rows for rows in classes if len(rows) > 1]
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
