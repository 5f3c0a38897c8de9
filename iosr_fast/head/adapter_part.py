"""What adapted embeddings contribute to a logit, beside the plain embeddings of the same support images."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.head.head import Head
from iosr_fast.scoring.fields import EMBEDDINGS
from iosr_fast.scoring.numpy_scorer import feature_rows

# (b, classes (k,), cache (k,)) -> (k,), for query b and the contribution of the support images to these classes.
AdapterPart = Callable[[int, np.ndarray, np.ndarray], np.ndarray]


def adapter_part(head: Head, embeddings: Embeddings) -> AdapterPart:
    """How much of `cache`, what the support images contribute to logits, comes through adapted embeddings.

    If the terms of the plan read one kind of embedding, that is all of it or nothing. If they read both, one product is
    computed, for these classes alone: the half of the linear term that is the adapted part, or what is left of `cache`
    beside it where the keys are adapted, too. A linear term over the distribution of texts (Tip-X) reads plain ones.
    """
    plan = head.plan
    read: set[str] = {plan.query} if plan.keys is not None else set()
    if plan.linear is not None:
        read |= set(EMBEDDINGS) if plan.feature == "both" else {plan.feature}
    if "adapted" not in read:
        return lambda b, classes, cache: np.zeros_like(cache)
    if read == {"adapted"}:
        return lambda b, classes, cache: cache
    assert plan.linear is not None
    adapted_keys = plan.keys is not None and plan.query == "adapted"
    columns, bias = slice(None), np.zeros(plan.n_classes) if plan.bias is None else plan.bias
    if plan.feature == "both":
        columns = slice(plan.width) if adapted_keys else slice(plan.width, None)
        bias = bias - head.adapted_bias if adapted_keys else head.adapted_bias
    features, linear = feature_rows(plan, embeddings)[:, columns], plan.linear[:, columns]

    def part(b: int, classes: np.ndarray, cache: np.ndarray) -> np.ndarray:
        product = linear[classes] @ features[b] + bias[classes]
        return cache - product if adapted_keys else product

    return part
