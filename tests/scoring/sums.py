"""What tests of backends on tensors share: plans with a cache term alone, and a bound for the error of their sums."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.scoring.device_plan import DevicePlan, device_plan
from iosr_fast.scoring.plan import ScoringPlan
from iosr_fast.scoring.reference import score_reference
from tests.conftest import random_plan, unit_rows

KINDS = ("classes", "values", "half values")
# Counts of keys by class (ragged, empty, larger than a tile), queries and channels.
SHAPES = (
    ([3, 1, 4, 1, 5], 1, 1),
    ([0, 0, 2, 0, 7, 0], 2, 3),
    ([1], 33, 7),
    ([1] * 70, 17, 17),
    ([150, 0, 61], 5, 33),
    ([16] * 9, 70, 64),
    ([0, 300, 0], 3, 123),
)


def make_plan(
    rng: np.random.Generator, counts: list[int], width: int, keys: str, kind: str, **options: Any
) -> ScoringPlan:
    """A plan with a cache term alone."""
    plan = random_plan(rng, counts, width, ("cache",), query="plain", dense=kind != "classes", **options)
    plan = plan.with_key_precision(keys)  # type: ignore[arg-type]
    if plan.values is None:
        return plan
    return replace(plan, values=plan.values.astype(np.float16 if kind == "half values" else np.float32))


def random_queries(rng: np.random.Generator, batch: int, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor(unit_rows(rng, batch, width)).to(dtype)


def assert_right(
    affinity_sums: Callable[[DevicePlan, Tensor, Tensor], str],
    path: str,
    plan: ScoringPlan,
    queries: Tensor,
    *,
    device: str = "cpu",
    half_queries: bool = False,
    half_affinities: bool = False,
) -> Tensor:
    """The logits that a backend has added its sums to; asserts its path, and that its error is at most twice that of
    the papers' code in float32, and a few roundings.

    A backend may round queries to the keys' type (float16 for int8), and affinities to float16 if values are or, for
    classes, if keys have fewer than 32 bits."""
    truth = score_reference(plan, Embeddings(queries.double().numpy()))
    if plan.query_transform is not None:  # as lower() does
        queries = queries.float() @ torch.tensor(plan.query_transform).T
    before = torch.linspace(-1, 1, truth.size).view(truth.shape)
    logits = before.to(device, copy=True)
    assert affinity_sums(device_plan(plan, device), queries.to(device), logits) == path
    eager, size = _eager(device_plan(plan, "cpu"), queries, half_queries, half_affinities)
    allowed = 2 * np.abs(eager.numpy() - truth).max()
    # Roundings of the sums, and of the exponent and the cosine in it, which beta multiplies.
    allowed += np.finfo(np.float32).eps * (6 + 4 * plan.beta) * (1 + size)
    assert np.abs(logits.cpu().numpy() - before.numpy() - truth).max() <= allowed
    return logits


def _eager(parts: DevicePlan, queries: Tensor, half_queries: bool, half_affinities: bool) -> tuple[Tensor, float]:
    """The sums as in the papers, with full affinity and one-hot matrices, and the largest if their signs were equal."""
    keys, values, weights = parts.keys, parts.values, parts.weights
    assert keys is not None
    if half_queries:
        queries = queries.to(torch.float16 if keys.dtype == torch.int8 else keys.dtype)
    scales = 1.0 if parts.key_scales is None else parts.key_scales[:, None]
    affinity = torch.exp(-parts.beta * (1.0 - queries.float() @ (keys.float() * scales).T))
    if weights is not None:
        affinity *= weights
    if half_affinities and (keys if values is None else values).dtype != torch.float32:
        unit = 1.0 if weights is None else float(weights.abs().max())
        affinity = (affinity / unit).half().float() * unit
    if values is None:
        assert parts.class_offsets is not None
        classes = torch.arange(parts.n_classes).repeat_interleave(parts.class_offsets.diff().long())
        values = torch.eye(parts.n_classes)[classes]
    values = values.float()
    return parts.alpha * affinity @ values, abs(parts.alpha) * float((affinity.abs() @ values.abs()).max())
