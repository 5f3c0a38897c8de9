"""iosr-fast benchmark: a classifier's and an engine's times, verified first. No time is asserted."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from iosr_fast.cli import benchmark
from iosr_fast.encoders.encoder import Embeddings
from tests.cli.runs import done, refused
from tests.demo_cache import demo_bundle


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["classifier", "engine"])
def test_each_part_and_batch_has_a_row(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "SECONDS", 0.0)
    monkeypatch.setattr(benchmark, "FEWEST", 3)
    folder = demo_bundle() if kind == "classifier" else demo_bundle() / "engine"
    (tmp_path / "in").mkdir()
    for name in ("a", "b"):
        Image.new("RGB", (90, 70), (len(name) * 40, 90, 10)).save(tmp_path / "in" / f"{name}.png")
    words = ("benchmark", folder, "--batch", "1", "3", "--runtime", "onnxruntime")
    shown = done(*words, "--json", tmp_path / "rows.json", "--images", tmp_path / "in")
    assert f"3 images: {tmp_path / 'in'}" in shown and "p99 ms" in shown and len(shown.splitlines()) == 7
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [(row["part"], row["batch"]) for row in rows] == [
        (part, size) for part in ("engine", "whole path") for size in (1, 3)
    ]
    for row in rows:
        assert 0 < row["p50_ms"] <= row["p90_ms"] <= row["p99_ms"] and row["images_per_s"] > 0 and row["calls"] >= 3
        assert row["runtime"] == "onnxruntime" and row["precision"] == "fp32" and row["device"] and row["versions"]
        assert ("labels" in row["verified"]) is (kind == "classifier")
    assert "the demo's pictures as JPEGs of 500 x 375" in done(*words)


def test_an_engine_that_mixes_up_a_batch_is_not_timed(rng: np.random.Generator) -> None:
    class Jumbled:
        """Returns the rows of a batch in reverse."""

        def encode(self, pixels: np.ndarray) -> Embeddings:
            return Embeddings(pixels.reshape(len(pixels), -1)[::-1].astype(np.float32))

    pixels = rng.integers(0, 255, (4, 4, 4, 3), dtype=np.uint8)
    benchmark.check_batches(Jumbled(), pixels[:1])  # type: ignore[arg-type]
    with pytest.raises(ArithmeticError, match="expected plain embeddings in a batch"):
        benchmark.check_batches(Jumbled(), pixels)  # type: ignore[arg-type]


def test_a_folder_without_a_classifier_or_images_is_refused(tmp_path: Path) -> None:
    assert str(tmp_path) in refused("benchmark", tmp_path)
    assert "expected images in" in refused("benchmark", tmp_path, "--images", tmp_path)
