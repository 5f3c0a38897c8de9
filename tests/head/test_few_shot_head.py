"""FewShotHead: scikit-learn's own checks, the float64 reference, and the Classifier that it has to equal."""

from __future__ import annotations

import pickle
import subprocess
import sys
import warnings
from typing import Any

import numpy as np
import pytest

pytest.importorskip("sklearn", reason="scikit-learn comes with the sklearn extra")

from sklearn.base import clone
from sklearn.exceptions import NotFittedError as SklearnNotFittedError
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import Normalizer
from sklearn.utils.estimator_checks import check_estimator

from iosr_fast import FewShotHead, IosrFastError
from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.exceptions import NotFittedError
from iosr_fast.head.embedding_rows import unit
from iosr_fast.methods import METHODS
from iosr_fast.methods.joint import predict_jointly
from iosr_fast.scoring.reference import score_reference, softmax
from tests.store.live_parts import random_queries, small_classifier

IMAGES_ALONE = [name for name, method in METHODS.items() if method.needs_support and not method.needs_text]
PLAIN = [name for name in IMAGES_ALONE if not METHODS[name].needs_adapter]
Data = tuple[np.ndarray, np.ndarray, np.ndarray]


def clusters(rng: np.random.Generator, classes: int, shots: int, width: int) -> Data:
    """Rows of any length about a centre a class, in random order; integer labels; the centres."""
    centres = rng.standard_normal((classes, width))
    labels = rng.permutation(np.repeat(np.arange(classes), shots))
    rows = (centres[labels] + 0.3 * rng.standard_normal((len(labels), width))) * rng.uniform(0.1, 50, (len(labels), 1))
    return rows, labels, centres


def unit64(rows: np.ndarray) -> np.ndarray:
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True))


@pytest.mark.slow
def test_passes_the_checks_of_scikit_learn() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of rows of zeros, which a check has
        results = check_estimator(FewShotHead(), on_fail="raise")
    skipped = [result["check_name"] for result in results if result["status"] == "skipped"]
    assert skipped in ([], ["check_array_api_input"])  # that one runs where SCIPY_ARRAY_API is set
    passed = sum(result["status"] == "passed" for result in results)
    print(f"check_estimator: {passed} checks passed, {len(skipped)} skipped")
    assert passed == len(results) - len(skipped) > 40


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.needs_support])
@pytest.mark.parametrize(("classes", "shots", "width", "n"), [(2, 3, 7, 1), (5, 3, 33, 67), (3, 18, 16, 130)])
def test_logits_equal_the_reference(
    rng: np.random.Generator, name: str, classes: int, shots: int, width: int, n: int
) -> None:
    rows, labels, centres = clusters(rng, classes, shots, width)
    both = np.hstack([rows, rows + rng.standard_normal(rows.shape)])
    reducer = "centre" if METHODS[name].reducible else None
    head = FewShotHead(name, tune="none", reducer=reducer, text=centres, tau=30.0, adapted=True).fit(both, labels)
    queries = rng.standard_normal((n, 2 * width))
    expected = score_reference(head.plan_, Embeddings(unit64(queries[:, :width]), unit64(queries[:, width:])))
    logits = head.decision_function(queries)
    assert logits.dtype == np.float32 and np.abs(expected).max() > 0
    tolerance = 2e-5 * np.abs(expected).max()
    probabilities = head.predict_proba(queries)
    np.testing.assert_allclose(probabilities, softmax(expected), atol=tolerance)
    np.testing.assert_allclose(probabilities.sum(1), 1.0, rtol=1e-12)
    if classes == 2:
        assert logits.shape == (n,)
        expected = expected[:, 1] - expected[:, 0]
        np.testing.assert_array_equal(head.predict(queries), (logits > 0).astype(int))
    else:
        np.testing.assert_array_equal(head.predict(queries), logits.argmax(1))
    np.testing.assert_allclose(logits, expected, atol=tolerance)


