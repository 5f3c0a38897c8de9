"""Without a named precision: fp32 on a CPU; on a GPU half precision, where it is as right as fp32. Real engines, run by
PyTorch on the CPU, on a machine that seems to have a GPU."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from iosr_fast import Classifier
from iosr_fast.backbones.demo.pictures import load_pictures
from iosr_fast.delivery.engine_choice import EngineCandidate, EngineChoice
from iosr_fast.encoders import engine_folder
from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.encoders.engine_folder import Runtime
from iosr_fast.encoders.runtimes.torch import TorchEncoder
from iosr_fast.exceptions import IosrFastError
from iosr_fast.export import build, candidates, check
from iosr_fast.export.candidates import Candidate, list_candidates
from iosr_fast.export.precision import Exportable, default_batch
from iosr_fast.export.source import source_of
from iosr_fast.utils import machine
from tests.backbones.small_clip import small_clip
from tests.conftest import unit_rows
from tests.store.live_parts import random_head, random_queries

H100 = machine.Gpu("NVIDIA H100 80GB HBM3", (9, 0))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "this_gpu", lambda: H100)


@pytest.fixture
def classifier(gpu: None, demo_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Classifier:
    monkeypatch.setenv("IOSR_FAST_CACHE", str(demo_cache))
    return Classifier("demo", runtime="torch", method="tip-adapter++", alpha=3.0, beta=7.0)


@pytest.fixture(scope="module")
def data() -> tuple[list[np.ndarray], list[str]]:
    drawings = load_pictures("held-out", min_styles=5)
    rows = np.flatnonzero(drawings.concepts < 6)
    return [*drawings.images[rows]], [drawings.names[c] for c in drawings.concepts[rows]]


def precision(classifier: Classifier) -> str:
    assert classifier.encoder.source is not None
    name: str = classifier.encoder.source.manifest["precision"]
    return name


def test_half_precision_is_for_fused_encoders_on_a_gpu(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    fused, plain = (Exportable("a CLIP", fused, products=True) for fused in (True, False))
    assert fused.default_precisions("torch")[0] == "fp16" and fused.default_precisions("torch")[-1] == "fp32"
    assert fused.default_precisions("onnxruntime") == plain.default_precisions("auto") == ("fp32",)
    monkeypatch.setattr(machine, "this_gpu", lambda: None)
    assert fused.default_precisions("torch") == ("fp32",)


@pytest.mark.parametrize(("memory", "batch"), [(2, 32), (8, 64), (24, 128), (80, 256)])
def test_the_largest_batch_is_by_the_memory_of_a_gpu(memory: int, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "this_gpu", lambda: machine.Gpu("a GPU", (9, 0), memory << 30))
    assert default_batch("torch") == batch and default_batch("openvino") == 32


def test_an_encoder_that_is_not_fused_says_that_it_leaves_the_gpu(
    gpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(build, "this_gpu", lambda: H100)
    clip = small_clip(layers=(1, 1, 1, 1), head_width=64, pool_type="tok")
    build.write_engine(source_of(clip), tmp_path / "engine", "onnxruntime")
    assert "onnxruntime runs on the CPU: small needs TensorRT for the GPU here" in caplog.text


def test_embeddings_on_a_gpu_are_checked_by_their_logits() -> None:
    class OnGpu(torch.Tensor):
        is_cuda = True

    head, rows = random_head(np.random.default_rng(0), 3, 2), random_queries(np.random.default_rng(1), 3)
    there = Embeddings(*(torch.from_numpy(array).as_subclass(OnGpu) for array in (rows.plain, rows.adapted)))
    np.testing.assert_allclose(head.score(there), head.score(rows), atol=1e-4)
    there.plain[1, 2] = there.adapted[1, 2] = torch.nan
    with pytest.raises(IosrFastError, match="expected finite embeddings, got NaN from the encoder on the GPU"):
        head.score(there)


@pytest.mark.slow
def test_a_gpus_default_is_half_precision_and_fp32_is_fp32(classifier: Classifier, data: Any, tmp_path: Path) -> None:
    by_default = classifier.fit(*data).predict_proba(data[0])
    assert classifier.get_params()["precision"] is classifier.get_params()["key_precision"] is None
    assert precision(classifier) == "fp16" and classifier.plan_.half_on_gpu
    classifier.set_params(precision="fp32", key_precision="fp32").fit(*data)
    assert precision(classifier) == "fp32" and not classifier.plan_.half_on_gpu
    classifier.save(tmp_path / "saved")
    assert not Classifier.load(tmp_path / "saved").plan_.half_on_gpu
    np.testing.assert_allclose(by_default, classifier.predict_proba(data[0]), atol=0.02)


@pytest.mark.slow
def test_wrong_embeddings_leave_half_precision_out(
    classifier: Classifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("IOSR_FAST_CACHE", str(tmp_path / "with bf16"))
    monkeypatch.setitem(check.MIN_COSINES, "fp16", 1.1)
    assert precision(classifier) == "bf16"
    source = classifier.encoder.source
    assert source is not None and source.manifest["dual_encoder"]["precision"] == "bf16"
    monkeypatch.setattr(candidates, "this_gpu", lambda: H100)
    monkeypatch.setattr(candidates, "openvino_core", None)  # which knows the CPU's bf16 alone
    assert Candidate("torch", "bf16") in list_candidates(source, 0)
    monkeypatch.setenv("IOSR_FAST_CACHE", str(tmp_path / "without"))
    monkeypatch.setitem(check.MIN_COSINES, "bf16", 1.1)
    assert precision(Classifier(**classifier.get_params())) == "fp32"
    for name in ("fp16", "bf16"):
        wrong = f"plain embeddings of random pictures by torch in {name} are wrong"
        assert f"the engine is not in {name}: {wrong}" in caplog.text


@pytest.mark.slow
def test_worse_labels_of_support_images_are_a_fit_in_fp32(
    classifier: Classifier, data: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert precision(classifier) == "fp16"
    run, rng = TorchEncoder._run, np.random.default_rng(0)

    def random(encoder: TorchEncoder, pixels: np.ndarray) -> tuple[np.ndarray, ...]:
        rows = run(encoder, pixels)
        if encoder._encoder.shapes.precision == "fp32":
            return rows
        return tuple(unit_rows(rng, *row.shape) for row in rows)

    monkeypatch.setattr(TorchEncoder, "_run", random)
    caplog.set_level(logging.WARNING)
    classifier.fit(*data)
    assert precision(classifier) == "fp32"
    assert "half precision is not taken: a cosine is" in caplog.text
    exact = Classifier(**{**classifier.get_params(), "precision": "fp32"}).fit(*data)
    assert classifier.predict(data[0]).tolist() == exact.predict(data[0]).tolist()


@pytest.mark.parametrize(
    ("chosen", "measured_on", "here", "opened"),
    [
        ("tensorrt", H100, H100, "tensorrt"),
        ("tensorrt", H100, machine.Gpu("NVIDIA A100", (8, 0)), "auto"),
        ("tensorrt", H100, None, "auto"),
        ("torch", None, H100, "auto"),
        ("openvino", H100, None, "openvino"),
        ("openvino", None, H100, "openvino"),
    ],
)
def test_a_chosen_runtime_is_for_the_processor_and_the_gpu_where_it_was_measured(
    chosen: Runtime,
    measured_on: machine.Gpu | None,
    here: machine.Gpu | None,
    opened: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(engine_folder, "find_spec", lambda name: True)  # all runtimes are installed
    monkeypatch.setattr(machine, "this_gpu", lambda: measured_on)
    best = EngineCandidate(runtime=chosen, precision="fp16", verdict="chosen")
    numbers: Any = {"tolerance": 0.5, "batch": 8, "judged": 9, "calibrated": 9, "seconds": 1.0, "candidates": [best]}
    choice = EngineChoice(objective="latency", processor=machine.processors(), **numbers)
    monkeypatch.setattr(machine, "this_gpu", lambda: here)
    assert choice.runtime == opened
    monkeypatch.setattr("iosr_fast.delivery.engine_choice.cpu_model", lambda: "another")
    monkeypatch.setattr(machine, "cpu_model", lambda: "another")
    assert choice.runtime == "auto"
