"""Invalid plans and embeddings are refused; a plan keeps its arrays without copies if possible."""

from __future__ import annotations

import tracemalloc
import warnings
from dataclasses import replace

import numpy as np
import pytest

from iosr_fast.scoring.fields import RANGES
from iosr_fast.scoring.plan import ScoringPlan
from iosr_fast.scoring.reducers import Reducer
from iosr_fast.scoring.score import score
from tests.conftest import EXTENDED, random_embeddings, random_plan, unit_rows
from tests.scoring.numerics import CPP_PATHS, assert_close_to_truth


def good_parts(rng: np.random.Generator) -> dict[str, object]:
    return {
        "n_classes": 3,
        "text": unit_rows(rng, 3, 8),
        "keys": unit_rows(rng, 5, 8),
        "class_offsets": np.array([0, 2, 2, 5]),
        "weights": np.ones(5),
        "linear": np.ones((3, 8)),
        "bias": np.zeros(3),
    }


NAN = np.full((5, 8), np.nan)
DENSE = {"class_offsets": None}
CODES = 127 * np.eye(8, dtype=np.int8)[:5]
BAD_PLANS = {
    "no class": ({"n_classes": 0}, "n_classes >= 1"),
    "no term": ({"text": None, "keys": None, "class_offsets": None, "weights": None, "linear": None}, "at least one"),
    "text of another class count": ({"text": np.eye(8)[:2]}, r"text of shape \(3, 8\), got \(2, 8\)"),
    "text of another width": ({"text": np.eye(9)[:3]}, "one width"),
    "keys unnormalised": ({"keys": 2 * np.eye(8)[:5]}, "keys rows of unit norm.*row 0 has norm 2.*divide"),
    "text unnormalised": ({"text": np.ones((3, 8))}, "text rows of unit norm"),
    "keys NaN": ({"keys": NAN}, "keys rows of unit norm, got 5 of 5.*NaN or infinite"),
    "keys one-dimensional": ({"keys": np.ones(5)}, r"keys of shape \(5, 8\), got \(5,\)"),
    "no keys": ({"keys": np.zeros((0, 8)), "class_offsets": np.zeros(4, int), "weights": None}, "at least one key"),
    "keys without offsets": ({"class_offsets": None}, "keys together with class_offsets or values"),
    "weights alone": ({"keys": None, "class_offsets": None}, "weights"),
    "weights of another length": ({"weights": np.ones(4)}, r"weights of shape \(5,\), got \(4,\)"),
    "offsets of another length": ({"class_offsets": np.array([0, 2, 5])}, r"class_offsets of shape \(4,\)"),
    "offsets that end early": ({"class_offsets": np.array([0, 2, 2, 4])}, "rise from 0 to the number of keys, 5"),
    "offsets that fall": ({"class_offsets": np.array([0, 4, 2, 5])}, "fall between"),
    "offsets of floats": ({"class_offsets": np.array([0.0, 2.0, 2.0, 5.0])}, "integers"),
    "beta negative": ({"beta": -1.0}, "beta from 0 to 1000, got -1"),
    "unknown query": ({"query": "both"}, '"plain" or "adapted"'),
    "query of a feature": ({"query": "text-distribution"}, '"plain" or "adapted", got .text-distribution'),
    "unknown feature": ({"feature": "all"}, '"plain", "adapted", "both" or "text-distribution", got .all'),
    "int8 keys without scales": ({"keys": CODES}, r"key_scales with int8 keys, got none; plan.with_key_precision"),
    "scales of another length": ({"keys": CODES, "key_scales": np.ones(4)}, r"key_scales of shape \(5,\), got \(4,\)"),
    "scales of zero": ({"keys": CODES, "key_scales": np.zeros(5)}, "key_scales > 0, got 0"),
    "scales NaN": ({"keys": CODES, "key_scales": np.full(5, np.nan)}, "key_scales to be finite"),
    "scales with float keys": ({"key_scales": np.ones(5)}, "key_scales with int8 keys only, got fp32 keys"),
    "int8 keys unnormalised": ({"keys": CODES, "key_scales": np.ones(5)}, "keys rows of unit norm.*norm 127"),
    "float16 keys infinite": ({"keys": np.full((5, 8), np.inf, np.float16)}, "NaN or infinite"),
    "bfloat16 keys NaN": ({"keys": np.full((5, 8), 0x7FC0, np.uint16)}, "NaN or infinite"),
    "bias of another length": ({"bias": np.zeros(2)}, r"bias of shape \(3,\), got \(2,\)"),
    "offsets and values": ({"values": np.ones((5, 3))}, "keys with class_offsets or with values, got both"),
    "values of other classes": (DENSE | {"values": np.ones((5, 2))}, r"values of shape \(5, 3\), got \(5, 2\)"),
    "values of other keys": (DENSE | {"values": np.ones((4, 3))}, r"values of shape \(5, 3\), got \(4, 3\)"),
    "values one-dimensional": (DENSE | {"values": np.ones(5)}, r"values of shape \(5, 3\), got \(5,\)"),
    "values without keys": (
        DENSE | {"keys": None, "weights": None, "values": np.zeros((0, 3))},
        "keys together with class_offsets or values, got one without the other",
    ),
    "reducer of another width": ({"reducer": Reducer(np.zeros(9))}, "a reducer of 8 channels, got one of 9"),
    "projection of another width": ({"reducer": Reducer(None, np.eye(7))}, "a reducer of 8 channels, got one of 7"),
    "linear over embeddings alone": ({"feature": "text-distribution"}, r"linear of shape \(3, 4\), got \(3, 8\)"),
    "linear over one embedding of two": ({"feature": "both"}, r"linear of shape \(3, 16\), got \(3, 8\)"),
    "linear over half a channel": (
        {"feature": "both", "linear": np.ones((3, 5)), **dict.fromkeys(("text", "keys", "class_offsets", "weights"))},
        r"linear of shape \(3, 4\), got \(3, 5\)",
    ),
    "linear over both, one-dimensional": ({"feature": "both", "linear": np.ones(16)}, r"\(3, 16\), got \(16,\)"),
    "linear over texts alone": ({"linear": np.ones((3, 4))}, "one width, got .*'linear': 4"),
    "a distribution over no texts": (
        {"text": None, "linear": np.ones((3, 4)), "feature": "text-distribution"},
        'expected text with feature "text-distribution", got none',
    ),
}

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


