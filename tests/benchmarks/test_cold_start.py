"""The cold-start benchmark: every way gives the same label, in a process of its own, and nothing wrong is timed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytest.importorskip("open_clip")

from iosr_fast.benchmarks import cold_start, harness
from iosr_fast.encoders.projections import FILE as PROJECTIONS
from iosr_fast.encoders.runtimes.onnxruntime import FILE, WEIGHTS
from iosr_fast.utils.manifest import read_manifest
from tests.demo_cache import demo_bundle


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A folder with the demo's bundle, and the picture to classify."""
    folder = tmp_path_factory.mktemp("cold")
    bundle = demo_bundle(12, 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cold_start, "CLASSES", 12)
        patch.setattr(cold_start, "SHOTS", 3)
        patch.setattr("iosr_fast.evaluation.demo_bundle.make_demo_bundle", lambda out, *_: shutil.copytree(bundle, out))
        return folder, cold_start.make_bundle("demo", folder)


@pytest.fixture
def child(made: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """One real start of each way; what else the benchmark asks for is answered with it."""
    started: list[tuple[str, ...]] = []
    start, answers = cold_start.cold_start, {}

    def once(*arguments: str) -> dict[str, Any]:
        started.append(arguments)
        if arguments not in answers:
            answers[arguments] = start(*arguments)
        return dict(answers[arguments])

    monkeypatch.setattr(cold_start, "cold_start", once)
    monkeypatch.setattr(cold_start, "make_bundle", lambda model, folder: _linked(made, folder))
    return started


def _linked(made: tuple[Path, Path], folder: Path) -> Path:
    (folder / "bundle").symlink_to(made[0] / "bundle")
    return made[1]


@pytest.mark.slow
def test_rows_of_real_cold_starts(child: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "BURST_S", 0.0)
    rows = cold_start.run("demo", repeats=2)
    assert [row["impl"] for row in rows] == ["iosr-fast", *cold_start.RIVALS]
    assert len(child) >= 4 * 3, "verified once, and started anew for each time that is taken"
    for row in rows:
        assert row["case"] == "demo" and row["torch_imported"] is (row["impl"] == "open-clip")
        assert min(row["import_ms"], row["load_ms"], row["predict_ms"], row["peak_memory_mb"]) > 0
        assert 0 < row["private_memory_mb"] < row["peak_memory_mb"]
        assert row["peak_memory_goal_mb"] == pytest.approx(1.3 * row["weights_mb"] + 150, abs=0.2)
    assert rows[0]["peak_memory_mb"] < rows[0]["peak_memory_goal_mb"] < rows[3]["peak_memory_mb"]


@pytest.mark.slow
def test_the_variant_holds_what_it_says(made: tuple[Path, Path], tmp_path: Path) -> None:
    bundle = made[0] / "bundle"
    cold_start.copy_bundle(bundle, tmp_path / "graph", cold_start.put_weights_into_graph)
    assert set(read_manifest(tmp_path / "graph" / "engine", "engine")["files"]) == {FILE, PROJECTIONS}
    files = read_manifest(tmp_path / "graph", "classifier")["files"]
    assert f"engine/{FILE}" in files and f"engine/{WEIGHTS}" not in files
    assert (tmp_path / "graph" / "engine" / FILE).stat().st_size > (bundle / "engine" / WEIGHTS).stat().st_size


def test_wrong_starts_are_not_timed(made: tuple[Path, Path]) -> None:
    right = {"label": "a pear", "torch_imported": False}
    with pytest.raises(ArithmeticError, match="disagree"):
        cold_start.verify({"iosr-fast": [right], "open-clip": [{**right, "label": "a plum"}]})
    with pytest.raises(ArithmeticError, match=r"imported by \['iosr-fast'\]"):
        cold_start.verify({"iosr-fast": [{**right, "torch_imported": True}], "open-clip": [right]})
    cold_start.verify({"iosr-fast": [right], "open-clip": [{**right, "torch_imported": True}]})
    with pytest.raises(RuntimeError, match="a cold start failed: iosr-fast nowhere"):
        cold_start.cold_start("iosr-fast", "nowhere", json.dumps(None))
