"""How good embeddings are before any few-shot method sees them: overlap of the cosines, and a linear probe.

Meant for a few times a training, on held-out pictures: it takes about a second on one core.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from iosr_fast.training.overlap import auroc, overlap_area, pair_cosines

logger = logging.getLogger(__name__)

MOST_PICTURES = 2000  # the cosines of all pairs take 16 MB then
RIDGE = 3e-5
_CURVATURE = 0.1
_LARGEST_GRADIENT = 1e-5
_ITERATIONS = 300


@dataclass(frozen=True)
class Probe:
    """What `probe` measured, on `pictures` of `classes`; `classes_left_out` had fewer than two pictures.

    `overlap_area` is in [0, 1], less is better; `auroc` 1 at best, 0.5 by chance (see `iosr_fast.training.overlap`).
    `linear_probe` is the share of test pictures labelled correctly; 1 / classes by chance.
    """

    overlap_area: float
    auroc: float
    linear_probe: float
    pictures: int
    classes: int
    classes_left_out: int = 0


def probe(
    embeddings: np.ndarray, labels: np.ndarray, seed: int = 0, ids: Sequence[int] | Sequence[str] | None = None
) -> Probe:
    """Overlap, AUROC and linear-probe accuracy of `embeddings` (N, D) with integer `labels` (N,).

    Rows are L2-normalised first. Classes of one picture are left out. Of more than 2,000 pictures at most 2,000 are
    looked at, about as many of each class; of more than 1,000 classes 1,000. The linear probe (`fit_linear_probe`) is
    fitted on half of each class, the larger half where they differ, and tested on the rest.

    Which pictures those are depends on `seed` and on what names a picture, never on the order of the rows: `ids` (N,),
    each another, or without them the embedding itself. Give ids (row numbers will do) to compare encoders, so that
    all are measured on the same pictures.

    Raises ValueError for other shapes or dtypes, embeddings that are zero or not finite, or fewer than two classes of
    two pictures.
    """
    units, labels = _checked(embeddings, labels)
    chosen = _choose(units if ids is None else _named(ids, len(units)), labels, seed)
    _, sizes = np.unique(labels, return_counts=True)
    _, labels, kept = np.unique(labels[chosen], return_inverse=True, return_counts=True)
    units = units[chosen]
    if len(kept) < 2:
        raise ValueError(
            f"expected at least two classes of two pictures or more, got {len(kept)} among {len(sizes)} classes of "
            f"{sizes.sum()} pictures; hold more pictures out"
        )
    paired, unpaired = pair_cosines(units, labels)
    fitted = _position(kept) < np.repeat(-(-kept // 2), kept)
    weight, bias = fit_linear_probe(units[fitted], labels[fitted], len(kept))
    right = (units[~fitted] @ weight + bias).argmax(1) == labels[~fitted]
    return Probe(
        overlap_area=overlap_area(paired, unpaired),
        auroc=auroc(paired, unpaired),
        linear_probe=float(right.mean()),
        pictures=len(units),
        classes=len(kept),
        classes_left_out=int(np.count_nonzero(sizes < 2)),
    )


def probed_rows(labels: np.ndarray, seed: int = 0) -> np.ndarray:
    """The rows that `probe` looks at where row numbers are the ids, ascending: no others need be encoded."""
    return np.sort(_choose(_named(range(len(labels)), len(labels)), labels, seed))


def fit_linear_probe(
    rows: np.ndarray, labels: np.ndarray, classes: int, ridge: float = RIDGE
) -> tuple[np.ndarray, np.ndarray]:
    """Multinomial logistic regression: weight (D, C) and bias (C,), float64, at the minimum of

        mean over i of -log softmax(rows[i] @ weight + bias)[labels[i]]  +  ridge / 2 * sum of weight^2

    `rows` (N, D), not standardised; `labels` (N,) in 0..C-1, each of which occurs. The bias is free; of all that do
    as well the one of mean zero is returned. The default ridge lies where accuracy is flat, on unit rows of the demo's
    CLIP and of CLIP ViT-B/32.

    Solved by L-BFGS in float64. It goes along the principal axes of the rows, each scaled by the curvature there:
    another way to the same minimum, in a tenth of the steps.
    """
    exact = torch.from_numpy(np.asarray(rows, np.float64))
    targets = torch.from_numpy(np.asarray(labels, np.int64))
    n = len(exact)
    mean = exact.mean(0)
    centred = exact - mean  # moves the bias only, which is free
    variance, axes = torch.linalg.eigh(centred.T @ centred / n)
    # A tenth of the curvature at weight zero, var / classes, for it falls as rows are told apart. The bias is one
    # more channel, of variance 1 and without a ridge.
    scale = (_CURVATURE * variance.clamp(min=0) / classes + ridge).rsqrt()
    bias_scale = (classes / _CURVATURE) ** 0.5
    basis = axes * scale
    points = torch.cat([centred @ basis, torch.full((n, 1), bias_scale, dtype=torch.float64)], 1)
    penalty = torch.cat([ridge * scale**2, torch.zeros(1, dtype=torch.float64)])[:, None]
    v = torch.zeros(points.shape[1], classes, dtype=torch.float64)
    at = torch.arange(n)

    def objective() -> torch.Tensor:
        log_p = torch.log_softmax(points @ v, 1)
        loss = -log_p[at, targets].mean() + 0.5 * (penalty * v**2).sum()
        residual = log_p.exp_()
        residual[at, targets] -= 1
        v.grad = torch.addmm(penalty * v, points.T, residual, alpha=1 / n)
        return loss

    solver = torch.optim.LBFGS(
        [v],
        max_iter=_ITERATIONS,
        tolerance_grad=_LARGEST_GRADIENT,
        tolerance_change=0,
        history_size=10,
        line_search_fn="strong_wolfe",
    )
    solver.step(objective)
    left = float(v.grad.abs().max()) if v.grad is not None else math.inf
    if left > 100 * _LARGEST_GRADIENT:
        logger.warning("the linear probe has not converged: a derivative of %g is left", left)
    weight = basis @ v[:-1]
    return weight.numpy(), (bias_scale * v[-1] - mean @ weight).numpy()


def _checked(embeddings: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    embeddings, labels = np.asarray(embeddings), np.asarray(labels)
    if embeddings.ndim != 2 or embeddings.dtype.kind != "f" or not embeddings.shape[1]:
        raise ValueError(f"expected embeddings (N, D) of floats, got {embeddings.shape} of {embeddings.dtype}")
    if labels.shape != (len(embeddings),) or labels.dtype.kind not in "iu":
        raise ValueError(
            f"expected labels ({len(embeddings)},) of integers, got {labels.shape} of {labels.dtype}; one for each row"
        )
    wide = embeddings.astype(np.float32)
    norms = np.linalg.norm(wide, axis=1, keepdims=True)
    bad = np.flatnonzero(~(np.isfinite(norms[:, 0]) & (norms[:, 0] > 0)))
    if len(bad):
        raise ValueError(
            f"expected finite embeddings other than zero, got {len(bad)} that are not, the first in row {bad[0]}"
        )
    return wide / norms, labels


def _named(ids: Sequence[int] | Sequence[str], count: int) -> list[bytes]:
    names = [str(i).encode() for i in ids]
    if len(names) != count or len(set(names)) != count:
        raise ValueError(f"expected an id for each of the {count} rows, no two the same, got {len(names)} ids")
    return names


def _choose(names: Sequence[bytes] | np.ndarray, labels: np.ndarray, seed: int) -> np.ndarray:
    """The rows that are looked at, class by class, in each by lot."""
    order = _order(names, labels, seed)
    _, sizes = np.unique(labels, return_counts=True)
    return order[_position(sizes) < np.repeat(_shares(sizes, seed), sizes)]


def _order(names: Sequence[bytes] | np.ndarray, labels: np.ndarray, seed: int) -> np.ndarray:
    """Rows class by class, and in each class as a hash of the seed and the row's name has it."""
    salt = str(seed).encode()
    hashes = [hashlib.blake2b(name, digest_size=8, salt=salt[:16]).digest() for name in names]
    return np.lexsort((np.array([int.from_bytes(h) for h in hashes], np.uint64), labels))


def _position(sizes: np.ndarray) -> np.ndarray:
    """For rows that lie class by class: which of its class each is, from 0."""
    return np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)


def _shares(sizes: np.ndarray, seed: int) -> np.ndarray:
    """How many pictures of each class: as many as there are up to one limit for all, none where there are not two."""
    take = np.where(sizes < 2, 0, sizes)
    usable = np.flatnonzero(take)
    if len(usable) > MOST_PICTURES // 2:
        dropped = np.random.default_rng(seed).permutation(usable)[MOST_PICTURES // 2 :]
        take[dropped] = 0
    limit = min(int(take.max(initial=0)), MOST_PICTURES)
    while np.minimum(take, limit).sum() > MOST_PICTURES:
        limit -= 1
    return np.minimum(take, limit)
