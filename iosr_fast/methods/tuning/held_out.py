"""Labelled images that a method is scored on while it is tuned: a validation set, or the support set's own images.

A support image is scored by what would have been fit without it. Reducers see no labels and are fitted once, on all
support images.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import numpy as np

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.methods import METHODS, Method
from iosr_fast.methods.proker import residual
from iosr_fast.methods.support_set import SupportSet, image_rows
from iosr_fast.methods.tuning.closed_form import gda_without, kernel_ridge_without
from iosr_fast.methods.tuning.search import Intervals, cache_intervals, intervals
from iosr_fast.scoring.plan import ScoringPlan
from iosr_fast.scoring.reducers import Reducer
from iosr_fast.scoring.score import score

MOST_FOLDS = 16
Setting = Mapping[str, float]  # a method's parameters but alpha


@dataclass(frozen=True)
class HeldOutSet:
    """`queries` with `labels` (V,), to be scored by what `support` makes without the images of the query's fold.

    `folds` (N,) int64 gives each support image's fold, and then queries are the support images in their order; those of
    a negative fold are never left out, and not scored. None: the queries are a validation set of their own.
    """

    support: SupportSet
    queries: Embeddings
    labels: np.ndarray
    folds: np.ndarray | None = None
    _slopes: dict[tuple[float, ...], np.ndarray] = field(default_factory=dict, repr=False)  # ProKeR's, by setting
    # Logits of methods that have one setting only, by name and reducer.
    _only: dict[tuple[str, Reducer | None], tuple[np.ndarray, np.ndarray]] = field(default_factory=dict, repr=False)

    @property
    def scored(self) -> np.ndarray:
        """(V,) bool."""
        return np.ones(len(self.labels), bool) if self.folds is None else self.folds >= 0

    @property
    def single(self) -> bool:
        """Whether images are left out one at a time."""
        return self.folds is not None and np.bincount(self.folds[self.folds >= 0], minlength=1).max() <= 1


def validation(support: SupportSet, queries: Embeddings, labels: np.ndarray) -> HeldOutSet:
    """A validation set. Raises ValueError where it is empty or its labels don't fit."""
    labels = np.asarray(labels, np.int64)
    if labels.shape != (len(queries),) or not len(labels):
        raise ValueError(
            f"expected at least one validation image and a label for each, got {len(queries)} images and "
            f"labels of shape {labels.shape}"
        )
    if labels.min() < 0 or labels.max() >= support.n_classes:
        raise ValueError(f"expected labels in 0..{support.n_classes - 1}, got {labels.min()}..{labels.max()}")
    return HeldOutSet(support, queries, labels)


def leave_out(support: SupportSet, single: bool = False) -> HeldOutSet:
    """The support images themselves: one of each class left out together, or (`single`) one alone.

    Leaving one image out alone leaves its class a key short of all others, which biases whatever sums over keys; with
    one of each class left out, all are equally short. There are as many rounds as the largest class has images, 16 at
    most: then a 16th of each class is left out. The only image of a class always stays.
    """
    labels, counts = support.labels, support.counts
    rank = np.arange(len(labels)) - support.class_offsets[labels]
    folds = np.arange(len(labels)) if single else rank % min(MOST_FOLDS, int(counts.max(initial=1)))
    return HeldOutSet(support, support.queries or support.embeddings, labels, np.where(counts[labels] > 1, folds, -1))


def logits_of(held: HeldOutSet, name: str, reducer: Reducer | None, setting: Setting) -> tuple[np.ndarray, np.ndarray]:
    """base, slope (V, C) float32: the logits at alpha are base + alpha * slope. Rows that aren't scored are NaN."""
    if METHODS[name].axes:
        return _logits(held, name, reducer, setting)
    if (name, reducer) not in held._only:
        held._only[name, reducer] = _logits(held, name, reducer, setting)
    return held._only[name, reducer]


