"""evaluate --task unknown: its figures against fit_unknown called anew; both thresholds; single scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from iosr_fast.evaluation.features import read_features
from iosr_fast.evaluation.unknown_table import OWN, SPLITS, half_of
from iosr_fast.methods.conformal import leave_out_labels, of_validation
from iosr_fast.methods.promise import threshold
from iosr_fast.methods.tuning.tune import tune
from iosr_fast.methods.unknown import fit_unknown
from iosr_fast.scoring.score import score
from iosr_fast.utils.ranking import auroc
from tests.cli.runs import main, refused
from tests.conftest import unit_rows

CLASSES, WIDTH = 12, 16
EACH = {"support1": 1, "support4": 4, "val": 8, "test": 15}


@pytest.fixture
def file(rng: np.random.Generator, tmp_path: Path) -> Path:
    return write(rng, tmp_path / "features.npz", CLASSES)


def write(rng: np.random.Generator, path: Path, classes: int) -> Path:
    centres = unit_rows(rng, classes, WIDTH)
    arrays: dict[str, np.ndarray] = {}
    for part, each in EACH.items():
        labels = np.repeat(np.arange(classes), each)
        arrays[f"{part}_y"] = labels
        arrays[f"{part}_x"] = (centres[labels] + 0.2 * rng.standard_normal((len(labels), WIDTH))).astype(np.float32)
    np.savez(path, **arrays)
    return path


def rows_of(file: Path, *words: str) -> list[dict[str, Any]]:
    out = file.with_suffix(".json")
    out.unlink(missing_ok=True)
    main("evaluate", "--features", file, "--task", "unknown", *words, "--json", out)
    rows: list[dict[str, Any]] = json.loads(out.read_text())
    return rows


@pytest.mark.parametrize("tune_on", ["validation", "loo"])
def test_a_row_is_what_fit_unknown_gives(file: Path, tune_on: str, capsys: pytest.CaptureFixture[str]) -> None:
    (row,) = rows_of(file, "--methods", "gda", "--shots", "4", "--tune", tune_on)
    task = read_features(file, [4]).draw(4, 0)
    figures: dict[str, list[float]] = {name: [] for name in ("auroc", "fpr95", "kept", "kept_left_out")}
    halves = [half_of(task, 0, k) for k in range(SPLITS)]
    for half in halves:
        fitted = fit_unknown(half.task.support)
        values, known = fitted.score(half.queries), half.known
        figures["auroc"].append(auroc(-values[known], -values[~known]))
        figures["fpr95"].append((values[~known] <= np.quantile(values[known], 0.95)).mean())
        figures["kept_left_out"].append((values[known] <= fitted.threshold(0.95)).mean())
        assert half.task.validation is not None
        limit = -threshold(-fitted.score(half.task.validation[0]), 0.95)
        limit = limit if tune_on == "validation" else fitted.threshold(0.95)
        figures["kept"].append((values[known] <= limit).mean())
    for name, values in figures.items():
        assert row[name] == pytest.approx(np.mean(values)), name
    assert (row["bench"], row["data"], row["method"], row["shots"]) == ("unknown", "features.npz", "gda", 4)
    assert row["auroc"] > 0.9 and len(row["splits"]) == SPLITS and row["best_auroc"] == max(row["scores"].values())
    assert {*OWN, "regression", "mahalanobis"} <= row["scores"].keys() and "text cosine" not in row["scores"]
    validation = task.validation if tune_on == "validation" else (None, None)
    tuned = tune("gda", task.support, *validation)
    plan = tuned.compile(task.support)
    by_left_out = leave_out_labels(task.support, tuned.compile)
    by_used = of_validation(plan, *task.validation) if tune_on == "validation" else by_left_out
    logits, rows = score(plan, task.queries), np.arange(len(task.labels))
    for name, images in (("coverage", by_used), ("coverage_left_out", by_left_out)):
        assert row[name] == pytest.approx(images.sets(logits, 0.9)[rows, task.labels].mean()), name
    assert row["size"] == pytest.approx(by_used.sets(logits, 0.9).sum(1).mean())
    assert row["left_out_error"] == pytest.approx(by_left_out.reliability.error)
    printed = " ".join(capsys.readouterr().out.split())
    assert f"{100 * row['auroc']:.1f}" in printed and "points on the mean" in printed


def test_halves_are_halves_and_hold_no_image_of_another_class(file: Path) -> None:
    task = read_features(file, [4]).draw(4, 0)
    halves = [half_of(task, 0, k) for k in range(SPLITS)]
    assert len({half.known.tobytes() for half in halves}) == SPLITS
    for half in halves:
        known = np.unique(task.labels[half.known])
        assert len(known) == CLASSES // 2 and half.task.support.n_classes == CLASSES // 2
        inside = np.isin(task.support.labels, known)
        assert (half.task.support.embeddings.plain == task.support.embeddings.plain[inside]).all()
        assert (known[half.task.labels] == task.labels[half.known]).all()
        validation = half.task.validation
        assert validation is not None and len(validation[1]) == EACH["val"] * CLASSES // 2


def test_one_shot_promises_nothing_by_left_out_images(file: Path) -> None:
    one, four = rows_of(file, "--tune", "loo")
    assert one["auroc"] > 0.7 and one["kept"] is None and one["coverage"] is None and one["size"] is None
    assert one["expected_auroc"] is None and four["expected_auroc"] > 0.9 and four["kept"] > 0.85
    by_validation, _ = rows_of(file)
    assert by_validation["kept"] > 0.85 and by_validation["kept_left_out"] is None


def test_bad_input_is_refused(rng: np.random.Generator, tmp_path: Path) -> None:
    small = write(rng, tmp_path / "small.npz", 3)
    words = ("evaluate", "features", small, "--task", "unknown")
    assert "expected at least 4 classes" in refused(*words)
    pytest.importorskip("sklearn", reason="scikit-learn comes with the sklearn extra")
    assert "expected --methods other than scikit-learn's" in refused(*words, "--methods", "NearestCentroid")
