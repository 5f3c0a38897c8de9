"""The quality of embeddings before any few-shot method: overlap of the cosines, and a linear probe (scikit-learn).

Meant for held-out pictures, a few times per training.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np

from iosr_fast.exceptions import IosrFastError
from iosr_fast.training.overlap import auroc, overlap_area, pair_cosines
from iosr_fast.utils.require import require

MOST_PICTURES = 2000  # limits the cosines of all pairs to 16 MB
RIDGE = 3e-5


@dataclass(frozen=True)
class Probe:
    """The result of `probe` on a number of `pictures` of a number of `classes`.

    `overlap_area` is in [0, 1], less is better; `auroc` 1 at best, 0.5 by chance (see `iosr_fast.training.overlap`).
    `linear_probe` is the share of test pictures labelled correctly; 1 / classes by chance.
    """

    overlap_area: float
    auroc: float
    linear_probe: float
    pictures: int
    classes: int


def probe(embeddings: np.ndarray, labels: np.ndarray, seed: int = 0) -> Probe:
    """Overlap, AUROC and linear-probe accuracy of `embeddings` (N, D) with integer `labels` (N,).

    Rows are L2-normalised first. Classes with a single picture are left out. At most 2,000 pictures, about equally many
    of each class, and at most 1,000 classes are used. The choice depends on `labels` and `seed` only, so encoders are
    compared on the same pictures. The linear probe is fitted on half of each class (the larger half of an odd number)
    and tested on the rest: multinomial logistic regression, at the minimum of

        mean over i of -log softmax(rows[i] @ weight + bias)[labels[i]]  +  ridge / 2 * sum of weight^2

    The ridge of 3e-5 lies where accuracy is flat, on unit rows of the demo's CLIP and of CLIP ViT-B/32.

    Raises ValueError for embeddings that are zero or not finite, or fewer than two classes of two pictures.
    """
    units = _normalised(embeddings)
    rows = _choose(labels, seed)
    names, sizes = np.unique(labels[rows], return_counts=True)
    if len(names) < 2:
        raise IosrFastError(
            f"expected at least two classes with two pictures or more, got {len(names)} among "
            f"{len(np.unique(labels))} classes of {len(labels)} pictures; hold out more pictures"
        )
    units, labels = units[rows], labels[rows]
    paired, unpaired = pair_cosines(units, labels)
    fitted = _position(sizes) < np.repeat(-(-sizes // 2), sizes)
    model = require("sklearn.linear_model", "train").LogisticRegression(
        C=1 / (RIDGE * np.count_nonzero(fitted)), tol=1e-5, max_iter=1000
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The number of unique classes")  # few pictures of each are usual here
        model.fit(units[fitted], labels[fitted])
    return Probe(
        overlap_area=overlap_area(paired, unpaired),
        auroc=auroc(paired, unpaired),
        linear_probe=float((model.predict(units[~fitted]) == labels[~fitted]).mean()),
        pictures=len(units),
        classes=len(names),
    )


def probed_rows(labels: np.ndarray, seed: int = 0) -> np.ndarray:
    """The rows that `probe` uses, ascending: only these must be encoded. A probe of these rows uses all of them."""
    return np.sort(_choose(labels, seed))


def _normalised(embeddings: np.ndarray) -> np.ndarray:
    rows = embeddings.astype(np.float32)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    bad = np.flatnonzero(~(np.isfinite(norms[:, 0]) & (norms[:, 0] > 0)))
    if len(bad):
        raise IosrFastError(
            f"expected finite embeddings other than zero, got {len(bad)} others, the first in row {bad[0]}"
        )
    units: np.ndarray = rows / norms
    return units


def _choose(labels: np.ndarray, seed: int) -> np.ndarray:
    """The rows to use, class by class, in random order within each."""
    rng = np.random.default_rng(seed)
    order = np.lexsort((rng.random(len(labels)), labels))
    sizes = np.unique(labels, return_counts=True)[1]
    shares = np.where(sizes < 2, 0, sizes)
    usable = np.flatnonzero(shares)
    if len(usable) > MOST_PICTURES // 2:
        shares[rng.permutation(usable)[MOST_PICTURES // 2 :]] = 0
    limit = min(int(shares.max(initial=0)), MOST_PICTURES)
    while np.minimum(shares, limit).sum() > MOST_PICTURES:
        limit -= 1
    return order[_position(sizes) < np.repeat(np.minimum(shares, limit), sizes)]


def _position(sizes: np.ndarray) -> np.ndarray:
    """The position of each row in its class, from 0, for rows sorted by class."""
    return np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
