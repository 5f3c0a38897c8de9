"""What was tuned is what the compiled plan does, on support sets as bad as they come; no constant beyond float32."""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.head.method_config import MethodConfig
from iosr_fast.methods import METHODS, compile_method, fit_method_reducer, unavailable_reason
from iosr_fast.methods.log_loss import MAX_ALPHA
from iosr_fast.methods.out_of_fold import out_of_fold
from iosr_fast.methods.support_set import SupportSet, make_support_set
from iosr_fast.methods.tune import tune
from iosr_fast.methods.tuned import Tuned
from iosr_fast.scoring.fields import RANGES
from iosr_fast.scoring.reducers import Reducer
from iosr_fast.scoring.score import score
from tests.conftest import random_embeddings, random_plan, unit_rows
from tests.methods.support_sets import unit
from tests.scoring.numerics import AT_THE_BOUNDS, PATHS, assert_close_to_truth, plan_at_a_bound

EPS = np.finfo(np.float32).eps
IMAGES = ("random", "same", "same but for rounding", "near", "one a class", "around", "across classes", "orthogonal")


def bad_support(
    rng: np.random.Generator, counts: list[int], width: int, images: str, texts: str, tau: float = 100.0
) -> SupportSet:
    labels = np.repeat(np.arange(len(counts)), counts)
    one = np.repeat(unit_rows(rng, 1, width), len(labels), 0)
    noise = rng.standard_normal(one.shape)
    rows = {
        "random": unit_rows(rng, len(labels), width),
        "same": one,
        "same but for rounding": unit(one + EPS * noise),
        "near": unit(one + 1e-3 * noise),
        "one a class": unit_rows(rng, len(counts), width)[labels],
        "around": unit(unit_rows(rng, len(counts), width)[labels] + 0.5 * unit(noise)),
        "across classes": unit_rows(rng, max(counts), width)[np.concatenate([np.arange(n) for n in counts])],
        "orthogonal": np.eye(width, dtype=np.float32)[np.arange(len(labels)) % width],
    }[images]
    text = None if texts == "none" else unit_rows(rng, 1 if texts == "same" else len(counts), width)
    text = text if text is None else np.repeat(text, len(counts) // len(text), 0)
    return make_support_set(Embeddings(rows, rows[::-1].copy()), labels, text, tau, len(counts))


def assert_sound(tuned: Tuned, support: SupportSet) -> None:
    """The numbers are finite, and those of the out-of-fold logits at the parameters of the compiled plan."""
    assert tuned.log_loss is None or np.isnan(tuned.log_loss) or tuned.log_loss >= 0
    assert 0 <= tuned.parameters.get("alpha", 0.0) <= MAX_ALPHA
    plan, method = tuned.compile(support), METHODS[tuned.method]
    logits = score(plan, support.embeddings)
    assert np.isfinite(logits).all() and np.abs(logits).max() < 1e12
    if (found := tuned.out_of_fold) is None:
        return
    reducer = fit_method_reducer(method, tuned.reducer, support)
    again = out_of_fold(method, support, reducer, tuned.parameters, tuned.factor)
    assert np.isfinite(found.logits).all()
    np.testing.assert_allclose(found.logits, again.logits, rtol=1e-3, atol=1e-4 * np.abs(again.logits).max(initial=0))
    if method.is_stack:  # its accuracy is that of the stack that left-out images judge, at few images another one
        return
    right = found.logits.argmax(1) == found.labels
    top = np.sort(found.logits, axis=1)[:, -2:]
    ties = int((np.ptp(top, axis=1) <= 1e-4 * np.abs(found.logits).max()).sum())
    assert abs(tuned.search_accuracy * len(right) - right.sum()) <= ties + 1e-6


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    method=st.sampled_from([*METHODS, "auto"]),
    reducer=st.sampled_from(["none", "none", "centre", "pca"]),
    counts=st.lists(st.integers(1, 4), min_size=2, max_size=4),
    width=st.sampled_from([3, 16]),
    images=st.sampled_from(IMAGES),
    texts=st.sampled_from(["random", "same", "none"]),
    tau=st.sampled_from([0.0, 1e-6, 1.0, 100.0, 1e6]),
    seed=st.integers(0, 99),
)
def test_what_was_tuned_is_what_the_plan_does(
    method: str, reducer: str, counts: list[int], width: int, images: str, texts: str, tau: float, seed: int
) -> None:
    support = bad_support(np.random.default_rng(seed), counts, width, images, texts, tau)
    if method != "auto" and unavailable_reason(method, support):
        return
    takes_reducer = method != "auto" and METHODS[method].takes_reducer
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_sound(tune(method, support, reducer=reducer if takes_reducer else "none"), support)


