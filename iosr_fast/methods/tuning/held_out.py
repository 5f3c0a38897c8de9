"""Labelled images on which a method is scored during a search: a validation set, or the support set's own images.

A support image is scored by a plan that was fitted without it. Reducers see no labels and are fitted once, on all
support images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import product
from typing import Any

import numpy as np

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.exceptions import IosrFastError
from iosr_fast.methods.method import Method
from iosr_fast.methods.support_set import SupportSet, image_rows
from iosr_fast.methods.tuning.near_duplicates import group_near_duplicates
from iosr_fast.methods.tuning.search import Intervals, cache_intervals, intervals
from iosr_fast.scoring.plan import ScoringPlan
from iosr_fast.scoring.reducers import Reducer
from iosr_fast.scoring.score import score

MAX_FOLDS = 16
Setting = Mapping[str, float]  # a method's parameters but alpha


@dataclass(frozen=True, eq=False)
class HeldOutSet:
    """`queries` with `labels` (V,), scored by plans that `method` compiles without the support images of their fold.

    `folds` (N,) int64 has each support image's fold. The queries are then the support images in their order; images of
    a negative fold are never left out. None: the queries are a validation set. `distinct` (C,) counts the images of
    each class of the support set, near duplicates once; all of them for a validation set. Images of a class with one
    distinct image are not scored.
    """

    method: Method
    reducer: Reducer | None
    support: SupportSet
    queries: Embeddings
    labels: np.ndarray
    folds: np.ndarray | None = None
    distinct: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    _logits: dict[tuple[Any, ...], tuple[np.ndarray, np.ndarray]] = field(default_factory=dict, repr=False)

    @classmethod
    def validation(
        cls, method: Method, reducer: Reducer | None, support: SupportSet, queries: Embeddings, labels: np.ndarray
    ) -> HeldOutSet:
        """A validation set. Raises ValueError if it is empty or its labels don't fit."""
        labels = np.asarray(labels, np.int64)
        if labels.shape != (len(queries),) or not len(labels):
            raise IosrFastError(
                f"expected at least one validation image and a label for each, got {len(queries)} images and "
                f"labels of shape {labels.shape}"
            )
        if labels.min() < 0 or labels.max() >= support.n_classes:
            raise IosrFastError(f"expected labels in 0..{support.n_classes - 1}, got {labels.min()}..{labels.max()}")
        return cls(method, reducer, support, queries, labels, distinct=support.counts)

    @classmethod
    def leave_one_out(
        cls, method: Method, reducer: Reducer | None, support: SupportSet, enough: int | None = None
    ) -> HeldOutSet:
        """The support images themselves, with one of each class left out at a time.

        If one image alone were left out, its class would have one key less than the others, which biases sums over
        keys; with one of each class left out, no class is at a disadvantage. Near duplicates of a class count as one
        image (group_near_duplicates): they are left out together. A class of a single group loses one of its images at
        a time, as the others do, but none of them is scored: if it stayed whole among classes of one image each, it
        alone would give the covariance. The number of folds is the number of images of the largest class, at most
        MAX_FOLDS (then a 16th of each class is left out at a time). `enough` images: where that many are scored, the
        other folds are not.
        """
        labels = support.labels
        groups = group_near_duplicates(support)
        distinct = np.zeros(support.n_classes, np.int64)
        np.maximum.at(distinct, labels, groups + 1)
        n_folds = min(MAX_FOLDS, int(distinct.max(initial=1)))
        units = np.where(distinct[labels] > 1, groups, np.arange(len(labels)) - support.class_offsets[labels])
        left_out = (support.counts[labels] > 1) & (n_folds > 1)
        if enough is not None:
            left_out &= units % n_folds < max(1, -(-n_folds * enough // max(len(labels), 1)))
            left_out &= units < n_folds * max(1, enough // support.n_classes)
        folds = np.where(left_out, units % n_folds, -1)
        return cls(method, reducer, support, support.as_queries, labels, folds, distinct)

    @property
    def n_duplicates(self) -> int:
        """How many support images are near duplicates of an earlier one of their class."""
        return int(self.support.counts.sum() - self.distinct.sum())

    @cached_property
    def halves(self) -> tuple[np.ndarray, np.ndarray]:
        """Two masks (V,) of the rows, every other fold (of a validation set: every other image) in each: what one half
        chooses is judged on the other."""
        groups = np.arange(len(self.labels)) if self.folds is None else self.folds[self.rows]
        return groups % 2 == 0, groups % 2 == 1

    @cached_property
    def scored(self) -> np.ndarray:
        """(V,) bool: the queries that are scored. A near duplicate of what stays in the fit says nothing."""
        if self.folds is None:
            return np.ones(len(self.labels), bool)
        scored: np.ndarray = (self.folds >= 0) & (self.distinct[self.labels] > 1)
        return scored

    @cached_property
    def rows(self) -> np.ndarray:
        """The queries that are scored, fold by fold: the order of `logits`, `intervals` and `plans`."""
        if self.folds is None:
            return np.arange(len(self.labels))
        order = np.argsort(self.folds, kind="stable")
        return order[self.scored[order]]

    @cached_property
    def splits(self) -> list[tuple[np.ndarray, SupportSet]]:
        """For each fold the rows of its queries, and the support set without them; a validation set is one fold."""
        if self.folds is None or not self.method.needs_support:
            return [(self.rows, self.support)]
        return [
            (np.flatnonzero((self.folds == fold) & self.scored), self.support.without(self.folds == fold))
            for fold in np.unique(self.folds[self.rows])
        ]

    def logits(self, setting: Setting) -> tuple[np.ndarray, np.ndarray]:
        """base, slope (V, C) float32 of the rows: their logits at alpha are base + alpha * slope."""
        if self.method.class_keys:
            parts = [fold.logits(setting) for fold in self._folds]
            return np.concatenate([base for base, _ in parts]), np.concatenate([slope for _, slope in parts])
        key = tuple(setting.items())
        if key in self._logits:
            return self._logits[key]
        if self._leave_out is not None:
            logits = self._zero_shot, self._leave_out(setting)[self.rows]
        else:
            parts = [self._terms(support, setting, self.queries[rows]) for rows, support in self.splits]
            logits = np.concatenate([base for base, _ in parts]), np.concatenate([slope for _, slope in parts])
        if self._leave_out is not None or not setting:  # other methods use few settings twice
            self._logits[key] = logits
        return logits

    def intervals(self, settings: Sequence[Setting]) -> Intervals:
        """The alphas at which each row is right, for each setting (search.Intervals)."""
        if self.method.class_keys:
            return Intervals.concatenate([fold.intervals(settings) for fold in self._folds])
        labels = self.labels[self.rows]
        return Intervals.concatenate([intervals(*self.logits(setting), labels) for setting in settings], axis=0)

    def plans(self, parameters: Mapping[str, float]) -> Iterator[tuple[np.ndarray, ScoringPlan]]:
        """For each fold the rows of its queries, and the plan that scores them, compiled with all parameters."""
        for rows, support in self.splits:
            yield rows, self.method.compile(support, self.method.which, self.reducer, **parameters)

    @cached_property
    def _zero_shot(self) -> np.ndarray:
        return zero_shot_logits(self.support, self.queries)[self.rows]

    @cached_property
    def _leave_out(self) -> Callable[[Setting], np.ndarray] | None:
        """Method.leave_out on the support images; None for another method and for a validation set."""
        if self.folds is None or self.method.leave_out is None:
            return None
        return self.method.leave_out(self.support, self.method.which, self.reducer, self.queries, self.folds)

    @cached_property
    def _folds(self) -> list[_ClassKeys]:
        """For each of `splits` its queries and the plan of the others, of a method with class keys."""
        ones = {name: 1.0 for name in self.method.parameters}
        return [
            _ClassKeys(
                self.method.compile(support, self.method.which, self.reducer, **ones),
                support.key_weights,
                self.queries[rows],
                self.labels[rows],
                zero_shot_logits(support, self.queries[rows]),
            )
            for rows, support in self.splits
        ]

    def _terms(self, support: SupportSet, setting: Setting, queries: Embeddings) -> tuple[np.ndarray, np.ndarray]:
        """The logits of the terms that alpha does not multiply, and of the one that it does."""
        plan = self.method.compile(support, self.method.which, self.reducer, alpha=1.0, **setting)
        no_linear: dict[str, Any] = {"linear": None, "bias": None}
        if self.method.scales == "linear":
            slope, rest = replace(plan, text=None), no_linear
        else:
            slope = replace(plan, text=None, feature="plain", **no_linear)
            rest = dict.fromkeys(("keys", "class_offsets", "weights", "values"))
        scores = score(slope, queries)
        has_rest = plan.text is not None or (self.method.scales == "cache" and plan.linear is not None)
        return (score(replace(plan, **rest), queries) if has_rest else np.zeros_like(scores)), scores


@dataclass(frozen=True, eq=False)
class _ClassKeys:
    """Queries with `labels` (V,), their zero-shot logits (V, C), and the plan of other images, all of whose parameters
    are 1. beta is a plan's own; gamma multiplies the linear term, or is the power of the keys' weights beyond those of
    their classes (SupportSet.key_weights).
    """

    plan: ScoringPlan
    key_weights: np.ndarray | None
    queries: Embeddings
    labels: np.ndarray
    zero_shot: np.ndarray

    @cached_property
    def _linear(self) -> np.ndarray | None:
        """The linear term at gamma 1, (V, C) float32."""
        if self.plan.linear is None:
            return None
        return score(replace(self.plan, keys=None, class_offsets=None, weights=None, tau=0.0), self.queries)

    def _weights(self, setting: Setting) -> np.ndarray | None:
        if self.plan.weights is None:
            return None
        of_class = 1.0 if self.key_weights is None else self.key_weights
        weights: np.ndarray = of_class * (self.plan.weights / of_class) ** setting.get("gamma", 1.0)
        return weights

    def logits(self, setting: Setting) -> tuple[np.ndarray, np.ndarray]:
        """As HeldOutSet.logits."""
        cache: dict[str, Any] = {"beta": setting["beta"], "weights": self._weights(setting)}
        cache |= {"text": None, "linear": None, "bias": None, "feature": "plain"}
        base = self.zero_shot
        if self._linear is not None:
            base = base + np.float32(setting["gamma"]) * self._linear
        return base, score(replace(self.plan, **cache), self.queries)

    def intervals(self, settings: Sequence[Setting]) -> Intervals:
        """As HeldOutSet.intervals, without forming an affinity."""
        call: dict[str, Any] = {"betas": [setting["beta"] for setting in settings]}
        if self._linear is not None:  # settings are every beta with every gamma
            betas, gammas = (list(dict.fromkeys(s[name] for s in settings)) for name in ("beta", "gamma"))
            if [dict(s) for s in settings] != [{"beta": b, "gamma": g} for b, g in product(betas, gammas)]:
                raise IosrFastError("expected every beta with every gamma, betas first")
            call = {"betas": betas, "extra": self._linear, "gammas": gammas}
            settings = settings[:: len(gammas)]
        assert self.plan.keys is not None and self.plan.class_offsets is not None
        if self.plan.weights is not None:
            call["weights"] = np.stack([np.asarray(self._weights(setting)) for setting in settings])
        return cache_intervals(
            base=self.zero_shot,
            query=image_rows(self.queries, self.plan.query, self.plan.reducer),
            keys=self.plan.keys,
            class_offsets=self.plan.class_offsets,
            labels=self.labels,
            **call,
        )


def zero_shot_logits(support: SupportSet, queries: Embeddings) -> np.ndarray:
    """tau * <plain, text>, (V, C) float32; zeros without texts."""
    if support.text is None:
        return np.zeros((len(queries), support.n_classes), np.float32)
    logits: np.ndarray = np.float32(support.tau) * (queries.plain @ support.text.T)
    return logits
