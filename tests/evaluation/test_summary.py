"""The summary of several data sets: means and gaps recomputed from the rows of accuracy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from iosr_fast.evaluation import sources
from iosr_fast.evaluation.accuracy import Draw, Result
from iosr_fast.evaluation.summary import summary_rows
from iosr_fast.exceptions import IosrFastError
from iosr_fast.methods.tuning.tuned import Tuned
from tests.cli.runs import main, refused
from tests.conftest import unit_rows
from tests.evaluation.test_evaluate import pictures_of

SHOTS = (1, 3)


def result(source: str, method: str, shots: int, accuracy: float, loss: float, error: float = 0.02) -> Result:
    reducer = "auto" if method == "auto" else "none"
    tuned = Tuned(method, reducer, {}, 0.5, 5, "loo")
    return Result(source, method, reducer, shots, (Draw(0, accuracy, 10, 5, tuned, 0.0, loss, error),))


def test_gaps_are_to_the_best_single_method_of_each_cell() -> None:
    results = [
        *(result("a", "gda", 1, 0.70, 1.0), result("a", "proker", 1, 0.72, 0.9), result("a", "auto", 1, 0.715, 0.8)),
        *(
            result("a", "gda", 4, 0.90, 0.5),
            result("a", "proker", 4, 0.90, 0.4),
            result("a", "auto", 4, 0.91, 0.3, 0.04),
        ),
        *(result("b", "gda", 4, 0.50, 2.0), result("b", "auto", 4, 0.49, 2.2)),
        *(result("a", "stack", 1, 0.74, 0.7), result("b", "stack", 4, 0.52, 0.9)),
        *(result("a", "LogisticRegression", 1, 0.73, 3.0), result("b", "LogisticRegression", 4, 0.40, float("nan"))),
    ]
    rows = {row["method"]: row for row in summary_rows(results)}
    auto = rows["auto"]
    assert auto["at"] == [["a", 1], ["a", 4], ["b", 4]] and auto["data"] == "a, b"
    assert auto["gaps"] == pytest.approx([0.5, -1.0, 1.0]) and auto["best"] == ["proker", "proker", "gda"]
    assert auto["gap_mean"] == pytest.approx(0.5 / 3) and auto["gap_worst"] == pytest.approx(1.0)
    assert auto["log_loss_gaps"] == pytest.approx([-0.1, -0.1, 0.2])
    assert auto["log_loss_gap_worst"] == pytest.approx(0.2) and auto["calibration_error_worst"] == 0.04
    assert auto["auto_ahead_mean"] == auto["auto_ahead_worst"] == 0
    assert rows["proker"]["at"] == [["a", 1], ["a", 4]] and rows["proker"]["gap_mean"] == 0
    assert rows["gda"]["gaps"] == pytest.approx([2.0, 0.0, 0.0])
    assert rows["stack"]["gaps"] == pytest.approx([-2.0, -2.0])
    linear = rows["LogisticRegression"]  # better than all single methods, and none of them
    assert linear["gaps"] == pytest.approx([-1.0, 10.0]) and linear["auto_ahead_worst"] == pytest.approx(-1.5)
    assert linear["log_loss"] is None and linear["log_loss_gap_mean"] == pytest.approx(2.1)
    assert [row["gap_mean"] for row in summary_rows(results)] == sorted(row["gap_mean"] for row in rows.values())
    json.dumps(list(rows.values()), allow_nan=False)


def test_without_a_single_method_there_are_no_gaps() -> None:
    (row,) = summary_rows([result("a", "auto", 1, 0.7, 1.0)])
    assert row["gap_mean"] is None and row["gaps"] == [None] and row["mean"] == 0.7


@pytest.fixture
def files(rng: np.random.Generator, tmp_path: Path) -> list[Path]:
    """Two sets of embeddings, the second without texts."""
    paths = []
    for name, classes in (("one", 4), ("two", 6)):
        centres = unit_rows(rng, classes, 12)
        arrays: dict[str, np.ndarray] = {"text": centres} if name == "one" else {}
        for part, each in (("support1", 1), ("support3", 3), ("test", 9)):
            labels = np.repeat(np.arange(classes), each)
            arrays[f"{part}_y"] = labels
            arrays[f"{part}_x"] = (centres[labels] + 0.3 * rng.standard_normal((len(labels), 12))).astype(np.float32)
        paths.append(tmp_path / f"{name}.npz")
        np.savez(paths[-1], **arrays)
    return paths


@pytest.mark.parametrize("form", ["features", "--features"])
def test_several_files_have_a_table_each_and_a_summary(
    form: str, files: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "rows.json"
    words = ("--methods", "zero-shot", "tip-adapter", "gda", "--reducers", "none", "--json", out, "--shots", *SHOTS)
    main("evaluate", form, *files, *words)
    rows: list[dict[str, Any]] = json.loads(out.read_text())
    printed = " ".join(capsys.readouterr().out.split())
    assert "one.npz: accuracy in %" in printed and "two.npz: accuracy in %" in printed
    assert "log-loss in nats / expected calibration error in % (15 bins of equal width)" in printed
    assert "left out: zero-shot" in printed and "summary over one.npz, two.npz." in printed
    accuracies = {(row["data"], row["shots"], row["method"]): row for row in rows if row["bench"] == "accuracy"}
    assert len(accuracies) == 2 * (3 + 2) and {row["data"] for row in rows if row["bench"] == "overlap"} == {
        *("one.npz", "two.npz")
    }
    for row in accuracies.values():
        assert row["log_loss"] == pytest.approx(np.mean(row["log_losses"])) and 0 <= row["calibration_error"] <= 1
        assert f"{row['log_loss']:.3f} / {100 * row['calibration_error']:.1f}" in printed
    summaries = {row["method"]: row for row in rows if row["bench"] == "summary"}
    assert {len(row["at"]) for row in summaries.values()} == {2, 4}
    for (data, shots, method), row in accuracies.items():
        best = max(other["mean"] for place, other in accuracies.items() if place[:2] == (data, shots))
        gap = summaries[method]["gaps"][summaries[method]["at"].index([data, shots])]
        assert gap == pytest.approx(100 * (best - row["mean"]))


def test_the_demo_may_stand_beside_files(
    files: list[Path], rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded = pictures_of(rng)
    monkeypatch.setattr(sources.demo, "encode_test", lambda: (encoded, ()))
    one, demo = sources.open_sources([str(files[0]), "demo"], [1, 3])
    assert (one.name, demo.name) == ("one.npz", "demo") and (one.seeds, demo.seeds) == ((0,), (0, 1, 2))
    assert demo.shots == (1, 3) and demo.notes == ()
    assert sources.open_sources(["demo"], seeds=2)[0].seeds == (0, 1)
    with pytest.raises(IosrFastError, match="--shots from 1 to 4"):
        sources.open_sources(["demo"], [4, 8])
    with pytest.raises(IosrFastError, match="feature files with --no-text, got demo"):
        sources.open_sources(["demo"], use_text=False)
    arrays = dict(np.load(files[0]))
    np.savez(files[0], **arrays, **{f"support8_{k}": arrays[f"test_{k}"] for k in "xy"})
    one, demo = sources.open_sources([str(files[0]), "demo"], [1, 8])
    assert one.shots == (1, 8) and demo.shots == (1,) and "without [8] shots" in demo.notes[0]


def test_what_several_files_must_not_be(files: list[Path], tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    twin = tmp_path / "other" / "one.npz"
    twin.write_bytes(files[0].read_bytes())
    assert "one.npz more than once; rename one" in refused("evaluate", "features", files[0], twin)
    assert "no feature file at" in refused("evaluate", "--features", files[0], tmp_path / "none.npz")
    words = ("--methods", "zero-shot", "--shots", "1")
    assert "two.npz: expected a method that the data allows" in refused("evaluate", "features", *files, *words)