def _logits(held: HeldOutSet, name: str, reducer: Reducer | None, setting: Setting) -> tuple[np.ndarray, np.ndarray]:
    method = METHODS[name]
    if held.folds is None or not method.needs_support:
        return _split_logits(method, held.support, reducer, setting, held.queries)
    if name.startswith("proker"):
        return _zero_shot(held.support, held.queries), _ridge_slope(held, method, reducer, setting)
    if held.single and name.startswith("gda"):
        rows = image_rows(held.support.embeddings, method.which, reducer)
        asked = image_rows(held.queries, method.which, reducer)
        slope = gda_without(rows, asked, held.support.class_offsets).astype(np.float32)
        return _zero_shot(held.support, held.queries), slope
    base = np.full((len(held.labels), held.support.n_classes), np.nan, np.float32)
    slope = base.copy()
    for out, sub in _folds(held):
        base[out], slope[out] = _split_logits(method, sub, reducer, setting, held.queries[out])
    return base, slope


def intervals_of(held: HeldOutSet, name: str, reducer: Reducer | None, settings: Sequence[Setting]) -> Intervals:
    """The alphas at which each scored query is right, for each setting (search.Intervals), in the order of folds.

    Methods with keys of their own for each class go through cache_intervals: no affinity is ever formed.
    """
    method = METHODS[name]
    # Of APE's channels and Tip-X's ranges every image has a part, so that leaving one out alone takes a fit.
    streamed = ("tip-adapter",) if held.single else ("tip-adapter", "tip-x", "ape")
    if name.partition("+")[0] not in streamed:
        parts, rows = [], in_order_of_folds(held)
        for setting in settings:
            base, slope = (part[rows] for part in logits_of(held, name, reducer, setting))
            parts.append(intervals(base, slope, held.labels[rows]))
        lower, upper, flags = (np.concatenate([getattr(p, f) for p in parts]) for f in ("lower", "upper", "flags"))
        return Intervals(lower, upper, flags, parts[0].path)
    if held.folds is None:
        return _stream(method, held.support, reducer, settings, held.queries, held.labels)
    if held.single:
        rows = np.flatnonzero(held.scored)
        return _stream(method, held.support, reducer, settings, held.queries[rows], held.labels[rows], own=rows)
    return Intervals.concatenate(
        [_stream(method, sub, reducer, settings, held.queries[out], held.labels[out]) for out, sub in _folds(held)]
    )


def in_order_of_folds(held: HeldOutSet) -> np.ndarray:
    """The rows of the queries in the order in which intervals_of has them."""
    if held.folds is None or held.single:
        return np.flatnonzero(held.scored)
    return np.concatenate([np.flatnonzero(held.folds == fold) for fold in range(int(held.folds.max(initial=-1)) + 1)])