@pytest.mark.parametrize("method", ["tip-x", "tip-adapter", "ape"])
@pytest.mark.parametrize("seed", range(2))
def test_a_count_of_keys_never_becomes_an_alpha_of_millions(method: str, seed: int) -> None:
    """At beta 0 the images' term counts keys, the same in each class: its deviation is rounding."""
    support = bad_support(np.random.default_rng(seed), [4] * 10, 32, "random", "random")
    tuned = tune(method, support)
    assert_sound(tuned, support)
    assert len(np.unique(score(tuned.compile(support), support.embeddings).argmax(1))) > 1


@pytest.mark.parametrize("case", AT_THE_BOUNDS, ids=str)
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8"])
def test_implementations_agree_at_the_bounds(case: dict[str, float], precision: str, rng: np.random.Generator) -> None:
    plan = plan_at_a_bound(rng, case, precision)  # type: ignore[arg-type]
    near = replace(random_embeddings(rng, 9, 40), adapted=unit(plan.dequantize()[:7][[0, 1, 2, 3, 4, 5, 6, 0, 1]]))
    for embeddings in (random_embeddings(rng, 30, 40), near):
        for path in PATHS:
            assert np.isfinite(score(plan, embeddings, path.partition("/")[0])).all()
        assert_close_to_truth(PATHS, plan, embeddings)


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


@pytest.mark.parametrize("method", METHODS)
def test_a_parameter_out_of_range_is_named(method: str, rng: np.random.Generator) -> None:
    support = bad_support(rng, [3] * 3, 16, "random", "random")
    for name in METHODS[method].parameters:
        for value in (-1.0, 1e9, 1e39, float("inf"), float("nan")):
            with pytest.raises(ValueError, match=rf"expected {name} of .* from .* to .*, got .*; .* is the default"):
                compile_method(method, support, **{name: value})


@pytest.mark.parametrize("wrong", [1e39, float("nan"), float("inf"), -1.0])
def test_a_config_from_a_file_or_a_log_is_held_to_the_same_ranges(wrong: float, rng: np.random.Generator) -> None:
    support = bad_support(rng, [3] * 3, 16, "random", "random")
    config = MethodConfig("tip-adapter", {"alpha": 1.0, "beta": 5.5})
    for changed in ({"alpha": wrong, "beta": 5.5}, {"alpha": 1.0, "beta": wrong}):
        with pytest.raises(ValueError, match=r"expected (alpha|beta) of tip-adapter from 0 to"):
            replace(config, parameters=changed).compile(support)
    with pytest.raises(ValueError, match="expected a factor above 0"):
        replace(config, factor=wrong).compile(support)
    with pytest.raises(ValueError, match="expected tau from"):
        config.compile(replace(support, tau=wrong))


def test_reducers_that_would_overflow_are_refused() -> None:
    for parts in ({"shift": np.full(4, 1e3)}, {"projection": 1e20 * np.eye(4)}, {"shift": np.full(4, 1e39)}):
        with pytest.raises(ValueError, match=r"expected (shift|projection) (of magnitudes up to|to be finite)"):
            Reducer(**parts)


def test_a_plan_of_equal_images_has_zero_keys_when_they_are_centred(rng: np.random.Generator) -> None:
    support = bad_support(rng, [2, 2], 16, "same", "random")
    plan = compile_method("tip-adapter", support, reducer="centre")
    assert plan.keys is not None and not plan.keys.any()
    assert_close_to_truth(PATHS, plan, random_embeddings(rng, 5, 16))
    with pytest.raises(ValueError, match="keys rows of unit norm"):
        replace(plan, reducer=None)
