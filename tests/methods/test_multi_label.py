"""Images with several labels: formulas against float64, leave-one-out against refits, every executor, and the head."""

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
from iosr_fast.methods.log_loss import fit_binary, sigmoid
from iosr_fast.methods.multi_label import SHRINKAGE, f1_thresholds, fit_multi_label
from iosr_fast.methods.multi_label_set import KeyTerm, LinearTerm, MultiLabelSet
from iosr_fast.methods.stack import _spread_folds, linear_discriminant, multi_label_discriminant
from iosr_fast.methods.support_set import make_support_set
from iosr_fast.scoring.dispatch import REGISTRY
from iosr_fast.scoring.reference import score_reference
from iosr_fast.utils.ranking import mean_average_precision

WITH = [name for name, method in METHODS.items() if callable(method.multi_label)]


def images_of(
    n: int = 31, classes: int = 5, width: int = 24, seed: int = 0, text: bool = True, views: bool = False
) -> MultiLabelSet:
    """Rows that hold the centres of their classes, some of none."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(classes, width))
    labels = rng.random((n, classes)) < 0.3
    labels[: 2 * classes] |= np.tile(np.eye(classes, dtype=bool), (2, 1))[:n]

    def unit(rows: np.ndarray) -> np.ndarray:
        return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)

    def draw() -> Embeddings:
        return Embeddings(*(unit(labels @ centres + noise * rng.normal(size=(n, width))) for noise in (1.5, 1.0)))

    texts = unit(centres + rng.normal(size=centres.shape)) if text else None
    return MultiLabelSet(draw(), labels, texts, 20.0, draw() if views else None)


def without(images: MultiLabelSet, row: int) -> MultiLabelSet:
    keep = np.arange(len(images.labels)) != row
    queries = None if images.queries is None else images.queries[keep]
    return replace(images, embeddings=images.embeddings[keep], labels=images.labels[keep], queries=queries)


def term_at(images: MultiLabelSet, which: str, keys: np.ndarray, term: KeyTerm, beta: float, row: int) -> np.ndarray:
    query = images.rows(which, queries=True)[row].astype(np.float64)  # type: ignore[arg-type]
    return np.exp(-beta * (1 - keys @ query)) @ term.values


@pytest.mark.parametrize("views", [False, True])
@pytest.mark.parametrize("name", [name for name in WITH if METHODS[name].needs_support])
def test_left_out_terms_are_those_of_a_fit_without_the_image(name: str, views: bool) -> None:
    images, method = images_of(views=views), METHODS[name]
    setting: Mapping[str, float] = {"beta": 2.0, "ridge": 0.1}
    assert callable(method.multi_label)
    terms = method.multi_label(images, method.which, setting)
    for row in range(len(images.labels)):
        others = without(images, row)
        keys = others.rows(method.which).astype(np.float64)
        for key, term in method.multi_label(others, method.which, setting).items():
            if isinstance(term, LinearTerm):
                continue
            expected = term_at(images, method.which, keys, term, 2.0, row)
            if name.startswith("tip-adapter"):  # n keys of the label in place of n - 1
                expected *= np.where(images.labels[row], images.counts / np.maximum(images.counts - 1, 1), 1.0)
            np.testing.assert_allclose(terms[key].left_out[row], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["proker", "proker++", "stack", "stack++"])
def test_regression_is_that_of_the_formula(name: str) -> None:
    images, method = images_of(), METHODS[name]
    keys = images.rows(method.which).astype(np.float64)
    kernel = np.exp(-1.5 * (1 - keys @ keys.T))
    target = images.labels - images.labels.mean(0)
    if name.startswith("proker"):
        assert images.text is not None
        target = 20.0 * (target - images.embeddings.plain.astype(np.float64) @ images.text.T)
    assert callable(method.multi_label)
    term, *_ = method.multi_label(images, method.which, {"beta": 1.5, "ridge": 0.3}).values()
    assert isinstance(term, KeyTerm)
    np.testing.assert_allclose(term.values, np.linalg.solve(kernel + 0.3 * np.eye(len(keys)), target), atol=1e-9)


@pytest.mark.parametrize("which", ["plain", "adapted"])
def test_a_discriminant_is_that_of_each_image_given_once_a_label(which: Any) -> None:
    images = images_of(n=45)
    rows, classes = np.nonzero(images.labels)
    term = multi_label_discriminant(images, which)

    def expected(chosen: np.ndarray, queries: np.ndarray) -> np.ndarray:
        some = chosen[rows]
        twice = make_support_set(images.embeddings[rows[some]], classes[some], None, 20.0, 5)
        linear, bias = linear_discriminant(
            images.rows(which)[rows[some]][np.argsort(classes[some], kind="stable")], twice
        )
        logits = queries @ linear.T + bias
        return logits - logits.mean(1, keepdims=True)

    queries = images.rows(which).astype(np.float64)
    np.testing.assert_allclose(
        queries @ term.linear.T + term.bias, expected(np.ones(45, bool), queries), rtol=1e-6, atol=1e-6
    )
    folds = _spread_folds(images.labels)
    assert folds.max() == 15 and np.bincount(folds).max() <= 5
    for fold in range(16):
        out = folds == fold
        np.testing.assert_allclose(term.left_out[out], expected(~out, queries[out]), rtol=1e-6, atol=1e-6)


def test_binary_fit_is_the_minimum() -> None:
    rng = np.random.default_rng(1)
    labels = rng.random((57, 4)) < 0.3
    parts = rng.normal(size=(3, 57, 4)) + np.array([1.0, 0.5, -0.5])[:, None, None] * labels
    used = np.array([True, True, False, True])
    fit = fit_binary(list(parts), labels, used, SHRINKAGE)

    def loss(weights: np.ndarray, bias: np.ndarray, common: float) -> float:
        logits = np.einsum("k,knc->nc", weights, parts[:, :, used]) + bias
        pairs = np.logaddexp(0, logits) - labels[:, used] * logits
        return float(pairs.sum() + SHRINKAGE / 2 * ((bias - common) ** 2).sum() + 0.005 * (weights**2).sum())

    least = loss(fit.weights, fit.bias[used], fit.common)
    assert (fit.weights >= 0).all() and fit.weights[2] == 0 and fit.bias[2] == fit.common
    for _ in range(200):
        moved = rng.normal(size=8) * 1e-3
        assert loss(np.maximum(fit.weights + moved[:3], 0), fit.bias[used] + moved[3:6], fit.common + moved[6]) > least


@pytest.mark.parametrize("impl", [entry.name for entry in REGISTRY if "cpu" in entry.devices])
@pytest.mark.parametrize("name", WITH)
def test_every_executor_gives_the_logits_of_the_formula(name: str, impl: str) -> None:
    for seed, (n, classes, width) in enumerate([(31, 5, 24), (13, 3, 7), (67, 9, 33)]):
        images = images_of(n, classes, width, seed)
        given = {key: 2.0 for key in ("alpha", "ridge") if key in METHODS[name].parameters}
        plan = fit_multi_label(images, name, given, search=False).plan
        expected = score_reference(plan, images.as_queries)
        np.testing.assert_allclose(score(plan, images.as_queries, impl), expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("text", [False, True])
@pytest.mark.parametrize("name", ["auto", *WITH])
def test_probabilities_are_those_of_new_images(name: str, text: bool) -> None:
    drawn = images_of(400, text=text, seed=3)
    images = replace(drawn, embeddings=drawn.embeddings[:40], labels=drawn.labels[:40])
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


@pytest.mark.parametrize("text", [False, True])
def test_one_image_a_class_takes_a_rule(text: bool) -> None:
    drawn = images_of(300, text=text, seed=4)
    rows = np.array([np.flatnonzero(drawn.labels[:, c] & (drawn.labels.sum(1) == 1))[0] for c in range(5)])
    images = replace(drawn, embeddings=drawn.embeddings[rows], labels=drawn.labels[rows])
    fit = fit_multi_label(images)
    logits = score(fit.plan, drawn.embeddings)
    assert fit.scored == 0 and np.isnan(fit.average_precision) and np.isnan(fit.log_loss)
    assert mean_average_precision(drawn.labels, logits) > 0.6
    assert 0.05 < sigmoid(logits.astype(np.float64)).mean() < 0.5


@pytest.mark.parametrize("text", [False, True])
@pytest.mark.parametrize("name", ["tip-adapter", "proker++", "zero-shot"])
def test_parameters_that_are_given_keep_their_ratio(name: str, text: bool) -> None:
    if name == "zero-shot" and not text:
        return
    images, given = images_of(text=text), {} if name == "zero-shot" else {"alpha": 3.0, "beta": 2.0}
    fit = fit_multi_label(images, name, given, search=False)
    assert fit.parameters == {**METHODS[name].parameters, **given}
    logits = score_reference(fit.plan, images.embeddings)
    expected = 0.0 if images.text is None else 20.0 * (images.embeddings.plain @ images.text.T)
    method = METHODS[name]
    assert callable(method.multi_label)
    for term in method.multi_label(images, method.which, fit.parameters).values():
        assert isinstance(term, KeyTerm)
        keys = images.rows(method.which).astype(np.float64)
        expected = expected + 3.0 * np.exp(-2.0 * (1 - keys @ keys.T)) @ term.values
    assert fit.plan.bias is not None
    np.testing.assert_allclose(logits, fit.factor * expected + fit.plan.bias, rtol=1e-4, atol=1e-4)


def test_thresholds_maximise_the_expected_f1() -> None:
    probabilities = np.random.default_rng(0).random((25, 3)) ** 2
    thresholds = f1_thresholds(probabilities)

    def expected(p: np.ndarray, least: float) -> float:
        members = p >= least
        return float(2 * p[members].sum() / (members.sum() + p.sum()))

    for p, threshold in zip(probabilities.T, thresholds, strict=True):
        assert expected(p, threshold) == pytest.approx(max(expected(p, least) for least in p))


def test_average_precision_is_scikit_learns() -> None:
    rng = np.random.default_rng(0)
    labels = rng.random((40, 6)) < 0.3
    labels[:, 4] = False
    scores = np.round(rng.normal(size=(40, 6)) + labels, 1)  # with ties
    expected = average_precision_score(np.delete(labels, 4, 1), np.delete(scores, 4, 1), average="macro")
    assert mean_average_precision(labels, scores) == pytest.approx(expected)
    assert np.isnan(mean_average_precision(labels[:, 4:5], scores[:, 4:5]))


def test_methods_without_such_a_form_say_why() -> None:
    for name in sorted(set(METHODS) - set(WITH)):
        with pytest.raises(
            IosrFastError, match=f"^{name.replace('+', '[+]')} can't learn from several labels .*use 'auto'"
        ):
            fit_multi_label(images_of(), name)
        assert len(str(METHODS[name].multi_label)) > 20


NAMES = np.array(["cat", "dog", "fox", "hen", "owl"])


def rows_and_sets(seed: int = 0) -> tuple[np.ndarray, list[set[str]], np.ndarray]:
    images = images_of(60, seed=seed)
    return images.embeddings.plain, [set(NAMES[row].tolist()) for row in images.labels], images.labels


def test_the_head_answers_in_the_form_of_its_labels() -> None:
    X, sets, indicator = rows_and_sets()
    by_sets, by_indicator = FewShotHead().fit(X, sets), FewShotHead().fit(X, indicator.astype(np.int8))
    assert by_sets.classes_.tolist() == NAMES.tolist() and by_indicator.classes_.tolist() == [*range(5)]
    members = by_indicator.predict(X)
    assert members.shape == (60, 5) and members.dtype == np.int8
    answers = by_sets.predict(X)
    assert answers.shape == (60,) and all(isinstance(answer, frozenset) for answer in answers)
    assert [set(NAMES[row > 0].tolist()) for row in members] == [set(answer) for answer in answers]
    logits = by_sets.decision_function(X)
    np.testing.assert_allclose(by_sets.predict_proba(X), 1 / (1 + np.exp(-logits.astype(np.float64))))
    assert (
        by_sets.score(X, sets)
        == by_indicator.score(X, indicator)
        == pytest.approx(average_precision_score(indicator, logits, average="macro"))
    )
    assert by_sets.fit(X, [min(one, default="none") for one in sets]).predict(X).dtype.kind == "U"  # one label again


def test_lists_tuples_and_frozensets_are_sets() -> None:
    X, sets, _ = rows_and_sets()
    first = FewShotHead("tip-adapter").fit(X, sets).decision_function(X)
    for form in (list, tuple, frozenset):
        again = FewShotHead("tip-adapter").fit(X, [form(one) for one in sets])
        assert np.array_equal(again.decision_function(X), first)


def test_a_sparse_indicator_is_one() -> None:
    X, _, indicator = rows_and_sets()
    dense, sparse = indicator.astype(int), csr_array(indicator.astype(int))
    head = FewShotHead("tip-adapter").fit(X, sparse)
    members = head.predict(X)
    assert members.dtype == dense.dtype and np.array_equal(members, head.fit(X, dense).predict(X))
    assert head.score(X, sparse) == head.score(X, dense)


def test_two_images_that_say_nothing_of_each_other() -> None:
    assert FewShotHead().fit(np.eye(2, 16), [{"a"}, {"b"}]).predict(np.eye(2, 16)).shape == (2,)
    X = np.random.default_rng(0).standard_normal((2, 16))  # their left-out terms are nothing but rounding
    assert np.abs(FewShotHead().fit(X, [{"a"}, {"b"}]).decision_function(X)).max() < 10


def test_parts_far_from_zero_are_weighed_as_those_about_it() -> None:
    rng = np.random.default_rng(0)
    for n in (4, 8, 40):
        labels, part = np.arange(n)[:, None] == np.arange(2), rng.standard_normal((n, 2))
        for shrinkage in (1.0, 1e6):
            near, far = (fit_binary([one], labels, np.ones(2, bool), shrinkage) for one in (part, part + 12.0))
            assert far.loss == pytest.approx(near.loss, abs=1e-6)
            assert far.common + 12.0 * far.weights[0] == pytest.approx(near.common, abs=1e-3)


def test_all_labels_may_be_those_of_one_image() -> None:
    X = np.random.default_rng(0).standard_normal((6, 8))
    probabilities = FewShotHead().fit(X, [{"a", "b"}, *[set()] * 5]).predict_proba(X)
    assert (probabilities[0] > probabilities[1:]).all()


def test_cross_validation_takes_an_indicator() -> None:
    X, _, indicator = rows_and_sets()
    scores = cross_val_score(clone(FewShotHead("proker")), X, indicator.astype(int), cv=3, scoring="average_precision")
    assert (scores > 0.6).all()


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


def test_what_is_for_one_label_says_so() -> None:
    X, sets, _ = rows_and_sets()
    head = FewShotHead().fit(X, sets)
    calls = {
        "predict_sets": lambda: head.predict_sets(X),
        "unknown_score": lambda: head.unknown_score(X),
        "unknown_": lambda: head.unknown_,
        "calibration": lambda: head.calibration(),
        "predict_jointly": lambda: head.predict_jointly(X),
        "audit": lambda: head.audit(),
        "suggest": lambda: head.suggest(X, 3),
        r"predict\(unknown='reject'\)": lambda: head.predict(X, unknown="reject"),
    }
    for name, call in calls.items():
        with pytest.raises(IosrFastError, match=f"^{name} is for one label a picture"):
            call()
    with pytest.raises(IosrFastError, match="take no reducer"):
        FewShotHead("proker", reducer="centre").fit(X, sets)
    with pytest.raises(IosrFastError, match="not among the 5 class names"):
        head.score(X, [{"eel"}] * len(X))
