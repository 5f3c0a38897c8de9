"""Everything in a plan but the sum over keys, once for NumPy arrays and torch tensors.

    logits[b, c] = tau * <plain[b], text[c]> + <feature[b], linear[c]> + bias[c]
    queries[b]   = query_transform @ reduced(query[b])

A backend (backends/) then adds the sums of affinities to the logits.
"""

from __future__ import annotations

from typing import NamedTuple

from iosr_fast.encoders.encoder import Array, Embeddings
from iosr_fast.scoring.arrays import AddProduct, as_float32, empty, module_of, product
from iosr_fast.scoring.fields import EMBEDDINGS, PlanTerms
from iosr_fast.scoring.reducers import reduce_rows


class Lowered(NamedTuple):
    """`logits` (B, C) float32, to which the sums of affinities are added; `queries` (B, D), which are compared with the
    keys, None without keys."""

    logits: Array
    queries: Array | None


def lower(plan: PlanTerms, embeddings: Embeddings, add_product: AddProduct) -> Lowered:
    """The logits of a plan without its cache term, and the queries of that.

    embeddings   (B, D), checked: NumPy arrays for a ScoringPlan, tensors on its device for a DevicePlan
    add_product  (rows (B, K), matrix (C, K), factor, logits (B, C)): logits += factor * rows @ matrix', in float32

    Queries that nothing moves keep their dtype; others are float32.
    """
    plain = embeddings.plain
    logits = empty(plain, plan.n_classes)
    logits[:] = 0.0 if plan.bias is None else plan.bias
    if plan.text is not None:
        add_product(plain, plan.text, plan.tau, logits)
    if plan.linear is not None:
        add_product(feature_rows(plan, embeddings, add_product), plan.linear, 1.0, logits)
    if plan.keys is None:
        return Lowered(logits, None)
    queries = _reduced(plan, embeddings, plan.query, add_product)
    if plan.query_transform is not None:
        queries = product(queries, plan.query_transform, add_product)
    return Lowered(logits, queries)


def feature_rows(plan: PlanTerms, embeddings: Embeddings, add_product: AddProduct) -> Array:
    """What the linear term reads: (B, D), the reduced embedding; (B, 2 D) for both; (B, C + 1) float32 for the
    distribution over texts."""
    if plan.feature == "text-distribution":
        return text_distribution(product(embeddings.plain, plan.text, add_product), plan.temperature)
    if plan.feature == "both":
        rows = [_reduced(plan, embeddings, which, add_product) for which in EMBEDDINGS]
        return module_of(rows[0]).concatenate(rows, axis=1)
    return _reduced(plan, embeddings, plan.feature, add_product)


def text_distribution(cosines: Array, temperature: float) -> Array:
    """[s, H], (B, C + 1): s = softmax(cosines / temperature) and H = sum of s * log(C s). cosines (B, C).

    >>> import numpy as np
    >>> text_distribution(np.array([[0.2, 0.2]]), temperature=0.5)
    array([[0.5, 0.5, 0. ]])
    """
    xp = module_of(cosines)
    exponents = cosines / temperature
    exponents = exponents - xp.amax(exponents, axis=1, keepdims=True)
    powers = xp.exp(exponents)
    sums = powers.sum(axis=1, keepdims=True)
    shares = powers / sums
    negentropy = (shares * (exponents - xp.log(sums / cosines.shape[1]))).sum(axis=1, keepdims=True)
    return xp.concatenate([shares, negentropy], axis=1)


def _reduced(plan: PlanTerms, embeddings: Embeddings, which: str, add_product: AddProduct) -> Array:
    rows = embeddings.plain if which == "plain" else embeddings.adapted
    assert rows is not None  # checked_inputs() has checked it
    if plan.reducer_shift is None and plan.reducer_projection is None:
        return rows
    return reduce_rows(as_float32(rows), plan.reducer_shift, plan.reducer_projection, add_product)
