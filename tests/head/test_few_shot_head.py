"""FewShotHead: scikit-learn's own checks, the float64 reference, and the Classifier that it has to equal."""

from __future__ import annotations

import gc
import warnings
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.sparse import csr_array
from sklearn.exceptions import NotFittedError as SklearnNotFittedError
from sklearn.metrics import average_precision_score
from sklearn.utils.estimator_checks import check_estimator
from typer.testing import CliRunner

from iosr_fast import Classifier, FewShotHead, IosrFastError
from iosr_fast.cli import app
from iosr_fast.encoders.encoder import Embeddings, unit
from iosr_fast.exceptions import DamagedFileError, NotFittedError
from iosr_fast.methods import METHODS
from iosr_fast.scoring.reference import score_reference, softmax
from tests.interpreter import printed
from tests.methods.support_sets import Clusters
from tests.store.live_parts import random_queries, saved_classifier, small_classifier
from tests.store.manifests import rewrite_manifest

Data = tuple[np.ndarray, np.ndarray, np.ndarray]


def clusters(rng: np.random.Generator, classes: int, shots: int, width: int) -> Data:
    """Rows of any length about a centre a class, in random order; integer labels; the centres."""
    centres = rng.standard_normal((classes, width))
    labels = rng.permutation(np.repeat(np.arange(classes), shots))
    rows = (centres[labels] + 0.3 * rng.standard_normal((len(labels), width))) * rng.uniform(0.1, 50, (len(labels), 1))
    return rows, labels, centres


@pytest.mark.slow
def test_passes_the_checks_of_scikit_learn() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of rows of zeros, which a check has
        results = check_estimator(FewShotHead(), on_fail="raise")
    skipped = [result["check_name"] for result in results if result["status"] == "skipped"]
    assert skipped in ([], ["check_array_api_input"])  # that one runs where SCIPY_ARRAY_API is set
    assert sum(result["status"] == "passed" for result in results) == len(results) - len(skipped) > 40


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.needs_support])
@pytest.mark.parametrize(("classes", "n"), [(2, 1), (5, 67)])
def test_logits_equal_the_reference(rng: np.random.Generator, name: str, classes: int, n: int) -> None:
    width = 33
    rows, labels, centres = clusters(rng, classes, 3, width)
    both = np.hstack([rows, rows + rng.standard_normal(rows.shape)])
    reducer = "centre" if METHODS[name].takes_reducer else None
    head = FewShotHead(name, tune="none", reducer=reducer, text=centres, tau=30.0, adapted=True).fit(both, labels)
    queries = rng.standard_normal((n, 2 * width))
    expected = score_reference(head.plan_, Embeddings(unit(queries[:, :width]), unit(queries[:, width:])))
    logits, tolerance = head.decision_function(queries), 2e-5 * np.abs(expected).max()
    assert logits.dtype == np.float32 and tolerance > 0
    shares = softmax(expected / head.snapshot().temperature)
    np.testing.assert_allclose(head.predict_proba(queries), shares, atol=tolerance)
    if classes == 2:
        assert logits.shape == (n,)
        np.testing.assert_array_equal(head.predict(queries), (logits > 0).astype(int))
        expected = expected[:, 1] - expected[:, 0]
    else:
        np.testing.assert_array_equal(head.predict(queries), logits.argmax(1))
    np.testing.assert_allclose(logits, expected, atol=tolerance)


@pytest.mark.isa
@pytest.mark.parametrize("name", list(METHODS))
def test_a_row_has_the_same_logits_in_any_batch(rng: np.random.Generator, name: str) -> None:
    rows, labels, centres = clusters(rng, 6, 4, 40)
    reducer = "pca" if METHODS[name].takes_reducer else None
    head = FewShotHead(name, tune="none", reducer=reducer, text=centres, adapted=True)
    head.fit(np.hstack([rows, rows[:, ::-1]]), labels)
    queries = rng.standard_normal((151, 80)).astype(np.float32)
    logits = head.decision_function(queries)
    np.testing.assert_array_equal(np.concatenate([head.decision_function(row[None]) for row in queries]), logits)
    order = rng.permutation(len(queries))
    np.testing.assert_array_equal(head.decision_function(queries[order]), logits[order])


