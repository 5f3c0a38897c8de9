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
class Span:
    """Coordinates (B, r + 1) of rows x (B, D): [x Q, |x - x Q Q'|], Q (D, r) an orthonormal basis of the span of some
    rows, and the length of what is outside of it. For a row of the span the last one is 0, so that its products with
    all rows, and their distances to it, are those of D channels. Without `basis` coordinates are channels.

    The covariance of N < D rows then takes N^3 operations to invert, in place of D^3.
    """

    basis: np.ndarray | None = None

    @classmethod
    def of(cls, rows: np.ndarray) -> Span:
        """Of rows (N, D) float64; without a basis unless they are fewer than their channels."""
        return cls(np.linalg.qr(rows.T)[0] if len(rows) + 1 < rows.shape[1] else None)

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        if self.basis is None:
            return rows
        inside = rows @ self.basis
        outside = np.einsum("bd,bd->b", rows, rows) - np.einsum("bd,bd->b", inside, inside)
        return np.column_stack([inside, np.sqrt(np.maximum(outside, 0.0))])

    def channels(self, inside: np.ndarray) -> np.ndarray:
        """(C, D) of the coordinates (C, r + 1) of vectors of the span."""
        return inside if self.basis is None else inside[:, :-1] @ self.basis.T

    def channel_precision(self, precision: np.ndarray) -> np.ndarray:
        """(D, D) of a precision in coordinates, which treats all directions outside of the span alike."""
        if self.basis is None:
            return precision
        outside = precision[-1, -1]
        inner = precision[:-1, :-1] - outside * np.eye(len(precision) - 1)
        return self.basis @ inner @ self.basis.T + outside * np.eye(len(self.basis))


CHANNELS = Span()


@dataclass(frozen=True, eq=False)
class Gaussians:
    """G(x, c) = <x, linear[c]> + bias[c]: log N(x; mu_c, Sigma) but for what all classes share.

    linear     (C, D) P mu_c
    bias       (C,) -(mu_c' P mu_c - e_c) / 2
    precision  P (`shrunk_precision`) in coordinates of `span`
    """

    linear: np.ndarray
    bias: np.ndarray
    precision: np.ndarray
    span: Span = CHANNELS

    @property
    def centred(self) -> tuple[np.ndarray, np.ndarray]:
        """`linear` and `bias` of G minus its mean over classes."""
        return self.linear - self.linear.mean(0), self.bias - self.bias.mean()

    def scores(self, rows: np.ndarray) -> np.ndarray:
        """G (B, C) of rows (B, D)."""
        return rows @ self.linear.T + self.bias


def fit_gaussians(
    images: Moments,
    text: np.ndarray | None = None,
    copies: float = 0.0,
    paper: bool = False,
    span: Span = CHANNELS,
) -> Gaussians:
    """The Gaussians of images, with `copies` of each class's text among them (Moments.with_texts); moments and texts in
    coordinates of `span`.

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
        precision *= (len(precision) if span.basis is None else len(span.basis)) / (n_rows - 1)
    free = counts.sum() - present.sum()
    noise = float(np.sum(precision * images.scatter)) / free if free > 1e-9 else 0.0
    shares = counts / np.maximum(joined.counts, 1e-9) ** 2
    excess = noise * (shares - shares[counts.argmax()])
    fitted = discriminant(joined.means, precision, excess, span)
    fitted.linear[~present], fitted.bias[~present] = fitted.linear[present].mean(0), fitted.bias[present].mean()
    return fitted


def discriminant(
    means: np.ndarray,
    precision: np.ndarray,
    excess: np.ndarray | float = 0.0,
    span: Span = CHANNELS,
) -> Gaussians:
    """From means (C, d), P (d, d) and e (C,), in d coordinates of `span`."""
    linear = means @ precision
    bias = -0.5 * (np.einsum("cd,cd->c", linear, means) - excess)
    return Gaussians(span.channels(linear), bias, precision, span)


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
    def _text_rows(self) -> np.ndarray | None:
        """(C, D) float64, the texts that are among the images."""
        text = self.support.text if self.copies else None
        return text if text is None else np.asarray(text if self.reducer is None else self.reducer(text), np.float64)

    @cached_property
    def span(self) -> Span:
        """Of all images and of the texts among them."""
        n_bytes = 8 * self.support.embeddings.plain.size
        return self._once(("span", self.copies > 0), n_bytes, self._span)

    def _span(self) -> Span:
        rows = self._label_rows(self.support)
        return Span.of(rows if self._text_rows is None else np.concatenate([rows, self._text_rows]))

    @cached_property
    def moments(self) -> Moments:
        """Those of all images, in coordinates of `span`."""
        n_classes = self.support.n_classes
        width = self.support.embeddings.plain.shape[1]
        n_bytes = 8 * width * (width + n_classes)
        return self._once(("moments", self.copies > 0), n_bytes, lambda: self._moments(self.support))

    def moments_without(self, out: np.ndarray) -> Moments:
        """Those of all images but some, `out` (N,) bool."""
        return self.moments - self._moments(self.support.only(out))

    def _moments(self, images: SupportSet) -> Moments:
        return Moments.of(self.span(self._label_rows(images)), images.one_hot)

    def _label_rows(self, images: SupportSet) -> np.ndarray:
        """(M, D): an image counts once for each of its labels."""
        return images.of_labels(self._rows(images.embeddings))

    def fit(self, moments: Moments) -> Gaussians:
        """The Gaussians of these moments, with the texts."""
        text = None if self._text_rows is None else self.span(self._text_rows)
        return fit_gaussians(moments, text, self.copies, self.paper, self.span)

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


@dataclass(frozen=True)
class CentredGaussianModel(GaussianModel):
    """G minus its mean over classes, for images with any number of labels: the mean says how unlike all classes an
    image is, not which it has. Zeros where all labels are those of images that are left out."""

    def scores_without(self, rows: np.ndarray, out: np.ndarray) -> np.ndarray:
        if self.support.of_labels(out).all():
            return np.zeros((len(rows), self.support.n_classes))
        scores = super().scores_without(rows, out)
        centred: np.ndarray = scores - scores.mean(1, keepdims=True)
        return centred

    def scores(self, queries: Embeddings) -> np.ndarray:
        linear, bias = self.fitted.centred
        return self._rows(queries) @ linear.T + bias

    def fields(self) -> dict[str, Any]:
        linear, bias = self.fitted.centred
        return {**super().fields(), "linear": linear, "bias": bias}
