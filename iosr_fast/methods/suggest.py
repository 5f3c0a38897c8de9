"""What to label next: of many unlabelled images a few that are diverse, typical and, after a fit, uncertain."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from iosr_fast.methods.support_set import blocks
from iosr_fast.utils.numbers import check_integer
from iosr_fast.utils.short_repr import short_repr

_ROUNDS = 20
_LOGITS = 1 << 24  # float32 of a block
_COMPARED = 2048  # images of a cluster, the nearest to its centre, of which one is suggested
_NEAR = 0.1  # of the usual distance within a cluster: near duplicates are closer


@dataclass(frozen=True, eq=False)
class Suggestions:
    """The result of `suggest` for n of B images, the most useful first.

    rows     (n,) int64, the images' positions
    stands   (n,) int64, how many of the B images each one stands for: those nearest to it, itself included
    """

    rows: np.ndarray
    stands: np.ndarray
    __repr__ = short_repr


def suggest(rows: np.ndarray, n: int, weights: np.ndarray | None = None) -> Suggestions:
    """n images of B to label next: the most typical image of each of n clusters of equal weight.

    `rows` (B, D) are embeddings of unit length, centred here and scaled again. `weights` (B,) >= 0, without unit: how
    much an image's label is worth, the entropy of a classifier's answers (links); None: all are worth the same, for a
    start without labels. Greedy k-means++ draws n centres, the same each time; at most 20 rounds of

        clusters   = the nearest centre that has room: one of total weight sum(weights) / n
        centre[k]  = mean of the rows of cluster k, by weights

    follow. Of each cluster that image is suggested, among those of at least mean weight, whose mean cosine to the
    nearest quarter of the cluster is largest; a near duplicate of a suggested image only if nothing else is left.
    Clusters of the largest mean weight come first: those of images that no known class explains. If there are at most
    n images, all are. Time B n D a round; memory 4 B n bytes.

    Clusters need not follow classes. If p[k] is a class's share of cluster k, one draw from each of n equal clusters
    misses it with probability prod(1 - p[k]) <= (1 - mean(p))^n, that of n draws from all images: equal clusters never
    lose to chance. Those of any size may, because most go to whatever scatters most. The typical image stands in for
    the draw: a better example where a cluster is a class, and still of its densest class where it is of several, of
    which the image at the centre is rather the plainest.

    Raises IosrFastError for n below 1.

    Sources: uncertainty-weighted clustering (CLUE; Prabhu et al., ICCV 2021), typical images (TypiClust; Hacohen et
    al., ICML 2022), stratified sampling by proportional allocation (Cochran, Sampling Techniques, 1977, chapter 5).
    """
    n = min(check_integer("n", n, 1), len(rows))
    if not n:
        return Suggestions(np.zeros(0, np.int64), np.zeros(0, np.int64))
    centred = np.asarray(rows, np.float32) - rows.mean(0, dtype=np.float64).astype(np.float32)
    centred /= np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-12)
    weights = np.ones(len(rows)) if weights is None else np.asarray(weights, np.float64)
    weights = weights / weights.max() + 1e-9 if weights.max() > 0 else np.ones(len(rows))
    centres = _first_centres(centred, weights, n, np.random.default_rng(0))
    clusters = _equal_clusters(centred, centres, weights)
    for _ in range(_ROUNDS):
        _move(centres, centred, weights, clusters)
        before = clusters
        clusters = _equal_clusters(centred, centres, weights)
        if (clusters == before).all():
            break
    chosen = _choose(centred, centres, weights, clusters)
    nearest = [(centred[b] @ centred[chosen].T).argmax(1) for b in blocks(len(rows), _LOGITS // n)]
    return Suggestions(chosen, np.bincount(np.concatenate(nearest), minlength=n))


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


def _equal_clusters(rows: np.ndarray, centres: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Each row's cluster (B,) int64, by deferred acceptance (Gale & Shapley, 1962): a row asks its nearest centre; a
    centre keeps the nearest rows up to its share of all weight, and refuses the others, which ask their next."""
    closeness = rows @ centres.T
    closeness -= 0.5 * np.einsum("kd,kd->k", centres, centres)
    share = weights.sum() / len(centres) * (1 + 1e-6)  # rounding never makes all centres refuse a row
    clusters = closeness.argmax(1)
    asked = np.arange(len(rows))
    while True:
        order = asked[np.lexsort((-closeness[asked, clusters[asked]], clusters[asked]))]
        nearer = np.cumsum(weights[order]) - weights[order]
        nearer -= nearer[np.searchsorted(clusters[order], clusters[order])]
        refused = order[nearer >= share]
        if not len(refused):
            return clusters
        closeness[refused, clusters[refused]] = -np.inf
        clusters[refused] = closeness[refused].argmax(1)
        asked = np.flatnonzero(np.bincount(clusters[refused], minlength=len(centres))[clusters])


def _move(centres: np.ndarray, rows: np.ndarray, weights: np.ndarray, clusters: np.ndarray) -> None:
    """Each centre to the weighted mean of its cluster; one without rows stays."""
    order = np.argsort(clusters, kind="stable")
    filled, first = np.unique(clusters[order], return_index=True)
    weighted = weights[order, None].astype(np.float32) * rows[order]
    total = np.add.reduceat(weights[order], first)
    centres[filled] = np.add.reduceat(weighted, first) / total[:, None]


def _choose(rows: np.ndarray, centres: np.ndarray, weights: np.ndarray, clusters: np.ndarray) -> np.ndarray:
    """(n,) int64: each cluster's most typical image, the cluster of the largest mean weight first; instead of near
    duplicates of these the next most typical ones."""
    n = len(centres)
    worth = np.bincount(clusters, weights, n) / np.maximum(np.bincount(clusters, minlength=n), 1)
    order = np.lexsort((-worth[clusters], _ranks(rows, centres, weights, clusters)))
    limit = 1.0 - _NEAR * (1.0 - np.einsum("kd,kd->k", centres, centres).mean())
    free = order
    chosen = list[int]()
    while len(chosen) < n and len(free):
        chosen.append(int(free[0]))
        free = free[1:][rows[free[1:]] @ rows[free[0]] < limit]
    rest = order[~np.isin(order, chosen)]
    return np.array(chosen + rest[: n - len(chosen)].tolist())


def _ranks(rows: np.ndarray, centres: np.ndarray, weights: np.ndarray, clusters: np.ndarray) -> np.ndarray:
    """Each row's place in its cluster (B,) int64, 0 for the most typical one."""
    ranks = np.empty(len(rows), np.int64)
    for k in np.unique(clusters):
        members = np.flatnonzero(clusters == k)
        members = members[np.argsort(-(rows[members] @ centres[k]), kind="stable")]
        ranks[members] = np.arange(len(members))
        members = members[:_COMPARED]
        near = min(1 + max(2, len(members) // 4), len(members))  # with the image itself
        typical = np.sort(rows[members] @ rows[members].T, axis=1)[:, len(members) - near :].sum(1)
        light = weights[members] < weights[members].mean() * (1 - 1e-9)
        ranks[members[np.lexsort((-typical, light))]] = np.arange(len(members))
    return ranks
