"""Kernel ridge regression with the kernel exp(-beta (1 - cosine)): ProKeR, and the regressions of the stack."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Self

import numpy as np

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.methods.folds import Folds
from iosr_fast.methods.models.model import Model
from iosr_fast.methods.support_set import class_weights, image_rows


def kernel_matrix(rows: np.ndarray, keys: np.ndarray, beta: float) -> np.ndarray:
    """exp(-beta (1 - <rows, keys>)), float64, for rows (B, D) and keys (N, D) of unit length."""
    kernel: np.ndarray = np.asarray(rows, np.float64) @ np.asarray(keys, np.float64).T
    kernel -= 1.0
    kernel *= beta
    return np.exp(kernel, out=kernel)


class KernelRidge:
    """Kernel ridge regression on images with `keys` (N, D), of any targets (N, C), in float64. `ridge` is a number, or
    that of each image (N,); `queries` (N, D) are other views of the images, None: the keys.

    One factorisation, at the first use, serves every target and every fold: kernel + diag(ridge) = L L',
    A = inv(L)' inv(L), and the values are A target. Without images F the values are

        values - A[:, F] Z,  Z = inv(A[F, F]) values[F],

    which is zero on F, and the predictions for the keys of F are target[F] - Z.
    """

    def __init__(self, keys: np.ndarray, queries: np.ndarray | None, beta: float, ridge: float | np.ndarray) -> None:
        self.keys, self.queries, self.beta, self.ridge = keys, queries, beta, ridge

    @cached_property
    def _factor(self) -> np.ndarray:
        """(N, N) inv(L)."""
        system = kernel_matrix(self.keys, self.keys, self.beta) + np.diag(np.broadcast_to(self.ridge, len(self.keys)))
        return lower_inverse(np.linalg.cholesky(system))

    @cached_property
    def _of_queries(self) -> tuple[np.ndarray, np.ndarray]:
        """The kernel of queries and keys (N, N), and that times inv(L)'."""
        assert self.queries is not None
        kernel = kernel_matrix(self.queries, self.keys, self.beta)
        return kernel, kernel @ self._factor.T

    def values(self, target: np.ndarray) -> np.ndarray:
        """(N, C): the prediction for a query is its kernel row times these."""
        return self._factor.T @ (self._factor @ target)

    def without(self, rows: np.ndarray, out: np.ndarray, target: np.ndarray, values: np.ndarray) -> np.ndarray:
        """(len(rows), C): the predictions for the queries `rows`, of the images `out` (N,) bool, without these."""
        if self.queries is None:
            return self.keys_without(rows, out, target, values)
        columns, removed = self._removed(out, values)
        kernel, across = self._of_queries
        return kernel[rows] @ values - (across[rows] @ columns) @ removed

    def keys_without(self, rows: np.ndarray, out: np.ndarray, target: np.ndarray, values: np.ndarray) -> np.ndarray:
        """The same for the keys of these images."""
        _, removed = self._removed(out, values)
        return target[rows] - removed[np.searchsorted(np.flatnonzero(out), rows)]

    def _removed(self, out: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The columns of inv(L) of the images F = `out`, (N, F), and Z (F, C)."""
        columns = self._factor[:, out]
        return columns, np.linalg.solve(columns.T @ columns, values[out])


def lower_inverse(lower: np.ndarray) -> np.ndarray:
    """The inverse of a lower triangular matrix (N, N), by halves: most of it is matrix products."""
    half = len(lower) // 2
    if half < 50:
        return np.linalg.inv(lower)
    first = lower_inverse(lower[:half, :half])
    last = lower_inverse(lower[half:, half:])
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
    system: KernelRidge | None = field(default=None, compare=False, repr=False)

    def unfitted(self) -> Self:
        return replace(self, memory=None, system=None)

    @cached_property
    def factorised(self) -> KernelRidge:
        """`system`, or a new one: regressions of other targets take it, too."""
        if self.system is not None:
            return self.system
        queries = self.support.queries
        weights = class_weights(self.support.counts)[self.support.labels]
        rows = None if queries is None else self._rows(queries)
        return KernelRidge(self._keys, rows, self.beta, self.ridge / weights)

    @cached_property
    def _keys(self) -> np.ndarray:
        return self._rows(self.support.embeddings)

    @cached_property
    def _target(self) -> np.ndarray:
        target: np.ndarray = self.label_weight * self.support.one_hot
        if (text := self.support.text) is not None:
            target -= self.text_weight * (np.asarray(self.support.embeddings.plain, np.float64) @ text.T)
        return target

    @cached_property
    def fitted(self) -> np.ndarray:
        """(N, C) V."""
        return self.factorised.values(self._target)

    def scores(self, queries: Embeddings) -> np.ndarray:
        scores: np.ndarray = kernel_matrix(self._rows(queries), self._keys, self.beta) @ self.fitted
        return scores

    def scores_without(self, rows: np.ndarray, out: np.ndarray) -> np.ndarray:
        return self.factorised.without(rows, out, self._target, self.fitted)

    def in_use(self, rows: np.ndarray, units: np.ndarray) -> np.ndarray:
        """It interpolates, so that the scores of images that it has seen, or whose siblings it has seen, say nothing of
        new ones: each without its unit."""
        scores = np.empty((len(rows), self.support.n_classes))
        for i, row in enumerate(rows):
            scores[i] = self.factorised.keys_without(rows[i : i + 1], units == units[row], self._target, self.fitted)
        return scores

    def fields(self) -> dict[str, Any]:
        return {
            "keys": self._keys,
            "values": self.fitted,
            "query": self.which,
            "reducer": self.reducer,
            "beta": self.beta,
        }


@dataclass(frozen=True)
class CentredRidgeModel(RidgeModel):
    """The same with V = (K + ridge I)^-1 (Y - share), for images with any number of labels: Y (N, C) is their indicator
    and `share` (C,) the share of images that have the label.

    The shares are those of the images that stay, else the regression of an image's own label would be lower where the
    image is left out, as there is one such image less. The regression is linear in the target: that of Y - share is
    that of Y minus share times that of 1.
    """

    @cached_property
    def factorised(self) -> KernelRidge:
        keys = image_rows(self.support.embeddings, self.which, self.reducer)
        queries = self.support.queries
        rows = None if queries is None else image_rows(queries, self.which, self.reducer)
        return KernelRidge(keys, rows, self.beta, self.ridge)

    @cached_property
    def _target(self) -> np.ndarray:
        """(N, C + 1) [Y, 1]."""
        return np.hstack([self.support.indicator, np.ones((len(self.support.embeddings), 1))])

    @cached_property
    def _values(self) -> np.ndarray:
        return self.factorised.values(self._target)

    @cached_property
    def fitted(self) -> np.ndarray:
        return _less_share(self._values, self._target.sum(0))

    def without(self, folds: Folds) -> np.ndarray:
        """Without its image alone where none shares a unit with another: more images stay."""
        return super().without(replace(folds, fold=np.arange(len(folds.fold))) if folds.are_alone else folds)

    def scores_without(self, rows: np.ndarray, out: np.ndarray) -> np.ndarray:
        predictions = self.factorised.without(rows, out, self._target, self._values)
        labelled = np.append(self.support.counts, len(out))
        return _less_share(predictions, labelled - self._target[out].sum(0))


def _less_share(predictions: np.ndarray, labelled: np.ndarray) -> np.ndarray:
    """(B, C): the predictions (B, C + 1) of [Y, 1] turned into those of Y - share, of `labelled` (C + 1,) images with
    each label, and of all."""
    shares = labelled[:-1] / np.maximum(labelled[-1:], 1)
    less: np.ndarray = predictions[:, :-1] - predictions[:, -1:] * shares
    return less
