"""FewShotHead with several labels a row: the forms of labels and answers, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy.sparse import csr_array
from sklearn.metrics import average_precision_score

from iosr_fast import FewShotHead
from iosr_fast.exceptions import IosrFastError

NAMES = np.array(["cat", "dog", "fox", "hen", "owl"])


def rows_and_sets(rng: np.random.Generator) -> tuple[np.ndarray, list[set[str]], np.ndarray]:
    """60 rows that hold the centres of their classes, with the sets of their names and the indicator."""
    centres, indicator = rng.standard_normal((5, 24)), rng.random((60, 5)) < 0.3
    indicator[:10] |= np.tile(np.eye(5, dtype=bool), (2, 1))
    rows = indicator @ centres + 1.5 * rng.standard_normal((60, 24))
    return rows, [set(NAMES[row].tolist()) for row in indicator], indicator


def test_the_head_answers_in_the_form_of_its_labels(rng: np.random.Generator) -> None:
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
    for labels in ([list(one) for one in sets], [tuple(one) for one in sets], csr_array(indicator.astype(int))):
        np.testing.assert_array_equal(FewShotHead().fit(X, labels).decision_function(X), logits)
    assert by_sets.fit(X, [min(one, default="none") for one in sets]).predict(X).dtype.kind == "U"  # one label again


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


def test_what_is_for_one_label_is_refused(rng: np.random.Generator) -> None:
    X, sets, _ = rows_and_sets(rng)
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
