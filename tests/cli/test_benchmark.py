"""iosr-fast benchmark: a classifier's and an engine's times, verified first. No time is asserted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

pytest.importorskip("onnxruntime")
pytest.importorskip("torch")

from iosr_fast.cli import app, benchmark
from iosr_fast.encoders.encoder import Embeddings
from tests.demo_cache import demo_bundle


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "SECONDS", 0.0)
    monkeypatch.setattr(benchmark, "FEWEST", 3)


def run(*words: object) -> Any:
    return CliRunner().invoke(app, ["benchmark", *map(str, words), "--runtime", "onnxruntime"])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["classifier", "engine"])
def test_each_part_and_batch_has_a_row(kind: str, tmp_path: Path) -> None:
    folder = demo_bundle() if kind == "classifier" else demo_bundle() / "engine"
    done = run(folder, "--batch", "1", "3", "--json", tmp_path / "rows.json")
    assert done.exit_code == 0, done.output
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [(row["part"], row["batch"]) for row in rows] == [
        ("engine", 1),
        ("engine", 3),
        ("whole path", 1),
        ("whole path", 3),
    ]
    for row in rows:
        assert 0 < row["p50_ms"] <= row["p90_ms"] <= row["p99_ms"] and row["images_per_s"] > 0 and row["calls"] >= 3
        assert row["runtime"] == "onnxruntime" and row["precision"] == "fp32" and row["device"] and row["versions"]
        assert ("labels" in row["verified"]) is (kind == "classifier")
    assert len(done.stdout.splitlines()) == 3 + len(rows) and "p99 ms" in done.stdout


@pytest.mark.slow
def test_pictures_of_a_folder(tmp_path: Path) -> None:
    for name in ("a", "b"):
        Image.new("RGB", (90, 70), (len(name) * 40, 90, 10)).save(tmp_path / f"{name}.png")
    done = run(demo_bundle(), "--batch", "3", "--images", tmp_path)
    assert done.exit_code == 0 and f"3 images: {tmp_path}" in done.stdout
    (tmp_path / "empty").mkdir()
    done = run(demo_bundle(), "--images", tmp_path / "empty")
    assert done.exit_code == 2 and "expected images in" in done.output


class Jumbled:
    """An encoder that returns the rows of a batch in reverse."""

    def encode(self, pixels: np.ndarray) -> Embeddings:
        return Embeddings(pixels.reshape(len(pixels), -1)[::-1].astype(np.float32))


def test_an_engine_that_mixes_up_a_batch_is_not_timed(rng: np.random.Generator) -> None:
    pixels = rng.integers(0, 255, (4, 4, 4, 3), dtype=np.uint8)
    benchmark.check_batches(Jumbled(), pixels[:1])  # type: ignore[arg-type]
    with pytest.raises(ArithmeticError, match="expected plain embeddings in a batch"):
        benchmark.check_batches(Jumbled(), pixels)  # type: ignore[arg-type]


def test_what_is_no_classifier_is_refused(tmp_path: Path) -> None:
    done = run(tmp_path)
    assert done.exit_code == 2 and str(tmp_path) in done.output and "Traceback" not in done.output
