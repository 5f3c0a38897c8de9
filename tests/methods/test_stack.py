"""The stack: its parts on left-out images, its weights, few images, its budget, and what it leaves out."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.methods import METHODS, compile_method, stack_weights
from iosr_fast.methods.held_out import HeldOut, Part, spread_of_others
from iosr_fast.methods.stack import MAX_KEYS, stack_models
from iosr_fast.methods.stack_weights import FEW_SHOT_SETTING, SETTINGS, Choice, affordable, fit_stack
from iosr_fast.methods.support_set import SupportSet, make_support_set
from iosr_fast.methods.tune import tune
from iosr_fast.scoring.score import score
from tests.conftest import unit_rows
from tests.methods.support_sets import Clusters

WEIGHTS = ("text", "discriminant", "discriminant_adapted", "regression", "text_regression")
SMALL = Clusters(8, width=12, noise=0.6, adapted=True)


def accuracy_of(support: SupportSet, method: str = "stack", world: Clusters = SMALL) -> float:
    queries, labels = world.queries(20, classes=support.n_classes)
    logits = score(tune(method, support).compile(support), queries)
    assert np.isfinite(logits).all()
    return float((logits.argmax(1) == labels).mean())


def test_a_part_without_weight_is_not_in_the_plan() -> None:
    support, nothing = SMALL.support([3, 3, 3]), dict.fromkeys(WEIGHTS, 0.0)

    def terms(**weights: float) -> tuple[bool, bool, bool, bool]:
        plan = compile_method("stack++", support, **{**nothing, **weights})
        return plan.text is not None, plan.keys is not None, plan.linear is not None, plan.needs_adapted

    assert terms(text=1.0) == (True, False, False, False)
    assert terms(discriminant=1.0) == (False, False, True, False)
    assert terms(discriminant_adapted=1.0) == (False, False, True, True)
    assert terms(regression=1.0) == (False, True, False, True)
    assert terms(regression=1.0, adapted_keys=0.0, text=1.0) == (True, True, False, False)
    with pytest.raises(ValueError, match="at least one weight of the stack above 0"):
        compile_method("stack++", support, **nothing)


def test_the_regression_is_left_out_beyond_its_largest_and_refused_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    support = SMALL.support([3, 3, 3])
    assert len(affordable(MAX_KEYS + 1, 3, 1, 1e6)) == 0
    for module in ("stack", "stack_weights"):
        monkeypatch.setattr(f"iosr_fast.methods.{module}.MAX_KEYS", 8)
    with pytest.raises(ValueError, match="at most 8 support images, got 9; tune the classifier again"):
        compile_method("stack", support)
    tuned = tune("stack", support)
    assert tuned.parameters["regression"] == 0 and tuned.compile(support).keys is None


def test_the_budget_counts_operations_and_no_seconds() -> None:
    support = SMALL.support([5] * 6)
    assert len(affordable(30, 6, 1, 20.0)) == len(SETTINGS) and len(affordable(30, 6, 1, 0.0)) == 0
    enough = 2.0 * 30**3 + 12.0 * 30**2 * 6
    assert len(affordable(30, 6, 1, 2.5 * enough / 1e10)) == 2 and len(affordable(30, 6, 2, 2.5 * enough / 1e10)) == 1
    first, again = (tune("stack", support, seconds=2.5 * enough / 1e10) for _ in range(2))
    assert first.settings == 2 and first.parameters == again.parameters
    tuned = tune("stack", support, seconds=0.0)
    assert tuned.parameters["regression"] == 0 and tuned.compile(support).keys is None and tuned.accuracy > 0.5
    one_shot = SMALL.support([1] * 6)
    assert tune("stack", one_shot, seconds=0.0).compile(one_shot).keys is None


@pytest.mark.parametrize("text", [True, False])
@pytest.mark.parametrize("shots", [1, 2, 3, 6])
@pytest.mark.parametrize("method", ["stack", "stack++"])
def test_better_than_chance_at_every_number_of_shots(method: str, shots: int, text: bool) -> None:
    support = SMALL.support([shots] * 8, text=text)
    tuned = tune(method, support)
    assert accuracy_of(support, method) > 0.5
    assert tuned.protocol == ("one-shot" if shots == 1 else "loo") and tuned.scored == (0 if shots == 1 else 8 * shots)
    assert sum(tuned.shares.values()) == pytest.approx(1.0) and (text or tuned.shares["text"] == 0)
    assert tuned.parameters == tune(method, support).parameters


@pytest.mark.parametrize("counts", [[1, 1], [2, 2], [5, 5], [9, 1], [1, 2], [3, 1, 1, 1]], ids=str)
def test_few_classes_and_unequal_ones(counts: list[int]) -> None:
    assert accuracy_of(SMALL.support(counts), "auto") > 0.5


def test_images_that_are_all_alike(rng: np.random.Generator) -> None:
    rows = np.repeat(unit_rows(rng, 1, 6), 12, axis=0)
    support = make_support_set(Embeddings(rows, rows), np.repeat([0, 1, 2], 4), unit_rows(rng, 3, 6), 30.0)
    for shots in (1, 2, 4):
        few = support.only(np.arange(12) % 4 < shots)
        assert np.isfinite(score(tune("auto", few).compile(few), few.embeddings)).all()


def test_adapted_embeddings_that_add_nothing_leave_the_plain_engine(rng: np.random.Generator) -> None:
    support = SMALL.support([6] * 6)
    useless = np.repeat(unit_rows(rng, 1, 12), 36, axis=0)
    support = replace(support, embeddings=Embeddings(support.embeddings.plain, useless))
    tuned = tune("auto", support)
    assert tuned.method == "stack" and "the plain engine does" in tuned.note and tuned.shares["adapter"] == 0
    assert not tuned.compile(support).needs_adapted


def test_weights_are_those_of_a_unit_of_spread() -> None:
    """The same embeddings in another unit of tau give the same logits: weights are divided by the spread in use."""
    logits, queries = [], SMALL.queries(20)[0]
    for tau in (30.0, 300.0):
        support = SMALL.support([4] * 8, tau=tau)
        tuned = tune("stack", support)
        logits.append(score(tuned.compile(support), queries))
        held_out = HeldOut.of_support(support)
        for name, model in stack_models(support, tuned.parameters).items():
            part = held_out.part(model)
            assert spread_of_others(part.scaled, held_out.labels) == pytest.approx(1.0), name
            assert spread_of_others(part.as_in_use, held_out.labels) == pytest.approx(part.in_use), name
            np.testing.assert_allclose(part.logits, model.without(held_out.folds)[held_out.folds.rows])
    np.testing.assert_allclose(logits[0], logits[1], rtol=1e-3, atol=1e-3)


def test_the_spread_ignores_the_own_class() -> None:
    logits = np.array([[50.0, 1.0, 3.0, 5.0], [2.0, -90.0, 2.0, 2.0]])
    assert spread_of_others(logits, np.array([0, 1])) == pytest.approx(np.std([1.0, 3.0, 5.0]) / 2)
    assert spread_of_others(np.ones((2, 3)), np.array([0, 1])) == 1.0  # mere rounding
    assert spread_of_others(np.array([[1.0, 3.0]]), np.array([0])) == pytest.approx(1.0)  # two classes


def test_the_regression_gets_more_weight_where_it_makes_more_images_right(rng: np.random.Generator) -> None:
    labels, noise = rng.integers(0, 6, 400), rng.standard_normal((2, 400, 6))
    images = Part(np.eye(6)[labels] + 0.3 * noise[0], 1.0, 1.0)
    parts = {"text": Part(0.5 * np.eye(6)[labels] + noise[1], 1.0, 1.0), "regression": images}
    everywhere = np.ones(400, bool)
    weak = Choice(parts, {"text": 1.0, "regression": 0.5}, {}, "plain", 2.0)
    better = stack_weights._with_more_regression(weak, labels, everywhere)
    assert better.weights["regression"] / better.weights["text"] == pytest.approx(0.625)
    assert (better.logits.argmax(1) == labels).sum() > (weak.logits.argmax(1) == labels).sum()
    assert better.losses(labels).mean() == pytest.approx(better.loss, rel=1e-3)
    fair = Choice(parts, {"text": 1.0, "regression": 50.0}, {}, "plain", 2.0)
    assert stack_weights._with_more_regression(fair, labels, everywhere) is fair


def test_a_quarter_of_small_classes_is_enough_for_the_prior() -> None:
    """Images of large classes alone are left out where the others have one."""
    for sizes, few in (([2, 1, 4, 4, 4, 4, 4, 4], True), ([2, 4, 4, 4, 4, 4, 4, 4], False)):
        fit = fit_stack(HeldOut.of_support(SMALL.support(sizes, text=False)), False, 20.0)
        assert ({name: fit.choice.setting[name] for name in FEW_SHOT_SETTING} == FEW_SHOT_SETTING) is few


def test_the_stack_takes_no_reducer() -> None:
    assert METHODS["stack"].is_stack and not METHODS["stack"].takes_reducer
