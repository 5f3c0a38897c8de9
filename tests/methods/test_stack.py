"""The stack: its parts on left-out images, its weights, few images, its budget, and what it leaves out."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.methods import compile_method
from iosr_fast.methods.out_of_fold import HeldOut
from iosr_fast.methods.papers import MAX_KEYS
from iosr_fast.methods.stack_weights import FEW_SHOT_SETTING, SETTINGS, affordable, fit_stack
from iosr_fast.methods.tune import tune
from iosr_fast.scoring.score import score
from tests.conftest import unit_rows
from tests.methods.support_sets import Clusters

SMALL = Clusters(8, width=12, noise=0.6, adapted=True)


def test_the_regression_is_left_out_beyond_its_largest_and_refused_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    support = SMALL.support([3, 3, 3])
    assert len(affordable(MAX_KEYS + 1, 3, 1, 1e6)) == 0
    for module in ("papers", "stack_weights"):
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
    assert tune("stack", SMALL.support([1] * 6), seconds=0.0).parameters["regression"] == 0


@pytest.mark.parametrize("text", [True, False])
@pytest.mark.parametrize("shots", [1, 2, 3, 6])
@pytest.mark.parametrize("method", ["stack", "stack++"])
def test_better_than_chance_at_every_number_of_shots(method: str, shots: int, text: bool) -> None:
    support, (queries, labels) = SMALL.support([shots] * 8, text=text), SMALL.queries(20)
    tuned = tune(method, support)
    assert (score(tuned.compile(support), queries).argmax(1) == labels).mean() > 0.5
    assert tuned.protocol == ("one-shot" if shots == 1 else "loo") and tuned.scored == (0 if shots == 1 else 8 * shots)
    assert sum(tuned.shares.values()) == pytest.approx(1.0) and (text or tuned.shares["text"] == 0)
    assert tuned.parameters == tune(method, support).parameters


def test_adapted_embeddings_that_add_nothing_leave_the_plain_engine(rng: np.random.Generator) -> None:
    support = SMALL.support([6] * 6)
    useless = np.repeat(unit_rows(rng, 1, 12), 36, axis=0)
    support = replace(support, embeddings=Embeddings(support.embeddings.plain, useless))
    tuned = tune("auto", support)
    assert tuned.method == "stack" and "the plain engine does" in tuned.note and tuned.shares["adapter"] == 0


def test_weights_are_those_of_a_unit_of_spread() -> None:
    """The same embeddings in another unit of tau give the same logits: weights are divided by the spread in use."""
    logits, queries = [], SMALL.queries(20)[0]
    for tau in (30.0, 300.0):
        support = SMALL.support([4] * 8, tau=tau)
        tuned = tune("stack", support)
        logits.append(score(tuned.compile(support), queries))
    np.testing.assert_allclose(logits[0], logits[1], rtol=1e-3, atol=1e-3)


def test_a_quarter_of_small_classes_is_enough_for_the_prior() -> None:
    """Images of large classes alone are left out where the others have one."""
    for sizes, few in (([2, 1, 4, 4, 4, 4, 4, 4], True), ([2, 4, 4, 4, 4, 4, 4, 4], False)):
        fit = fit_stack(HeldOut.of_support(SMALL.support(sizes, text=False)), False, 20.0)
        assert ({name: fit.choice.setting[name] for name in FEW_SHOT_SETTING} == FEW_SHOT_SETTING) is few
