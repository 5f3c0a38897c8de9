"""The search: exact on a validation set, one-shot rules, protocols, notes, and the out-of-fold logits it hands on."""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np
import pytest

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.methods import METHODS, compile_method, fit_method_reducer
from iosr_fast.methods.held_out import HeldOut, is_level
from iosr_fast.methods.out_of_fold import calibrate, out_of_fold, usual_factor
from iosr_fast.methods.support_set import SupportSet, make_support_set
from iosr_fast.methods.tune import one_shot_parameters, tune
from iosr_fast.methods.tuned import Tuned
from iosr_fast.scoring.reference import score_reference
from iosr_fast.scoring.score import score
from tests.conftest import unit_rows
from tests.methods.support_sets import Clusters, unit
from tests.methods.test_log_loss import log_loss

WORLD = Clusters(7, noise=1.3, adapted=True)
SEARCHED = [name for name, method in METHODS.items() if not method.is_stack]
UNEVEN = [3, 1, 4, 2, 3, 3, 2]


def accuracy(tuned: Tuned, support: SupportSet, queries: Embeddings, labels: np.ndarray) -> float:
    return float((score(tuned.compile(support), queries).argmax(1) == labels).mean())


@pytest.mark.parametrize("method", SEARCHED)
def test_on_a_validation_set_the_accuracy_is_what_the_plan_gets(method: str) -> None:
    support, (queries, labels) = WORLD.support([4] * 7), WORLD.queries(9)
    tuned = tune(method, support, queries, labels)
    assert tuned.protocol == "validation" and tuned.scored == 63 and tuned.out_of_fold is None
    # A sample on the border may fall to the other side in float32.
    assert abs(tuned.search_accuracy - accuracy(tuned, support, queries, labels)) <= 1.001 / 63
    assert set(tuned.parameters) == set(METHODS[method].parameters)
    assert tuned.right is not None and tuned.right.mean() == tuned.accuracy
    if tuned.alpha_range is not None:
        low, high = tuned.alpha_range
        assert low <= tuned.parameters["alpha"] <= high


@pytest.mark.parametrize("method", ["tip-adapter", "tip-adapter++", "tip-x"])
def test_never_below_the_public_grid(method: str) -> None:
    """200 alphas and 20 betas from 0 to 20 (and, for Tip-X, gammas from 0 to 30), as the papers' code tries them."""
    support, (queries, labels) = WORLD.support([4] * 7), WORLD.queries(8)
    best, gammas = 0.0, [{"gamma": g} for g in np.linspace(0, 30, 50)[::12]] if method == "tip-x" else [{}]
    for beta in np.linspace(0, 20, 20):
        for gamma in gammas:
            base = score_reference(compile_method(method, support, alpha=0.0, beta=beta, **gamma), queries)
            slope = score_reference(compile_method(method, support, alpha=1.0, beta=beta, **gamma), queries) - base
            for alpha in np.linspace(0, 20, 200):
                best = max(best, float(((base + alpha * slope).argmax(1) == labels).mean()))
    assert tune(method, support, queries, labels).search_accuracy >= best - 1e-12


@pytest.mark.parametrize("text", [True, False])
@pytest.mark.parametrize("method", [*(name for name in METHODS if name != "zero-shot"), "auto"])
def test_the_out_of_fold_logits_are_those_at_the_parameters_it_chose(method: str, text: bool) -> None:
    support = WORLD.support(UNEVEN, text=text, views=True)
    if method != "auto" and METHODS[method].needs_text and not text:
        return
    tuned = tune(method, support, reducer="none" if "stack" in method or method == "auto" else "centre")
    entry, found = METHODS[tuned.method], tuned.out_of_fold
    reducer = fit_method_reducer(entry, tuned.reducer, support)
    expected = out_of_fold(entry, support, reducer, tuned.parameters, tuned.factor)
    assert found is not None and tuned.protocol == "loo" and tuned.scored == len(found.folds.rows) == 17
    np.testing.assert_array_equal(found.folds.fold, expected.folds.fold)
    np.testing.assert_allclose(found.logits, expected.logits, rtol=1e-4, atol=1e-5 * np.abs(expected.logits).max())
    right = found.logits.argmax(1) == support.labels[found.folds.rows]
    assert tuned.search_accuracy == pytest.approx(right.mean(), abs=1.001 / 17)
    if tuned.log_loss is not None and not entry.is_stack:
        assert tuned.log_loss == pytest.approx(log_loss(found.logits, found.labels), rel=1e-2, abs=1e-3)
    by_image = found.by_image()
    np.testing.assert_array_equal(by_image[found.folds.rows], found.logits)
    assert np.isnan(by_image[3]).all()  # the only image of a class


