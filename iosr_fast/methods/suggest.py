"""What to label next: of many unlabelled images a few that are diverse and, for a fitted classifier, uncertain."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from iosr_fast.methods.support_set import blocks
from iosr_fast.scoring.reference import softmax
from iosr_fast.utils.numbers import check_integer

_ROUNDS = 20
_LOGITS = 1 << 24  # float32 of a block


@dataclass(frozen=True, eq=False)
class Suggestions:
    """The result of `suggest` for n of B images, the most useful first.

    rows     (n,) int64, the images' positions
    stands   (n,) int64, how many of the B images each one stands for, itself included
    """

    rows: np.ndarray
    stands: np.ndarray


def entropy(logits: np.ndarray) -> np.ndarray:
    """The entropy of softmax(logits), (B,) float64 in nats, for logits (B, C): how uncertain a classifier is."""
    p = softmax(logits.astype(np.float64))
    result: np.ndarray = -(p * np.log(np.maximum(p, 1e-300))).sum(1)
    return result


def suggest(rows: np.ndarray, n: int, weights: np.ndarray | None = None, seed: int = 0) -> Suggestions:
    """n images of B to label next: the medoids of weighted k-means.

    `rows` (B, D) are embeddings of unit length, centred here and scaled again. `weights` (B,) >= 0, without unit: how
    much an image's label is worth, `entropy` of a classifier's logits; None: all are worth the same, for a start
    without labels. Greedy k-means++ draws n centres from a generator of `seed`; at most 20 rounds of

        centre[k] = mean of the rows of cluster k, by weights

    follow. Of each cluster the image nearest to its centre is suggested, clusters of the largest summed weight first:
    those of images that no known class explains. If there are at most n images, all are. Time B n D a round; memory
    blocks of 64 MiB.

    Raises IosrFastError for n below 1.

    Source: uncertainty-weighted clustering (CLUE; Prabhu et al., ICCV 2021), here on the classifier's own embeddings.
    """
    n = min(check_integer("n", n, 1), len(rows))
    if not n:
        return Suggestions(np.zeros(0, np.int64), np.zeros(0, np.int64))
    centred = np.asarray(rows, np.float32) - rows.mean(0, dtype=np.float64).astype(np.float32)
    centred /= np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-12)
    weights = np.ones(len(rows)) if weights is None else np.asarray(weights, np.float64)
    weights = weights / weights.max() + 1e-9 if weights.max() > 0 else np.ones(len(rows))
    centres = _first_centres(centred, weights, n, np.random.default_rng(seed))
    clusters, _ = _nearest(centred, centres)
    for _ in range(_ROUNDS):
        _move(centres, centred, weights, clusters)
        before = clusters
        clusters, distances = _nearest(centred, centres)
        if (clusters == before).all():
            break
    order = np.lexsort((distances, clusters))  # by cluster, the nearest to its centre first
    found, first, stands = np.unique(clusters[order], return_index=True, return_counts=True)
    medoids, worth = order[first], np.bincount(clusters, weights, n)[found]
    best = np.argsort(-worth, kind="stable")
    return _fill(Suggestions(medoids[best], stands[best]), weights * distances, n)


def _first_centres(rows: np.ndarray, weights: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    """Greedy k-means++ (Arthur & Vassilvitskii, 2007): each next centre is a row drawn by weight times squared distance
    to the nearest centre; of 2 + log(n) draws the one that leaves the least sum of these."""
    tries = 2 + int(np.log(n))
    distances = np.ones(len(rows))
    chosen: list[int] = []
    while len(chosen) < n:
        worth = np.cumsum(weights * distances)
        if worth[-1] <= 0:  # all rows are centres
            chosen += rng.integers(len(rows), size=n - len(chosen)).tolist()
            break
        drawn = np.minimum(np.searchsorted(worth, rng.random(tries) * worth[-1]), len(rows) - 1)
        nearer = np.minimum(distances[:, None], np.maximum(2.0 - 2.0 * (rows @ rows[drawn].T), 0.0))
        best = int((weights @ nearer).argmin())
        chosen.append(int(drawn[best]))
        distances = nearer[:, best]
    return rows[chosen]


def _nearest(rows: np.ndarray, centres: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each row's centre (B,) int64, and the squared distance to it."""
    clusters, distances = np.empty(len(rows), np.int64), np.empty(len(rows), np.float64)
    half = 0.5 * np.einsum("kd,kd->k", centres, centres)
    for block in blocks(len(rows), _LOGITS // len(centres)):
        closeness = rows[block] @ centres.T
        closeness -= half
        clusters[block] = closeness.argmax(1)
        distances[block] = 1.0 - 2.0 * np.take_along_axis(closeness, clusters[block, None], 1)[:, 0]
    return clusters, np.maximum(distances, 0.0)


def _move(centres: np.ndarray, rows: np.ndarray, weights: np.ndarray, clusters: np.ndarray) -> None:
    """Each centre to the weighted mean of its cluster; one without rows stays."""
    order = np.argsort(clusters, kind="stable")
    found, first = np.unique(clusters[order], return_index=True)
    weighted = weights[order, None].astype(np.float32) * rows[order]
    total = np.add.reduceat(weights[order], first)
    centres[found] = np.add.reduceat(weighted, first) / total[:, None]


def _fill(suggestions: Suggestions, worth: np.ndarray, n: int) -> Suggestions:
    """Where equal rows left a cluster empty: further images, of the largest `worth` (B,), each standing for itself."""
    missing = n - len(suggestions.rows)
    if not missing:
        return suggestions
    rest = np.setdiff1d(np.arange(len(worth)), suggestions.rows)
    more = rest[np.argsort(-worth[rest], kind="stable")][:missing]
    return Suggestions(np.r_[suggestions.rows, more], np.r_[suggestions.stands, np.ones(missing, np.int64)])