def test_logits_equal_the_papers_formula(rng: np.random.Generator) -> None:
    rows, labels, centres = clusters(rng, 4, 5, 24)
    head = FewShotHead("tip-adapter", alpha=2.0, beta=3.0, tune="none", text=7.0 * centres, tau=20.0).fit(rows, labels)
    queries = rng.standard_normal((9, 24))
    affinity = np.exp(-3.0 * (1.0 - unit64(queries) @ unit64(rows).T)) @ np.eye(4)[labels]
    expected = 20.0 * unit64(queries) @ unit64(centres).T + 2.0 * affinity
    np.testing.assert_allclose(head.decision_function(queries), expected, atol=1e-4)
    assert head.tuned_ is None and head.parameters_ == {"alpha": 2.0, "beta": 3.0} and head.reducer_ == "none"
    without = FewShotHead("tip-adapter", alpha=2.0, beta=3.0, tune="none").fit(rows, labels)
    np.testing.assert_allclose(without.decision_function(queries), 2.0 * affinity, atol=1e-5)


@pytest.mark.isa
@pytest.mark.parametrize("name", list(METHODS))
@pytest.mark.parametrize("reducer", ["none", "pca"])
def test_a_row_has_the_same_logits_in_any_batch(rng: np.random.Generator, name: str, reducer: str) -> None:
    rows, labels, centres = clusters(rng, 6, 4, 40)
    head = FewShotHead(
        name, tune="none", reducer=reducer if METHODS[name].reducible else None, text=centres, adapted=True
    )
    head.fit(np.hstack([rows, rows[:, ::-1]]), labels)
    queries = rng.standard_normal((151, 80)).astype(np.float32)
    logits = head.decision_function(queries)
    np.testing.assert_array_equal(np.concatenate([head.decision_function(row[None]) for row in queries]), logits)
    order = rng.permutation(len(queries))
    np.testing.assert_array_equal(head.decision_function(queries[order]), logits[order])
    np.testing.assert_array_equal(head.decision_function(np.asfortranarray(queries)), logits)


@pytest.mark.parametrize("name", list(METHODS))
def test_the_order_of_support_rows_does_not_count(rng: np.random.Generator, name: str) -> None:
    rows, labels, centres = clusters(rng, 4, 5, 20)
    both, order = np.hstack([rows, rows[:, ::-1]]), rng.permutation(len(rows))
    reducer = "pca" if METHODS[name].reducible else None
    head = FewShotHead(name, tune="none", reducer=reducer, text=centres, adapted=True)
    queries = rng.standard_normal((30, 40))
    logits = head.fit(both, labels).decision_function(queries)
    again = head.fit(both[order], labels[order]).decision_function(queries)
    np.testing.assert_allclose(again, logits, atol=2e-5 * np.abs(logits).max())


@pytest.mark.parametrize("fit", [{}, {"method": "auto", "alpha": None, "beta": None}, {"reducer": "pca:3"}])
def test_equals_a_classifier_on_its_embeddings(rng: np.random.Generator, fit: dict[str, Any]) -> None:
    classifier = small_classifier(**fit)
    support = classifier.support_
    given = {"method": "tip-adapter++", "alpha": 40.0, "beta": 5.0} | fit
    head = FewShotHead(**given, text=support.text, tau=support.tau, adapted=True)
    head.fit(np.hstack([support.embeddings.plain, support.embeddings.adapted]), support.labels)
    assert (head.method_, head.reducer_) == (classifier.method_, classifier.reducer_)
    assert head.parameters_ == pytest.approx(classifier.parameters_, rel=1e-4)
    ours, theirs = head.plan_, classifier.plan_
    for name in ("text", "keys", "weights", "values", "linear", "bias", "class_offsets"):
        assert (getattr(ours, name) is None) == (getattr(theirs, name) is None), name
        if getattr(ours, name) is not None:
            np.testing.assert_allclose(getattr(ours, name), getattr(theirs, name), atol=1e-5)
    queries = random_queries(rng, 40)
    expected = classifier.snapshot().score(queries)
    logits = head.decision_function(np.hstack([queries.plain, queries.adapted]))
    np.testing.assert_allclose(logits, expected, atol=1e-4 * np.abs(expected).max())
    assert head.tuned_ is None or head.tuned_.accuracy == classifier.tuned_.accuracy