def plans(
    held: HeldOutSet, name: str, reducer: Reducer | None, parameters: Mapping[str, float]
) -> Iterator[tuple[np.ndarray, ScoringPlan]]:
    """Rows of the queries and the plan that is compiled to score them, with all parameters: one on a validation set, by
    leave-one-out one a fold, and every n-th of more than MOST_FOLDS."""
    method = METHODS[name]
    if held.folds is None or not method.needs_support:
        yield in_order_of_folds(held), method.compile(held.support, method.which, reducer, **parameters)
        return
    folds = _folds(held)
    for rows, sub in folds[:: -(-len(folds) // MOST_FOLDS)]:
        yield rows, method.compile(sub, method.which, reducer, **parameters)


def _folds(held: HeldOutSet) -> list[tuple[np.ndarray, SupportSet]]:
    """For each fold, the rows left out and the support set of the others."""
    assert held.folds is not None
    found = [(np.flatnonzero(held.folds == f), held.support.only(held.folds != f)) for f in range(held.folds.max() + 1)]
    return [(rows, sub) for rows, sub in found if len(rows)]


def _compiled(method: Method, support: SupportSet, reducer: Reducer | None, setting: Setting) -> ScoringPlan:
    return method.compile(support, method.which, reducer, alpha=1.0, **setting)


def _base_plan(method: Method, plan: ScoringPlan) -> ScoringPlan | None:
    """The terms that alpha does not multiply; None where there are none."""
    if method.scales == "linear":
        return None if plan.text is None else replace(plan, linear=None, bias=None)
    if plan.text is None and plan.linear is None:
        return None
    return replace(plan, keys=None, class_offsets=None, weights=None, values=None)


def _slope_plan(method: Method, plan: ScoringPlan) -> ScoringPlan:
    if method.scales == "linear":
        return replace(plan, text=None)
    return replace(plan, text=None, linear=None, bias=None, feature="plain")


def _split_logits(
    method: Method, support: SupportSet, reducer: Reducer | None, setting: Setting, queries: Embeddings
) -> tuple[np.ndarray, np.ndarray]:
    if not method.needs_support:
        base = score(method.compile(support), queries)
        return base, np.zeros_like(base)
    plan = _compiled(method, support, reducer, setting)
    slope = score(_slope_plan(method, plan), queries)
    base_plan = _base_plan(method, plan)
    return np.zeros_like(slope) if base_plan is None else score(base_plan, queries), slope


def _zero_shot(support: SupportSet, queries: Embeddings) -> np.ndarray:
    """tau <plain, text>, or zeros without texts: what the methods but Tip-X have beside what alpha multiplies."""
    if support.text is None:
        return np.zeros((len(queries), support.n_classes), np.float32)
    logits: np.ndarray = np.float32(support.tau) * (queries.plain @ support.text.T)
    return logits


def _ridge_slope(held: HeldOutSet, method: Method, reducer: Reducer | None, setting: Setting) -> np.ndarray:
    assert held.folds is not None
    key = (setting["beta"], setting["ridge"])
    if key in held._slopes:
        return held._slopes[key]
    keys = image_rows(held.support.embeddings, method.which, reducer)
    asked = image_rows(held.queries, method.which, reducer)
    exact = keys.astype(np.float64)
    kernel, query_kernel = (
        np.exp(-setting["beta"] * (1.0 - rows.astype(np.float64) @ exact.T)) for rows in (keys, asked)
    )
    slope = kernel_ridge_without(kernel, query_kernel, residual(held.support), setting["ridge"], held.folds)
    held._slopes[key] = (held.support.tau * slope).astype(np.float32)
    return held._slopes[key]


def _stream(
    method: Method,
    support: SupportSet,
    reducer: Reducer | None,
    settings: Sequence[Setting],
    queries: Embeddings,
    labels: np.ndarray,
    own: np.ndarray | None = None,
) -> Intervals:
    # gamma, where there is one, is 1 here: it only scales what is read of this plan.
    first = _compiled(method, support, reducer, {name: 1.0 for name in settings[0]})
    assert first.keys is not None and first.class_offsets is not None
    asked = image_rows(queries, method.which, first.reducer)
    betas = np.array([setting["beta"] for setting in settings])
    call: dict[str, Any] = {
        "base": _zero_shot(support, queries),
        "query": asked,
        "keys": first.keys,
        "class_offsets": first.class_offsets,
        "labels": labels,
    }
    if first.weights is not None:  # APE: gamma is in the weights
        by_gamma = {
            g: _compiled(method, support, reducer, {"beta": 1.0, "gamma": g}).weights
            for g in {setting["gamma"] for setting in settings}
        }
        weights = np.stack([np.asarray(by_gamma[setting["gamma"]]) for setting in settings])
        return cache_intervals(**call, betas=betas, weights=weights)
    if first.linear is None:
        return cache_intervals(**call, betas=betas, own=own)
    # Tip-X: gamma multiplies the linear term, and settings are every beta with every gamma.
    extra = score(replace(first, keys=None, class_offsets=None, tau=0.0), queries)
    gammas = list(dict.fromkeys(setting["gamma"] for setting in settings))
    betas = np.array(list(dict.fromkeys(setting["beta"] for setting in settings)))
    if [dict(s) for s in settings] != [{"beta": b, "gamma": g} for b, g in product(betas, gammas)]:
        raise ValueError("expected settings of Tip-X to be every beta with every gamma, betas first")
    return cache_intervals(**call, betas=betas, extra=extra, gammas=np.array(gammas))
