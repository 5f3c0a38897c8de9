"""Support images with several labels each, and the terms that a method makes of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import numpy as np

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.exceptions import IosrFastError
from iosr_fast.methods.folds import MAX_FOLDS, Folds, assign_folds, join_units
from iosr_fast.methods.look_alikes import find_look_alikes
from iosr_fast.methods.models.gaussian import GaussianModel
from iosr_fast.methods.models.model import TextModel
from iosr_fast.methods.models.ridge import KernelRidge
from iosr_fast.methods.out_of_fold import Part
from iosr_fast.methods.papers import DISCRIMINANTS, Method
from iosr_fast.methods.support_set import SupportSet, image_rows, make_support_set
from iosr_fast.scoring.plan import Which
from iosr_fast.utils.short_repr import short_repr

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
    __repr__ = short_repr

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
        """Every image in one of up to MAX_FOLDS folds (folds.assign_folds), those of a unit in one. Where images share
        units `distinct` counts a class's folds."""
        rows, classes = np.nonzero(self.labels)
        fold = assign_folds(self.units, rows, classes, min(MAX_FOLDS, int(self.units.max(initial=0)) + 1))
        folds_of_class = np.array([len(np.unique(fold[column])) for column in self.labels.T])
        distinct = self.counts if self.are_alone else folds_of_class
        return Folds(fold, np.ones(len(self.labels), bool), distinct, self.units)

    @cached_property
    def units(self) -> np.ndarray:
        """(N,) int64 from 0: the same for images of a group, near duplicates that share a label, or have none, and
        images that look alike, where more do than of independent ones (look_alikes.find_look_alikes)."""
        n_images = len(self.labels)
        group_of = np.arange(n_images) if self.groups is None else self.groups
        with_none = np.hstack([self.labels, ~self.labels.any(1, keepdims=True)])  # "no label" is the last class
        classes, rows = np.nonzero(with_none.T)
        plain, n_classes = Embeddings(self.embeddings.plain[rows]), self.n_classes + 1
        pairs = make_support_set(plain, classes, None, self.tau, n_classes, groups=group_of[rows])
        alike = find_look_alikes(pairs)
        units = np.empty(n_images, np.int64)
        units[rows] = join_units(pairs, alike.groups if alike.many else None)
        return units

    @property
    def are_alone(self) -> bool:
        """Whether each image is a unit of its own."""
        return int(self.units.max(initial=-1)) + 1 == len(self.labels)

    @cached_property
    def pairs(self) -> SupportSet:
        """Each image once for each of its labels."""
        classes, rows = np.nonzero(self.labels.T)
        return make_support_set(self.embeddings[rows], classes, self.text, self.tau, self.n_classes)


def _part(logits: np.ndarray, **fields: Any) -> Part:
    """Of the logits (N, C) of left-out images as queries, each fitted without it, and their term's fields of a plan."""
    deviation = float(logits.std())
    spread = deviation if deviation > _ROUNDING else 1.0
    return Part(logits, spread, spread, SimpleNamespace(fields=lambda: fields))


def fixed_parts(images: MultiLabelSet, method: Method) -> dict[str, Part]:
    """The parts without a setting, by the parameter that weighs each: texts, if there are any, and the discriminants of
    a stack."""
    parts = dict[str, Part]()
    if images.text is not None:
        texts = TextModel(images.pairs)
        parts["text"] = _part(texts.scores(images.as_queries), **texts.fields())
    for which, name in DISCRIMINANTS.items():
        if name in method.parameters:
            parts[name] = _discriminant(images, which)
    return parts


def regression(images: MultiLabelSet, which: Which, beta: float, ridge: float) -> Part:
    """Kernel ridge regression of the labels (N, C) minus the share of images that have each. Every image is left out
    by itself, with groups the fold of its group, and in the shares too: else the regression of an image's own label
    would be lower where the image is left out, as there is one such image less.

    The regression is linear in the target: that of labels - share is that of the labels minus share times that of 1.
    """
    keys = image_rows(images.embeddings, which, None)
    count = len(images.labels)
    queries = None if images.queries is None else image_rows(images.queries, which, None)
    model = KernelRidge(keys, queries, beta, ridge)
    target = np.hstack([images.labels, np.ones((count, 1))])
    values = model.values(target)
    folds = replace(images.folds, fold=np.arange(count)) if images.are_alone else images.folds
    sums = np.zeros((folds.number, target.shape[1]))
    np.add.at(sums, folds.fold, target)
    others = target.sum(0) - sums[folds.fold]
    left_out = np.empty(target.shape)
    for rows, out in folds.splits:
        left_out[rows] = model.without(rows, out, target, values)
    left_out = left_out[:, :-1] - left_out[:, -1:] * (others[:, :-1] / np.maximum(others[:, -1:], 1))
    values = values[:, :-1] - values[:, -1:] * (images.counts / count)
    return _part(left_out, keys=keys, values=values, query=which, beta=beta)


def _discriminant(images: MultiLabelSet, which: Which) -> Part:
    """G (models.gaussian) minus its mean over classes, where an image counts for each of its classes: mu_c is the mean
    of the images with label c, Sigma the covariance around these means over all pairs of image and label. The mean says
    how unlike all classes an image is, not which it has."""
    model = GaussianModel(images.pairs, which)
    queries = image_rows(images.as_queries, which, None)
    left_out = np.zeros(images.labels.shape)
    of_pairs = np.nonzero(images.labels.T)[1]
    for rows, out in images.folds.splits:
        if images.labels[~out].any():  # else all labels are those of the images that are left out
            left_out[rows] = model.fit(model.moments_without(out[of_pairs])).scores(queries[rows])
    linear, bias = model.fitted.centred
    return _part(left_out - left_out.mean(1, keepdims=True), linear=linear, bias=bias, feature=which)
