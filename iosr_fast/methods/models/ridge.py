"""Kernel ridge regression with the kernel exp(-beta (1 - cosine)): ProKeR, and the regressions of the stack."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.methods.folds import Folds
from iosr_fast.methods.models.model import Model
from iosr_fast.methods.support_set import SupportSet, class_weights


def kernel_matrix(rows: np.ndarray, keys: np.ndarray, beta: float) -> np.ndarray:
    """exp(-beta (1 - <rows, keys>)), float64, for rows (B, D) and keys (N, D) of unit length."""
    kernel: np.ndarray = np.asarray(rows, np.float64) @ np.asarray(keys, np.float64).T
    kernel -= 1.0
    kernel *= beta
    return np.exp(kernel, out=kernel)


class KernelRidge:
    """Kernel ridge regression on images with `keys` (N, D), of any targets (N, C), in float64. `ridge` is a number, or
    that of each image (N,); `queries` (N, D) are other views of the images, None: the keys.

    One factorisation serves every target and every fold: kernel + diag(ridge) = L L', A = inv(L)' inv(L), and the
    values are A target.
    """

    def __init__(self, keys: np.ndarray, queries: np.ndarray | None, beta: float, ridge: float | np.ndarray) -> None:
        system = kernel_matrix(keys, keys, beta) + np.diag(np.broadcast_to(ridge, len(keys)))
        self._factor = lower_inverse(np.linalg.cholesky(system))
        self._query_kernel = None if queries is None else kernel_matrix(queries, keys, beta)

    def values(self, target: np.ndarray) -> np.ndarray:
        """(N, C): the prediction for a query is its kernel row times these."""
        return self._factor.T @ (self._factor @ target)

    def without_unit(self, rows: np.ndarray, units: np.ndarray, target: np.ndarray, values: np.ndarray) -> np.ndarray:
        """(len(rows), C): the prediction for each of these keys without all keys of its unit; `units` (N,). As in
        `without`, target[U] - inv(A[U, U]) values[U]."""
        predicted = np.empty((len(rows), target.shape[1]))
        for i, row in enumerate(rows.tolist()):
            unit = np.flatnonzero(units == units[row])
            columns = self._factor[:, unit]
            removed = np.linalg.solve(columns.T @ columns, values[unit])
            predicted[i] = target[row] - removed[np.searchsorted(unit, row)]
        return predicted

    def without(self, folds: Folds, target: np.ndarray, values: np.ndarray) -> np.ndarray:
        """(N, C): query j's prediction is fitted without the images of j's fold; NaN for queries that no fold scores.

        With Z = inv(A[F, F]) values[F], the values fitted without the fold F are values - A[:, F] Z, which is zero on
        F. The predictions for the keys of F themselves are target[F] - Z.
        """
        predicted, kernel = np.full(target.shape, np.nan), self._query_kernel
        across = None if kernel is None else kernel @ self._factor.T
        for rows, out in folds.splits:
            left_out = np.flatnonzero(out)
            columns = self._factor[:, left_out]
            removed = np.linalg.solve(columns.T @ columns, values[left_out])
            if kernel is None or across is None:
                predicted[rows] = target[rows] - removed[np.searchsorted(left_out, rows)]
            else:
                predicted[rows] = kernel[rows] @ values - (across[rows] @ columns) @ removed
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
    kernel ridge regression of `label_weight` times the one-hot labels minus `text_weight` times the zero-shot cosines.

    W = diag(class_weights of each image), so that a class with more images than others does not get their queries; with
    classes of one size it is I. ridge > 0. N^3 operations. A fold keeps W, so that one factorisation serves all folds.

    Source: ProKeR (Bendou et al., CVPR 2025, section 4) for label_weight = text_weight = 1.
    """

    beta: float = 1.0
    ridge: float = 3.0
    label_weight: float = 1.0
    text_weight: float = 1.0
    same_kernel: RidgeModel | None = field(default=None, compare=False, repr=False)

    def of(self, label_weight: float, text_weight: float) -> RidgeModel:
        """The regression of another target, with the same factorisation."""
        return replace(self, label_weight=label_weight, text_weight=text_weight, same_kernel=self.same_kernel or self)

    def refitted(self, support: SupportSet) -> RidgeModel:
        return replace(self, support=support, same_kernel=None)

    @cached_property
    def _system(self) -> KernelRidge:
        if self.same_kernel is not None:
            return self.same_kernel._system
        own, ridge = self.support.queries, self.ridge / class_weights(self.support.counts)[self.support.labels]
        return KernelRidge(self._keys, None if own is None else self._rows(own), self.beta, ridge)

    @cached_property
    def _keys(self) -> np.ndarray:
        return self._rows(self.support.embeddings)

    @cached_property
    def target(self) -> np.ndarray:
        target: np.ndarray = self.label_weight * self.support.one_hot
        if (text := self.support.text) is not None:
            target -= self.text_weight * (np.asarray(self.support.embeddings.plain, np.float64) @ text.T)
        return target

    @cached_property
    def values(self) -> np.ndarray:
        return self._system.values(self.target)

    def scores(self, queries: Embeddings) -> np.ndarray:
        return kernel_matrix(self._rows(queries), self._keys, self.beta) @ self.values

    def without(self, folds: Folds) -> np.ndarray:
        return self._system.without(folds, self.target, self.values)

    def in_use(self, rows: np.ndarray, units: np.ndarray) -> np.ndarray:
        """It interpolates, so that the scores of images that it has seen, or whose siblings it has seen, say nothing of
        new ones: each without its unit."""
        return self._system.without_unit(rows, units, self.target, self.values)

    def fields(self) -> dict[str, Any]:
        return {
            "keys": self._keys,
            "values": self.values,
            "query": self.which,
            "reducer": self.reducer,
            "beta": self.beta,
        }
