"""Constants at the bounds of float32: every path agrees at them, and a plan refuses what lies beyond."""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np
import pytest

from iosr_fast.scoring.fields import RANGES
from iosr_fast.scoring.reducers import Reducer
from iosr_fast.scoring.score import score
from tests.conftest import random_embeddings, random_plan
from tests.scoring.numerics import AT_THE_BOUNDS, PATHS, assert_close_to_truth, plan_at_a_bound

BEYOND = {
    "tau": (1e16, 1e39, -1.0, float("inf"), float("nan")),
    "alpha": (1e16, 1e39, -1e39, float("-inf"), float("nan")),
    "beta": (1001.0, 1e38, -1e-3, float("inf"), float("nan")),
    "temperature": (1e-3, 0.0, 1e3, float("nan")),
    "linear": (1e16, 1e39, -1e39, float("nan")),
    "bias": (1e16, 1e39, float("inf")),
    "weights": (1e15, 1e30, 1e39, float("nan")),
    "values": (1e15, 1e30, 1e39, float("nan")),
    "key_scales": (1e4,),
    "query_transform": (1e4, float("nan")),
}


@pytest.mark.parametrize("case", AT_THE_BOUNDS, ids=str)
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8"])
def test_implementations_agree_at_the_bounds(case: dict[str, float], precision: str, rng: np.random.Generator) -> None:
    plan = plan_at_a_bound(rng, case, precision)  # type: ignore[arg-type]
    near = plan.dequantize()[:7][[0, 1, 2, 3, 4, 5, 6, 0, 1]]
    near /= np.linalg.norm(near, axis=1, keepdims=True)
    for embeddings in (random_embeddings(rng, 30, 40), replace(random_embeddings(rng, 9, 40), adapted=near)):
        for path in PATHS:
            assert np.isfinite(score(plan, embeddings, path.partition("/")[0])).all()
        assert_close_to_truth(PATHS, plan, embeddings)


@pytest.mark.parametrize("name", BEYOND)
def test_what_float32_can_not_hold_is_refused(name: str, rng: np.random.Generator) -> None:
    feature = "text-distribution" if name == "temperature" else "plain"
    plan = random_plan(rng, [3, 0, 4], 40, feature=feature, dense=name == "values", precision="int8")
    plan = replace(plan, query_transform=np.eye(40, dtype=np.float32)) if plan.query_transform is None else plan
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for value in BEYOND[name]:
            wrong = value if name in RANGES else np.full(getattr(plan, name).shape, value)
            with pytest.raises(ValueError, match=f"expected .*{name}.*got|alpha times all weights and values"):
                replace(plan, **{name: wrong})
        for factor in (0.0, 1e16, 1e39, float("nan")):
            with pytest.raises(ValueError, match="expected a factor"):
                plan.scaled(factor)
        with pytest.raises(ValueError, match=r"expected tau from 0 to 1e\+15, got 1e\+16"):
            plan.scaled(1e14)


def test_reducers_that_would_overflow_are_refused() -> None:
    for parts in ({"shift": np.full(4, 1e3)}, {"projection": 1e20 * np.eye(4)}, {"shift": np.full(4, 1e39)}):
        with pytest.raises(ValueError, match=r"expected (shift|projection) (of magnitudes up to|to be finite)"):
            Reducer(**parts)
