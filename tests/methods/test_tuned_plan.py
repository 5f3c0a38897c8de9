"""What was tuned is what the compiled plan does, on support sets as bad as they come; no constant beyond float32."""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.methods import METHODS
from iosr_fast.methods.config import Config
from iosr_fast.methods.folds import make_folds
from iosr_fast.methods.log_loss import MAX_ALPHA
from iosr_fast.methods.out_of_fold import HeldOut
from iosr_fast.methods.support_set import SupportSet, make_support_set
from iosr_fast.methods.tune import tune
from iosr_fast.scoring.reducers import Reducer
from iosr_fast.scoring.score import score
from tests.conftest import unit_rows
from tests.methods.support_sets import unit

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


def right_of_plans(tuned: Config, support: SupportSet, reducer: Reducer | None) -> tuple[int, int]:
    """How many left-out images the plans compiled without their fold get right, and how many nearly tie."""
    method, right, ties = METHODS[tuned.method], 0, 0
    for rows, out in make_folds(support).splits:
        logits = score(method.compile(support.only(~out), reducer, tuned.parameters), support.as_queries[rows])
        right += int((logits.argmax(1) == support.labels[rows]).sum())
        ties += int((np.ptp(np.sort(logits, axis=1)[:, -2:], axis=1) <= 1e-4 * np.abs(logits).max()).sum())
    return right, ties


def assert_sound(tuned: Config, support: SupportSet) -> None:
    """All numbers are finite; left-out images are right where they are by the plans compiled without them."""
    if tuned.evidence is None:
        return
    assert tuned.evidence.log_loss is None or tuned.evidence.log_loss >= 0
    assert 0 <= tuned.parameters.get("alpha", 0.0) <= MAX_ALPHA
    logits, method = score(tuned.compile(support), support.embeddings), METHODS[tuned.method]
    assert np.isfinite(logits).all() and np.abs(logits).max() < 1e12
    if tuned.evidence.protocol != "loo" or not method.needs_support:
        return
    # A regression keeps the weights of classes without a fold.
    if not (method.is_stack or method.max_support):
        reducer, held_out = tuned.fit_reducer(support), HeldOut.of_support(support, make_folds(support))
        terms = method.terms(support, reducer, tuned.parameters)
        left_out = np.sum([weight * held_out.left_out(model) for weight, model in terms], axis=0)
        right, ties = right_of_plans(tuned, support, reducer)
        assert abs((left_out.argmax(1) == held_out.labels).sum() - right) <= ties


@pytest.mark.slow
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
    takes_reducer = method != "auto" and METHODS[method].takes_reducer
    asked = Config(method=method, reducer=reducer if takes_reducer else "none")
    if asked.unavailable_reason(support):
        return
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_sound(tune(asked, support)[0], support)


@pytest.mark.parametrize("wrong", [-1.0, 1e9, 1e39, float("inf"), float("nan")])
def test_no_parameter_of_a_call_a_file_or_a_log_is_out_of_range(wrong: float, rng: np.random.Generator) -> None:
    support = bad_support(rng, [3] * 3, 16, "random", "random")
    for name, method in METHODS.items():
        for parameter in method.parameters:
            config = Config(method=name, parameters={**method.parameters, parameter: wrong})
            with pytest.raises(ValueError, match=rf"expected {parameter} of .* from .* to .*; .* is the default"):
                config.compile(support)
    if not 0 < wrong < 1e15:
        config = Config(method="tip-adapter", parameters={"alpha": 1.0, "beta": 5.5})
        with pytest.raises(ValueError, match="expected a factor above 0"):
            structs.replace(config, factor=wrong).compile(support)
        with pytest.raises(ValueError, match="expected tau from"):
            config.compile(replace(support, tau=wrong))
