"""The choice of parameters: by search, by rules at one image a class, the stack; honest accuracies, notes, refusals."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.methods import METHODS
from iosr_fast.methods.config import Config, Evidence, wilson
from iosr_fast.methods.folds import make_folds
from iosr_fast.methods.out_of_fold import HeldOut, Part, out_of_fold, spread_of_others
from iosr_fast.methods.papers import MAX_KEYS
from iosr_fast.methods.stack_weights import (
    FEW_SHOT_SETTING,
    SETTINGS,
    Stack,
    WeightPrior,
    affordable,
    few_share,
    one_shot_weights,
    settings_for,
)
from iosr_fast.methods.support_set import SupportSet, make_support_set
from iosr_fast.methods.tune import asked_config, tune
from iosr_fast.scoring.score import score
from tests.conftest import unit_rows
from tests.methods.support_sets import Clusters, unit
from tests.methods.test_log_loss import log_loss

WORLD = Clusters(7, noise=1.3, adapted=True)
SMALL = Clusters(8, width=12, noise=0.6, adapted=True)
MANY = Clusters(16, width=12)


def best_config(method: str, support: SupportSet, *validation: Any, **options: Any) -> Config:
    return tune(Config(method=method), support, *validation, **options)[0]


def accuracy(tuned: Config, support: SupportSet, queries: Embeddings, labels: np.ndarray) -> float:
    return float((score(tuned.compile(support), queries).argmax(1) == labels).mean())


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if not method.is_stack])
def test_on_a_validation_set_the_log_loss_is_what_the_plan_gets(method: str) -> None:
    support, (queries, labels) = WORLD.support([4] * 7), WORLD.queries(9)
    tuned = best_config(method, support, queries, labels)
    assert tuned.evidence.protocol == "validation" and tuned.evidence.scored == 63
    assert set(tuned.parameters) == set(METHODS[method].parameters)
    logits = score(tuned.compile(support), queries)
    assert tuned.evidence.log_loss == pytest.approx(log_loss(logits, labels), rel=1e-3)


@pytest.mark.parametrize("text", [True, False])
@pytest.mark.parametrize("method", [*(name for name in METHODS if name != "zero-shot"), "auto"])
def test_the_log_loss_is_that_of_left_out_images_at_the_parameters_it_chose(method: str, text: bool) -> None:
    support = WORLD.support([3, 1, 4, 2, 3, 3, 2], text=text, views=True)
    if method != "auto" and METHODS[method].needs_text and not text:
        return
    asked = Config(method=method, reducer="none" if "stack" in method or method == "auto" else "centre")
    tuned, reducer, *_ = tune(asked, support)
    entry, folds = tuned.entry, make_folds(support)
    found = out_of_fold(entry, support, folds, reducer, tuned.parameters, tuned.factor)
    assert tuned.evidence.protocol == "loo" and tuned.evidence.scored == len(folds.rows) == 17
    if not entry.is_stack:
        assert tuned.evidence.log_loss == pytest.approx(log_loss(found.logits, found.labels), rel=1e-2, abs=1e-3)
    np.testing.assert_array_equal(found.by_image()[found.folds.rows], found.logits)
    assert np.isnan(found.by_image()[3]).all()  # the only image of a class


def test_one_shot_weighs_images_by_how_wrong_texts_are() -> None:
    support = WORLD.support([1] * 7)
    trusted = replace(support, text=support.embeddings.plain)  # every text is right
    misled = replace(support, text=np.roll(support.text, 1, 0))
    alphas = [best_config("tip-adapter", one).parameters["alpha"] for one in (trusted, misled)]
    assert alphas[0] < alphas[1]
    for one, right in ((trusted, 6), (misled, 1)):  # at least one, and at most all but one
        assert best_config("proker", one).parameters["ridge"] == pytest.approx(3 * (right / 7) ** 2)
    assert best_config("gda", replace(support, text=None)).parameters == METHODS["gda"].parameters


@pytest.mark.parametrize("method", ["tip-adapter", "tip-x", "gda", "proker", "ape", "timo"])
def test_one_image_a_class_gets_the_usual_spread(method: str) -> None:
    support, (queries, labels), entry = WORLD.support([1] * 7), WORLD.queries(20), METHODS[method]
    tuned = best_config(method, support)
    assert tuned.evidence.protocol == "one-shot" and "rule of thumb" in tuned.evidence.summary()
    weights, own = one_shot_weights(support, ["plain"]), score(tuned.compile(support), support.as_queries)
    assert spread_of_others(own, support.labels) == pytest.approx(weights["text"] + weights["discriminant"], rel=1e-3)
    sure = Config(method=method, parameters={**entry.parameters, "alpha": 1e4})
    before, after = (score(plan, queries) for plan in (sure.compile(support), tune(sure, support)[2]))
    assert log_loss(after, labels) < log_loss(before, labels) / 5


@pytest.mark.parametrize("method", ["tip-adapter", "gda", "proker", "tip-x", "stack"])
@pytest.mark.parametrize("shots", [2, 6])
def test_given_parameters_get_the_factor_that_lowers_the_log_loss(method: str, shots: int) -> None:
    support, (queries, labels) = WORLD.support([shots] * 7), WORLD.queries(40)
    given = {"beta": 3.0} if method == "stack" else {"alpha": 40.0}
    asked = Config(method=method, parameters=given)
    before, after = (score(plan, queries) for plan in (asked.compile(support), tune(asked, support)[2]))
    best = min(log_loss(before * one, labels) for one in np.geomspace(1e-3, 1e3, 200))
    assert log_loss(after, labels) < min(max(1.35 * best, best + 0.15), log_loss(before, labels) + 0.02)
    config, _, plan = tune(asked, support, tuning="none")
    assert config == asked.complete and np.array_equal(score(plan, queries), before)


@pytest.mark.parametrize(
    ("method", "small", "least"),
    [("tip-adapter", 2, 0.8), ("gda", 2, 0.8), ("proker", 2, 0.7), ("stack", 2, 0.8), ("stack", 1, 0.5)],
)
def test_small_classes_keep_their_queries(method: str, small: int, least: float) -> None:
    """With sums over keys, lengths of means and one ridge for all, and weights from the images of large classes alone,
    53, 75, 52, 63 and 15% of them are right."""
    recalls = []
    for seed in range(3):
        world = Clusters(10, width=32, noise=1.2, seed=seed)
        support, (queries, labels) = world.support([small] * 5 + [16] * 5, text=False, tau=1.0), world.queries(40)
        recalls.append(accuracy(best_config(method, support), support, queries[labels < 5], labels[labels < 5]))
    assert np.mean(recalls) > least


def test_the_regression_is_left_out_beyond_its_largest_and_refused_in_words() -> None:
    support = SMALL.support([MAX_KEYS // 2 + 1] * 2)
    assert len(affordable(MAX_KEYS + 1, 3, ["plain"], 1e6)) == 0
    with pytest.raises(ValueError, match="at most 8192 support images, got 8194; tune the classifier again"):
        Config(method="stack").compile(support)
    with pytest.raises(ValueError, match="proker: expected at most 8192 support images, got 8194"):
        Config(method="proker").compile(support)
    tuned = best_config("stack", support)
    assert tuned.parameters["regression"] == 0 and tuned.compile(support).keys is None
    assert Config(method="proker").reason_against(np.array([MAX_KEYS])) is None


def test_the_budget_counts_operations_and_no_seconds() -> None:
    support = SMALL.support([5] * 6)
    assert len(affordable(30, 6, ["plain"], 20.0)) == len(SETTINGS) and len(affordable(30, 6, ["plain"], 0.0)) == 0
    enough = 2.0 * 30**3 + 12.0 * 30**2 * 6
    for embeddings in (["plain"], ["adapted", "plain"]):  # one setting on both, or two on one
        assert len(affordable(30, 6, embeddings, 2.5 * enough / 1e10)) == 2
    first, again = (best_config("stack", support, seconds=2.5 * enough / 1e10) for _ in range(2))
    assert first.evidence.settings == 2 and first.parameters == again.parameters
    tuned = best_config("stack", support, seconds=0.0)
    assert tuned.parameters["regression"] == 0 and tuned.compile(support).keys is None and tuned.evidence.accuracy > 0.5
    assert best_config("stack", SMALL.support([1] * 6), seconds=0.0).parameters["regression"] == 0


@pytest.mark.parametrize("text", [True, False])
@pytest.mark.parametrize("shots", [1, 2, 3, 6])
@pytest.mark.parametrize("method", ["stack", "stack++"])
def test_better_than_chance_at_every_number_of_shots(method: str, shots: int, text: bool) -> None:
    support, (queries, labels) = SMALL.support([shots] * 8, text=text), SMALL.queries(20)
    tuned = best_config(method, support)
    assert (score(tuned.compile(support), queries).argmax(1) == labels).mean() > 0.5
    known = tuned.evidence
    assert (known.protocol, known.scored) == (("one-shot", 0) if shots == 1 else ("loo", 8 * shots))
    assert sum(known.shares.values()) == pytest.approx(1.0) and (text or known.shares["text"] == 0)
    assert tuned.parameters == best_config(method, support).parameters


def test_adapted_embeddings_that_add_nothing_leave_the_plain_engine(rng: np.random.Generator) -> None:
    support = SMALL.support([6] * 6)
    useless = np.repeat(unit_rows(rng, 1, 12), 36, axis=0)
    support = replace(support, embeddings=Embeddings(support.embeddings.plain, useless))
    tuned = best_config("auto", support)
    assert (
        tuned.method == "stack"
        and "the plain engine does" in tuned.evidence.note
        and tuned.evidence.shares["adapter"] == 0
    )


def test_weights_are_those_of_a_unit_of_spread() -> None:
    """The same embeddings in another unit of tau give the same logits: weights are divided by the spread in use, at
    which left-out images have the log-loss that was fitted. The plan is that of the config."""
    logits, queries = [], SMALL.queries(20)[0]
    for tau in (30.0, 300.0):
        support = SMALL.support([4] * 8, tau=tau)
        config, _, plan = tune(Config(method="stack"), support)
        left_out = out_of_fold(config.entry, support, make_folds(support), None, config.parameters)
        assert log_loss(left_out.logits, left_out.labels) == pytest.approx(config.evidence.log_loss, rel=1e-4)
        np.testing.assert_array_equal(score(plan, queries), score(config.compile(support), queries))
        logits.append(score(plan, queries))
    np.testing.assert_allclose(logits[0], logits[1], rtol=1e-3, atol=1e-3)


def test_few_images_count_smoothly() -> None:
    """Each class of one image beside those of eight holds the weights more; alone they have a setting of their own."""
    shares = []
    for small in range(17):
        support = MANY.support([1] * small + [8] * (16 - small))
        shares.append(few_share(HeldOut.of_support(support, make_folds(support))))
    assert shares[0] == 0 and shares[-1] == 1 and (np.diff(shares) >= 0).all() and max(np.diff(shares)) < 0.45
    assert few_share(HeldOut.validation(support, *MANY.queries(2))) == 0  # which judges all classes
    assert settings_for(0.0) == list(SETTINGS) and settings_for(1.0) == [FEW_SHOT_SETTING]
    half = settings_for(0.5)
    assert len(half) == 3 and half[0]["ridge"] == pytest.approx((0.03 * FEW_SHOT_SETTING["ridge"]) ** 0.5)


def test_a_preference_for_classes_of_many_images_earns_no_weight() -> None:
    """Left-out images are of these more often than new ones; the images of a validation set are as new ones."""
    support = SMALL.support([2] * 4 + [6] * 4)
    held_out = HeldOut.of_support(support, make_folds(support))
    preference = Stack({"regression": Part(np.tile([0.0] * 4 + [2.0] * 4, (32, 1)), 1.0, 1.0)}, {}, {})
    for folds, expected in ((held_out.folds, 0.0), (None, np.log(3.0) / 2.0)):
        objective = WeightPrior.of(replace(held_out, folds=folds), {"regression": 0.0}, few=0.0)
        assert objective.best([preference]).weights["regression"] == pytest.approx(expected, abs=0.06)


def test_what_has_no_effect_or_is_not_distinguished_is_in_the_note(rng: np.random.Generator) -> None:
    tight, labels = Clusters(4, width=64, noise=0.5), np.repeat(np.arange(4), 5)
    misled = replace(tight.support([5] * 4), text=unit(np.roll(tight.centres, 1, 0)))  # texts of other classes
    assert "the texts have no effect" in best_config("tip-adapter", misled).evidence.note
    rows, text = Embeddings(np.tile(unit_rows(rng, 5, 64), (4, 1))), unit_rows(rng, 4, 64)
    alike = make_support_set(rows, labels, text, 100.0, queries=Embeddings(text[labels]))
    assert "similarity to support images has no effect" in best_config("tip-adapter", alike).evidence.note
    assert best_config("tip-adapter", replace(misled, text=unit(tight.centres), tau=9.0)).evidence.note == ""
    # One embedding for all queries: each fold has another winner, and in use one class takes all.
    same = Embeddings(np.repeat(unit_rows(rng, 1, 16), 20, 0))
    equal = make_support_set(Embeddings(unit_rows(rng, 20, 16)), labels, None, 30.0, 4, same)
    assert "all 20 support images get the label of class" in best_config("tip-adapter", equal).evidence.note


@pytest.mark.slow
@pytest.mark.parametrize("method", ["tip-adapter", "gda", "proker", "ape", "stack"])
@pytest.mark.parametrize("validation", [False, True])
def test_random_labels_are_reported_at_chance(method: str, validation: bool) -> None:
    """Four classes without any difference: over ten draws the mean is about chance."""
    reported = []
    for seed in range(10):
        rng = np.random.default_rng(seed)
        rows = Embeddings(unit_rows(rng, 32, 16))
        support = make_support_set(rows, np.repeat(np.arange(4), 8), unit_rows(rng, 4, 16), 30.0)
        asked = (Embeddings(unit_rows(rng, 32, 16)), rng.integers(0, 4, 32)) if validation else ()
        tuned = best_config(method, support, *asked)
        assert tuned.evidence.scored == 32
        reported.append(tuned.evidence.accuracy)
    assert abs(np.mean(reported) - 0.25) < 0.09  # three standard errors of 320 images are 0.073


@pytest.mark.parametrize("method", ["tip-adapter", "gda", "proker", "stack"])
def test_the_accuracy_of_series_of_pictures_is_that_of_other_series_if_they_are_groups(method: str) -> None:
    world, found = Clusters(8, width=32, noise=1.6), []
    for seed in range(4):
        series, labels = world.queries(8, seed=seed)
        rows = np.repeat(series.plain, 3, 0) + 0.09 * np.random.default_rng(seed).standard_normal((192, 32))
        support = make_support_set(Embeddings(unit(rows)), np.repeat(labels, 3), None, 30.0, 8)
        grouped = best_config(method, replace(support, groups=np.arange(192) // 3))
        queries, truth = world.queries(40)
        reached = (score(grouped.compile(support), queries).argmax(1) == truth).mean()
        found.append((best_config(method, support).evidence.accuracy, grouped.evidence.accuracy, reached))
    alone, together, reached = np.mean(found, axis=0)
    assert alone > reached + 0.15 and abs(together - reached) < 0.1


def test_the_interval_is_wilsons() -> None:
    """The ends solve |share - p| = z sqrt(p (1 - p) / n)."""
    for right, count in ((0, 5), (3, 5), (5, 5), (70, 100), (1, 1)):
        low, high = wilson(right / count, count)
        assert 0 <= low < high <= 1
        for end in (low, high):
            if 0 < end < 1:
                assert abs(right / count - end) == pytest.approx(1.959964 * np.sqrt(end * (1 - end) / count))
    one = Evidence(accuracy=0.9, scored=10, protocol="validation", note="alpha 0: nothing", stale=True, version=3)
    assert one.interval == wilson(0.9, 10) and one.summary() == (
        "90.0% of 10 validation images right (95%: 60% to 98%); alpha 0: nothing; as of version 3; the classifier has "
        "changed since"
    )


def test_what_a_method_needs_and_lacks_is_named() -> None:
    support = WORLD.support([4] * 7)
    nothing = support.only(np.zeros(28, bool))
    for name, one, words in (
        ("gda++", replace(support, embeddings=Embeddings(support.embeddings.plain)), "an encoder with an adapter"),
        ("tip-adapter", nothing, "needs support images, got none"),
        ("tip-x", replace(support, text=None), "no text embeddings"),
        ("gda", support.only(support.labels != 2), "at least one image of each class, got none of 1 classes"),
    ):
        config = Config(method=name)
        assert config.unavailable_reason(support) is None and words in str(config.unavailable_reason(one))
        for call in (config.compile, best_config):
            with pytest.raises(ValueError, match=words):
                call(*([one] if call == config.compile else [name, one]))
    of_fit = Config(method="auto").reason_against(np.array([2, 0, 3]), names=["cat", "dog", "fox"])
    assert of_fit == "auto needs at least one image of each class, got none of 'dog'"
    assert Config(method="zero-shot").reason_against(np.zeros(2, int), names=["cat", "dog"]) is None


def test_wrong_names_and_parameters_are_named() -> None:
    support, (queries, labels) = WORLD.support([4] * 7), WORLD.queries(3)
    nothing = support.only(np.zeros(28, bool))
    for one, chosen in ((support, "stack++"), (nothing, "zero-shot")):
        assert best_config("auto", one).method == chosen
    stack = Config(method="stack", reducer="centre")
    for words, call in {
        r"expected a method of .*tip-adapter, .*got 'tipx'": lambda: Config(method="tipx").compile(support),
        "expected a method of auto, zero-shot": lambda: best_config("tipx", support),
        r"has the parameters \['alpha', 'beta'\], got \['gamma'\]": lambda: asked_config("tip-adapter", gamma=1.0),
        "expected a reducer of none, centre, pca": lambda: Config(method="gda", reducer="whiten").compile(support),
        "stack takes no reducer, got 'pca'": lambda: asked_config("stack", "pca"),
        "stack takes no reducer, got 'centre'": lambda: tune(stack, support),
        "expected tune to be 'loo' or 'none', got 'yes'": lambda: asked_config("gda", tune="yes"),
        "leave-one-out: leave alpha, reducer out": lambda: asked_config("auto", "none", alpha=1.0),
        "leave tune='none' out, or name a method": lambda: asked_config("auto", tune="none"),
        "labels of shape": lambda: best_config("gda", support, queries, labels[:-1]),
        r"labels in 0\.\.6": lambda: best_config("gda", support, queries, labels + 1),
        "at least one validation image": lambda: best_config("gda", support, queries[:0], labels[:0]),
        "there are no text embeddings": lambda: best_config("auto", replace(nothing, text=None)),
    }.items():
        with pytest.raises(ValueError, match=words):
            call()
    assert asked_config("auto", tune="loo") == Config(method="auto")
    asked = asked_config("gda", "pca", "none", alpha=2, views=3)  # a parameter of a classifier that is none of these
    assert asked == Config(method="gda", parameters={"alpha": 2.0}, reducer="pca")
