"""iosr-fast benchmark: a classifier's and an engine's times, verified first. No time is asserted."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from iosr_fast import Classifier
from iosr_fast.cli import benchmark
from iosr_fast.encoders.encoder import Embeddings, Encoder
from iosr_fast.encoders.runtimes import graph
from iosr_fast.encoders.runtimes.graph import Graph, open_graph
from tests.cli.runs import done, refused, run
from tests.demo_cache import demo_bundle
from tools.demo.bundle import held_out_queries


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "SECONDS", 0.0)
    monkeypatch.setattr(benchmark, "FEWEST", 3)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["onnxruntime", "openvino", "several labels", "engine"])
def test_each_part_and_batch_has_a_row(kind: str, of_several_labels: Path, tmp_path: Path, short: None) -> None:
    folder = {"several labels": of_several_labels, "engine": demo_bundle() / "engine"}.get(kind, demo_bundle())
    runtime = "openvino" if kind == "openvino" else "onnxruntime"
    pytest.importorskip(runtime)
    (tmp_path / "in").mkdir()
    for name in ("a", "b"):
        Image.new("RGB", (90, 70), (len(name) * 40, 90, 10)).save(tmp_path / "in" / f"{name}.png")
    words = ("benchmark", folder, "--batch", "1", "3", "--runtime", runtime)
    result = run(*words, "--json", tmp_path / "rows.json", "--images", tmp_path / "in")
    assert f"3 images: {tmp_path / 'in'}" in result.stdout and "p99 ms" in result.stdout
    assert "not timed as one file" not in result.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())
    parts = ("engine", "whole path")
    if kind != "engine":
        parts = ("engine", "engine, then kernels", "one file", "whole path")
    assert [(row["part"], row["batch"]) for row in rows] == [(part, size) for part in parts for size in (1, 3)]
    for row in rows:
        assert row["part"].ljust(21) in result.stdout
        assert 0 < row["p50_ms"] <= row["p90_ms"] <= row["p99_ms"] and row["images_per_s"] > 0 and row["calls"] >= 3
        assert row["runtime"] == runtime and row["precision"] == "fp32" and row["device"] and row["versions"]
        assert ("labels in a batch" in row["verified"]) is (kind != "engine")
        assert ("one file: labels, probabilities to 0.001" in row["verified"]) is ("one file" in parts)
    if kind == "engine":
        assert "the demo's pictures as JPEGs of 500 x 375" in done(*words)


@pytest.mark.slow
@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_one_file_takes_more_images_than_a_batch(runtime: str) -> None:
    pytest.importorskip(runtime)
    classifier, pixels = Classifier.load(demo_bundle(), runtime=runtime, threads=1), held_out_queries(12, 3)[0]
    assert len(pixels) > classifier.encoder.max_batch
    assert benchmark.open_one_file(classifier, pixels)(pixels)["label"].shape == (len(pixels),)


@pytest.mark.slow
@pytest.mark.parametrize("alone", [False, True])
def test_one_file_that_answers_otherwise_is_not_timed(alone: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(file: Path, outputs: list[str], encoder: Encoder) -> Graph:
        right = open_graph(file, outputs, encoder)

        def execute(pixels: np.ndarray) -> dict[str, np.ndarray]:
            got = right(pixels)
            if (len(pixels) == 1) is alone:
                got["probabilities"] = got["probabilities"] + 0.002
            return got

        return execute

    monkeypatch.setattr(graph, "open_graph", wrong)
    with pytest.raises(ArithmeticError, match=r"output probabilities .* a difference of 0\.002, where 0\.001"):
        benchmark.open_parts(demo_bundle(), benchmark.read_files(None, 2)[0], "onnxruntime", 1)


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
