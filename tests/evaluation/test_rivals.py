"""scikit-learn's classifiers in the tables: fitted on the support set alone; support sets drawn from the largest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("sklearn", reason="scikit-learn comes with the sklearn extra")

from sklearn.linear_model import LogisticRegression

from iosr_fast.cli.evaluate import evaluate
from iosr_fast.evaluation.features import read_features
from iosr_fast.evaluation.rivals import RIVALS, fit_rival
from tests.conftest import unit_rows

CLASSES, WIDTH = 5, 12


@pytest.fixture
def file(rng: np.random.Generator, tmp_path: Path) -> Path:
    """Embeddings with texts; up to six support images a class."""
    centres = unit_rows(rng, CLASSES, WIDTH)
    arrays: dict[str, np.ndarray] = {"text": centres}
    for part, each in (("support1", 1), ("support6", 6), ("test", 9)):
        labels = rng.permutation(np.repeat(np.arange(CLASSES), each))
        arrays[f"{part}_y"] = labels
        arrays[f"{part}_x"] = (centres[labels] + 0.3 * rng.standard_normal((len(labels), WIDTH))).astype(np.float32)
    np.savez(tmp_path / "features.npz", **arrays)
    return tmp_path / "features.npz"


def rows_of(file: Path, *words: str) -> list[dict[str, Any]]:
    out = file.with_suffix(".json")
    out.unlink(missing_ok=True)
    evaluate(["features", str(file), "--json", str(out), *words], standalone_mode=False)
    return [row for row in json.loads(out.read_text()) if row["bench"] == "accuracy"]


def test_support_sets_are_drawn_from_the_largest(file: Path) -> None:
    source = read_features(file, [2, 5], seeds=3, use_text=False)
    whole = read_features(file, [6]).draw(6, 0).support
    known = {row.tobytes(): label for row, label in zip(whole.embeddings.plain, whole.labels, strict=True)}
    drawn = [source.draw(2, seed).support for seed in source.seeds]
    for support in drawn:
        assert support.text is None and support.counts.tolist() == [2] * CLASSES
        assert [known[row.tobytes()] for row in support.embeddings.plain] == support.labels.tolist()
    assert len({support.embeddings.plain.tobytes() for support in drawn}) == 3
    np.testing.assert_array_equal(source.draw(2, 1).support.embeddings.plain, drawn[1].embeddings.plain)
    with pytest.raises(ValueError, match="--shots below 6 with --seeds"):
        read_features(file, [6], seeds=2)


@pytest.mark.slow
def test_rows_of_scikit_learn(file: Path) -> None:
    rows = rows_of(file, "--methods", "gda", "scikit-learn", "--shots", "1", "6", "--reducers", "none")
    by_shots = {shots: [row["method"] for row in rows if row["shots"] == shots] for shots in (1, 6)}
    assert by_shots[6] == ["gda", *RIVALS]
    assert by_shots[1] == [name for name in by_shots[6] if name != "LinearDiscriminantAnalysis"]
    tuned_on = {(row["shots"], row["tuned_on"]) for row in rows if row["method"] in RIVALS}
    assert tuned_on == {(1, "none"), (6, "cross-validation")}
    task = read_features(file, [6]).draw(6, 0)
    row = next(row for row in rows if row["method"] == "LogisticRegression" and row["shots"] == 6)
    model = LogisticRegression(max_iter=300, **row["parameters"][0])
    model.fit(task.support.embeddings.plain, task.support.labels)
    assert row["mean"] == model.score(task.queries.plain, task.labels) > 0.8


@pytest.mark.slow
def test_no_test_image_has_a_part_in_their_parameters(file: Path, rng: np.random.Generator) -> None:
    support = read_features(file, [6]).draw(6, 0).support
    chosen = {name: fit_rival(name, support, 0)[1].parameters for name in RIVALS}
    arrays = dict(np.load(file))
    np.savez(file, **{**arrays, "test_y": rng.permutation(arrays["test_y"])})
    for row in rows_of(file, "--methods", "scikit-learn", "--shots", "6"):
        assert row["parameters"] == [chosen[row["method"]]]
        assert row["mean"] < 0.6