@pytest.mark.parametrize(
    "names",
    [
        np.array(["fox", "ant", "cat"]),
        np.array(["fox", "ant", "cat"], dtype=object),
        np.array([7, -2, 40]),
        np.array([2.0, 0.0, 1.0]),
    ],
)
def test_labels_come_back_as_they_were_given(rng: np.random.Generator, names: np.ndarray) -> None:
    rows, labels, centres = clusters(rng, 3, 4, 12)
    head = FewShotHead("gda").fit(rows.tolist(), names[labels].tolist())
    assert head.classes_.tolist() == sorted(names.tolist())
    predicted = head.predict(centres)
    assert predicted.tolist() == names.tolist() and type(predicted.tolist()[0]) is type(names.tolist()[0])
    assert head.score(rows, names[labels]) == 1.0 and head.n_features_in_ == 12
    two = FewShotHead("gda").fit(rows[labels < 2], labels[labels < 2] == 1)
    assert two.predict(centres[:2]).tolist() == [False, True]


def test_works_in_cross_validation_grid_search_and_pipeline(rng: np.random.Generator) -> None:
    rows, labels, _ = clusters(rng, 3, 6, 12)
    head = FewShotHead("tip-adapter", tune="none")
    assert cross_val_score(head, rows, labels, cv=3).tolist() == [1.0, 1.0, 1.0]
    names = [name for name in PLAIN if METHODS[name].reducible]
    search = GridSearchCV(head, {"method": names, "reducer": ["none", "centre"]}, cv=2).fit(rows, labels)
    assert (
        len(search.cv_results_["params"]) == 2 * len(names) and np.isfinite(search.cv_results_["mean_test_score"]).all()
    )
    assert search.best_score_ == 1.0
    assert make_pipeline(Normalizer(), head).fit(rows, labels).score(rows, labels) == 1.0
    assert (
        clone(head).get_params() == head.get_params() and repr(head) == "FewShotHead(method='tip-adapter', tune='none')"
    )
    again = pickle.loads(pickle.dumps(head.fit(rows, labels)))
    np.testing.assert_array_equal(again.decision_function(rows), head.decision_function(rows))


def test_adapted_embeddings_are_the_second_half(rng: np.random.Generator) -> None:
    rows, labels, _ = clusters(rng, 4, 5, 16)
    other = rng.standard_normal(rows.shape)
    options: dict[str, Any] = {"alpha": 1.0, "beta": 4.0}
    plain = FewShotHead("tip-adapter", **options).fit(rows, labels)
    doubled = FewShotHead("tip-adapter++", adapted=True, **options).fit(np.hstack([other, rows]), labels)
    assert doubled.n_features_in_ == 32 and doubled.plan_.query == "adapted"
    queries = rng.standard_normal((11, 16))
    logits = doubled.decision_function(np.hstack([rng.standard_normal((11, 16)), queries]))
    np.testing.assert_array_equal(logits, plain.decision_function(queries))
    auto = FewShotHead(adapted=True).fit(np.hstack([other, rows]), labels)  # plain embeddings are noise here
    assert METHODS[auto.method_].needs_adapter and auto.tuned_.accuracy > 0.9


def test_many_classes_of_one_row_are_no_reason_to_warn(rng: np.random.Generator) -> None:
    rows, labels, _ = clusters(rng, 30, 1, 24)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        FewShotHead("gda", tune="none").fit(rows, labels)


def test_one_row_a_class_takes_the_rule_of_thumb(rng: np.random.Generator) -> None:
    rows, labels, centres = clusters(rng, 5, 1, 24)
    alone = FewShotHead().fit(rows, labels)
    assert METHODS[alone.method_].weighted and alone.tuned_.protocol == "one-shot"
    assert FewShotHead("zero-shot", text=centres).fit(rows, labels).predict(centres).tolist() == list(range(5))


def test_rows_of_zeros_are_left_out_with_a_warning(rng: np.random.Generator) -> None:
    rows, labels, _ = clusters(rng, 3, 4, 8)
    more, others = np.vstack([np.zeros((1, 8)), rows]), np.append(2, labels)
    with pytest.warns(UserWarning, match="1 of 13 rows of X hold zeros only, the first is row 0: left out"):
        head = FewShotHead("tip-adapter", tune="none").fit(more, others)
    assert len(head.plan_.keys) == 12
    with pytest.warns(UserWarning, match="their cosines count as 0"):
        assert np.isfinite(head.predict_proba(more)).all()
    zeros = np.where((labels == 1)[:, None], 0.0, rows)
    with (
        pytest.warns(UserWarning),
        pytest.raises(IosrFastError, match="a row other than zero for each class, got none of"),
    ):
        head.fit(zeros, labels)