def test_equals_a_classifier_on_its_embeddings(rng: np.random.Generator) -> None:
    classifier = small_classifier(method="auto", alpha=None, beta=None)
    support, queries = classifier.support_, random_queries(rng, 40)
    head = FewShotHead(text=support.text, tau=support.tau, adapted=True)
    head.fit(np.hstack([support.embeddings.plain, support.embeddings.adapted]), support.labels)
    assert (head.method_, head.reducer_) == (classifier.method_, classifier.reducer_)
    expected = classifier.snapshot().score(queries)
    logits = head.decision_function(np.hstack([queries.plain, queries.adapted]))
    np.testing.assert_allclose(logits, expected, atol=1e-4 * np.abs(expected).max())
    explained = head.explain(np.hstack([queries.plain, queries.adapted]), top=1, nearest=2)
    assert [one.logit for one in explained] == logits.max(1).tolist() and len(explained[0].nearest) == 2


@pytest.mark.parametrize("names", [["fox", "ant", "cat"], [7, -2, 40], [2.0, 0.0, 1.0], [False, True]])
def test_labels_come_back_as_they_were_given(rng: np.random.Generator, names: list[Any]) -> None:
    rows, labels, centres = clusters(rng, len(names), 4, 12)
    given = [names[c] for c in labels]
    for y in (given, np.array(given), *([np.array(given, object)] if isinstance(names[0], str) else [])):
        head = FewShotHead("gda").fit(rows.tolist(), y)
        predicted = head.predict(centres).tolist()
        assert predicted == names and type(predicted[0]) is type(names[0]) and head.classes_.tolist() == sorted(names)
        assert head.score(rows, y) == 1.0 and head.n_features_in_ == 12


@pytest.mark.parametrize("options", [{}, {"method": "gda", "tune": "none"}, {"method": "tip-adapter", "alpha": 1.0}])
def test_the_memory_of_too_many_logits_is_named_before_it_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    monkeypatch.setattr("iosr_fast.methods.support_set.usable_memory", lambda: 8 << 30)
    rows, labels = np.random.default_rng(0).standard_normal((100_000, 2)), np.arange(100_000)
    with pytest.raises(IosrFastError, match=r"8\.0 GiB of memory, got 100,000 images of 100,000 .* take 74\.5 GiB"):
        FewShotHead(**options).fit(rows, labels)


def test_rows_of_zeros_are_left_out_with_a_warning(rng: np.random.Generator) -> None:
    rows, labels, _ = clusters(rng, 3, 4, 8)
    more, others = np.vstack([np.zeros((1, 8)), rows]), np.append(2, labels)
    with pytest.warns(UserWarning, match="1 of 13 rows of X hold zeros only, the first is row 0: left out"):
        head = FewShotHead("tip-adapter", tune="none").fit(more, others)
    assert len(head.plan_.keys) == 12
    with pytest.warns(UserWarning, match="their cosines count as 0"):
        assert np.isfinite(head.predict_proba(more)).all()
    zeros = np.where((labels == 1)[:, None], 0.0, rows)
    with pytest.warns(UserWarning), pytest.raises(IosrFastError, match="a row other than zero for each class"):
        head.fit(zeros, labels)


def test_promises_hold_on_noisier_pictures_if_they_rest_on_some_of_them() -> None:
    support, noisy = Clusters(8, width=32, noise=0.8), Clusters(8, width=32, noise=1.6)
    images, labels = support.queries(12, seed=0)
    head = FewShotHead("gda", alpha=1.0).fit(images.plain, np.array(list("abcdefgh"))[labels])
    (new, truth), (own, own_labels) = noisy.queries(200, seed=1), noisy.queries(40, seed=2)

    def held() -> tuple[float, float]:
        sets = head.predict_sets(new.plain, 0.9)
        covered = [name in found for name, found in zip(head.classes_[truth], sets, strict=True)]
        kept = head.predict(new.plain, unknown="reject", keep=0.9) != np.array(None)
        return float(np.mean(covered)), float(kept.mean())

    assert max(held()) < 0.8
    head.calibrate_on(own.plain, head.classes_[own_labels])
    assert min(held()) > 0.86 and 310 < head.calibration().n_images <= 320
    with pytest.raises(IosrFastError, match="the labels 'z' are not among the 8 class names"):
        head.calibrate_on(own.plain, np.full(320, "z"))


def test_what_promises_rest_on_goes_with_its_fit(rng: np.random.Generator) -> None:
    rows, labels, _ = clusters(rng, 3, 30, 8)
    head = FewShotHead("gda").fit(rows, labels)
    head.predict(rows, max_error=0.3)
    left_out = weakref.ref(head.snapshot().judged)
    head.fit(rows, labels)
    gc.collect()
    assert left_out() is None


