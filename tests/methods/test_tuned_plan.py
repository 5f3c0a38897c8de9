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
from iosr_fast.methods.log_loss import fit_alpha, fit_factor
from iosr_fast.methods.method import MAX_ALPHA
from iosr_fast.methods.support_set import SupportSet, make_support_set
from iosr_fast.methods.tune import one_shot_parameters, tune
from iosr_fast.methods.tuned import Tuned
from iosr_fast.methods.tuning import plan_check
from iosr_fast.methods.tuning.held_out import HeldOutSet
from iosr_fast.methods.tuning.search import cache_intervals, intervals, sweep
from iosr_fast.scoring.fields import RANGES
from iosr_fast.scoring.plan import ScoringPlan
from iosr_fast.scoring.reducers import Reducer
from iosr_fast.scoring.score import score
from tests.conftest import random_embeddings, random_plan, unit_rows
from tests.scoring.numerics import AT_THE_BOUNDS, PATHS, assert_close_to_truth, plan_at_a_bound

pytestmark = pytest.mark.slow

EPS = np.finfo(np.float32).eps
IMAGES = ("random", "same", "same but for rounding", "near", "one a class", "around", "across classes", "orthogonal")


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


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


def right_of_plans(tuned: Tuned, support: SupportSet) -> float:
    """By leave-one-out: the share of images that the plans compiled without them get right."""
    method = METHODS[tuned.method]
    held_out = HeldOutSet.leave_one_out(method, fit_method_reducer(method, tuned.reducer, support), support)
    if not method.needs_support:
        held_out = HeldOutSet.validation(method, None, support, support.embeddings, support.labels)
    right = []
    for rows, plan in held_out.plans(tuned.parameters):
        logits = score(plan.scaled(tuned.factor), held_out.queries[rows])
        assert np.isfinite(logits).all()
        right.append(logits.argmax(1) == held_out.labels[rows])
    return float(np.concatenate(right).mean())


def assert_sound(tuned: Tuned, support: SupportSet) -> None:
    assert tuned.log_loss is None or tuned.log_loss >= 0
    assert 0 <= tuned.parameters.get("alpha", 0.0) <= MAX_ALPHA
    plan = tuned.compile(support)
    logits = score(plan, support.embeddings)
    assert np.isfinite(logits).all() and np.abs(logits).max() < 1e12
    shares = np.exp(logits - logits.max(1, keepdims=True))
    np.testing.assert_allclose((shares / shares.sum(1, keepdims=True)).sum(1), 1.0, rtol=1e-5)
    if tuned.scored and not METHODS[tuned.method].weighted:
        assert tuned.search_accuracy == right_of_plans(tuned, support)


@settings(max_examples=20, deadline=None, derandomize=True, database=None)
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
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if method == "auto":  # of two methods, to be soon done
            assert_sound(tune("auto", replace(support, embeddings=Embeddings(support.embeddings.plain))), support)
        else:
            assert_sound(tune(method, support, reducer=reducer if METHODS[method].reducible else "none"), support)


@pytest.mark.parametrize("method", ["tip-x", "tip-adapter", "ape"])
@pytest.mark.parametrize("seed", range(2))
def test_a_count_of_keys_never_becomes_an_alpha_of_millions(method: str, seed: int) -> None:
    """At beta 0 the slope counts keys, the same in each class: its deviation was noise, and alpha 4e8."""
    rng = np.random.default_rng(seed)
    support = bad_support(rng, [4] * 10, 32, "random", "random")
    tuned = tune(method, support)
    assert_sound(tuned, support)
    assert len(np.unique(score(tuned.compile(support), support.embeddings).argmax(1))) > 1
    base = rng.standard_normal((40, 10)).astype(np.float32) * 10
    for size in (1e-3, 0.1, 1 / 3, 4.0, 1e6):
        slope = np.float32(size) * np.ones_like(base) * (1 + EPS * rng.integers(-8, 9, base.shape)).astype(np.float32)
        fit = fit_alpha(base, slope, support.labels)
        assert fit.alpha == 0 and fit.loss >= 0 and fit == fit_factor(base, slope, support.labels, 0.0)
        best = sweep(intervals(base, slope, support.labels))
        assert best.alpha.max() <= 2 and best.right[0] == (base.argmax(1) == support.labels).sum()


