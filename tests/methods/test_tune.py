"""Tuning: exact on a validation set, honest by leave-one-out, and every choice of auto."""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np
import pytest

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.methods import METHODS, compile_method
from iosr_fast.methods.log_loss import fit_alpha, fit_factor
from iosr_fast.methods.support_set import SupportSet, make_support_set
from iosr_fast.methods.tune import one_shot_parameters, tune
from iosr_fast.methods.tuning.held_out import HeldOutSet
from iosr_fast.methods.tuning.parameter_search import is_level
from iosr_fast.scoring.reducers import fit_reducer
from iosr_fast.scoring.reference import score_reference
from iosr_fast.scoring.score import score
from tests.conftest import unit_rows

pytestmark = pytest.mark.slow

CLASSES, WIDTH = 7, 24


def around(rng: np.random.Generator, centres: np.ndarray, labels: np.ndarray, noise: float) -> np.ndarray:
    rows = centres[labels] + noise * unit_rows(rng, len(labels), centres.shape[1])
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def task(
    rng: np.random.Generator, counts: list[int] | None = None, queries: int = 90, text: bool = True
) -> tuple[SupportSet, Embeddings, np.ndarray]:
    """A support set of clustered embeddings (adapted ones closer together), and labelled queries."""
    centres, texts = unit_rows(rng, CLASSES, WIDTH), unit_rows(rng, CLASSES, WIDTH)
    labels = np.repeat(np.arange(CLASSES), counts or [4] * CLASSES)
    asked = rng.integers(0, CLASSES, queries)

    def embed(ids: np.ndarray) -> Embeddings:
        return Embeddings(around(rng, centres, ids, 1.5), around(rng, centres, ids, 0.8))

    names = around(rng, texts + 0.5 * centres, np.arange(CLASSES), 0.0) if text else None
    return make_support_set(embed(labels), labels, names, 30.0, CLASSES), embed(asked), asked


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if not method.weighted])
def test_on_a_validation_set_the_accuracy_is_what_the_plan_gets(rng: np.random.Generator, method: str) -> None:
    support, queries, labels = task(rng)
    tuned = tune(method, support, queries, labels)
    right = score(tuned.compile(support), queries).argmax(1) == labels
    assert tuned.protocol == "validation" and tuned.scored == len(labels)
    assert abs(tuned.search_accuracy - right.mean()) <= 1 / len(labels)  # a sample on the border of float32
    assert set(tuned.parameters) == set(METHODS[method].parameters)
    np.testing.assert_allclose(tuned.right.mean() if tuned.right is not None else -1, tuned.accuracy)
    if tuned.alpha_range is not None:
        low, high = tuned.alpha_range
        assert low <= tuned.parameters["alpha"] <= high


@pytest.mark.parametrize("method", ["tip-adapter", "tip-adapter++", "tip-x"])
def test_never_below_the_public_grid(rng: np.random.Generator, method: str) -> None:
    """200 alphas and 20 betas from 0 to 20 (and, for Tip-X, gammas from 0 to 30), as the paper's code tries them."""
    support, queries, labels = task(rng, queries=60)
    best = 0.0
    gammas = np.linspace(0, 30, 50)[::12] if method == "tip-x" else [None]
    for beta in np.linspace(0, 20, 20):
        for gamma in gammas:
            setting = {"beta": beta} if gamma is None else {"beta": beta, "gamma": gamma}
            base = score_reference(compile_method(method, support, alpha=0.0, **setting), queries)
            slope = score_reference(compile_method(method, support, alpha=1.0, **setting), queries) - base
            for alpha in np.linspace(0, 20, 200):
                best = max(best, float(((base + alpha * slope).argmax(1) == labels).mean()))
    assert tune(method, support, queries, labels).search_accuracy >= best - 1e-12


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.reducible])
def test_leave_one_out_scores_what_was_fit_without_the_image(rng: np.random.Generator, method: str) -> None:
    support, _, _ = task(rng, [3, 1, 4, 2, 3, 3, 2])
    reducer = fit_reducer("centre", support.embeddings.plain)
    held_out = HeldOutSet.leave_one_out(METHODS[method], reducer, support)
    assert len(held_out.rows) == len(support.labels) - 1  # the only image of a class is not left out
    setting = {name: values[1] for name, values in METHODS[method].axes.items()}
    base, slope = held_out.logits(setting)
    alpha, right = 2.5, []
    for at, j in enumerate(held_out.rows):
        assert held_out.folds is not None
        without = support.without(held_out.folds == held_out.folds[j])
        plan = compile_method(method, without, reducer=reducer, alpha=alpha, **setting)
        expected = score_reference(plan, held_out.queries[np.array([j])])[0]
        assert np.abs(base[at] + alpha * slope[at] - expected).max() < 2e-4 * np.abs(expected).max()
        right.append(expected.argmax() == support.labels[j])
    intervals = held_out.intervals([setting])
    inside = (intervals.lower[0] <= alpha) & (alpha <= intervals.upper[0]) & (intervals.flags[0] & 4 == 0)
    assert (inside != np.array(right)).sum() <= 1