def test_a_class_of_one_picture_is_named(rng: np.random.Generator) -> None:
    X, y = rng.standard_normal((32, 12)), np.repeat(["ant", "fig", "kiwi", "plum"], [16, 14, 1, 1])
    few, fewer = (FewShotHead("gda").fit(X[:n], y[:n]).snapshot().summary() for n in (31, 32))
    assert "'kiwi' has one picture: add a second; until" in few
    assert "'kiwi', 'plum' have one picture: add a second; until" in fewer


def test_groups_of_any_classes_leave_every_answer_finite(rng: np.random.Generator) -> None:
    for counts in rng.integers(1, 7, (12, 4)):  # of some folds a single class is left
        y = np.repeat(np.arange(4), counts)
        X = rng.standard_normal((4, 12))[y] + rng.standard_normal((len(y), 12))
        head = FewShotHead("gda").fit(X, y, groups=rng.integers(0, rng.integers(1, len(y)), len(y)))
        assert np.isfinite(head.unknown_score(X)).all() and np.isfinite(head.predict_jointly(X).probabilities).all()
        assert len(head.audit().classes) == 4


def test_bad_input_is_named(rng: np.random.Generator) -> None:
    rows, labels, _ = clusters(rng, 3, 3, 8)
    for message, options, X, y in [
        ("at least two classes, got one class: .*0", {}, rows, labels * 0),
        ("no text embeddings: take a CLIP, or in FewShotHead give text=", {"method": "tip-x"}, rows, labels),
        (r"in FewShotHead adapted=True and X of \(n, 2 D\)", {"method": "tip-adapter++"}, rows, labels),
        ("an even number of columns, for adapted=True, got 7", {"adapted": True}, rows[:, :7], labels),
        (r"expected text of shape \(3, 8\).*got \(2, 8\)", {"text": np.ones((2, 8))}, rows, labels),
        ("text rows other than zero, got zeros in row 1", {"text": np.eye(3, 8) * [[1], [0], [1]]}, rows, labels),
        ("expected tau", {"tau": -1.0}, rows, labels),
        ("contains NaN", {}, rows * np.nan, labels),
        ("inconsistent numbers of samples", {}, rows, labels[1:]),
    ]:
        with pytest.raises(IosrFastError, match=message):
            FewShotHead(**options).fit(X, y)
    head = FewShotHead("gda")
    for error in (NotFittedError, SklearnNotFittedError):
        for call in (head.predict, head.unknown_score, head.predict_jointly):
            with pytest.raises(error, match="FewShotHead instance is not fitted yet"):
                call(rows)
    with pytest.raises(IosrFastError, match="X has 7 features, but FewShotHead is expecting 8"):
        head.fit(rows, labels).predict(rows[:, :7])
    with pytest.raises(IosrFastError, match="expected two or more unknown images"):
        head.fit(rows, labels, unknown_images=rows[:1])


# --- saved and loaded ---


def answers(head: FewShotHead, X: Any) -> list[Any]:
    """What a head says of rows, and of its own."""
    sets = [list(one) for one in head.predict_sets(X, 0.8)]
    labels = head.predict(X, unknown="reject", keep=0.8)
    audit = [(one.image, one.suggested, one.suspicion) for one in head.audit().suspects]
    suggested = head.suggest(X, 5).rows.tolist()
    return [labels.tolist(), head.predict_proba(X).tolist(), sets, head.unknown_score(X).tolist(), audit, suggested]


