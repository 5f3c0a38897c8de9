"""What a method would say of each support image had it been fit without it, in closed form where there is one."""

from __future__ import annotations

import numpy as np


def gda_without(rows: np.ndarray, queries: np.ndarray, class_offsets: np.ndarray) -> np.ndarray:
    """GDA's score (N, C) float64 of queries[j], fit on all `rows` but rows[j]; classes keep at least one image.

    Without x of class c (n_c images, mean mu_c, v = x - mu_c, N images in all):

        mu_c' = mu_c - v / (n_c - 1),    S' = S - n_c / (n_c - 1) v v',    P' = D inv(S' + tr(S') / (N - 2) I)

    The ridge differs from image to image, so S is diagonalised once and the rank-one change applied to the inverse of
    each (Sherman and Morrison). Rows whose class has one image, which can't be left out, come back as NaN.
    """
    rows, queries = rows.astype(np.float64), queries.astype(np.float64)
    counts = np.diff(class_offsets)
    labels = np.repeat(np.arange(len(counts)), counts)
    means = np.add.reduceat(rows, class_offsets[:-1], axis=0) / counts[:, None]
    centred = rows - means[labels]
    n_rows, width = rows.shape
    spectrum, basis = np.linalg.eigh(centred.T @ centred)
    spectrum = np.maximum(spectrum, 0.0)
    means, centred, queries = means @ basis, centred @ basis, queries @ basis
    scores = np.full((n_rows, len(counts)), np.nan)
    for j in np.flatnonzero(counts[labels] > 1):
        c, v = labels[j], centred[j]
        factor = counts[c] / (counts[c] - 1)
        trace = spectrum.sum() - factor * (v @ v)
        kept = means.copy()
        kept[c] -= v / (counts[c] - 1)
        if n_rows < 3 or trace <= (n_rows - 1) * np.finfo(np.float32).eps:
            weighted = kept  # P = I
        else:
            inverse = 1.0 / (spectrum + trace / (n_rows - 2))
            moved = inverse * v
            weighted = kept * inverse + np.outer(kept @ moved, moved) * (factor / (1.0 - factor * (v @ moved)))
            weighted *= width
        scores[j] = weighted @ queries[j] - 0.5 * np.einsum("cd,cd->c", weighted, kept) - np.log(len(counts))
    return scores


def kernel_ridge_without(
    kernel: np.ndarray, query_kernel: np.ndarray, residual: np.ndarray, ridge: float, folds: np.ndarray
) -> np.ndarray:
    """Kernel ridge's prediction (N, C) float64 for query j, fit without all images of j's fold.

    kernel (N, N) of the images, query_kernel (N, N) of queries and images, residual (N, C), folds (N,) int64; a
    negative fold is never left out, and its rows come back as NaN. With A = inv(kernel + ridge I) and V = A residual,
    what is left of V without the fold F is

        V - A[:, F] inv(A[F, F]) V[F]

    which is zero on F. One inverse serves every fold.
    """
    inverse = np.linalg.inv(kernel + ridge * np.eye(len(kernel)))
    values = inverse @ residual
    predicted = np.full(residual.shape, np.nan)
    n_folds = int(folds.max(initial=-1)) + 1
    if n_folds and np.bincount(folds[folds >= 0]).max() == 1:  # singletons: all at once
        held = np.flatnonzero(folds >= 0)
        through = np.einsum("jn,nj->j", query_kernel[held], inverse[:, held]) / np.diagonal(inverse)[held]
        predicted[held] = query_kernel[held] @ values - through[:, None] * values[held]
        return predicted
    for fold in range(n_folds):
        held = np.flatnonzero(folds == fold)
        without = values - inverse[:, held] @ np.linalg.solve(inverse[np.ix_(held, held)], values[held])
        predicted[held] = query_kernel[held] @ without
    return predicted
