"""evaluate --task audit and --task suggest: rows against the functions that they measure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.evaluation import audit_table
from iosr_fast.evaluation.audit_table import EXCHANGES, exchange_labels
from iosr_fast.evaluation.features import read_features
from iosr_fast.methods.label_noise import fit_label_noise
from iosr_fast.methods.left_out import left_out_logits
from iosr_fast.methods.support_set import make_support_set
from iosr_fast.methods.tuning.tune import tune
from tests.cli.runs import main, refused
from tests.conftest import unit_rows

CLASSES, WIDTH = 12, 16


@pytest.fixture
def file(rng: np.random.Generator, tmp_path: Path) -> Path:
    centres = unit_rows(rng, CLASSES, WIDTH)
    arrays: dict[str, np.ndarray] = {}
    for part, each in (("support2", 2), ("support8", 8), ("val", 20), ("test", 15)):
        labels = np.repeat(np.arange(CLASSES), each)
        arrays[f"{part}_y"] = labels
        arrays[f"{part}_x"] = (centres[labels] + 0.15 * rng.standard_normal((len(labels), WIDTH))).astype(np.float32)
    np.savez(tmp_path / "features.npz", **arrays)
    return tmp_path / "features.npz"


def rows_of(file: Path, *words: str) -> list[dict[str, Any]]:
    out = file.with_suffix(".json")
    out.unlink(missing_ok=True)
    main("evaluate", "features", file, *words, "--json", out)
    rows: list[dict[str, Any]] = json.loads(out.read_text())
    return rows


def test_exchanged_labels_are_a_share_between_classes(rng: np.random.Generator) -> None:
    labels = np.repeat(np.arange(6), 10)
    support = make_support_set(Embeddings(unit_rows(rng, 60, 8)), labels, None, 100.0, 6)
    exchanged, wrong = exchange_labels(support, 0.2, seed=3)
    assert wrong.sum() == 12 and (exchanged.counts == 10).all()
    place = {row.tobytes(): label for row, label in zip(support.embeddings.plain, labels, strict=True)}
    own = np.array([place[row.tobytes()] for row in exchanged.embeddings.plain])
    np.testing.assert_array_equal(own != exchanged.labels, wrong)
    assert not exchange_labels(support, 0.0, seed=3)[1].any()


def test_an_audit_row_is_what_the_suspicions_give(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit_table, "find_spec", lambda name: None)
    (row,) = rows_of(file, "--task", "audit", "--methods", "gda", "--shots", "8")
    assert (row["bench"], row["method"], row["shots"], len(row["draws"])) == ("audit", "gda", 8, EXCHANGES)
    assert row["auroc"] > 0.97 and row["precision"] > 0.8 and row["false_alarms"] < 1 and row["wrong"] == 10
    support, wrong = exchange_labels(read_features(file, [8]).draw(8, 0).support, 0.1, seed=1)
    noise = fit_label_noise(left_out_logits(support, tune("gda", support).compile), support.labels)
    most = np.argsort(-noise.surprise)[: wrong.sum()]
    draw = row["draws"][1]
    assert draw["precision"] == pytest.approx(wrong[most].mean())
    assert (draw["listed"], draw["found"]) == ((noise.wrong > 0.5).sum(), (wrong & (noise.wrong > 0.5)).sum())


def test_ours_is_level_with_cleanlab(file: Path) -> None:
    pytest.importorskip("cleanlab")
    ours, rival = rows_of(file, "--task", "audit", "--shots", "8")
    assert rival["method"] == "cleanlab" and rival["auroc"] > 0.9
    assert ours["auroc"] > rival["auroc"] - 0.01 and ours["precision"] > rival["precision"] - 0.05


def test_a_suggest_row_gains_over_random_choices(file: Path) -> None:
    rows = rows_of(file, "--task", "suggest", "--shots", "2")
    by_start = {row["start"]: row for row in rows}
    assert list(by_start) == ["nothing", "half", "all"] and {row["bench"] for row in rows} == {"suggest"}
    first = by_start["nothing"]
    assert (first["budget"], first["pool"], first["method"]) == (2 * CLASSES, 20 * CLASSES, "gda")
    assert first["gain"] == pytest.approx(100 * (first["suggested"] - first["random"]))
    assert first["suggested_classes"] > first["random_classes"] and first["gain"] > 2
    assert by_start["half"]["suggested_classes"] > by_start["half"]["random_classes"]
    assert by_start["all"]["random_classes"] == by_start["all"]["suggested_classes"] == CLASSES
    assert by_start["all"]["budget"] == CLASSES


@pytest.mark.parametrize("task", ["audit", "suggest"])
def test_scikit_learns_alone_are_refused(task: str, file: Path) -> None:
    assert f"--task {task}, got none" in " ".join(
        refused("evaluate", "features", file, "--task", task, "--methods", "NearestCentroid").split()
    )