@pytest.mark.parametrize(
    ("options", "change", "message"),
    [
        ({}, "one class", "at least two classes, got one class: np.int64\\(0\\)|one class: 0"),
        ({"method": "tipx"}, "", "expected a method of .*, got 'tipx'"),
        ({"method": "tip-x"}, "", "no text embeddings; give text="),
        ({"method": "zero-shot"}, "", "no text embeddings; give text="),
        ({"method": "tip-adapter++"}, "", "expected adapted=True and X of \\(n, 2 D\\)"),
        ({"adapted": True}, "odd", "an even number of columns, for adapted=True, got 7"),
        ({"text": np.ones((2, 8))}, "", "expected text of shape \\(3, 8\\).*got \\(2, 8\\)"),
        ({"text": np.eye(3, 8) * [[1], [0], [1]]}, "", "text rows other than zero, got zeros in row 1"),
        ({"text": np.full((3, 8), np.nan)}, "", "text contains NaN"),
        ({"method": "gda", "beta": 1.0}, "", "gda has the parameters \\['alpha'\\], got \\['beta'\\]"),
        ({"method": "gda", "alpha": -1.0}, "", "expected alpha of gda from 0"),
        ({"alpha": 1.0}, "", "'auto' chooses by leave-one-out"),
        ({"method": "gda", "reducer": "whiten"}, "", "expected a reducer of"),
        ({"method": "gda", "tune": "grid"}, "", "expected tune to be 'loo' or 'none'"),
        ({"tau": -1.0}, "", "expected tau"),
        ({"key_precision": "fp8"}, "", "expected a key precision of fp32"),
        ({}, "nan", "contains NaN"),
        ({}, "labels", "inconsistent numbers of samples"),
    ],
)
def test_bad_input_is_named(rng: np.random.Generator, options: dict[str, Any], change: str, message: str) -> None:
    rows, labels, _ = clusters(rng, 3, 3, 8)
    if change == "one class":
        labels = np.zeros_like(labels)
    elif change == "odd":
        rows = rows[:, :7]
    elif change == "nan":
        rows[2, 1] = np.nan
    elif change == "labels":
        labels = labels[1:]
    with pytest.raises(IosrFastError, match=message):
        FewShotHead(**options).fit(rows, labels)


def test_queries_are_checked(rng: np.random.Generator) -> None:
    rows, labels, _ = clusters(rng, 3, 3, 8)
    head = FewShotHead("gda")
    for error in (NotFittedError, SklearnNotFittedError):
        with pytest.raises(error, match="FewShotHead instance is not fitted yet"):
            head.predict(rows)
    with pytest.raises(IosrFastError, match="X has 7 features, but FewShotHead is expecting 8"):
        head.fit(rows, labels).predict(rows[:, :7])


def test_lengths_of_rows_do_not_count(rng: np.random.Generator) -> None:
    rows, labels, _ = clusters(rng, 3, 3, 8)
    scale = 10.0 ** rng.uniform(-200, 200, (len(rows), 1))
    one, other = (FewShotHead("gda").fit(part, labels) for part in (rows, rows * scale))
    np.testing.assert_allclose(one.decision_function(rows), other.decision_function(rows * scale), rtol=1e-4, atol=1e-4)