@pytest.mark.parametrize("case", BAD_PLANS)
def test_a_wrong_plan_is_refused(case: str, rng: np.random.Generator) -> None:
    change, message = BAD_PLANS[case]
    ScoringPlan(**good_parts(rng))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        ScoringPlan(**{**good_parts(rng), **change})  # type: ignore[arg-type]


def test_a_plan_is_a_frozen_copy(rng: np.random.Generator) -> None:
    keys = unit_rows(rng, 5, 8)
    plan = ScoringPlan(3, keys=keys, class_offsets=np.array([0, 2, 2, 5], dtype=np.int32))
    original = keys.copy()
    keys[:] = 0
    np.testing.assert_array_equal(plan.keys, original)
    assert plan.class_offsets.dtype == np.int64 and not plan.keys.flags.writeable
    assert replace(plan, alpha=2.0).keys is plan.keys
    values = np.ones((5, 3))
    dense = replace(plan, class_offsets=None, values=values)
    values[:] = 0
    assert dense.values.dtype == np.float32 and dense.values.all() and not dense.values.flags.writeable


def test_a_reducer_or_values_leave_the_rest_of_a_plan_alone(rng: np.random.Generator) -> None:
    plan = random_plan(rng, [2, 0, 3], 8, dense=True, reducer="projection", feature="text-distribution")
    for precision in ("fp16", "bf16", "int8", "fp32"):
        stored = plan.with_key_precision(precision)
        assert stored.key_precision == precision and stored.width == 8 and stored.needs_adapted
        assert stored.reducer is plan.reducer and stored.linear is plan.linear
    # Neither a reducer nor a distribution over texts is a reason to encode by the adapter.
    assert not replace(plan, query="plain").needs_adapted
    assert random_plan(rng, [1, 1], 8, ("linear",), reducer="centre", feature="adapted").needs_adapted


