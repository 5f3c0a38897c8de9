"""Images with several labels: formulas in float64, leave-one-out against refits, and the head's answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy.sparse import csr_array
from sklearn.base import clone
from sklearn.metrics import average_precision_score
from sklearn.model_selection import cross_val_score

from iosr_fast import Embeddings, FewShotHead, score
from iosr_fast.exceptions import IosrFastError
from iosr_fast.methods import METHODS
from iosr_fast.methods.log_loss import sigmoid
from iosr_fast.methods.models.gaussian import Moments, fit_gaussians
from iosr_fast.methods.multi_label import f1_thresholds, fit_multi_label
from iosr_fast.methods.multi_label_set import KeyTerm, LinearTerm, MultiLabelSet, _spread_folds, multi_label_terms
from iosr_fast.scoring.reference import score_reference
from iosr_fast.utils.ranking import mean_average_precision
from tests.methods.support_sets import unit

WITH = [name for name, method in METHODS.items() if not method.one_label]
SETTING: Mapping[str, float] = {"beta": 2.0, "ridge": 0.1}


def images_of(n: int = 31, classes: int = 5, seed: int = 0, text: bool = True, views: bool = False) -> MultiLabelSet:
    """Rows that hold the centres of their classes, some of none."""
    rng = np.random.default_rng(seed)
    centres, labels = rng.normal(size=(classes, 24)), rng.random((n, classes)) < 0.3
    labels[: 2 * classes] |= np.tile(np.eye(classes, dtype=bool), (2, 1))[:n]

    def draw() -> Embeddings:
        return Embeddings(*(unit(labels @ centres + noise * rng.normal(size=(n, 24))) for noise in (1.5, 1.0)))

    texts = unit(centres + rng.normal(size=centres.shape)) if text else None
    return MultiLabelSet(draw(), labels, texts, 20.0, draw() if views else None)


def only(images: MultiLabelSet, rows: np.ndarray) -> MultiLabelSet:
    queries = None if images.queries is None else images.queries[rows]
    return replace(images, embeddings=images.embeddings[rows], labels=images.labels[rows], queries=queries)


@pytest.mark.parametrize("views", [False, True])
@pytest.mark.parametrize("name", [name for name in WITH if METHODS[name].needs_support])
def test_left_out_terms_are_those_of_a_fit_without_the_image(name: str, views: bool) -> None:
    images, method = images_of(views=views), METHODS[name]
    terms = multi_label_terms(images, method, method.which, SETTING)
    for row in range(31):
        others = only(images, np.arange(31) != row)
        query = images.rows(method.which, queries=True)[row].astype(np.float64)
        for key, term in multi_label_terms(others, method, method.which, SETTING).items():
            if isinstance(term, LinearTerm):
                continue
            expected = np.exp(-2.0 * (1 - others.rows(method.which).astype(np.float64) @ query)) @ term.values
            if method.family == "keys":  # n keys of the label in place of n - 1
                expected *= np.where(images.labels[row], images.counts / np.maximum(images.counts - 1, 1), 1.0)
            np.testing.assert_allclose(terms[key].left_out[row], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["proker", "proker++", "stack", "stack++"])
def test_the_regression_is_that_of_the_formula(name: str) -> None:
    images, method = images_of(), METHODS[name]
    keys, target = images.rows(method.which).astype(np.float64), images.labels - images.labels.mean(0)
    if name.startswith("proker"):
        target = 20.0 * (target - images.embeddings.plain.astype(np.float64) @ images.text.T)
    system = np.exp(-2.0 * (1 - keys @ keys.T)) + 0.1 * np.eye(31)
    term, *_ = multi_label_terms(images, method, method.which, SETTING).values()
    assert isinstance(term, KeyTerm)
    np.testing.assert_allclose(term.values, np.linalg.solve(system, target), atol=1e-9)


@pytest.mark.parametrize(("which", "name"), [("plain", "discriminant"), ("adapted", "discriminant_adapted")])
def test_a_discriminant_is_that_of_each_image_given_once_a_label(which: Any, name: str) -> None:
    images = images_of(n=45)
    term, (rows, classes) = (
        multi_label_terms(images, METHODS["stack++"], which, SETTING)[name],
        np.nonzero(images.labels),
    )
    queries, folds = images.rows(which).astype(np.float64), _spread_folds(images.labels)
    assert isinstance(term, LinearTerm) and folds.number == 16 and np.bincount(folds.fold).max() <= 5

    def expected(chosen: np.ndarray, asked: np.ndarray) -> np.ndarray:
        some = chosen[rows]
        logits = fit_gaussians(Moments.of(queries[rows[some]], np.eye(5)[classes[some]])).scores(asked)
        return logits - logits.mean(1, keepdims=True)

    np.testing.assert_allclose(queries @ term.linear.T + term.bias, expected(np.ones(45, bool), queries), atol=1e-6)
    for own, out in folds.splits:
        np.testing.assert_allclose(term.left_out[own], expected(~out, queries[own]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("text", [False, True])
@pytest.mark.parametrize("name", ["auto", *WITH])
def test_probabilities_are_those_of_new_images(name: str, text: bool) -> None:
    drawn = images_of(400, text=text, seed=3)
    images = only(drawn, np.arange(400) < 40)
    if name == "zero-shot" and not text:
        with pytest.raises(IosrFastError, match="no text embeddings"):
            fit_multi_label(images, name)
        return
    fit = fit_multi_label(images, name)
    logits, labels = score(fit.plan, drawn.embeddings[40:]).astype(np.float64), drawn.labels[40:]
    assert mean_average_precision(labels, logits) > 0.8
    assert abs(sigmoid(logits).mean() - labels.mean()) < 0.08
    assert fit.log_loss == pytest.approx(float((np.logaddexp(0, logits) - labels * logits).mean()), abs=0.15)
    assert 0.7 < fit.average_precision <= 1.0 and fit.scored == 5
    np.testing.assert_allclose(logits[:9], score_reference(fit.plan, drawn.embeddings[40:49]), rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("text", [False, True])
def test_one_image_a_class_takes_a_rule(text: bool) -> None:
    drawn = images_of(300, text=text, seed=4)
    rows = np.array([np.flatnonzero(drawn.labels[:, c] & (drawn.labels.sum(1) == 1))[0] for c in range(5)])
    fit = fit_multi_label(only(drawn, rows))
    logits = score(fit.plan, drawn.embeddings)
    assert fit.scored == 0 and np.isnan(fit.average_precision) and np.isnan(fit.log_loss)
    assert mean_average_precision(drawn.labels, logits) > 0.6
    assert 0.05 < sigmoid(logits.astype(np.float64)).mean() < 0.5


@pytest.mark.parametrize(("name", "text"), [("tip-adapter", True), ("proker++", False), ("zero-shot", True)])
def test_parameters_that_are_given_keep_their_ratio(name: str, text: bool) -> None:
    images, given = images_of(text=text), {} if name == "zero-shot" else {"alpha": 3.0, "beta": 2.0}
    fit, method = fit_multi_label(images, name, given, search=False), METHODS[name]
    assert fit.parameters == {**method.parameters, **given}
    expected = 20.0 * images.zero_shot()
    for term in multi_label_terms(images, method, method.which, fit.parameters).values():
        assert isinstance(term, KeyTerm)
        keys = images.rows(method.which).astype(np.float64)
        expected = expected + 3.0 * np.exp(-2.0 * (1 - keys @ keys.T)) @ term.values
    logits = score_reference(fit.plan, images.embeddings)
    np.testing.assert_allclose(logits, fit.factor * expected + fit.plan.bias, rtol=1e-4, atol=1e-4)


def test_thresholds_maximise_the_expected_f1() -> None:
    probabilities = np.random.default_rng(0).random((25, 3)) ** 2

    def expected(p: np.ndarray, least: float) -> float:
        members = p >= least
        return float(2 * p[members].sum() / (members.sum() + p.sum()))

    for p, threshold in zip(probabilities.T, f1_thresholds(probabilities), strict=True):
        assert expected(p, threshold) == pytest.approx(max(expected(p, least) for least in p))


def test_average_precision_is_scikit_learns(rng: np.random.Generator) -> None:
    labels = rng.random((40, 6)) < 0.3
    labels[:, 4] = False
    scores = np.round(rng.normal(size=(40, 6)) + labels, 1)  # with ties
    expected = average_precision_score(np.delete(labels, 4, 1), np.delete(scores, 4, 1), average="macro")
    assert mean_average_precision(labels, scores) == pytest.approx(expected)
    assert np.isnan(mean_average_precision(labels[:, 4:5], scores[:, 4:5]))


NAMES = np.array(["cat", "dog", "fox", "hen", "owl"])


def rows_and_sets() -> tuple[np.ndarray, list[set[str]], np.ndarray]:
    images = images_of(60)
    return images.embeddings.plain, [set(NAMES[row].tolist()) for row in images.labels], images.labels


def test_the_head_answers_in_the_form_of_its_labels() -> None:
    X, sets, indicator = rows_and_sets()
    by_sets, by_indicator = FewShotHead().fit(X, sets), FewShotHead().fit(X, indicator.astype(np.int8))
    assert by_sets.classes_.tolist() == NAMES.tolist() and by_indicator.classes_.tolist() == [*range(5)]
    members, answers = by_indicator.predict(X), by_sets.predict(X)
    assert members.shape == (60, 5) and members.dtype == np.int8
    assert answers.shape == (60,) and all(isinstance(answer, frozenset) for answer in answers)
    assert [set(NAMES[row > 0].tolist()) for row in members] == [set(answer) for answer in answers]
    logits = by_sets.decision_function(X)
    np.testing.assert_allclose(by_sets.predict_proba(X), 1 / (1 + np.exp(-logits.astype(np.float64))))
    expected = pytest.approx(average_precision_score(indicator, logits, average="macro"))
    assert by_sets.score(X, sets) == by_indicator.score(X, indicator) == expected
    assert by_sets.fit(X, [min(one, default="none") for one in sets]).predict(X).dtype.kind == "U"  # one label again


def test_lists_tuples_frozensets_and_sparse_indicators_are_read() -> None:
    X, sets, indicator = rows_and_sets()
    first = FewShotHead("tip-adapter").fit(X, sets).decision_function(X)
    forms = [[form(one) for one in sets] for form in (list, tuple, frozenset)]
    for labels in (*forms, csr_array(indicator.astype(int)), indicator.astype(int)):
        np.testing.assert_array_equal(FewShotHead("tip-adapter").fit(X, labels).decision_function(X), first)
    head = clone(FewShotHead("proker"))
    assert (cross_val_score(head, X, indicator.astype(int), cv=3, scoring="average_precision") > 0.6).all()


def test_two_images_and_labels_of_one_image_alone(rng: np.random.Generator) -> None:
    X = rng.standard_normal((6, 16))
    assert np.abs(FewShotHead().fit(X[:2], [{"a"}, {"b"}]).decision_function(X)).max() < 10  # rounding alone
    probabilities = FewShotHead().fit(X, [{"a", "b"}, *[set()] * 5]).predict_proba(X)
    assert (probabilities[0] > probabilities[1:]).all()


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([{"cat"}, "dog", {"cat", "dog"}], r"got 'dog' at position 1: write \{'dog'\}"),
        ([{"cat"}, {1}, {"dog"}], r"expected sets of class names, got int \(1\) in the one at position 1"),
        ([{"cat"}, {"dog"}], "for each of 3 images, got 2"),
        ([[0, 2, 1], [0, 1, 1], [1, 0, 0]], "expected an indicator .* of 0 and 1, or sets of names, got 2"),
        ([[0, 1], [0, 1, 1], [1, 0]], "a column for each class, got rows of '2', '3' values"),
        (np.array([[1, 0], [1, 0], [0, 0]]), "at least one image of each class, got none of the classes at '1'"),
        ([set(), set(), set()], "expected labels of at least one class, got empty sets alone"),
    ],
)
def test_wrong_labels_are_refused(labels: Any, message: str) -> None:
    with pytest.raises(IosrFastError, match=message):
        FewShotHead().fit(np.eye(3), labels)


def test_what_has_no_form_for_several_labels_is_refused() -> None:
    X, sets, _ = rows_and_sets()
    for name in sorted(set(METHODS) - set(WITH)):
        with pytest.raises(IosrFastError, match=f"^{name.replace('+', '[+]')} can't learn from several .*use 'auto'"):
            fit_multi_label(images_of(), name)
    with pytest.raises(IosrFastError, match="take no reducer"):
        FewShotHead("proker", reducer="centre").fit(X, sets)
    head = FewShotHead().fit(X, sets)
    with pytest.raises(IosrFastError, match="not among the 5 class names"):
        head.score(X, [{"eel"}] * len(X))
    for name, call in {
        "predict_sets": lambda: head.predict_sets(X),
        "unknown_score": lambda: head.unknown_score(X),
        "unknown_": lambda: head.unknown_,
        "calibration": head.calibration,
        "predict_jointly": lambda: head.predict_jointly(X),
        "audit": head.audit,
        "suggest": lambda: head.suggest(X, 3),
        r"predict\(unknown='reject'\)": lambda: head.predict(X, unknown="reject"),
    }.items():
        with pytest.raises(IosrFastError, match=f"^{name} is for one label a picture"):
            call()