@pytest.mark.parametrize("method", ["tip-adapter", "gda", "proker++"])
def test_out_of_fold_logits_are_those_of_plans_without_the_fold(method: str) -> None:
    """But for a factor of the image term, which has its spread in use."""
    support = WORLD.support([4] * 7, text=False)
    found = out_of_fold(METHODS[method], support, None, METHODS[method].parameters, factor=0.5)
    ratios = []
    for rows, out in found.folds.splits:
        plan = compile_method(method, support.only(~out))
        expected = score_reference(plan, support.embeddings[rows])
        logits = found.by_image()[rows]
        ratios += (np.ptp(logits, axis=1) / np.ptp(expected, axis=1)).tolist()
        np.testing.assert_array_equal(logits.argmax(1), expected.argmax(1))
    assert np.ptp(ratios) < 1e-3 * np.mean(ratios)


def test_all_classes_are_equally_short_of_keys(rng: np.random.Generator) -> None:
    """At beta 0 every affinity is 1, so the images' term only counts keys: it must not give the left-out class away."""
    support = make_support_set(Embeddings(unit_rows(rng, 30, 24)), np.repeat(np.arange(3), 10), None, 1.0, 3)
    logits = out_of_fold(METHODS["tip-adapter"], support, None, {"alpha": 1.0, "beta": 0.0}).logits
    assert np.ptp(logits) == 0


@pytest.mark.parametrize("text", [True, False])
def test_auto_finds_what_is_far_better(text: bool) -> None:
    support, (queries, labels) = WORLD.support([5] * 7, text=text), WORLD.queries(40)
    tuned = tune("auto", support)
    assert tuned.method == "stack++" and tuned.protocol == "loo" and tuned.scored == 35
    others = [
        tune(name, support, queries, labels).accuracy for name in ("tip-adapter", "gda", "gda++", "tip-adapter++")
    ]
    assert accuracy(tuned, support, queries, labels) >= max(others) - 0.05
    by_validation = tune("auto", support, queries, labels)
    assert by_validation.protocol == "validation" and by_validation.accuracy >= max(others) - 0.05


def test_auto_goes_without_what_is_missing(caplog: pytest.LogCaptureFixture) -> None:
    one_shot = WORLD.support([1] * 7)
    tuned = tune("auto", one_shot)
    assert (tuned.method, tuned.reducer, tuned.protocol, tuned.scored) == ("stack++", "none", "one-shot", 0)
    plain = replace(one_shot, text=None, embeddings=Embeddings(one_shot.embeddings.plain))
    with caplog.at_level(logging.INFO, "iosr_fast"):
        tuned = tune("auto", plain)
    assert tuned.method == "stack" and tuned.shares["text"] == 0 and "stack: nan of 0 held-out images" in caplog.text
    nothing = one_shot.only(np.zeros(7, bool))
    assert tune("auto", nothing).method == "zero-shot" and tune("auto", nothing).protocol == "none"
    with pytest.raises(ValueError, match="support images or text embeddings"):
        tune("auto", replace(nothing, text=None))


def test_one_shot_weighs_images_by_how_wrong_texts_are() -> None:
    support = WORLD.support([1] * 7)
    trusted = replace(support, text=support.embeddings.plain)  # every text is right
    misled = replace(support, text=np.roll(support.text, 1, 0))
    alphas = [one_shot_parameters(METHODS["tip-adapter"], one, None)["alpha"] for one in (trusted, misled)]
    assert alphas[0] < alphas[1]
    right = ((support.embeddings.plain @ support.text.T).argmax(1) == np.arange(7)).sum()
    share = np.clip(right, 1, 6) / 7
    assert one_shot_parameters(METHODS["proker"], support, None)["ridge"] == pytest.approx(3 * share**2)
    assert one_shot_parameters(METHODS["gda"], replace(support, text=None), None) == METHODS["gda"].parameters
    constant = replace(support, text=np.repeat(support.text[:1], 7, 0))
    assert one_shot_parameters(METHODS["tip-adapter"], constant, None) == METHODS["tip-adapter"].parameters


@pytest.mark.parametrize("method", ["tip-adapter", "tip-x", "gda", "proker", "ape", "timo"])
def test_one_image_a_class_gets_a_rule_and_the_usual_spread(method: str) -> None:
    support, (queries, labels) = WORLD.support([1] * 7), WORLD.queries(20)
    tuned, entry = tune(method, support), METHODS[method]
    assert tuned.protocol == "one-shot" and tuned.interval is None and tuned.out_of_fold is None
    assert tuned.parameters == one_shot_parameters(entry, support, None) and "rule of thumb" in tuned.summary()
    assert tuned.factor == usual_factor(entry, support, None, tuned.parameters)
    given = {**entry.parameters, "alpha": 1e4}  # far too sure
    factor = calibrate(entry, support, None, given)
    assert factor == usual_factor(entry, support, None, given)
    logits = score(compile_method(method, support, **given), queries)
    assert log_loss(factor * logits, labels) < log_loss(logits, labels) / 5
    same = replace(support, embeddings=Embeddings(np.repeat(support.embeddings.plain[:1], 7, axis=0)), text=None)
    assert usual_factor(METHODS["gda"], same, None, METHODS["gda"].parameters) == 1.0


