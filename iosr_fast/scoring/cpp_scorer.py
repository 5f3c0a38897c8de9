"""Scoring NumPy arrays with the C++ kernel of csrc/scoring."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from iosr_fast.scoring.fields import ARRAYS, EMBEDDINGS
from iosr_fast.scoring.numpy_scorer import feature_rows, query_rows
from iosr_fast.scoring.validation import UNIT_NORM_TOLERANCE

if TYPE_CHECKING:
    from iosr_fast.encoders.encoder import Embeddings
    from iosr_fast.scoring.plan import ScoringPlan

_AFFINITIES = 1 << 22  # 16 MB


def score_cpp(plan: ScoringPlan, embeddings: Embeddings) -> tuple[np.ndarray, str]:
    """The C++ kernel; IOSR_FAST_SIMD forces one of its instruction sets. NumPy applies a reducer and computes the
    distribution over texts, with products of the kernel: a row's bits then do not depend on the other rows."""
    scored = bound_plan(plan)(plan, embeddings, check=False)  # scoring_inputs() has checked the embeddings
    assert scored is not None
    return scored[0], f"cpp/{scored[1]}"


def bound_plan(plan: ScoringPlan) -> BoundTerms:
    """The plan's arrays, bound to the kernel once and cached with the plan."""
    bound: BoundTerms | None = vars(plan).get("_bound")
    if bound is None:
        bound = vars(plan)["_bound"] = _bind(plan)
    return bound


@dataclass(frozen=True, slots=True)
class BoundTerms:
    """A plan's terms as _C.BoundPlan objects.

    whole       texts, keys with classes, the linear term over one embedding, bias
    linear      the linear term over another feature: its rows (C, F) are bound as texts are
    affinities  keys with values: the cache term with a class for each key
    values      the keys' values by class, (C, N), which are bound as texts of affinities are

    It doesn't hold the plan, which holds it: without a circle, large arrays are freed at once.
    """

    whole: Any
    linear: Any
    affinities: Any
    values: Any

    def __call__(self, plan: ScoringPlan, embeddings: Embeddings, check: bool) -> tuple[np.ndarray, str] | None:
        """The logits (B, C) of `plan`, and the instruction set.

        None unless the embeddings are C-contiguous float32 arrays (B, D) that the plan's terms can read and, with
        `check`, of unit norm. A plan with a reducer needs checked embeddings.
        """
        query = feature = None
        if plan.reducer is not None:
            query = None if plan.class_offsets is None else query_rows(plan, embeddings, _product)
            feature = (
                feature_rows(plan, embeddings, _product) if plan.linear is not None and self.linear is None else None
            )
        scored: tuple[np.ndarray, str] | None
        scored = self.whole(embeddings.plain, embeddings.adapted, check, query, feature)
        if scored is None or (embeddings.adapted is None and plan.needs_adapted):
            return None
        logits = scored[0]
        if self.linear is not None:
            logits += self.linear(feature_rows(plan, embeddings, _product), None, False)[0]
        if self.values is not None:
            query = query_rows(plan, embeddings, _product)
            step = max(1, _AFFINITIES // len(plan.values))  # type: ignore[arg-type]
            for first in range(0, len(query), step):
                block = slice(first, first + step)
                affinity, _ = self.affinities(query[block], None, False)
                logits[block] += self.values(affinity, None, False)[0]
        return scored


def _bind(plan: ScoringPlan) -> BoundTerms:
    arrays = {field.name: field.of(plan) for field in ARRAYS if field.term != "reducer"}
    cache = {field.name: arrays.pop(field.name) for field in ARRAYS if field.term == "cache"}
    linear = affinities = products = None
    if plan.linear is not None and plan.feature not in EMBEDDINGS:
        linear = _kernel_plan(plan, width=plan.linear.shape[1], text=arrays.pop("linear"), tau=1.0)
    values = cache.pop("values")
    if values is None:
        arrays |= cache
    else:
        n_keys = len(values)
        cache["class_offsets"] = np.arange(n_keys + 1)
        affinities = _kernel_plan(plan, n_classes=n_keys, alpha=1.0, adapted_query=False, **cache)
        rows = vars(plan).get("_values_by_class")  # of torch_op
        products = _kernel_plan(plan, width=n_keys, text=by_class(values) if rows is None else rows, tau=plan.alpha)
    return BoundTerms(_kernel_plan(plan, **arrays), linear, affinities, products)


def by_class(values: np.ndarray) -> np.ndarray:
    """Values (N, C) of keys as (C, N), in memory of their own."""
    return np.array(values.T, order="C")


def _product(rows: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """rows @ matrix': the matrix is bound as texts are."""
    from iosr_fast import _C

    bound = _C.BoundPlan(n_classes=len(matrix), width=matrix.shape[1], text=matrix, tau=1.0)
    product: np.ndarray = bound(np.ascontiguousarray(rows), None, False)[0]
    return product


def _kernel_plan(plan: ScoringPlan, **changed: Any) -> Any:
    from iosr_fast import _C

    constants = {
        "n_classes": plan.n_classes,
        "width": plan.width,
        "tau": plan.tau,
        "alpha": plan.alpha,
        "beta": plan.beta,
        "adapted_query": plan.query == "adapted",
        "adapted_feature": plan.feature == "adapted",
        "tolerance": UNIT_NORM_TOLERANCE["fp32"],
    }
    return _C.BoundPlan(**{**constants, **changed})
