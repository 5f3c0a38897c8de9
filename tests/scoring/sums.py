"""What tests of backends on tensors share: plans with a cache term alone, and a bound for the error of their sums."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.scoring.device_plan import DevicePlan, device_plan
from iosr_fast.scoring.key_precision import PRECISIONS
from iosr_fast.scoring.plan import ScoringPlan
from iosr_fast.scoring.reference import score_reference
from tests.conftest import random_plan, unit_rows

KINDS = ("classes", "values", "half values")
# Few and many classes; ragged, empty, and larger than a tile.
LAYOUTS = ([3, 1, 4, 1, 5], [0, 0, 2, 0, 7, 0], [1], [1] * 70, [150, 0, 61], [16] * 9, [0, 300, 0])
WIDTHS = (1, 3, 7, 17, 33, 64, 123)
SHAPES = tuple(zip(LAYOUTS, (1, 2, 33, 17, 5, 70, 3), WIDTHS, strict=True))
assert PRECISIONS == ("fp32", "fp16", "bf16", "int8")


def make_plan(
    rng: np.random.Generator, counts: list[int], width: int, keys: str, kind: str, **options: Any
) -> ScoringPlan:
    """A plan with a cache term alone, whose values float16 holds exactly."""
    plan = random_plan(rng, counts, width, ("cache",), query="plain", dense=kind != "classes", **options)
    plan = plan.with_key_precision(keys)  # type: ignore[arg-type]
    if plan.values is None:
        return plan
    return replace(plan, values=plan.values.astype(np.float16).astype(np.float32))


def on_device(plan: ScoringPlan, kind: str, device: str) -> DevicePlan:
    parts = copy.copy(device_plan(plan, device))
    if kind == "half values":
        object.__setattr__(parts, "values", parts.values.half())
    return parts


def assert_right(
    affinity_sums: Callable[[DevicePlan, Tensor, Tensor], str],
    path: str,
    plan: ScoringPlan,
    kind: str,
    queries: Tensor,
    *,
    device: str = "cpu",
    half_queries: bool = False,
    half_affinities: bool = False,
) -> Tensor:
    """The logits that a backend's sums are added to; asserts its path, and that its error is at most twice that of the
    papers' code in float32 and a few roundings.

    That code rounds queries as the keys (float16 for int8), and affinities to float16 for half values, if the backend
    is known to."""
    truth = score_reference(plan, Embeddings(queries.double().numpy()))
    if plan.query_transform is not None:
        queries = queries.float() @ torch.tensor(plan.query_transform).T
    before = torch.linspace(-1, 1, truth.size).view(truth.shape)
    logits = before.to(device, copy=True)
    assert affinity_sums(on_device(plan, kind, device), queries.to(device), logits) == path
    half_affinities &= kind == "half values"
    eager, size = _eager(on_device(plan, "", "cpu"), queries, half_queries, half_affinities)
    allowed = 2 * np.abs(eager.numpy() - truth).max()
    # Roundings of the sums, and of the exponent and the cosine in it, which beta multiplies.
    allowed += np.finfo(np.float32).eps * (6 + 4 * plan.beta) * (1 + size)
    assert np.abs(logits.cpu().numpy() - before.numpy() - truth).max() <= allowed
    return logits


def _eager(parts: DevicePlan, queries: Tensor, half_queries: bool, half_affinities: bool) -> tuple[Tensor, float]:
    """The sums as in the papers, with full affinity and one-hot matrices, and the largest if their signs were equal."""
    keys = parts.keys
    assert keys is not None
    if half_queries:
        queries = queries.to(torch.float16 if keys.dtype == torch.int8 else keys.dtype)
    scales = 1.0 if parts.key_scales is None else parts.key_scales[:, None]
    affinity = torch.exp(-parts.beta * (1.0 - queries.float() @ (keys.float() * scales).T))
    if parts.weights is not None:
        affinity *= parts.weights
    if half_affinities:
        unit = 1.0 if parts.weights is None else float(parts.weights.abs().max())
        affinity = (affinity / unit).half().float() * unit
    values = parts.values
    if values is None:
        assert parts.class_offsets is not None
        classes = torch.arange(parts.n_classes).repeat_interleave(parts.class_offsets.diff().long())
        values = torch.eye(parts.n_classes)[classes]
    return parts.alpha * affinity @ values, abs(parts.alpha) * float((affinity.abs() @ values.abs()).max())


def random_queries(rng: np.random.Generator, batch: int, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor(unit_rows(rng, batch, width)).to(dtype)