@pytest.mark.parametrize("method", ["tip-adapter", "gda", "proker", "tip-x", "stack"])
@pytest.mark.parametrize("shots", [2, 6])
def test_given_parameters_get_the_factor_that_lowers_the_log_loss(method: str, shots: int) -> None:
    support, (queries, labels) = WORLD.support([shots] * 7), WORLD.queries(40)
    given = {
        **METHODS[method].parameters,
        **({"alpha": 40.0} if "alpha" in METHODS[method].parameters else {"beta": 3.0}),
    }
    factor = calibrate(METHODS[method], support, None, given)
    logits = score(compile_method(method, support, **given), queries)
    best = min(log_loss(logits * one, labels) for one in np.geomspace(1e-3, 1e3, 200))
    assert factor != 1.0 and log_loss(factor * logits, labels) < max(1.35 * best, best + 0.15)
    assert log_loss(factor * logits, labels) < log_loss(logits, labels) + 0.02


def test_level_means_within_two_standard_errors_of_the_difference() -> None:
    best, other = np.ones(100, bool), np.ones(100, bool)
    other[:4] = False
    assert is_level(other, best)  # 4 lost, 2 * sqrt(4) = 4
    other[4] = False
    assert not is_level(other, best)
    best[50:60] = False
    assert is_level(other, best) and is_level(best, best)


def test_what_has_no_effect_is_in_the_note(rng: np.random.Generator) -> None:
    tight = Clusters(4, width=64, noise=0.5)
    misled = tight.support([5] * 4)
    misled = replace(misled, text=unit(np.roll(tight.centres, 1, 0)))  # every text is another class's
    assert "the texts have no effect" in tune("tip-adapter", misled).note
    alike = make_support_set(
        Embeddings(np.tile(unit_rows(rng, 5, 64), (4, 1))), misled.labels, unit_rows(rng, 4, 64), 100.0
    )
    alike = replace(alike, queries=Embeddings(alike.text[alike.labels]))
    assert "similarity to support images has no effect" in tune("tip-adapter", alike).note
    fair = replace(misled, text=unit(tight.centres), tau=9.0)
    assert tune("tip-adapter", fair).note == ""


def test_images_that_the_encoder_does_not_distinguish_are_in_the_note(rng: np.random.Generator) -> None:
    """One embedding for all queries: each fold has another winner, and in use one class takes all."""
    labels, same = np.repeat([0, 1, 2], 4), np.repeat(unit_rows(rng, 1, 16), 12, 0)
    support = make_support_set(Embeddings(unit_rows(rng, 12, 16)), labels, None, 30.0, 3, Embeddings(same))
    assert "all 12 support images get the label of class" in tune("tip-adapter", support).note


@pytest.mark.parametrize("method", ["tip-adapter", "gda", "proker", "stack"])
def test_the_note_counts_what_leaving_out_does_not_judge(method: str, rng: np.random.Generator) -> None:
    for sizes, words in (
        ([1, 4, 4, 4], "1 of 4 classes has a"),
        ([1, 1, 4, 4], "2 of 4 classes have a"),
        ([4] * 4, ""),
    ):
        tuned = tune(method, WORLD.support(sizes, text=False))
        assert tuned.scored == sum(size for size in sizes if size > 1)
        assert words in tuned.summary() and bool(words) is ("single image, which can't be left out" in tuned.note)
    assert not tune(method, WORLD.support([1] * 4, text=False)).note
    pairs = unit(np.repeat(unit_rows(rng, 24, 32), 2, axis=0) + 0.1 * unit_rows(rng, 48, 32))
    support = make_support_set(Embeddings(pairs), np.repeat(np.arange(6), 8), None, 30.0, 6)
    tuned = tune(method, support)  # with the other photograph at hand nearly all were right
    assert tuned.accuracy < 0.4 and tuned.scored == 48
    assert "24 images are near duplicates of others of the same class" in tuned.note
    alike = replace(support, embeddings=Embeddings(np.repeat(pairs[::8], 8, axis=0)))
    tuned = tune(method, alike)
    assert tuned.protocol == "one-shot" and tuned.scored == 0 and "42 images are near duplicates" in tuned.note


def test_bad_requests_are_named() -> None:
    support, (queries, labels) = WORLD.support([4] * 7), WORLD.queries(3)
    plain = replace(support, embeddings=Embeddings(support.embeddings.plain))
    for words, call in {
        "expected a method of auto, zero-shot": lambda: tune("tipx", support),
        "a reducer of none, centre, pca": lambda: tune("gda", support, reducer="lda"),
        "labels of shape": lambda: tune("gda", support, queries, labels[:-1]),
        r"labels in 0\.\.6": lambda: tune("gda", support, queries, labels + 1),
        "at least one validation image": lambda: HeldOut.validation(support, queries[:0], labels[:0]),
        "no text embeddings": lambda: tune("ape", replace(support, text=None)),
        "needs an encoder with an adapter": lambda: tune("gda++", plain),
        "at least one image of each class": lambda: tune("gda", support.only(support.labels > 0)),
    }.items():
        with pytest.raises(ValueError, match=words):
            call()