def test_folds_leave_one_image_of_each_class_out() -> None:
    labels = np.repeat(np.arange(4), [3, 1, 2, 40])
    rows = unit_rows(np.random.default_rng(0), len(labels), 8)
    support = make_support_set(Embeddings(rows), labels, None, 1.0, 4)
    held_out = HeldOutSet.leave_one_out(METHODS["tip-adapter"], None, support)
    folds = held_out.folds
    assert folds is not None
    assert folds[:6].tolist() == [0, 1, 2, -1, 0, 1]
    assert set(folds[6:]) == set(range(16)) and np.bincount(folds[6:]).max() == 3
    asked = replace(support, queries=Embeddings(rows[::-1].copy()))
    queries = HeldOutSet.leave_one_out(METHODS["tip-adapter"], None, asked).queries
    np.testing.assert_array_equal(queries.plain, rows[::-1])


def test_all_classes_are_equally_short_of_keys(rng: np.random.Generator) -> None:
    """At beta 0 every affinity is 1, so the slope only counts keys: it must not give the left-out class away."""
    rows = unit_rows(rng, 30, WIDTH)
    support = make_support_set(Embeddings(rows), np.repeat(np.arange(3), 10), None, 1.0, 3)
    slope = HeldOutSet.leave_one_out(METHODS["tip-adapter"], None, support).logits({"beta": 0.0})[1]
    assert np.ptp(slope) == 0


def test_bad_requests_are_named(rng: np.random.Generator) -> None:
    support, queries, labels = task(rng)
    for said, call in {
        "expected a method of auto, zero-shot": lambda: tune("tipx", support),
        "a reducer of none, centre, pca": lambda: tune("gda", support, reducer="lda"),
        "labels of shape": lambda: tune("gda", support, queries, labels[:-1]),
        r"labels in 0\.\.6": lambda: tune("gda", support, queries, labels + 1),
        "no text embeddings": lambda: tune("ape", replace(support, text=None)),
        "needs an encoder with an adapter": lambda: tune(
            "gda++", replace(support, embeddings=Embeddings(support.embeddings.plain))
        ),
        "at least one image of each class": lambda: tune("gda", support.only(support.labels > 0)),
    }.items():
        with pytest.raises(ValueError, match=said):
            call()


def test_log_loss_is_the_least_of_a_fine_grid(rng: np.random.Generator) -> None:
    labels = rng.integers(0, 5, 80)
    base, slope = rng.standard_normal((80, 5)), rng.standard_normal((80, 5))
    base[np.arange(80), labels] += 0.8
    slope[np.arange(80), labels] += 1.5
    base, slope = (100 * base).astype(np.float32), (0.01 * slope).astype(np.float32)

    def loss(factor: float, alpha: float) -> float:
        logits = factor * (base + alpha * slope.astype(float))
        logits -= np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1, keepdims=True)) + logits.max(1)[:, None]
        return float(-logits[np.arange(80), labels].mean())

    fit = fit_alpha(base, slope, labels)
    assert fit.loss == pytest.approx(loss(fit.factor, fit.alpha), rel=2e-3)
    grid = [loss(fit.factor * f, fit.alpha * a) for f in np.linspace(0.5, 2, 31) for a in np.linspace(0.5, 2, 31)]
    assert fit.loss <= min(grid) + 1e-3
    given = fit_factor(base, slope, labels, 3 * fit.alpha)
    assert given.alpha == 3 * fit.alpha and given.loss > fit.loss
    assert given.loss <= min(loss(given.factor * f, given.alpha) for f in np.linspace(0.5, 2, 61)) + 1e-3