def test_images_that_differ_by_rounding_alone_choose_no_alpha(rng: np.random.Generator) -> None:
    support = bad_support(rng, [5, 5, 5], 64, "same but for rounding", "random")
    base = (100 * support.embeddings.plain @ support.text.T + rng.standard_normal((15, 3))).astype(np.float32)
    keys = support.embeddings.plain
    found = cache_intervals(base, keys, keys, support.class_offsets, support.labels, [0.0, 1.0, 20.0])
    assert (sweep(found).alpha <= 2).all()


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e9])
def test_a_log_loss_is_never_below_zero(size: float, rng: np.random.Generator) -> None:
    labels = rng.integers(0, 4, 50)
    right = np.eye(4, dtype=np.float32)[labels]
    for base in (size * right, np.full((50, 4), size), size + right, np.zeros((50, 4)), size * rng.random((50, 4))):
        for slope in (right, np.full((50, 4), 1e8), 1e-6 * rng.random((50, 4)), 1e8 + right):
            part = [np.asarray(each, np.float32) for each in (base, slope)]
            for fit in (fit_alpha(*part, labels), fit_factor(*part, labels, 1.0), fit_factor(*part, labels, MAX_ALPHA)):
                assert fit.loss >= 0 and 0 <= fit.alpha <= MAX_ALPHA
                assert 0 < fit.factor * max(1, fit.alpha) <= 1.001 * MAX_ALPHA


def test_constant_texts_and_two_classes_leave_one_image_its_weight(rng: np.random.Generator) -> None:
    for counts, texts in (([1, 1], "random"), ([1] * 5, "same")):
        support = bad_support(rng, counts, 16, "random", texts)
        for method in ("tip-adapter", "gda", "ape"):
            assert one_shot_parameters(METHODS[method], support, None)["alpha"] > 0
            plan = compile_method(method, support, **one_shot_parameters(METHODS[method], support, None))
            right = score(plan, support.embeddings).argmax(1) == support.labels
            assert texts == "random" or right.all()


def test_texts_or_images_that_count_for_nothing_are_said(rng: np.random.Generator) -> None:
    misled = bad_support(rng, [5] * 4, 64, "around", "random")
    misled = replace(misled, text=np.roll(misled.embeddings.plain[::5], 1, 0))  # every text is another class's
    assert "the texts have no effect" in tune("tip-adapter", misled).note
    alike = bad_support(rng, [5] * 4, 64, "across classes", "random")
    alike = replace(alike, queries=Embeddings(alike.text[alike.labels], alike.text[alike.labels]))
    assert "similarity to support images has no effect" in tune("tip-adapter", alike).note
    centres = unit_rows(rng, 4, 64)
    both = make_support_set(
        Embeddings(unit(centres[misled.labels] + unit_rows(rng, 20, 64))), misled.labels, centres, 9
    )
    assert tune("tip-adapter", both).note == ""


@pytest.mark.parametrize("method", ["tip-x", "gda", "proker", "zero-shot"])
@pytest.mark.parametrize("held_out", ["support", "validation"])
def test_a_plan_that_does_otherwise_than_the_search_is_an_error(
    method: str, held_out: str, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    support = bad_support(rng, [3] * 4, 32, "around", "random")
    asked = () if held_out == "support" else (support.embeddings, support.labels)
    tune(method, support, *asked)

    plans = HeldOutSet.plans

    def turned(held_out: HeldOutSet, parameters: dict[str, float]) -> object:
        for rows, plan in plans(held_out, parameters):
            yield rows, replace(plan, bias=1e3 * (np.arange(4) == 0), linear=None)

    monkeypatch.setattr(HeldOutSet, "plans", turned)
    with pytest.raises(RuntimeError, match=rf"compiled plan of {method} at .* to agree with the search, got an ac"):
        tune(method, support, *asked)


def test_a_tie_is_no_error_and_counts_as_the_plan_has_it(rng: np.random.Generator) -> None:
    support = bad_support(rng, [3] * 4, 32, "across classes", "none")
    held_out = HeldOutSet.leave_one_out(METHODS["tip-adapter"], None, support)
    parameters = {"alpha": 1.0, "beta": 5.5}
    for found in (np.zeros(12, bool), np.ones(12, bool)):
        right = plan_check.right_by_plan(held_out, parameters, 1.0, found)
        np.testing.assert_array_equal(right, support.labels[held_out.rows] == 0)


@pytest.mark.parametrize("case", AT_THE_BOUNDS, ids=str)
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8"])
def test_implementations_agree_at_the_bounds(case: dict[str, float], precision: str, rng: np.random.Generator) -> None:
    plan = plan_at_a_bound(rng, case, precision)
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
    assert isinstance(plan, ScoringPlan) and plan.keys is not None and not plan.keys.any()
    assert_close_to_truth(PATHS, plan, random_embeddings(rng, 5, 16))
    with pytest.raises(ValueError, match="keys rows of unit norm"):
        replace(plan, reducer=None)