@pytest.mark.parametrize("names", [["ant", "cat", "fox"], [-2, 7, 40], [0.0, 1.0, 2.0], [False, True]])
@pytest.mark.parametrize(("method", "text", "adapted"), [("auto", False, False), ("tip-adapter++", True, True)])
def test_a_loaded_head_answers_as_the_saved_one(
    rng: np.random.Generator, names: list[Any], method: str, text: bool, adapted: bool, tmp_path: Path
) -> None:
    rows, ids, centres = clusters(rng, len(names), 10, 16)
    X = np.hstack([rows, rows + rng.standard_normal(rows.shape)]) if adapted else rows
    X[3], y = 0, np.array(names)[ids]  # audit names rows by their positions in all of X
    table, head = pd.DataFrame(X).add_prefix("x"), FewShotHead(method, text=centres if text else None, adapted=adapted)
    with pytest.warns(UserWarning):
        head.fit(table, y, unknown_images=pd.DataFrame(rng.standard_normal((4, X.shape[1]))).add_prefix("x"))
    queries = table[4:]
    for _ in ("nothing left out yet", "what left-out rows say is stored"):
        head.save(tmp_path / "head")
        loaded = FewShotHead.load(tmp_path / "head")
        np.testing.assert_array_equal(loaded.decision_function(queries), head.decision_function(queries))
        assert loaded.classes_.dtype == head.classes_.dtype and loaded.n_features_in_ == X.shape[1]
        assert answers(loaded, queries) == answers(head, queries) and repr(loaded) == repr(head)
        given, stored = head.get_params(), loaded.get_params()
        if text:
            np.testing.assert_allclose(stored.pop("text"), unit(given.pop("text")), atol=1e-6)
        assert stored == given
    said = CliRunner().invoke(app, ["info", str(tmp_path / "head")]).stdout
    assert f"takes embeddings of {X.shape[1]} numbers" in said and f"method {head.method_}" in said
    digest = said.splitlines()[-1].removeprefix("digest ")
    FewShotHead.load(tmp_path / "head", expected_digest=digest)
    with pytest.raises(IosrFastError, match="it is another head than the pinned one"):
        FewShotHead.load(tmp_path / "head", expected_digest=f"sha256:{'0' * 64}")


def test_a_notebook_shows_parameters_then_accuracy_and_classes() -> None:
    head = FewShotHead("gda")
    assert head._repr_mimebundle_()["text/html"] == "<pre>FewShotHead(method=&#x27;gda&#x27;)</pre>"
    shown = head.fit(np.eye(12), ["a", "b"] * 6)._repr_mimebundle_(include=None)["text/html"]
    assert "<p>2 classes, 12 images, method gda</p>" in shown and "12 left-out support images right" in shown
    assert '<td>b</td><td class="number">6</td>' in shown


def test_a_repr_has_the_shape_of_text_alone() -> None:
    assert repr(FewShotHead("gda", text=np.eye(3, 384))) == "FewShotHead(method='gda', text=array of shape (3, 384))"


def test_what_can_not_be_loaded_is_not_saved(rng: np.random.Generator, tmp_path: Path) -> None:
    X, y, _ = clusters(rng, 3, 3, 8)
    days = np.array(["2024-01-01", "2024-01-02", "2024-01-03"], "datetime64[D]")
    for labels, message in (
        (days[y], "labels of text, integers.*got datetime64"),
        (np.array(["a ", "b", "c"])[y], "blanks"),
    ):
        with pytest.raises(IosrFastError, match=message):
            FewShotHead("gda").fit(X, labels).save(tmp_path / "head")
    with pytest.raises(NotFittedError):
        FewShotHead().save(tmp_path / "head")
    assert not (tmp_path / "head").exists()


def test_impossible_facts_and_other_folders_are_named(rng: np.random.Generator, tmp_path: Path) -> None:
    X, y, _ = clusters(rng, 3, 3, 8)
    folder, classifier = tmp_path / "head", saved_classifier(tmp_path / "classifier")
    FewShotHead("gda").fit(X, y).save(folder)
    for fact, message in (
        ({"labels": "int8"}, "300"),
        ({"labels": "complex64"}, "labels"),
        ({"columns": 3}, "columns"),
    ):
        rewrite_manifest(folder, **{"class_names": ["1", "2", "300"], "labels": "int64", "columns": None, **fact})
        with pytest.raises(DamagedFileError, match=f"not a complete head.*{message}"):
            FewShotHead.load(folder)
    with pytest.raises(DamagedFileError, match=r"to hold a head, got a classifier: Classifier\.load opens it"):
        FewShotHead.load(classifier)
    with pytest.raises(FileExistsError, match="is not replaced"):
        FewShotHead("gda").fit(X, y).save(classifier)


