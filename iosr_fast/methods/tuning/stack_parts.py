"""The parts of a stack on held-out images: logits of texts, discriminants and kernel ridge regressions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.methods.kernel_ridge import KernelRidge, class_ridge, kernel_matrix
from iosr_fast.methods.method import ROUNDING
from iosr_fast.methods.stack import discriminant_of_moments, linear_discriminant, one_hot, zero_shot
from iosr_fast.methods.support_set import image_rows
from iosr_fast.methods.tuning.held_out import HeldOutSet
from iosr_fast.scoring.plan import Which


@dataclass(frozen=True, eq=False)
class Part:
    """A part's logits of V held-out images, (V, C), of plans that were fitted without them.

    unit       the spread of these logits over the classes that are not the image's own (`spread_of_others`)
    full_unit  the same of the part that is fitted with all images: weight / full_unit is a parameter of the stack
    """

    logits: np.ndarray
    unit: float
    full_unit: float

    @property
    def scaled(self) -> np.ndarray:
        """The logits in units of their spread."""
        return self.logits / self.unit


def spread_of_others(logits: np.ndarray, labels: np.ndarray) -> float:
    """The mean over images of the standard deviation over the classes that are not the image's own; 1 if that is mere
    rounding. An image that the fit has seen distorts the logit of its own class alone.

    logits (V, C), labels (V,). With two classes there is a single other class: then over both.

    >>> spread_of_others(np.array([[9.0, 1.0, 3.0]]), np.array([0]))
    1.0
    """
    if not len(logits):
        return 1.0
    if logits.shape[1] > 2:
        own = np.arange(logits.shape[1])[None, :] == labels[:, None]
        logits = logits[~own].reshape(len(logits), -1)
    spread = float(np.std(logits, axis=1).mean())
    return spread if spread > max(ROUNDING * float(np.abs(logits).max()), 1e-12) else 1.0


class HeldOutParts:
    """The parts of a stack, fitted without the fold of each image and scored on it, in the order of HeldOutSet.rows; or
    on a validation set, fitted once with all support images."""

    def __init__(self, held_out: HeldOutSet) -> None:
        self.support, self.folds = held_out.support, held_out.folds
        self.distinct = held_out.distinct
        self.rows, self.labels = held_out.rows, held_out.labels[held_out.rows]
        self._own = self.support.as_queries
        self._queries = held_out.queries

    @cached_property
    def text_logits(self) -> np.ndarray:
        """tau <plain, text> of all support images as queries, (N, C); they have not been fitted to them."""
        assert self.support.text is not None
        return self._zero_shot(self._own)

    @cached_property
    def text_accuracy(self) -> float:
        """The share of all support images that the texts alone get right."""
        return float((self.text_logits.argmax(1) == self.support.labels).mean())

    @cached_property
    def text(self) -> Part | None:
        """tau <plain, text>; None without texts."""
        if self.support.text is None:
            return None
        return self._part(self._zero_shot(self._queries)[self.rows], self.text_logits)

    def _zero_shot(self, queries: Embeddings) -> np.ndarray:
        assert self.support.text is not None
        logits: np.ndarray = self.support.tau * (queries.plain.astype(np.float64) @ self.support.text.T)
        return logits

    def discriminant(self, which: Which, text_images: float) -> Part:
        """G of methods.stack on these embeddings."""
        keys, queries = image_rows(self.support.embeddings, which, None), image_rows(self._queries, which, None)
        full = linear_discriminant(keys, self.support, text_images)
        if self.folds is None:
            logits = queries @ full[0].T + full[1]
            return self._part(logits, logits)
        exact, labels = keys.astype(np.float64), self.support.labels
        second, one = exact.T @ exact, np.eye(self.support.n_classes)
        sums = one[:, labels] @ exact
        logits = np.zeros((len(queries), self.support.n_classes))
        for fold in np.unique(self.folds[self.rows]):
            out = np.flatnonzero(self.folds == fold)
            counts = self.support.counts - np.bincount(labels[out], minlength=self.support.n_classes)
            kept_sums, kept_second = sums - one[:, labels[out]] @ exact[out], second - exact[out].T @ exact[out]
            linear, bias = discriminant_of_moments(counts, kept_sums, kept_second, self.support.text, text_images)
            logits[out] = queries[out] @ linear.T + bias
        return self._part(logits[self.rows], queries @ full[0].T + full[1])

    def regressions(self, which: Which, setting: Mapping[str, float]) -> tuple[Part, Part | None]:
        """Kernel ridge regression of the one-hot labels, and of the texts' cosines, negated (None without texts)."""
        keys = image_rows(self.support.embeddings, which, None)
        queries = image_rows(self._queries, which, None)
        targets = [one_hot(self.support)] + ([] if self.support.text is None else [-zero_shot(self.support)])
        ridge = class_ridge(setting["ridge"], self.support)
        model = KernelRidge(kernel_matrix(keys, keys, setting["beta"]), np.hstack(targets), ridge)
        if self.folds is None:
            logits = kernel_matrix(queries, keys, setting["beta"]) @ model.values
        else:
            same = self._queries is self.support.embeddings
            query_kernel = None if same else kernel_matrix(queries, keys, setting["beta"])
            logits = model.without_folds(self.folds, query_kernel)[self.rows]
        parts = np.split(logits, len(targets), axis=1), np.split(model.without_one(), len(targets), axis=1)
        first, *rest = (self._part(*pair) for pair in zip(*parts, strict=True))
        return first, rest[0] if rest else None

    def _part(self, logits: np.ndarray, full: np.ndarray) -> Part:
        """`full` (N, C): the logits of all support images; on a validation set the unit is that of its images."""
        unit = spread_of_others(logits, self.labels)
        if len(self.labels) and (self.folds is None or self.support.n_classes == 2):
            return Part(logits, unit, unit)
        full_unit = spread_of_others(full, self.support.labels)
        return Part(logits, unit if len(self.labels) else full_unit, full_unit)
