"""Support images with several labels each, and the terms that a method makes of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.exceptions import IosrFastError
from iosr_fast.methods.folds import MAX_FOLDS, Folds, spread
from iosr_fast.methods.models.gaussian import Moments, fit_gaussians, gaussians_without
from iosr_fast.methods.models.ridge import KernelRidge, kernel_matrix
from iosr_fast.methods.out_of_fold import Part
from iosr_fast.methods.papers import DISCRIMINANTS, Method
from iosr_fast.methods.support_set import image_rows
from iosr_fast.scoring.plan import Which

_ROUNDING = 1e-12  # a spread of a term that is nothing but rounding


@dataclass(frozen=True, eq=False)
class MultiLabelSet:
    """N support images with any number of C labels each, of D channels: the input of a multi-label method.

    embeddings  (N, D), in any order
    labels      (N, C) bool, an indicator: the classes of each image, several, one or none
    text        (C, D) float32, unit rows; None without class names
    tau         the CLIP's logit scale
    queries     (N, D): the same images with one view each, as queries have; left-out images are scored by these. None:
                the rows of `embeddings`
    groups      (N,) int64: images of one group are left out together; None: each is its own

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
    groups: np.ndarray | None = None

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

    @cached_property
    def folds(self) -> Folds:
        """Every image in one of up to MAX_FOLDS folds (folds.spread). With groups `distinct` counts a class's folds."""
        n_images, distinct, (rows, classes) = len(self.labels), self.counts, np.nonzero(self.labels)
        own = np.arange(n_images) if self.groups is None else np.unique(self.groups, return_inverse=True)[1]
        fold = spread(own, rows, classes, min(MAX_FOLDS, int(own.max(initial=0)) + 1))
        if self.groups is not None:
            distinct = np.array([len(np.unique(fold[column])) for column in self.labels.T])
        return Folds(fold, np.ones(n_images, bool), distinct, own)


@dataclass(frozen=True, eq=False)
class MultiLabelTerm(Part):
    """A term of the logits, to be multiplied by a weight: of left-out images as queries (N, C), each fitted without it;
    their standard deviation is its unit. `fields` are those of a ScoringPlan that give it (models.model.join_terms)."""

    fields: Mapping[str, Any]

    @classmethod
    def of(cls, left_out: np.ndarray, **fields: Any) -> MultiLabelTerm:
        spread = float(left_out.std())
        unit = spread if spread > _ROUNDING else 1.0
        return cls(left_out, unit, unit, fields)


def multi_label_terms(
    images: MultiLabelSet, method: Method, which: Which, setting: Mapping[str, float]
) -> dict[str, MultiLabelTerm]:
    """The terms of a method by the parameter that weighs each: the texts, if there are any, and for a stack the
    regression with `setting` of the embeddings `which` and the discriminants."""
    terms = dict[str, MultiLabelTerm]()
    if images.text is not None:
        left_out = images.tau * (np.asarray(images.as_queries.plain, np.float64) @ images.text.T)
        terms["text"] = MultiLabelTerm.of(left_out, text=images.text, tau=images.tau)
    if method.is_stack:
        terms["regression"] = _regression(images, which, setting["beta"], setting["ridge"])
        for read, name in DISCRIMINANTS.items():
            if name in method.parameters:
                terms[name] = _discriminant(images, read)
    return terms


def _regression(images: MultiLabelSet, which: Which, beta: float, ridge: float) -> MultiLabelTerm:
    """Kernel ridge regression of the labels (N, C) minus the share of images that have each; left-out images are fitted
    without them, in their shares too. Without the shares the regression of an image's own label would be lower where
    the image is left out: there is one such image less.

    The regression is linear in the target: that of labels - share is that of the labels minus share times that of 1.
    """
    keys = image_rows(images.embeddings, which, None)
    target = np.hstack([images.labels, np.ones((len(keys), 1))])
    model = KernelRidge(kernel_matrix(keys, keys, beta), ridge)
    queries = None if images.queries is None else image_rows(images.queries, which, None)
    kernel = None if queries is None else kernel_matrix(queries, keys, beta)
    values = model.values(target)
    if images.groups is None:
        left_out, without = model.without_one(target, values, kernel), target
    else:
        left_out, fold = model.without(images.folds, target, values, kernel), images.folds.fold
        without = (fold[:, None] == fold) @ target
    shares = (target.sum(0) - without)[:, :-1] / np.maximum(len(keys) - without[:, -1:], 1)
    values = values[:, :-1] - values[:, -1:] * (images.counts / len(keys))
    left_out = left_out[:, :-1] - left_out[:, -1:] * shares
    return MultiLabelTerm.of(left_out, keys=keys, values=values, query=which, beta=beta)


def _discriminant(images: MultiLabelSet, which: Which) -> MultiLabelTerm:
    """G (models.gaussian) minus its mean over classes, where an image counts for each of its classes: mu_c is the mean
    of the images with label c, Sigma the covariance around these means over all pairs of image and label. The mean says
    how unlike all classes an image is, not which it has. Left-out images are those of a fold of up to MAX_FOLDS, over
    which the images of a class are spread. It has no setting, so it is kept with the images."""
    known: dict[Which, MultiLabelTerm] = vars(images).setdefault("_discriminants", {})
    if which not in known:
        own, queries = (
            image_rows(rows, which, None).astype(np.float64) for rows in (images.embeddings, images.as_queries)
        )
        labels = images.labels.astype(np.float64)
        moments = Moments.of(own, labels)
        left_out = gaussians_without(moments, own, queries, labels, images.folds)
        linear, bias = fit_gaussians(moments).centred
        centred = left_out - left_out.mean(1, keepdims=True)
        known[which] = MultiLabelTerm.of(centred, linear=linear, bias=bias, feature=which)
    return known[which]