def test_level_means_within_two_standard_errors_of_the_difference() -> None:
    best, other = np.ones(100, bool), np.ones(100, bool)
    other[:4] = False
    assert is_level(other, best)  # 4 lost, 2 * sqrt(4) = 4
    other[4] = False
    assert not is_level(other, best)
    best[50:60] = False
    assert is_level(other, best) and is_level(best, best)


@pytest.mark.parametrize("text", [True, False])
def test_auto_finds_what_is_far_better(rng: np.random.Generator, text: bool) -> None:
    support, queries, labels = task(rng, [5] * CLASSES, 300, text)
    tuned = tune("auto", support)
    assert tuned.protocol == "loo" and tuned.scored == 5 * CLASSES
    assert tuned.method.endswith("++")  # adapted embeddings are far closer to their centres
    accuracy = float((score(tuned.compile(support), queries).argmax(1) == labels).mean())
    others = [tune(name, support, queries, labels) for name in ("tip-adapter", "gda", "gda++", "tip-adapter++")]
    assert accuracy >= max(other.accuracy for other in others) - 0.05
    assert text or tune("auto", support).parameters == tuned.parameters


def test_auto_on_a_validation_set_takes_the_level_method_that_is_preferred(rng: np.random.Generator) -> None:
    support, queries, labels = task(rng, queries=60)
    tuned = tune("auto", support, queries, labels)
    assert tuned.protocol == "validation"
    best = max(tune(name, support, queries, labels).accuracy for name in METHODS)
    assert tuned.accuracy >= best - 2 / np.sqrt(len(labels))


def test_auto_with_one_image_a_class(rng: np.random.Generator) -> None:
    support, queries, labels = task(rng, [1] * CLASSES)
    tuned = tune("auto", support)
    assert (tuned.method, tuned.reducer, tuned.protocol, tuned.scored) == ("stack++", "none", "one-shot", 0)
    assert (score(tuned.compile(support), queries).argmax(1) == labels).mean() > 1.5 / CLASSES
    plain = tune("auto", replace(support, embeddings=Embeddings(support.embeddings.plain)))
    assert plain.method == "stack"
    nothing = support.only(np.zeros(CLASSES, bool))
    assert tune("auto", nothing).method == "zero-shot"
    with pytest.raises(ValueError, match="support images or text embeddings"):
        tune("auto", replace(nothing, text=None))


def test_auto_goes_without_what_is_missing(rng: np.random.Generator, caplog: pytest.LogCaptureFixture) -> None:
    support, _, _ = task(rng, [3] * CLASSES)
    support = replace(support, text=None, embeddings=Embeddings(support.embeddings.plain))
    with caplog.at_level(logging.INFO, "iosr_fast"):
        tuned = tune("auto", support)
    assert not tuned.method.endswith("++") and tuned.shares["text"] == 0
    assert "auto: stack: " in caplog.text and "on 21 images" in caplog.text


def test_one_shot_weighs_images_by_how_wrong_texts_are(rng: np.random.Generator) -> None:
    support, _, _ = task(rng, [1] * CLASSES)
    names = support.text
    assert names is not None
    trusted = replace(support, text=support.embeddings.plain)  # every text is right
    alphas = [one_shot_parameters(METHODS["tip-adapter"], s, None)["alpha"] for s in (trusted, support)]
    assert alphas[0] < alphas[1]
    right = int((support.embeddings.plain @ names.T).argmax(1).tolist() == list(range(CLASSES)))
    share = max(1, right, int(((support.embeddings.plain @ names.T).argmax(1) == np.arange(CLASSES)).sum())) / CLASSES
    share = min(share, (CLASSES - 1) / CLASSES)
    assert one_shot_parameters(METHODS["proker"], support, None)["ridge"] == pytest.approx(3 * share**2)
    assert one_shot_parameters(METHODS["gda"], replace(support, text=None), None) == METHODS["gda"].parameters


def test_validation_refuses_an_empty_set(rng: np.random.Generator) -> None:
    support, queries, _ = task(rng)
    with pytest.raises(ValueError, match="at least one validation image"):
        HeldOutSet.validation(METHODS["gda"], None, support, queries[:0], np.zeros(0, int))
