"""evaluate --task joint: its rows against predict_jointly called anew; folders of few classes; what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from iosr_fast.evaluation import joint_table
from iosr_fast.evaluation.calibration import measure_probabilities
from iosr_fast.evaluation.features import read_features
from iosr_fast.evaluation.joint_table import FEWEST, FOLDERS, few_classes
from iosr_fast.evaluation.tasks import Task
from iosr_fast.methods.joint import JointPrediction, predict_jointly
from iosr_fast.methods.tuning.tune import tune
from iosr_fast.scoring.score import score
from tests.cli.runs import main, refused
from tests.conftest import unit_rows

CLASSES, WIDTH, EACH = 12, 16, 15


@pytest.fixture
def file(rng: np.random.Generator, tmp_path: Path) -> Path:
    centres = unit_rows(rng, CLASSES, WIDTH)
    arrays: dict[str, np.ndarray] = {}
    for part, each in (("support1", 1), ("support4", 4), ("test", EACH)):
        labels = np.repeat(np.arange(CLASSES), each)
        arrays[f"{part}_y"] = labels
        arrays[f"{part}_x"] = (centres[labels] + 0.25 * rng.standard_normal((len(labels), WIDTH))).astype(np.float32)
    np.savez(tmp_path / "features.npz", **arrays)
    return tmp_path / "features.npz"


def rows_of(form: str, file: Path, *words: str) -> list[dict[str, Any]]:
    out = file.with_suffix(".json")
    out.unlink(missing_ok=True)
    main("evaluate", form, file, "--task", "joint", *words, "--json", out)
    rows: list[dict[str, Any]] = json.loads(out.read_text())
    return rows


@pytest.mark.parametrize("form", ["--features", "features"])
def test_a_row_is_what_predict_jointly_gives(form: str, file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (row,) = rows_of(form, file, "--methods", "gda", "--shots", "4")
    task = read_features(file, [4]).draw(4, 0)
    tuned = tune("gda", task.support)
    alone = (score(tuned.compile(task.support), task.queries).argmax(1) == task.labels).mean()
    joint = predict_jointly(task.support, tuned.compile, task.queries)
    expected = measure_probabilities(joint.probabilities, task.labels)
    assert (row["bench"], row["method"], row["shots"], row["tuned_on"]) == ("joint", "gda", 4, "loo")
    assert row["alone"] == alone and row["joint"] == expected.accuracy
    assert row["gain"] == pytest.approx(100 * (expected.accuracy - alone))
    (draw,) = row["draws"]
    assert draw["images"] == CLASSES * EACH and draw["refused"] == joint.refused
    assert draw["log_loss_joint"] == pytest.approx(expected.log_loss)
    assert draw["left_out"] == [joint.left_out_alone, joint.left_out_joint]
    assert len(row["few_draws"]) == FOLDERS
    for draw, classes in zip(row["few_draws"], few_classes(task, 0), strict=True):
        rows = np.isin(task.labels, classes)
        again = predict_jointly(task.support, tuned.compile, task.queries[rows])
        assert (draw["images"], draw["classes"]) == (FEWEST * EACH, FEWEST)
        assert draw["joint"] == (again.labels == task.labels[rows]).mean()
    assert row["few_gain"] == pytest.approx(100 * np.mean([d["joint"] - d["alone"] for d in row["few_draws"]]))
    printed = capsys.readouterr().out
    assert f"{100 * row['alone']:.1f}" in printed and f"{row['few_gain']:+.2f}" in printed


def test_auto_is_the_default_and_a_refusal_is_told(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, four = rows_of("features", file)
    assert (one["method"], one["shots"], four["shots"]) == ("auto", 1, 4)
    assert one["refused"] == 1 and one["few_refused"] == FOLDERS and one["gain"] == one["few_gain"] == 0
    assert f"refused: {one['draws'][0]['refused']}" in " ".join(capsys.readouterr().out.split())
    assert one["draws"][0]["left_out"] == [None, None]


def test_test_labels_are_not_seen(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder in which every image is judged as the first class: the scores say so, and gain is negative."""

    def first_class(support: Any, compile: Any, queries: Any) -> JointPrediction:
        probabilities = np.zeros((len(queries), support.n_classes), np.float32)
        probabilities[:, 0] = 1
        return JointPrediction(probabilities, np.arange(support.n_classes))

    monkeypatch.setattr(joint_table, "predict_jointly", first_class)
    (row,) = rows_of("features", file, "--methods", "gda", "--shots", "4")
    assert row["joint"] == pytest.approx(1 / CLASSES) and row["gain"] < -50 and row["refused"] == 0


def test_folders_of_few_classes(rng: np.random.Generator, file: Path) -> None:
    task = read_features(file, [4]).draw(4, 0)
    folders = [sorted(classes.tolist()) for classes in few_classes(task, 0)]
    assert folders == [sorted(classes.tolist()) for classes in few_classes(task, 0)]
    assert folders != [sorted(classes.tolist()) for classes in few_classes(task, 1)]
    assert all(len(set(classes)) == FEWEST for classes in folders) and len({tuple(one) for one in folders}) > 1
    many = Task(task.support, task.queries, np.arange(len(task.labels)) % 70)
    assert [len(classes) for classes in few_classes(many, 0)] == [7] * FOLDERS


def test_scikit_learn_alone_is_refused(file: Path) -> None:
    words = ("--task", "joint", "--methods", "NearestCentroid")
    pytest.importorskip("sklearn", reason="scikit-learn comes with the sklearn extra")
    assert "expected --methods other than scikit-learn's" in refused("evaluate", "features", file, *words)
