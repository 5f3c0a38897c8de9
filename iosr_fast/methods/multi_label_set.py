"""Support images with several labels each, and the terms that a method makes of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.exceptions import IosrFastError
from iosr_fast.methods.folds import MAX_FOLDS, Folds
from iosr_fast.methods.models.gaussian import Gaussians, Moments, fit_gaussians, gaussians_without
from iosr_fast.methods.models.ridge import KernelRidge, kernel_matrix
from iosr_fast.methods.papers import Method
from iosr_fast.methods.stack import DISCRIMINANTS
from iosr_fast.scoring.plan import Which


@dataclass(frozen=True, eq=False)
class MultiLabelSet:
    """N support images with any number of C labels each, of D channels: the input of a multi-label method.

    embeddings  (N, D), in any order
    labels      (N, C) bool, an indicator: the classes of each image, several, one or none
    text        (C, D) float32, unit rows; None without class names
    tau         the CLIP's logit scale
    queries     (N, D): the same images with one view each, as queries have; left-out images are scored by these. None:
                the rows of `embeddings`

    Raises IosrFastError for another number of rows or classes.

    >>> images = MultiLabelSet(Embeddings(np.eye(3)), np.array([[1, 1], [0, 1], [0, 0]], bool), text=None, tau=100.0)
    >>> images.counts
    array([1, 2])
    """

    embeddings: Embeddings
    labels: np.ndarray
    text: np.ndarray | None
    tau: float
    queries: Embeddings | None = None

    def __post_init__(self) -> None:
        rows, classes = self.labels.shape
        if rows != len(self.embeddings):
            raise IosrFastError(f"expected a row of labels for each of {len(self.embeddings)} images, got {rows}")
        if self.text is not None and len(self.text) != classes:
            raise IosrFastError(f"expected text for each of {classes} classes, got {len(self.text)} rows")

    @property
    def n_classes(self) -> int:
        return self.labels.shape[1]

    @property
    def counts(self) -> np.ndarray:
        """(C,) int64, images of each class; an image counts for each of its classes."""
        return self.labels.sum(0)

    @property
    def as_queries(self) -> Embeddings:
        """The images as queries."""
        return self.queries or self.embeddings

    def zero_shot(self, queries: bool = False) -> np.ndarray:
        """The cosines (N, C) float64 of the images, or of the same as queries, and the texts; 0 without texts."""
        if self.text is None:
            return np.zeros(self.labels.shape)
        plain = (self.as_queries if queries else self.embeddings).plain
        cosines: np.ndarray = np.asarray(plain, np.float64) @ self.text.T
        return cosines

    def rows(self, which: Which, queries: bool = False) -> np.ndarray:
        """The embeddings (N, D) float32 that are compared with other images."""
        embeddings = self.as_queries if queries else self.embeddings
        return np.asarray(embeddings.plain if which == "plain" else embeddings.adapted, np.float32)


@dataclass(frozen=True)
class KeyTerm:
    """A term sum_j exp(-beta (1 - <x, key[j]>)) values[j, c] of the logits, to be multiplied by a weight.

    values    (N, C) float64, of all support images as keys
    left_out  (N, C) float64: the term of each support image as a query, fitted without it
    """

    values: np.ndarray
    left_out: np.ndarray


@dataclass(frozen=True)
class LinearTerm:
    """A term <x, linear[c]> + bias[c] of the logits, of plain or adapted embeddings x, to be multiplied by a weight.

    linear, bias  (C, D) and (C,) float64
    left_out      (N, C) float64: the term of each support image as a query, fitted without it
    """

    which: Which
    linear: np.ndarray
    bias: np.ndarray
    left_out: np.ndarray


# Terms by the parameter that weighs them.
MultiLabelTerms = Mapping[str, KeyTerm | LinearTerm]


def multi_label_terms(
    images: MultiLabelSet, method: Method, which: Which, setting: Mapping[str, float]
) -> MultiLabelTerms:
    """The terms of a method, with an indicator of labels in the place of one-hot ones: Tip-Adapter's cache, ProKeR's
    regression, the regression and the discriminants of the stack; none of zero-shot."""
    if method.family == "keys":
        return {"alpha": _cache(images, which, setting["beta"])}
    if method.family == "values":
        term = _regression(images, which, setting["beta"], setting["ridge"], texts=1.0)
        return {"alpha": KeyTerm(images.tau * term.values, images.tau * term.left_out)}
    if not method.is_stack:
        return {}
    regression = _regression(images, which, setting["beta"], setting["ridge"])
    known: dict[str, LinearTerm] = vars(images).setdefault("_discriminants", {})  # the same at all settings
    for read, name in DISCRIMINANTS.items():
        if name in method.parameters and name not in known:
            known[name] = _discriminant(images, read)
    return {"regression": regression, **{name: term for name, term in known.items() if name in method.parameters}}


def _cache(images: MultiLabelSet, which: Which, beta: float) -> KeyTerm:
    """The sum over the keys that have the label, as of one label. An image that is left out lacks one of the n keys of
    each of its labels, which n / (n - 1) makes up for."""
    kernel = kernel_matrix(images.rows(which, queries=True), images.rows(which), beta)
    np.fill_diagonal(kernel, 0.0)
    values, more = images.labels.astype(np.float64), np.maximum(images.counts - 1, 1)
    return KeyTerm(values, (kernel @ values) * np.where(images.labels, images.counts / more, 1.0))


def _regression(images: MultiLabelSet, which: Which, beta: float, ridge: float, texts: float = 0.0) -> KeyTerm:
    """Kernel ridge regression of the labels (N, C) minus the share of images that have each, minus `texts` times the
    zero-shot cosines; left-out images are fitted without them, in their shares too. Without the shares the regression
    of an image's own label would be lower where the image is left out: there is one such image less.

    The regression is linear in the target: that of labels - share is that of the labels minus share times that of 1.
    """
    keys = images.rows(which)
    target = np.hstack([images.labels - texts * images.zero_shot(), np.ones((len(keys), 1))])
    model = KernelRidge(kernel_matrix(keys, keys, beta), ridge)
    kernel = None if images.queries is None else kernel_matrix(images.rows(which, queries=True), keys, beta)
    values, left_out = model.values(target), model.without_one(target, kernel)
    others = max(len(keys) - 1, 1)
    return KeyTerm(
        values[:, :-1] - values[:, -1:] * (images.counts / len(keys)),
        left_out[:, :-1] - left_out[:, -1:] * ((images.counts - images.labels) / others),
    )


def _discriminant(images: MultiLabelSet, which: Which) -> LinearTerm:
    """G (models.gaussian) minus its mean over classes, where an image counts for each of its classes: mu_c is the mean
    of the images with label c, Sigma the covariance around these means over all pairs of image and label. The mean says
    how unlike all classes an image is, not which it has. Left-out images are those of a fold of up to MAX_FOLDS, over
    which the images of a class are spread."""
    rows, queries = (images.rows(which, own).astype(np.float64) for own in (False, True))
    labels = images.labels.astype(np.float64)
    moments = Moments.of(rows, labels)
    left_out = gaussians_without(moments, rows, queries, labels, _spread_folds(images.labels))
    left_out -= left_out.mean(1, keepdims=True)
    fitted: Gaussians = fit_gaussians(moments)
    return LinearTerm(which, fitted.linear - fitted.linear.mean(0), fitted.bias - fitted.bias.mean(), left_out)


def _spread_folds(labels: np.ndarray) -> Folds:
    """Every image in one of up to MAX_FOLDS folds: that with fewest images of its classes, then fewest at all."""
    number = min(MAX_FOLDS, len(labels))
    of_class, sizes = np.zeros((number, labels.shape[1])), np.zeros(number)
    folds = np.zeros(len(labels), np.int64)
    for i, row in enumerate(labels):
        folds[i] = np.lexsort((sizes, of_class[:, row].sum(1)))[0]
        of_class[folds[i]] += row
        sizes[folds[i]] += 1
    return Folds(folds, np.ones(len(labels), bool), labels.sum(0))
