"""The out-of-fold logits: labelled images that judge models of a support set, each by a model that has not seen it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.exceptions import IosrFastError
from iosr_fast.methods.folds import Folds
from iosr_fast.methods.models.model import Memory, Model, Term
from iosr_fast.methods.papers import Method
from iosr_fast.methods.support_set import ROUNDING, SupportSet, check_labels
from iosr_fast.scoring.reducers import Reducer
from iosr_fast.utils.short_repr import short_repr

_SPREAD_IMAGES = 256  # on which a spread in use is measured
_ROUNDING = 1e-12  # a spread of a part that is nothing but rounding


@dataclass(frozen=True, eq=False)
class Part:
    """A model's logits of V held-out images, (V, C).

    spread_left_out  the spread of these logits over the classes that are not the image's own (`spread_of_others`)
    spread_full      the same of the model that is fitted with all support images, which has another spread
    model            that one: `model.fields()` are its part of a plan, for which nothing is fitted again
    """

    logits: np.ndarray
    spread_left_out: float
    spread_full: float
    model: Any = None

    @property
    def scaled(self) -> np.ndarray:
        """The logits in units of their spread."""
        return self.logits / self.spread_left_out


@dataclass(frozen=True, eq=False)
class OutOfFold:
    """The logits (V, C) float32 of the support images `folds.rows`, whose labels (V,) they have not seen: each by the
    classifier fitted without the images of its fold, at the spread of the classifier in use."""

    folds: Folds
    labels: np.ndarray
    logits: np.ndarray
    __repr__ = short_repr

    @property
    def units(self) -> np.ndarray:
        """(V,) int64, as of Folds."""
        return self.folds.units[self.folds.rows]

    def by_image(self) -> np.ndarray:
        """(N, C): the logits of every support image; NaN for one that is never left out."""
        logits = np.full((len(self.folds.fold), self.logits.shape[1]), np.nan, np.float32)
        logits[self.folds.rows] = self.logits
        return logits


@dataclass(frozen=True, eq=False)
class HeldOut:
    """V `queries` with `labels` (V,), or an indicator (V, C) of any number of labels, which judge models of `support`.

    By `folds` they are the support images that can be left out, in their order, and each is judged by a model without
    its fold. Without, they are a validation set.
    """

    support: SupportSet
    queries: Embeddings
    labels: np.ndarray
    folds: Folds | None = None
    memory: Memory = field(default_factory=Memory, repr=False)

    @classmethod
    def of_support(cls, support: SupportSet, folds: Folds) -> HeldOut:
        """The support images themselves."""
        labels = support.labels if support.owners is None else support.indicator
        return cls(support, support.as_queries[folds.rows], labels[folds.rows], folds)

    @classmethod
    def validation(cls, support: SupportSet, queries: Embeddings, labels: np.ndarray) -> HeldOut:
        """A validation set. Raises IosrFastError if it is empty or its labels don't fit."""
        if not len(queries):
            raise IosrFastError("expected at least one validation image, got none")
        return cls(support, queries, check_labels(labels, len(queries), support.n_classes))

    @property
    def protocol(self) -> Literal["loo", "validation"]:
        """How they judge: "loo" or "validation"."""
        return "validation" if self.folds is None else "loo"

    @property
    def halves(self) -> Sequence[np.ndarray]:
        """Two masks (V,), every other fold (of a validation set: every other image) in each: what one half chooses is
        judged on the other. None if there are no images for both."""
        even = (np.arange(len(self.labels)) if self.folds is None else self.folds.fold[self.folds.rows]) % 2 == 0
        return (even, ~even) if even.any() and not even.all() else ()

    def left_out(self, model: Model) -> np.ndarray:
        """(V, C): the model's logits of the held-out images, without their folds at the spread that these give."""
        model = self._with_memory(model)

        def judge() -> np.ndarray:
            return model.scores(self.queries) if self.folds is None else model.without(self.folds)[self.folds.rows]

        return self.memory.get(("left out", model.unfitted()), 8 * len(self.labels) * self.support.n_classes, judge)

    def part(self, model: Model) -> Part:
        """These logits with their spreads."""
        n_bytes = 8 * len(self.support.embeddings) * self.support.n_classes  # of the model: its values
        return self.memory.get(("part", model.unfitted()), n_bytes, lambda: self._part(self._with_memory(model)))

    def _part(self, model: Model) -> Part:
        logits = self.left_out(model)
        kept = model.kept()
        if self.support.owners is not None:  # an image that the fit has seen distorts the logits of all classes
            deviation = float(logits.std())
            spread = deviation if deviation > _ROUNDING else 1.0
            return Part(logits, spread, spread, kept)
        spread = spread_of_others(logits, self.labels)
        if len(self.labels) and (self.folds is None or self.support.n_classes == 2):
            return Part(logits, spread, spread, kept)
        rows = self.folds.rows if self.folds is not None and len(self.labels) else np.arange(len(self.support.labels))
        rows = rows[:: -(-len(rows) // _SPREAD_IMAGES) or 1]
        units = np.arange(len(self.support.labels)) if self.folds is None else self.folds.units
        in_use = spread_of_others(model.in_use(rows, units), self.support.labels[rows])
        return Part(logits, spread if len(self.labels) else in_use, in_use, kept)

    def _with_memory(self, model: Model) -> Model:
        return model if model.memory is self.memory else replace(model, memory=self.memory)

    def logits(self, terms: Sequence[Term]) -> np.ndarray:
        """(V, C): the sum of weighted terms, at the spread that they have in use, so that weights and probabilities of
        the classifier in use fit them."""
        total = np.zeros((len(self.labels), self.support.n_classes))
        for weight, model in terms if len(total) else ():
            part = self.part(model)
            total += weight * (part.logits * (part.spread_full / part.spread_left_out))
        return total


def out_of_fold(
    method: Method,
    support: SupportSet,
    folds: Folds,
    reducer: Reducer | None,
    parameters: Mapping[str, float],
    factor: float = 1.0,
) -> OutOfFold:
    """The out-of-fold logits of a method with these parameters and a factor of its logits; of no image where each class
    has one."""
    held_out = HeldOut.of_support(support, folds)
    logits = factor * held_out.logits(method.terms(support, reducer, parameters))
    return OutOfFold(folds, held_out.labels, logits.astype(np.float32))


def spread_of_others(logits: np.ndarray, labels: np.ndarray) -> float:
    """The mean over images of the standard deviation over the classes that are not the image's own; 1 if that is mere
    rounding. An image that the fit has seen distorts the logit of its own class alone.

    logits (V, C), labels (V,). With two classes there is a single other class: then over both.
    """
    if not len(logits):
        return 1.0
    if logits.shape[1] > 2:
        of_label = np.arange(logits.shape[1])[None, :] == labels[:, None]
        logits = logits[~of_label].reshape(len(logits), -1)
    spread = float(np.std(logits, axis=1).mean())
    return spread if spread > max(ROUNDING * float(np.abs(logits).max()), 1e-12) else 1.0