def test_a_missing_scikit_learn_is_named() -> None:
    code = (
        "import sys; sys.modules['sklearn'] = None\n"
        "import iosr_fast\n"
        "try:\n    iosr_fast.FewShotHead\n"
        "except iosr_fast.exceptions.MissingPackageError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install 'iosr_fast[sklearn]'" in done.stdout


def test_rows_classified_together() -> None:
    rng = np.random.default_rng(5)
    centres = rng.standard_normal((4, 16))
    labels, truth = np.arange(12) % 4, np.arange(400) % 4
    rows, queries = (centres[c] + 0.9 * rng.standard_normal((len(c), 16)) for c in (labels, truth))
    head = FewShotHead("gda").fit(rows, np.array(list("abcd"))[labels])
    joint = head.predict_jointly(queries)
    again = predict_jointly(head._head.support, head._head.config.compile, Embeddings(unit(queries)))
    np.testing.assert_array_equal(joint.probabilities, again.probabilities)
    expected = np.array(list("abcd"))[truth]
    assert not joint.refused and (joint.labels == expected).mean() > head.score(queries, expected)
    with pytest.raises(NotFittedError):
        FewShotHead().predict_jointly(queries)
    one_shot = FewShotHead("gda").fit(centres, list("abcd"))
    alone = one_shot.predict_jointly(queries)
    assert "one support image" in alone.refused
    np.testing.assert_allclose(alone.probabilities, one_shot.predict_proba(queries), atol=1e-6)


def test_unknown_rows_are_rejected_and_sets_of_labels_given(rng: np.random.Generator) -> None:
    X, y, centres = clusters(rng, 8, 6, 24)
    names = np.array(["abcdefgh"[c] for c in y])
    head = FewShotHead(method="gda").fit(X, names)
    others = rng.standard_normal((40, 24))
    queries = np.concatenate([centres + 0.3 * rng.standard_normal((8, 24)), others])
    scores = head.unknown_score(queries)
    embeddings = Embeddings(unit(queries))
    assert (scores == head.unknown_.score(embeddings)).all() and scores[8:].min() > scores[:8].max()
    labels = head.predict(queries, unknown="reject", keep=0.9)
    assert (labels[8:] == np.array(None)).all() and (labels[:8] != np.array(None)).mean() > 0.7
    named = head.predict(queries, unknown="reject", unknown_label="none of these")
    assert set(named[8:]) == {"none of these"} and named.dtype.kind == "U"
    assert (head.predict(queries) != "none of these").all()
    sets = head.predict_sets(centres, coverage=0.9)
    assert [list(one) for one in sets] == [[label] for label in "abcdefgh"]
    assert head.calibration().n_images == 48 and head.calibration().accuracy > 0.95
    integers = FewShotHead(method="gda").fit(X, y)
    assert integers.predict(queries, unknown="reject", unknown_label="?")[8:].tolist() == ["?"] * 40


def test_another_fit_tells_other_unknown_rows(rng: np.random.Generator) -> None:
    X, y, centres = clusters(rng, 8, 6, 24)
    head = FewShotHead(method="gda").fit(X[y < 4], y[y < 4])
    assert head.unknown_score(centres)[4:].min() > head.unknown_score(centres)[:4].max()
    before, confident = head.unknown_, head.calibration()
    head.fit(X, y)
    assert head.unknown_ is not before and head.calibration() is not confident
    assert head.unknown_score(centres).max() < head.unknown_.threshold(0.95)
    sharpened = FewShotHead(method="gda").fit(X, y, unknown_images=rng.standard_normal((30, 24)))
    assert sharpened.unknown_.names[-1] == "nearest unknown key"
    assert (sharpened.predict_proba(X) == head.predict_proba(X)).all()


def test_unknown_rows_need_a_fit_and_a_promise_that_can_be_kept(rng: np.random.Generator) -> None:
    X, y, _ = clusters(rng, 4, 2, 24)
    for call in (FewShotHead().unknown_score, FewShotHead().predict_sets):
        with pytest.raises(NotFittedError):
            call(X)
    with pytest.raises(NotFittedError):
        FewShotHead().calibration()
    head = FewShotHead(method="gda").fit(X, y)
    assert np.isfinite(head.unknown_score(X)).all()
    with pytest.raises(IosrFastError, match=r"0\.95 of the pictures needs at least 19 .* got 8"):
        head.predict(X, unknown="reject")
    with pytest.raises(IosrFastError, match=r"0\.9 of the pictures needs at least 9 .* got 8"):
        head.predict_sets(X)
    with pytest.raises(IosrFastError, match="expected coverage above 0 and below 1"):
        head.predict_sets(X, coverage=90)
    with pytest.raises(IosrFastError, match="expected unknown to be 'reject'"):
        head.predict(X, unknown="yes")
    with pytest.raises(IosrFastError, match="that no class has"):
        head.predict(X, unknown="reject", unknown_label=y[0], keep=0.5)
    with pytest.raises(IosrFastError, match="expected two or more unknown images"):
        head.fit(X, y, unknown_images=X[:1])


def test_unknown_rows_by_adapted_embeddings_where_the_method_compares_them(rng: np.random.Generator) -> None:
    X, y, _ = clusters(rng, 6, 4, 24)
    both = np.concatenate([rng.standard_normal(X.shape), X], axis=1)
    for method, adapted in (("gda++", True), ("gda", False)):
        head = FewShotHead(method=method, adapted=True).fit(both, y)
        assert any(name.endswith("adapted") for name in head.unknown_.names) is adapted
        assert np.isfinite(head.unknown_score(both)).all()
