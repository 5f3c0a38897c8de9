"""Kernel ridge regression with the kernel exp(-beta (1 - cosine)): ProKeR, and the regressions of the stack."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.methods.folds import Folds
from iosr_fast.methods.models.model import Model
from iosr_fast.methods.support_set import SupportSet, class_weights, image_rows


def kernel_matrix(rows: np.ndarray, keys: np.ndarray, beta: float) -> np.ndarray:
    """exp(-beta (1 - <rows, keys>)), float64, for rows (B, D) and keys (N, D) of unit length."""
    kernel: np.ndarray = rows.astype(np.float64) @ keys.astype(np.float64).T
    kernel -= 1.0
    kernel *= beta
    return np.exp(kernel, out=kernel)


class KernelRidge:
    """Kernel ridge regression on images with the kernel matrix `kernel` (N, N), of any targets (N, C), in float64.
    `ridge` is a number, or that of each image (N,).

    One factorisation serves every target and every fold: kernel + diag(ridge) = L L', A = inv(L)' inv(L), and the
    values are A target.
    """

    def __init__(self, kernel: np.ndarray, ridge: float | np.ndarray) -> None:
        self._factor = lower_inverse(np.linalg.cholesky(kernel + np.diag(np.broadcast_to(ridge, len(kernel)))))

    def values(self, target: np.ndarray) -> np.ndarray:
        """(N, C): the prediction for a query is its kernel row times these."""
        values: np.ndarray = self._factor.T @ (self._factor @ target)
        return values

    def without_one(self, target: np.ndarray, values: np.ndarray, query_kernel: np.ndarray | None = None) -> np.ndarray:
        """(N, C): of each image the prediction that is fitted without it, target - values / diag(A), from the `values`
        of the target.

        query_kernel (N, N) of queries and images, if image j is query j in another view: the values without image j
        are values - A[:, j] values[j] / A[j, j].
        """
        removed = values / np.einsum("ij,ij->j", self._factor, self._factor)[:, None]
        if query_kernel is None:
            predicted: np.ndarray = target - removed
            return predicted
        own = np.einsum("jk,kj->j", query_kernel @ self._factor.T, self._factor)
        return query_kernel @ values - own[:, None] * removed

    def without(
        self, folds: Folds, target: np.ndarray, values: np.ndarray, query_kernel: np.ndarray | None = None
    ) -> np.ndarray:
        """(N, C): query j's prediction is fitted without the images of j's fold; NaN for queries that no fold scores.

        query_kernel (N, N) of queries and images; None: the queries are the images. With Z = inv(A[F, F]) values[F],
        the values fitted without the fold F are values - A[:, F] Z, which is zero on F. The predictions of the images
        of F themselves are target[F] - Z.
        """
        predicted = np.full(target.shape, np.nan)
        for rows, out in folds.splits:
            left_out = np.flatnonzero(out)
            columns = self._factor[:, left_out]
            removed = np.linalg.solve(columns.T @ columns, values[left_out])
            if query_kernel is None:
                predicted[rows] = target[rows] - removed[np.searchsorted(left_out, rows)]
            else:
                predicted[rows] = query_kernel[rows] @ (values - self._factor.T @ (columns @ removed))
        return predicted


def lower_inverse(lower: np.ndarray) -> np.ndarray:
    """The inverse of a lower triangular matrix (N, N), by halves: most of it is matrix products."""
    half = len(lower) // 2
    if half < 50:
        return np.linalg.inv(lower)
    first, last = lower_inverse(lower[:half, :half]), lower_inverse(lower[half:, half:])
    inverse = np.zeros_like(lower)
    inverse[:half, :half], inverse[half:, half:] = first, last
    inverse[half:, :half] = -last @ (lower[half:, :half] @ first)
    return inverse


@dataclass(frozen=True)
class RidgeModel(Model):
    """sum_j k(x, key[j]) V[j, c] with k(x, y) = exp(-beta (1 - <x, y>)) and V = (K + ridge * W^-1)^-1 target, (N, C):
    kernel ridge regression of `labels` times the one-hot labels minus `texts` times the zero-shot cosines.

    W = diag(class_weights of each image), so that a class with more images than others does not get their queries; with
    classes of one size it is I. ridge > 0. N^3 operations. A fold keeps W, so that one factorisation serves all folds.

    Source: ProKeR (Bendou et al., CVPR 2025, section 4) for labels = texts = 1.
    """

    beta: float = 1.0
    ridge: float = 3.0
    labels: float = 1.0
    texts: float = 1.0
    same_kernel: RidgeModel | None = field(default=None, compare=False, repr=False)

    def of(self, labels: float, texts: float) -> RidgeModel:
        """The regression of another target, with the same factorisation."""
        return replace(self, labels=labels, texts=texts, same_kernel=self.same_kernel or self)

    def refitted(self, support: SupportSet) -> RidgeModel:
        return replace(self, support=support, same_kernel=None)

    @cached_property
    def _system(self) -> tuple[KernelRidge, np.ndarray | None]:
        """The factorised kernel of the images, and that of the queries where these are other views."""
        if self.same_kernel is not None:
            return self.same_kernel._system
        support = self.support
        keys = image_rows(support.embeddings, self.which, self.reducer)
        model = KernelRidge(
            kernel_matrix(keys, keys, self.beta), self.ridge / class_weights(support.counts)[support.labels]
        )
        if support.queries is None:
            return model, None
        return model, kernel_matrix(image_rows(support.queries, self.which, self.reducer), keys, self.beta)

    @cached_property
    def target(self) -> np.ndarray:
        target: np.ndarray = self.labels * self.support.one_hot
        if (text := self.support.text) is not None:
            target -= self.texts * (np.asarray(self.support.embeddings.plain, np.float64) @ text.T)
        return target

    @cached_property
    def values(self) -> np.ndarray:
        return self._system[0].values(self.target)

    def scores(self, queries: Embeddings) -> np.ndarray:
        keys = image_rows(self.support.embeddings, self.which, self.reducer)
        scores: np.ndarray = kernel_matrix(image_rows(queries, self.which, self.reducer), keys, self.beta) @ self.values
        return scores

    def without(self, folds: Folds) -> np.ndarray:
        model, query_kernel = self._system
        return model.without(folds, self.target, self.values, query_kernel)

    def in_use(self, rows: np.ndarray) -> np.ndarray:
        """It interpolates, so that the scores of images it has seen say nothing of new ones: each without itself."""
        return self._system[0].without_one(self.target, self.values)[rows]

    def fields(self) -> dict[str, Any]:
        return {
            "keys": image_rows(self.support.embeddings, self.which, self.reducer),
            "values": self.values,
            "query": self.which,
            "reducer": self.reducer,
            "beta": self.beta,
        }
