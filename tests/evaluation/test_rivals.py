"""scikit-learn's classifiers in the tables: fitted on the support set alone; support sets drawn from the largest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss

from iosr_fast.cli.evaluate import evaluate
from iosr_fast.evaluation import rivals
from iosr_fast.evaluation.comparison import method_names, why_unavailable
from iosr_fast.evaluation.features import read_features
from iosr_fast.evaluation.rivals import DEFAULT_RIVALS, RIVALS
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


@pytest.mark.slow
def test_rows_of_scikit_learn(file: Path) -> None:
    rows = rows_of(file, "--methods", "gda", "scikit-learn", "--shots", "1", "6", "--reducers", "none")
    by_shots = {shots: [row["method"] for row in rows if row["shots"] == shots] for shots in (1, 6)}
    assert by_shots[6] == ["gda", *(name for name in RIVALS if not name.endswith("++"))]
    assert by_shots[1] == [name for name in by_shots[6] if name != "LinearDiscriminantAnalysis"]
    tuned_on = {(row["shots"], row["method"]): row["tuned_on"] for row in rows if row["method"] in RIVALS}
    for (shots, method), protocol in tuned_on.items():
        assert protocol == ("cross-validation" if shots == 6 and method != "NearestCentroid" else "none")
    task = read_features(file, [6]).draw(6, 0)
    row = next(row for row in rows if row["method"] == "LogisticRegression" and row["shots"] == 6)
    model = LogisticRegression(max_iter=1000, tol=1e-6, **row["parameters"][0])
    model.fit(task.support.embeddings.plain, task.support.labels)
    assert row["mean"] == pytest.approx(model.score(task.queries.plain, task.labels), abs=0.03) and row["mean"] > 0.7
    expected = log_loss(task.labels, model.predict_proba(task.queries.plain))
    assert row["log_loss"] == pytest.approx(expected, rel=0.05)
    one_image = {row["method"]: row["log_loss"] for row in rows if row["shots"] == 1}
    assert one_image["NearestCentroid"] is None and one_image["LogisticRegression"] > 0


def test_adapted_embeddings_are_a_rivals_too(file: Path, rng: np.random.Generator) -> None:
    arrays = dict(np.load(file))
    for part in ("support1", "support6", "test"):
        centres = np.eye(WIDTH)[arrays[f"{part}_y"]]
        arrays[f"{part}_xa"] = centres + 0.01 * rng.standard_normal(centres.shape)
    np.savez(file, **arrays)
    rows = rows_of(file, "--methods", "NearestCentroid", "NearestCentroid++", "LogisticRegression++", "--shots", "6")
    means = {row["method"]: row["mean"] for row in rows}
    assert means["NearestCentroid++"] == means["LogisticRegression++"] == 1 > means["NearestCentroid"]


def test_two_of_them_are_in_every_table(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = read_features(file, [6]).draw(6, 0)
    assert [name for name in method_names(["all"]) if name in RIVALS] == [*DEFAULT_RIVALS]
    reasons = {name: why_unavailable(name, task) for name in DEFAULT_RIVALS}
    assert {name for name, reason in reasons.items() if reason} == {n for n in DEFAULT_RIVALS if n.endswith("++")}
    assert str(reasons["LogisticRegression++"]).endswith("use 'LogisticRegression'")
    monkeypatch.setattr(rivals, "find_spec", lambda _: None)
    assert "pip install 'iosr_fast[sklearn]'" in str(why_unavailable("NearestCentroid", task))
