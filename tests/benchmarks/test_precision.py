"""The benchmark of precisions: its rows, the demo's accuracy, and that nothing wrong is timed."""

from __future__ import annotations

from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytest.importorskip("open_clip")

from iosr_fast.benchmarks import ceilings, harness, precision
from iosr_fast.clip.demo.pictures import Pictures, load_pictures
from iosr_fast.encoders.encoder import Embeddings
from tests.clip.small_clip import small_clip
from tests.conftest import unit_rows

ORT, OPENVINO = ["onnxruntime-fp32", "onnxruntime-int8"], ["openvino-fp32", "openvino-bf16", "openvino-int8"]


def emoji(count: int) -> np.ndarray:
    chosen: np.ndarray = np.ascontiguousarray(load_pictures("generic").images[:count, ::2, ::2])
    return chosen


@pytest.fixture
def small(cached_exports: None, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = emoji(60)
    monkeypatch.setattr(precision, "load_clip", lambda *_: small_clip(layers=2))
    monkeypatch.setattr(precision, "pictures_of", lambda clip: (pictures[:40], pictures[40:]))
    best_gemm = ceilings.best_gemm
    monkeypatch.setattr(ceilings, "best_gemm", lambda threads: best_gemm(threads, size=64, repeats=1))
    monkeypatch.setattr(harness, "PAUSE_S", 0)
    installed = precision.find_spec
    monkeypatch.setattr(precision, "find_spec", lambda name: None if name == "nncf" else installed(name))


@pytest.mark.slow
def test_rows_and_nothing_wrong_is_timed(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: dict[str, Any] = {}
    right = precision.candidates

    def once(*arguments: Any) -> dict[str, Any]:
        opened.update(opened or right(*arguments))
        for kind in ("fp32", "int8"):
            (arguments[-1] / kind).mkdir(exist_ok=True)
        return opened

    monkeypatch.setattr(precision, "candidates", once)
    rows = precision.run("Small", batch=3, threads=1, repeats=1, first_adapted_block=1)
    names = [row["impl"] for row in rows]
    assert names[:2] == ORT
    # bf16 is left out where the processor would compute it in fp32.
    assert set(names[2:]) <= set(OPENVINO) and ({*OPENVINO} - {*names} <= {"openvino-bf16"}) is bool(
        find_spec("openvino")
    )
    for row in rows:
        assert row["bench"] == "precision" and row["case"] == "small-b3-s1" and row["threads"] == 1
        assert row["impl"].endswith(row["precision"]) and row["runtime_ms"] > 0 and row["rate"] > 0
        assert (row["ceiling"] is None) is (row["precision"] != "fp32") and row["pictures"] == 20
        assert row["min_cosine"] == min(row["min_cosine_plain"], row["min_cosine_adapted"]) >= 0.99
        assert "accuracy" not in row
    exact, narrow = rows[:2]
    assert exact["min_cosine"] > 0.999999 > narrow["min_cosine"] and narrow["file_mb"] < 0.8 * exact["file_mb"]
    assert set(narrow["ratios"]) == set(precision.RIVALS) & set(names)

    # The next run is given a quantised encoder that is blind to one colour.
    encode = opened["onnxruntime-int8"].encode
    opened["onnxruntime-int8"] = SimpleNamespace(encode=lambda pixels: encode(pixels * np.array([1, 0, 1], np.uint8)))
    monkeypatch.setattr(harness, "measure", lambda *_: pytest.fail("timed a wrong candidate"))
    with pytest.raises(ArithmeticError, match=r"onnxruntime-int8: plain .*cosine >= 0\.99\); nothing is timed"):
        precision.run("Small", batch=3, threads=1, repeats=1, first_adapted_block=1)


@pytest.mark.parametrize(
    ("name", "angle", "allowed"),
    [
        (precision.NNCF, 0.5, True),
        ("onnxruntime-fp32", 1e-5, True),
        ("onnxruntime-fp32", 1e-3, False),
        ("openvino-bf16", 0.04, True),
        ("openvino-bf16", 0.05, False),
        ("onnxruntime-int8", 0.14, True),
        ("onnxruntime-int8", 0.145, False),
        ("onnxruntime-int8", np.nan, False),
    ],
)
def test_limits(name: str, angle: float, allowed: bool) -> None:
    exact, turned = np.eye(2, dtype=np.float32)[:1], np.array([[np.cos(angle), np.sin(angle)]], np.float32)
    truth = Embeddings(exact, exact)
    if allowed:
        found = precision.verify(name, Embeddings(exact, turned), truth)
        assert (
            found["mean_cosine"] == found["min_cosine"]
            and found["min_cosine_plain"] == 1
            and found["min_cosine"] == pytest.approx(np.cos(angle), abs=1e-6)
        )
        return
    with pytest.raises(ArithmeticError, match="adapted embeddings"):
        precision.verify(name, Embeddings(exact, turned), truth)


def test_accuracy_is_that_of_the_given_embeddings(monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator) -> None:
    width, labels = 16, np.repeat(np.arange(6), 7)
    pictures = Pictures(np.zeros((42, 1, 1, 3), np.uint8), labels, labels * 0, [f"concept {i}" for i in range(6)], [])
    monkeypatch.setattr(precision, "held_out", lambda: (pictures, None))
    monkeypatch.setattr("iosr_fast.clip.prompts.embed_classes", lambda clip, names: unit_rows(rng, len(names), width))
    good = np.eye(width, dtype=np.float32)[labels] + 0.05 * unit_rows(rng, 42, width)
    good /= np.linalg.norm(good, axis=1, keepdims=True)
    bad = unit_rows(rng, 42, width)
    found = precision.accuracies(small_clip(), {"good": Embeddings(good, good), "bad": Embeddings(bad, bad)})
    assert found["good"]["accuracy"] == 1 and found["good"]["accuracy_std"] == 0 and found["bad"]["accuracy"] < 0.6
    for facts in found.values():
        assert facts["test_images"] == 18 and facts["seeds"] == 3 and facts["accuracy_of"] == "tip-adapter++, 4 shots"
        assert facts["accuracy_tip-adapter_4_shot"] == pytest.approx(facts["accuracy"], abs=1e-6)
        assert 0 <= facts["accuracy_proker_1_shot"] <= 1


@pytest.mark.slow
def test_pictures_of_another_clip_look_like_photographs() -> None:
    calibration, judged = precision.pictures_of(small_clip())
    assert calibration.shape == (precision.CALIBRATED, 32, 32, 3) and judged.shape == (precision.JUDGED, 32, 32, 3)
    assert calibration.dtype == judged.dtype == np.uint8 and judged.std() > 20
    assert not any((judged == one).all((1, 2, 3)).any() for one in calibration)
