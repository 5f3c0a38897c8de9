"""Intra-modal overlap: how far the cosines of same-class and of different-class image pairs overlap."""

from __future__ import annotations

import numpy as np

from iosr_fast.exceptions import IosrFastError

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