@pytest.mark.parametrize("name", EXTENDED)
@pytest.mark.parametrize("factor", [0.01, 3.0])
def test_a_scaled_plan_has_scaled_logits(name: str, factor: float, rng: np.random.Generator) -> None:
    plan, embeddings = random_plan(rng, [2, 0, 3, 1], 17, **EXTENDED[name]), random_embeddings(rng, 33, 17)
    logits, scaled = score(plan, embeddings), score(plan.scaled(factor), embeddings)
    np.testing.assert_allclose(scaled, factor * logits, rtol=1e-5, atol=1e-4 * factor)
    np.testing.assert_array_equal(scaled.argmax(1), logits.argmax(1))
    assert_close_to_truth(CPP_PATHS[0], plan.scaled(factor), embeddings)


def test_a_plan_is_scaled_by_a_positive_number_only(rng: np.random.Generator) -> None:
    plan = random_plan(rng, [2, 1], 8)
    for factor in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="expected a factor above 0"):
            plan.scaled(factor)
    assert plan.scaled(2.0).keys is plan.keys and plan.scaled(2.0).weights is plan.weights


def test_read_only_keys_of_each_precision_are_kept_without_a_copy(rng: np.random.Generator) -> None:
    plan = ScoringPlan(3, keys=unit_rows(rng, 5, 8), class_offsets=np.array([0, 2, 2, 5]))
    for precision in ("fp32", "fp16", "bf16", "int8"):
        keys = plan.with_key_precision(precision).keys
        scales = plan.with_key_precision(precision).key_scales
        again = ScoringPlan(3, keys=keys, key_scales=scales, class_offsets=np.array([0, 2, 2, 5]))
        assert again.keys is keys and again.key_precision == precision
        assert np.shares_memory(ScoringPlan(3, keys=keys[:], key_scales=scales, class_offsets=[0, 2, 2, 5]).keys, keys)


def test_keys_of_other_dtypes_become_float32(rng: np.random.Generator) -> None:
    for keys in (unit_rows(rng, 5, 8).astype(np.float64), np.eye(8)[:5].astype(np.int64), np.eye(8)[:5].tolist()):
        assert ScoringPlan(1, keys=keys, class_offsets=[0, 5]).keys.dtype == np.float32
    assert ScoringPlan(1, text=np.eye(8)[:1]).key_precision is None


def test_checking_many_keys_takes_little_memory(rng: np.random.Generator) -> None:
    n_keys, width = 40_000, 256  # 41 MB as float32
    keys = unit_rows(rng, n_keys, width)
    keys.flags.writeable = False
    codes, scales = (127 * np.eye(256, dtype=np.int8))[rng.integers(0, 256, n_keys)], np.full(n_keys, 1 / 127)
    codes.flags.writeable = False
    offsets = np.array([0, n_keys])
    for arrays in ({"keys": keys}, {"keys": codes, "key_scales": scales}):
        tracemalloc.start()
        try:
            plan = ScoringPlan(1, class_offsets=offsets, **arrays)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert plan.keys is arrays["keys"]
        assert peak < 16e6


@pytest.mark.parametrize("name", BEYOND)
def test_what_float32_cannot_hold_is_refused(name: str, rng: np.random.Generator) -> None:
    feature = "text-distribution" if name == "temperature" else "plain"
    plan = random_plan(rng, [3, 0, 4], 40, feature=feature, dense=name == "values", precision="int8")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for value in BEYOND[name]:
            wrong = value if name in RANGES else np.full(getattr(plan, name).shape, value)
            with pytest.raises(ValueError, match=f"expected .*{name}.*got|alpha times all weights and values"):
                replace(plan, **{name: wrong})
        with pytest.raises(ValueError, match=r"expected tau from 0 to 1e\+15, got 1e\+16"):
            plan.scaled(1e14)
