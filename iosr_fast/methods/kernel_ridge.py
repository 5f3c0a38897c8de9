"""Kernel ridge regression with the kernel exp(-beta (1 - cosine)), and its predictions for images that are left out."""

from __future__ import annotations

import numpy as np

from iosr_fast.methods.multi_label_set import KeyTerm, MultiLabelSet
from iosr_fast.methods.support_set import SupportSet, class_weights
from iosr_fast.scoring.plan import Which


def kernel_matrix(rows: np.ndarray, keys: np.ndarray, beta: float) -> np.ndarray:
    """exp(-beta (1 - <rows, keys>)), float64, for rows (B, D) and keys (N, D) of unit length."""
    kernel: np.ndarray = rows.astype(np.float64) @ keys.astype(np.float64).T
    kernel -= 1.0
    kernel *= beta
    return np.exp(kernel, out=kernel)


class KernelRidge:
    """Kernel ridge regression of `target` (N, C) on images with the kernel matrix `kernel` (N, N), in float64. `ridge`
    is a number, or that of each image (N,).

    One factorisation serves every fold: kernel + diag(ridge) = L L', A = inv(L)' inv(L), values = A target.

    >>> model = KernelRidge(np.array([[1.0, 0.5], [0.5, 1.0]]), np.eye(2), ridge=1.0)
    >>> model.values.round(3)
    array([[ 0.533, -0.133],
           [-0.133,  0.533]])
    >>> model.without_one()  # the other image predicts k(x, y) / (1 + ridge) of its own target
    array([[0.  , 0.25],
           [0.25, 0.  ]])
    """

    def __init__(self, kernel: np.ndarray, target: np.ndarray, ridge: float | np.ndarray) -> None:
        self.target = target
        self._factor = lower_inverse(np.linalg.cholesky(kernel + np.diag(np.broadcast_to(ridge, len(kernel)))))
        self.values: np.ndarray = self._factor.T @ (self._factor @ target)

    def without_one(self, query_kernel: np.ndarray | None = None) -> np.ndarray:
        """(N, C): of each image the prediction that is fitted without it, target - values / diag(A).

        query_kernel (N, N) of queries and images, if image j is query j in another view: the values without image j
        are values - A[:, j] values[j] / A[j, j].
        """
        removed = self.values / np.einsum("ij,ij->j", self._factor, self._factor)[:, None]
        if query_kernel is None:
            predicted: np.ndarray = self.target - removed
            return predicted
        own = np.einsum("jk,kj->j", query_kernel @ self._factor.T, self._factor)
        return query_kernel @ self.values - own[:, None] * removed

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


def class_ridge(ridge: float, support: SupportSet) -> np.ndarray:
    """(N,) float64: `ridge` over the weight of each image (`support_set.class_weights`). The squared errors of a
    class's images together weigh as much as those of another class, which may have more images.

    A fold keeps the weights of the whole set (SupportSet.whole), so that one factorisation serves every fold.
    """
    return ridge / class_weights(support.counts if support.whole is None else support.whole)[support.labels]


def regress_labels(images: MultiLabelSet, which: Which, beta: float, ridge: float, texts: float = 0.0) -> KeyTerm:
    """Kernel ridge regression of the labels (N, C) minus the share of images that have each, minus `texts` times the
    zero-shot cosines; left-out images are fitted without them, in their shares too. Without the shares the regression
    of an image's own label would be lower where the image is left out: there is one such image less.

    The regression is linear in the target: that of labels - share is that of the labels minus share times that of 1.
    """
    keys = images.rows(which)
    target = np.hstack([images.labels - texts * images.zero_shot(), np.ones((len(keys), 1))])
    model = KernelRidge(kernel_matrix(keys, keys, beta), target, ridge)
    kernel = None if images.queries is None else kernel_matrix(images.rows(which, queries=True), keys, beta)
    left_out, others = model.without_one(kernel), max(len(keys) - 1, 1)
    return KeyTerm(
        model.values[:, :-1] - model.values[:, -1:] * (images.counts / len(keys)),
        left_out[:, :-1] - left_out[:, -1:] * ((images.counts - images.labels) / others),
    )


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
