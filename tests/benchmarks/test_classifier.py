"""The classifier's benchmark: its rows, and that nothing wrong is timed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytest.importorskip("open_clip")

from iosr_fast.benchmarks import classifier, harness, pipeline  # noqa: E402
from iosr_fast.benchmarks.encoder_rivals import Embed, eagerly  # noqa: E402
from iosr_fast.clip.adapter import load_adapter  # noqa: E402
from iosr_fast.clip.load import load_clip  # noqa: E402
from iosr_fast.export.pretrained import DEMO_ADAPTER  # noqa: E402
from tests.demo_cache import demo_bundle  # noqa: E402


def in_eager(file: Path, pixels: np.ndarray, threads: int, spin: bool = True) -> Embed:
    """Instead of two exports: tests/benchmarks/test_pipeline.py and tests/benchmarks/test_encoder.py make those."""
    one = eagerly(load_clip("demo", None), load_adapter(DEMO_ADAPTER), pixels)
    return lambda: one()[file.name == "adapted.onnx" :][:1]


@pytest.mark.slow
def test_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(classifier, "make_demo_bundle", lambda folder, *arguments: demo_bundle(*arguments))
    monkeypatch.setattr(harness, "PAUSE_S", 0)
    monkeypatch.setattr(classifier, "write_passes", lambda *_: (Path("plain.onnx"), Path("adapted.onnx")))
    monkeypatch.setattr(classifier, "in_onnxruntime", in_eager)
    monkeypatch.setattr(classifier, "CLASSES", 12)
    monkeypatch.setattr(classifier, "SHOTS", 3)
    monkeypatch.setattr(classifier, "BATCHES", (1, 3))
    monkeypatch.setattr(classifier, "percentiles", lambda runs: right(runs, calls=4, block=2))
    right = PERCENTILES
    made = classifier.run(threads=1, repeats=1)
    assert [row["case"] for row in made] == ["demo-b1"] * 3 + ["demo-b3"] * 3
    assert [row["impl"] for row in made[:3]] == ["iosr_fast", "two-pass", "eager-two-pass"]
    for row in made:
        assert row["rate_unit"] == "images/s" and row["rate"] > 0 and row["images"] == int(row["case"][-1])
        assert set(row["ratios"]) == set(classifier.RIVALS) - {row["impl"]}
    for row in made[:3]:
        assert row["calls"] == 4 and 0 < row["p50_ms"] <= row["p99_ms"]
    assert "p50_ms" not in made[3]


PERCENTILES = classifier.percentiles


def test_each_candidate_has_its_own_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(10**6))
    monkeypatch.setattr(classifier.time, "perf_counter", lambda: next(clock) / 1e3)
    monkeypatch.setattr(harness, "PAUSE_S", 0)
    calls = {"a": 0, "b": 0}

    def called(name: str) -> np.ndarray:
        calls[name] += 1
        return np.zeros(1)

    told = classifier.percentiles({name: lambda name=name: called(name) for name in calls}, calls=200)
    assert told == {name: {"calls": 200, "p50_ms": 1.0, "p99_ms": 1.0} for name in calls}
    assert calls == {"a": 210, "b": 210}  # each block of 20 has one to warm up


def test_wrong_labels_are_not_timed() -> None:
    truth = np.arange(500)
    wrong = truth.copy()
    wrong[7] = 0
    pipeline.verify_labels({"iosr_fast": truth, "eager-two-pass": truth}, "eager-two-pass")
    with pytest.raises(ArithmeticError, match=r"iosr_fast: 99\.80% of the labels are right \(expected: 99\.9%\)"):
        pipeline.verify_labels({"iosr_fast": wrong, "eager-two-pass": truth}, "eager-two-pass")
