"""One Gaussian a class with a shared covariance: GDA, TIMO, and every other discriminant of this package."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.methods.models.model import Model
from iosr_fast.methods.support_set import SupportSet


@dataclass(frozen=True, eq=False)
class Moments:
    """Of weighted rows x of C classes, float64: weights (C,), sums (C, D), and second moment sum of x x' (D, D)."""

    counts: np.ndarray
    sums: np.ndarray
    second: np.ndarray

    @classmethod
    def of(cls, rows: np.ndarray, labels: np.ndarray) -> Moments:
        """From rows (N, D) float64 and their one-hot labels (N, C)."""
        return cls(labels.sum(0), labels.T @ rows, rows.T @ rows)

    def __sub__(self, other: Moments) -> Moments:
        counts = self.counts - other.counts
        sums = np.where(counts[:, None] > 0, self.sums - other.sums, 0.0)  # without the rounding error
        return Moments(counts, sums, self.second - other.second)

    @property
    def means(self) -> np.ndarray:
        """(C, D); zeros for a class without rows."""
        return self.sums / np.maximum(self.counts, np.finfo(float).tiny)[:, None]

    @property
    def scatter(self) -> np.ndarray:
        """(D, D) about the class means."""
        scatter = self.second - self.sums.T @ self.means
        return (scatter + scatter.T) / 2

    @property
    def joined(self) -> Moments:
        """Of all rows as one class."""
        return Moments(self.counts.sum(keepdims=True), self.sums.sum(0, keepdims=True), self.second)

    def with_texts(self, text: np.ndarray, copies: float) -> Moments:
        """With `copies` rows <u_c, text_c> text_c for each class c that has images, u_c the unit mean of these: a text
        counts as much as it matches its images (TIMO, Li et al., AAAI 2025, arXiv 2412.11375)."""
        lengths = np.maximum(np.linalg.norm(self.sums, axis=1), np.finfo(float).tiny)
        rows = (np.einsum("cd,cd->c", self.sums, text) / lengths)[:, None] * text
        weights = copies * (self.counts > 0)
        weighted = weights[:, None] * rows
        return Moments(self.counts + weights, self.sums + weighted, self.second + rows.T @ weighted)


@dataclass(frozen=True, eq=False)
class Gaussians:
    """G(x, c) = <x, linear[c]> + bias[c]: log N(x; mu_c, Sigma) but for what all classes share.

    linear     (C, D) P mu_c
    bias       (C,) -(mu_c' P mu_c - e_c) / 2
    precision  (D, D) P (`shrunk_precision`)
    """

    linear: np.ndarray
    bias: np.ndarray
    precision: np.ndarray

    @property
    def centred(self) -> tuple[np.ndarray, np.ndarray]:
        """`linear` and `bias` of G minus its mean over classes."""
        return self.linear - self.linear.mean(0), self.bias - self.bias.mean()

    def scores(self, rows: np.ndarray) -> np.ndarray:
        """G (B, C) of rows (B, D)."""
        return rows @ self.linear.T + self.bias


def fit_gaussians(
    images: Moments, text: np.ndarray | None = None, copies: float = 0.0, paper: bool = False
) -> Gaussians:
    """The Gaussians of images, with `copies` of each class's text among them (Moments.with_texts).

    mu_c is a class's mean and P = inv(Sigma + tr(Sigma) / (n - 1) I) the shrunk precision of all n rows about their
    means; I where Sigma is 0, as with one image a class. The noise of a mean of few images adds to mu_c' P mu_c, so
    that small classes would lose images to large ones; e_c takes it off against a largest class:

        e_c = tr(P S) (n_c / (n_c + copies)^2 - that of a largest class),  S = scatter of the images / (N - C)

    A class without images takes the mean of the others, which says nothing about it.

    Sources: GDA (Wang et al., ICLR 2024, equations 4 to 8), whose P, with `paper`, is D / (n - 1) times this one; e_c
    as in Moran & Murphy (Applied Statistics 28, 1979).
    """
    joined = images if text is None or not copies else images.with_texts(np.asarray(text, np.float64), copies)
    present = images.counts > 0
    counts = images.counts
    n_rows = float(joined.counts.sum())
    precision = shrunk_precision(joined.scatter, n_rows)
    if paper and not np.array_equal(precision, np.eye(len(precision))):
        precision *= len(precision) / (n_rows - 1)
    free = counts.sum() - present.sum()
    noise = float(np.sum(precision * images.scatter)) / free if free > 1e-9 else 0.0
    shares = counts / np.maximum(joined.counts, 1e-9) ** 2
    excess = noise * (shares - shares[counts.argmax()])
    fitted = discriminant(joined.means, precision, excess)
    fitted.linear[~present], fitted.bias[~present] = fitted.linear[present].mean(0), fitted.bias[present].mean()
    return fitted


def discriminant(means: np.ndarray, precision: np.ndarray, excess: np.ndarray | float = 0.0) -> Gaussians:
    """From means (C, D), P (D, D) and e (C,)."""
    linear = means @ precision
    return Gaussians(linear, -0.5 * (np.einsum("cd,cd->c", linear, means) - excess), precision)


def shrunk_precision(scatter: np.ndarray, n_rows: float) -> np.ndarray:
    """inv(Sigma + tr(Sigma) / (n - 1) I), (D, D) float64, of the scatter (n - 1) Sigma of n rows; I if that is 0.

    Source: the estimator of Kubokawa & Srivastava that GDA takes.
    """
    width = len(scatter)
    trace = np.trace(scatter)
    if trace <= n_rows * np.finfo(np.float32).eps:
        return np.eye(width)
    precision = np.linalg.inv(scatter / (n_rows - 1) + trace / (n_rows - 1) ** 2 * np.eye(width))
    return (precision + precision.T) / 2


@dataclass(frozen=True)
class GaussianModel(Model):
    """G of `fit_gaussians`, with `copies` of each class's text among the images, which are reduced as these are; with
    `paper` at the scale of GDA's paper.
    """

    copies: float = 0.0
    paper: bool = False

    @cached_property
    def moments(self) -> Moments:
        """Those of all images."""
        n_classes = self.support.n_classes
        width = self.support.embeddings.plain.shape[1]
        n_bytes = 8 * width * (width + n_classes)
        return self._once("moments", n_bytes, lambda: self._moments(self.support))

    def moments_without(self, out: np.ndarray) -> Moments:
        """Those of all images but some, `out` (N,) bool."""
        return self.moments - self._moments(self.support.only(out))

    def _moments(self, images: SupportSet) -> Moments:
        return Moments.of(self._rows(images.embeddings), images.one_hot)

    def fit(self, moments: Moments) -> Gaussians:
        """The Gaussians of these moments, with the texts."""
        text = self.support.text
        moved = text if text is None or self.reducer is None else self.reducer(text)
        return fit_gaussians(moments, moved, self.copies, self.paper)

    @cached_property
    def fitted(self) -> Gaussians:
        return self.fit(self.moments)

    def scores(self, queries: Embeddings) -> np.ndarray:
        return self.fitted.scores(self._rows(queries))

    def scores_without(self, rows: np.ndarray, out: np.ndarray) -> np.ndarray:
        """In closed form: the moments of the images `out` are taken off those of all."""
        return self.fit(self.moments_without(out)).scores(self._rows(self.support.as_queries[rows]))

    def fields(self) -> dict[str, Any]:
        linear, bias = self.fitted.linear, self.fitted.bias
        return {"linear": linear, "bias": bias, "feature": self.which, "reducer": self.reducer}
