"""Intra-modal overlap: how far the cosines of same-class and of different-class image pairs overlap."""

from __future__ import annotations

import numpy as np

from iosr_fast.exceptions import IosrFastError
from iosr_fast.utils.ranking import auroc

__all__ = ["auroc", "feature_variance", "overlap_area", "pair_cosines"]

BINS = 200


def pair_cosines(embeddings: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cosines of all pairs i < j: (paired, unpaired), of the same and of different classes. Needs N^2 * 4 bytes.

    `embeddings` (N, D), L2-normalised; `labels` (N,). Raises ValueError if no pair, or every pair, shares a class.
    """
    cosines = embeddings @ embeddings.T
    upper = np.triu(np.ones(cosines.shape, bool), 1)
    same = labels[:, None] == labels[None, :]
    paired, unpaired = cosines[upper & same], cosines[upper & ~same]
    if not len(paired) or not len(unpaired):
        raise IosrFastError(
            f"expected pairs of the same and of different classes, got {len(paired)} and {len(unpaired)} of them"
        )
    return paired, unpaired


def overlap_area(paired: np.ndarray, unpaired: np.ndarray) -> float:
    """The area shared by the two densities, in [0, 1]: sum over bins of min(p, q), with bins over [-1, 1].

    Source: Kravets & Namboodiri, BMVC 2024, section 3 (their intra-modal overlap).
    """
    p, _ = np.histogram(np.clip(paired, -1, 1), bins=BINS, range=(-1, 1))
    q, _ = np.histogram(np.clip(unpaired, -1, 1), bins=BINS, range=(-1, 1))
    return float(np.minimum(p / p.sum(), q / q.sum()).sum())


def feature_variance(embeddings: np.ndarray) -> float:
    """The scatter of unit rows x[i] about their mean m, in [0, N / (N - 1)]: the trace of their covariance,

        sum_i |x[i] - m|^2 / (N - 1) = N / (N - 1) * (1 - |m|^2)

    `embeddings` (N, D), L2-normalised, N >= 2. Near 0 if all rows share a direction, N / (N - 1) if their mean is zero.
    Divided by D it is the mean of the channels' variances. Raises ValueError for fewer than two rows.
    """
    n_rows = len(embeddings)
    if n_rows < 2:
        raise IosrFastError(f"expected at least two embeddings, got {n_rows}")
    exact = np.asarray(embeddings, np.float64)
    return float(((exact - exact.mean(0)) ** 2).sum() / (n_rows - 1))