def test_a_saved_head_opens_as_a_classifier_of_rows(rng: np.random.Generator, tmp_path: Path) -> None:
    X, y, queries = clusters(rng, 3, 3, 8)
    head = FewShotHead("gda").fit(X, y)
    head.save(tmp_path / "head")
    classifier = Classifier.load(tmp_path / "head")
    assert classifier.predict(queries).tolist() == [str(label) for label in head.predict(queries).tolist()]
    assert classifier.score(X, y) == classifier.evaluate(X, y).accuracy == head.score(X, y)
    with pytest.raises(IosrFastError, match="no engine to choose"):
        classifier.optimize(X, y)
    classifier.open_log(tmp_path / "log.db")
    classifier.add_examples(classifier.classes_[0], 2.0 * queries[:1])
    classifier.save(tmp_path / "changed")
    changed = FewShotHead.load(tmp_path / "changed")
    assert len(changed.snapshot().examples) == len(X) + 1 and changed.classes_.tolist() == head.classes_.tolist()
    np.testing.assert_allclose(changed.predict_proba(queries), classifier.predict_proba(queries), atol=1e-6)
    classifier.rename_class(classifier.classes_[0], "no number")
    with pytest.raises(DamagedFileError, match="no number"):  # the labels of y are integers
        classifier.save(tmp_path / "renamed")
    assert not (tmp_path / "renamed").exists()
    for rows, wrong in ((queries[:, :7], "shape"), (np.zeros((2, 8)), "row 0"), (np.full(8, np.nan), "row 0")):
        with pytest.raises(IosrFastError, match=f"expected rows of 8 numbers.*{wrong}"):
            classifier.predict(rows)


# --- several labels a row ---

NAMES = np.array(["cat", "dog", "fox", "hen", "owl"])


def rows_and_sets(rng: np.random.Generator) -> tuple[np.ndarray, list[set[str]], np.ndarray]:
    """60 rows that hold the centres of their classes, with the sets of their names and the indicator."""
    centres, indicator = rng.standard_normal((5, 24)), rng.random((60, 5)) < 0.3
    indicator[:10] |= np.tile(np.eye(5, dtype=bool), (2, 1))
    rows = indicator @ centres + 1.5 * rng.standard_normal((60, 24))
    return rows, [set(NAMES[row].tolist()) for row in indicator], indicator


def test_answers_have_the_form_of_the_labels(rng: np.random.Generator, tmp_path: Path) -> None:
    X, sets, indicator = rows_and_sets(rng)
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
    for labels in ([tuple(one) for one in sets], csr_array(indicator.astype(int))):
        np.testing.assert_array_equal(FewShotHead().fit(X, labels).decision_function(X), logits)
    for number, head in enumerate((by_sets, by_indicator)):
        head.save(tmp_path / str(number))
        loaded = FewShotHead.load(tmp_path / str(number))
        np.testing.assert_array_equal(loaded.predict(X), head.predict(X))
        assert loaded.predict(X).dtype == head.predict(X).dtype
        assert loaded.score(X, sets if head is by_sets else indicator) == expected
    with pytest.raises(IosrFastError, match="not among the 5 class names"):
        by_sets.score(X, [{"eel"}] * len(X))
    for name, call in {
        "unknown_score": lambda: by_sets.unknown_score(X),
        "suggest": lambda: by_sets.suggest(X, 3),
        "predict with unknown or max_error": lambda: by_sets.predict(X, unknown="reject"),
    }.items():
        with pytest.raises(IosrFastError, match=f"^{name} is for one label a picture"):
            call()
    assert by_sets.fit(X, [min(one, default="none") for one in sets]).predict(X).dtype.kind == "U"  # one label again


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([{"cat"}, "dog", {"cat", "dog"}], r"got 'dog' at position 1: write \{'dog'\}"),
        ([{"cat"}, {1}, {"dog"}], r"expected sets of class names, got int \(1\) in the one at position 1"),
        ([[0, 2, 1], [0, 1, 1], [1, 0, 0]], "expected an indicator .* of 0 and 1, or sets of names, got 2"),
        ([[0, 1], [0, 1, 1], [1, 0]], "a column for each class, got rows of '2', '3' values"),
    ],
)
def test_wrong_sets_of_labels_are_refused(labels: Any, message: str) -> None:
    with pytest.raises(IosrFastError, match=message):
        FewShotHead().fit(np.eye(3), labels)


def test_a_missing_scikit_learn_is_named() -> None:
    code = (
        "import sys; sys.modules['sklearn'] = None\n"
        "import iosr_fast\n"
        "try:\n    iosr_fast.FewShotHead\n"
        "except iosr_fast.exceptions.MissingPackageError as error:\n    print(error)\n"
    )
    assert "pip install 'iosr_fast[sklearn]'" in printed(code)
