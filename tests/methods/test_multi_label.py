"""Images with several labels: formulas in float64, leave-one-out against refits, probabilities of new images."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from iosr_fast import Embeddings, score
from iosr_fast.exceptions import IosrFastError
from iosr_fast.methods import METHODS
from iosr_fast.methods.config import Config
from iosr_fast.methods.folds import make_folds
from iosr_fast.methods.links import Sigmoid, f1_thresholds
from iosr_fast.methods.log_loss import sigmoid
from iosr_fast.methods.models.gaussian import CentredGaussianModel, Moments, fit_gaussians
from iosr_fast.methods.models.ridge import CentredRidgeModel
from iosr_fast.methods.support_set import SupportSet, make_support_set
from iosr_fast.methods.tune import tune
from iosr_fast.scoring.plan import Which
from iosr_fast.scoring.reference import score_reference
from iosr_fast.utils.ranking import mean_average_precision
from tests.methods.support_sets import unit

WITH = ["zero-shot", "stack", "stack++"]


def images_of(n: int = 31, classes: int = 5, seed: int = 0, text: bool = True, views: bool = False) -> SupportSet:
    """Rows that hold the centres of their classes, some of none."""
    rng = np.random.default_rng(seed)
    centres, labels = rng.normal(size=(classes, 24)), rng.random((n, classes)) < 0.3
    labels[: 2 * classes] |= np.tile(np.eye(classes, dtype=bool), (2, 1))[:n]

    def draw() -> Embeddings:
        return Embeddings(*(unit(labels @ centres + noise * rng.normal(size=(n, 24))) for noise in (1.5, 1.0)))

    texts = unit(centres + rng.normal(size=centres.shape)) if text else None
    return make_support_set(draw(), labels, texts, 20.0, queries=draw() if views else None)


def rows_of(embeddings: Embeddings, which: str) -> np.ndarray:
    return getattr(embeddings, which).astype(np.float64)


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("views", [False, True])
@pytest.mark.parametrize("which", ["plain", "adapted"])
def test_regression_is_the_formula_and_a_refit_without_each_unit(which: Which, views: bool, grouped: bool) -> None:
    support = replace(images_of(views=views), groups=np.arange(31) // 3 if grouped else None)
    folds = make_folds(support)
    fold = folds.fold if grouped else np.arange(31)
    assert not grouped or (fold[:30].reshape(-1, 3) == fold[:30:3, None]).all()
    model = CentredRidgeModel(support, which, None, 2.0, 0.1)
    keys, left_out = rows_of(support.embeddings, which), model.without(folds)
    system = np.exp(-2.0 * (1 - keys @ keys.T)) + 0.1 * np.eye(31)
    target = support.indicator - support.indicator.mean(0)
    np.testing.assert_allclose(model.fitted, np.linalg.solve(system, target), atol=1e-9)
    for row in range(31):
        refit = replace(model, support=support.only(fold != fold[row]))
        expected = refit.scores(support.as_queries[row : row + 1])[0]
        np.testing.assert_allclose(left_out[row], expected, rtol=1e-9, atol=1e-9)


def test_a_discriminant_is_that_of_each_image_given_once_a_label() -> None:
    support = images_of(n=45)
    model = CentredGaussianModel(support, "adapted")
    fields, folds = model.fields(), make_folds(support)
    left_out, queries = model.without(folds), rows_of(support.embeddings, "adapted")
    rows, classes = np.nonzero(support.indicator)
    assert folds.number == 16 and np.bincount(folds.fold).max() <= 5

    def expected(chosen: np.ndarray, asked: np.ndarray) -> np.ndarray:
        some = chosen[rows]
        logits = fit_gaussians(Moments.of(queries[rows[some]], np.eye(5)[classes[some]])).scores(asked)
        return logits - logits.mean(1, keepdims=True)

    found = queries @ fields["linear"].T + fields["bias"]
    np.testing.assert_allclose(found, expected(np.ones(45, bool), queries), atol=1e-6)
    for own, out in folds.splits:
        np.testing.assert_allclose(left_out[own], expected(~out, queries[own]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("text", [False, True])
@pytest.mark.parametrize("name", ["auto", *WITH])
def test_probabilities_are_those_of_new_images(name: str, text: bool) -> None:
    drawn = images_of(400, text=text, seed=3)
    support = drawn.only(np.arange(400) < 40)
    for lacking in ["zero-shot"] * (not text) + ["gda++"]:
        with pytest.raises(IosrFastError, match=r"no text embeddings|^gda\+\+ can't learn from several .*use 'auto'"):
            tune(Config(method=lacking), support)
    if name == "zero-shot" and not text:
        return
    config, _, plan = tune(Config(method=name), support)
    logits, labels = score(plan, drawn.embeddings[40:]).astype(np.float64), drawn.indicator[40:]
    assert mean_average_precision(labels, logits) > 0.8
    assert abs(sigmoid(logits).mean() - labels.mean()) < 0.08
    loss = float((np.logaddexp(0, logits) - labels * logits).mean())
    assert config.evidence.log_loss == pytest.approx(loss, abs=0.15)
    assert 0.7 < config.evidence.average_precision <= 1.0
    np.testing.assert_allclose(logits[:9], score_reference(plan, drawn.embeddings[40:49]), rtol=2e-4, atol=2e-4)
    shares = sigmoid(logits)
    expected = [max(2 * p[p >= t].sum() / ((p >= t).sum() + p.sum()) for t in p) / 2 for p in shares.T]
    np.testing.assert_allclose(f1_thresholds(shares), expected, rtol=1e-5)  # half of the largest expected F1
    link = Sigmoid.of(logits)
    np.testing.assert_array_equal(link.decide(logits), shares >= link.thresholds)


@pytest.mark.parametrize("text", [False, True])
def test_one_image_a_class_takes_a_rule(text: bool) -> None:
    drawn = images_of(300, text=text, seed=4)
    labels = drawn.indicator
    rows = [np.flatnonzero(labels[:, c] & (labels.sum(1) == 1))[0] for c in range(5)]
    config, _, plan = tune(Config(method="auto"), drawn.only(np.isin(np.arange(300), rows)))
    logits = score(plan, drawn.embeddings)
    assert config.evidence.protocol == "one-shot" and config.evidence.average_precision is None
    assert mean_average_precision(labels, logits) > 0.6
    assert 0.05 < sigmoid(logits.astype(np.float64)).mean() < 0.5


@pytest.mark.parametrize("name", ["stack", "stack++"])
def test_a_setting_that_is_given_is_kept(name: str) -> None:
    config, _, plan = tune(Config(method=name, parameters={"beta": 2.5}), images_of())
    given = METHODS[name].parameters
    assert plan.beta == config.parameters["beta"] == 2.5 and config.parameters["ridge"] == given["ridge"]
    assert config.parameters["regression"] not in (0.0, given["regression"])  # weights are fitted


def test_repeated_images_are_left_out_together_whatever_their_labels(rng: np.random.Generator) -> None:
    """A copy that stays would vouch for the image; it did where images had several labels."""
    rows = unit(rng.standard_normal((40, 24)))
    labels = rng.random((40, 3)) < 0.4
    labels[:4] = False  # images of no label, too
    alone = make_support_set(Embeddings(rows), labels, None, 1.0)
    twice = Embeddings(unit(np.repeat(rows, 2, 0) + 1e-4 * rng.standard_normal((80, 24))))
    copies = make_support_set(twice, np.repeat(labels, 2, 0), None, 1.0)
    folds = make_folds(copies)
    assert make_folds(alone).are_alone and not folds.are_alone
    assert (folds.fold[::2] == folds.fold[1::2]).all() and (folds.units[::2] == folds.units[1::2]).all()
    assert 30 <= len(np.unique(folds.units)) <= 40
    losses = [tune(Config(method="auto"), one)[0].evidence.log_loss for one in (alone, copies)]
    assert losses[1] > 0.9 * losses[0], "random labels stay hard to tell"


def test_a_probability_at_its_threshold_counts() -> None:
    link = Sigmoid(np.array([0.5, 0.5], np.float32))
    answers = link.named(link.decide(np.array([[0.0, -1e-9], [-1.0, -1.0]])), np.array(["cat", "dog"]))
    assert answers.tolist() == [frozenset({"cat"}), frozenset()]
    assert [listed.tolist() for listed in link.listed(np.array([[-1.0, -1.0]]), 5)] == [[]]


def test_copies_with_every_label_have_every_label() -> None:
    """Nothing can be left out, and no image is without a label."""
    rows = Embeddings(unit(np.ones((3, 24))))
    _, _, plan = tune(Config(method="auto"), make_support_set(rows, np.ones((3, 2), bool), None, 20.0))
    assert Sigmoid.of(logits := score(plan, rows)).decide(logits).all()


def test_one_image_is_too_few() -> None:
    with pytest.raises(IosrFastError, match="expected 2 to 8192 support images, got 1"):
        tune(Config(method="auto"), images_of(1))
