"""Kernel ridge regression with the kernel exp(-beta (1 - cosine)), and its predictions for images that are left out."""

from __future__ import annotations

import numpy as np


def kernel_matrix(rows: np.ndarray, keys: np.ndarray, beta: float) -> np.ndarray:
    """exp(-beta (1 - <rows, keys>)), float64, for rows (B, D) and keys (N, D) of unit length."""
    kernel: np.ndarray = rows.astype(np.float64) @ keys.astype(np.float64).T
    kernel -= 1.0
    kernel *= beta
    return np.exp(kernel, out=kernel)


class KernelRidge:
    """Kernel ridge regression of `target` (N, C) on images with the kernel matrix `kernel` (N, N), in float64.

    One factorisation serves every fold: kernel + ridge I = L L', A = inv(L)' inv(L), values = A target.

    >>> model = KernelRidge(np.array([[1.0, 0.5], [0.5, 1.0]]), np.eye(2), ridge=1.0)
    >>> model.values.round(3)
    array([[ 0.533, -0.133],
           [-0.133,  0.533]])
    >>> model.without_one()  # the other image predicts k(x, y) / (1 + ridge) of its own target
    array([[0.  , 0.25],
           [0.25, 0.  ]])
    """

    def __init__(self, kernel: np.ndarray, target: np.ndarray, ridge: float) -> None:
        self.target = target
        self._factor = lower_inverse(np.linalg.cholesky(kernel + ridge * np.eye(len(kernel))))
        self.values: np.ndarray = self._factor.T @ (self._factor @ target)

    def without_one(self) -> np.ndarray:
        """(N, C): of each image the prediction that is fitted without it, target - values / diag(A)."""
        predicted: np.ndarray = self.target - self.values / np.einsum("ij,ij->j", self._factor, self._factor)[:, None]
        return predicted

    def without_folds(self, folds: np.ndarray, query_kernel: np.ndarray | None = None) -> np.ndarray:
        """(N, C): query j's prediction is fitted without the images of j's fold.

        query_kernel (N, N) of queries and images; None: the queries are the images. folds (N,) int64; images of a
        negative fold are never left out, and their rows are NaN. With Z = inv(A[F, F]) values[F], the values fitted
        without the fold F are values - A[:, F] Z, which is zero on F. The predictions of the images of F themselves are
        target[F] - Z.
        """
        predicted = np.full(self.target.shape, np.nan)
        for fold in range(int(folds.max(initial=-1)) + 1):
            rows = np.flatnonzero(folds == fold)
            columns = self._factor[:, rows]
            removed = np.linalg.solve(columns.T @ columns, self.values[rows])
            if query_kernel is None:
                predicted[rows] = self.target[rows] - removed
            else:
                predicted[rows] = query_kernel[rows] @ (self.values - self._factor.T @ (columns @ removed))
        return predicted


def lower_inverse(lower: np.ndarray) -> np.ndarray:
    """The inverse of a lower triangular matrix (N, N), by halves: most of it is matrix products.

    >>> lower_inverse(np.array([[2.0, 0.0], [1.0, 1.0]]))
    array([[ 0.5,  0. ],
           [-0.5,  1. ]])
    """
    half = len(lower) // 2
    if half < 50:
        return np.linalg.inv(lower)
    first, last = lower_inverse(lower[:half, :half]), lower_inverse(lower[half:, half:])
    inverse = np.zeros_like(lower)
    inverse[:half, :half], inverse[half:, half:] = first, last
    inverse[half:, :half] = -last @ (lower[half:, :half] @ first)
    return inverse
