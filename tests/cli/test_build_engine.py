"""iosr-fast build-engine from the command line, on the demo's CLIP."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from iosr_fast.delivery import one_plan
from iosr_fast.encoders.engine_folder import Target, unavailable_reason
from iosr_fast.encoders.runtimes import open_engine
from iosr_fast.encoders.runtimes.graph import Graph, open_graph
from iosr_fast.head.verdict import Abstention
from iosr_fast.sealed.manifest import read_manifest
from iosr_fast.store.bundle import load
from tests.cli.runs import done, refused
from tests.demo_cache import demo_bundle, export_once

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The demo with a random adapter, built for ONNX Runtime, and what was printed."""
    folder = tmp_path_factory.mktemp("built") / "engine"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("iosr_fast.export.source.export_onnx", export_once)
        options = ("--first-adapted-block", "4", "--runtime", "onnxruntime", "--max-batch", "5")
        return folder, done("build-engine", "--out", folder, *options)


def test_a_random_adapter_is_named_and_the_numbers_are_printed(built: tuple[Path, str]) -> None:
    folder, stdout = built
    for words in ("RANDOM adapter", "3 random pictures: max error", "8 real pictures", "engine/encoder.onnx"):
        assert words in stdout
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["model"], manifest["adapter"], manifest["first_adapted_block"]) == ("demo", "random", 4)
    assert str(folder) not in json.dumps(manifest)
    encoder = open_engine(folder)
    embeddings = encoder.encode(np.full((6, encoder.image_size, encoder.image_size, 3), 77, np.uint8))
    assert embeddings.adapted is not None and embeddings.adapted.shape == (6, encoder.width)


def test_an_engine_without_an_adapter_has_plain_embeddings(tmp_path: Path) -> None:
    shown = done("build-engine", "--out", tmp_path / "engine", "--adapter", "none", "--runtime", "torch")
    assert "plain embeddings only" in shown and "adapted " not in shown
    assert json.loads((tmp_path / "engine" / "manifest.json").read_text())["first_adapted_block"] is None


def test_a_classifiers_plan_comes_with_class_names_and_says_that_it_was_not_run(tmp_path: Path) -> None:
    version = pytest.importorskip("tensorrt_rtx").__version__
    if unavailable_reason("tensorrt_rtx") is None:
        pytest.skip("shows what a machine without a GPU builds")
    words = ("build-plan", demo_bundle(), "--out", tmp_path / "plan", "--runtime", "tensorrt_rtx")
    shown = done(*words, "--max-batch", "4", "--max-error", "30%", "--reject-unknown")
    assert "not run: no GPU" in shown and f"for any GPU with tensorrt_rtx {version}" in shown
    manifest = read_manifest(tmp_path / "plan", "plan")
    fit, facts = load(demo_bundle()).open("onnxruntime", None, 1), manifest["iosr_fast"]
    assert manifest["class_names"] == list(fit.head.class_names) and list(manifest["files"]) == ["1/model.plan"]
    assert manifest["outputs"] == ["probabilities", "label", "accepted", "unknown", "rejected"]
    assert (manifest["was_run"], manifest["max_batch"]) == (False, 4)
    assert manifest["target"]["gpu"] is None and manifest["target"]["version"] == version
    assert facts["encoder_fingerprint"] == fit.encoder.fingerprint and facts["max_error"] == 0.3 and facts["promise"]


@pytest.mark.parametrize(("max_batch", "profiles"), [(1, '"0"'), (4, '"0", "1"')])
def test_a_plan_is_written_for_triton_after_it_answered_as_the_classifier_does(
    max_batch: int, profiles: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONNX Runtime executes in place of TensorRT."""
    fit = load(demo_bundle()).open("onnxruntime", 1, 1)
    here = Target(runtime="tensorrt", version="10.1", gpu="NVIDIA H100", compute_capability="9.0")
    monkeypatch.setattr(one_plan, "target", lambda runtime: here)
    monkeypatch.setattr(one_plan, "unavailable_reason", lambda runtime: None)
    monkeypatch.setattr(one_plan, "build_plan", lambda file, runtime, max_batch: b"a plan")
    sizes: list[int] = []
    wrong: list[tuple[str, int]] = []  # outputs, and sizes of batches

    def opened(file: Path, plan: bytes, runtime: str, outputs: list[str], shape: tuple[int, ...]) -> Graph:
        execute = open_graph(file, outputs, fit.encoder)
        assert shape == (max_batch, 64, 64, 3)

        def run(pixels: np.ndarray) -> dict[str, np.ndarray]:
            sizes.append(len(pixels))
            got = execute(pixels)
            spoilt = [name for name, size in wrong if size == len(pixels)]
            return got | {name: ~got[name] if got[name].dtype == bool else (got[name] + 1) % 12 for name in spoilt}

        return run

    monkeypatch.setattr(one_plan, "graph_of_plan", opened)
    several = min(max_batch, 3)  # the other profile
    for name, size in (("label", 1), ("label", several), ("accepted", 1), ("rejected", 1), ("unknown", 1)):
        wrong[:] = [(name, size)]
        with pytest.raises(ArithmeticError, match=f"output {name}"):
            one_plan.write_plan(fit, tmp_path / "plan", "tensorrt", max_batch, Abstention(0.9, None, 0.3))
    assert list(tmp_path.iterdir()) == []
    wrong.clear()
    assert one_plan.write_plan(fit, tmp_path / "plan", "tensorrt", max_batch)["was_run"]
    assert set(sizes) == {1, several}
    config = (tmp_path / "plan" / "config.pbtxt").read_text()
    assert config == f'backend: "tensorrt"\ninstance_group [ {{ kind: KIND_GPU profile: [ {profiles} ] }} ]\n'
    assert (tmp_path / "plan" / "1" / "model.plan").read_bytes() == b"a plan"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--adapter", "a.safetensors", "--first-adapted-block", "3"], "knows its own blocks"),
        (["--adapter", "a.safetensors"], "no adapter at a.safetensors"),
        (["--model", "ViT-B-17"], "ViT-B-17"),
        (["--first-adapted-block", "99"], "got 99"),
        (["--adapter", "none", "--precision", "int4"], "got 'int4'"),
        (["--adapter", "none", "--runtime", "tvm"], "got 'tvm'"),
        (["--calibration", "photos"], "--calibration is for --precision int8 and fp8, got None"),
        (["--precision", "int8", "--calibration", "photos"], "found no folder photos"),
        (["--model", "RN50", "--pretrained", "none", "--precision", "int8"], "RN50"),
    ],
)
def test_wrong_options_are_refused_before_the_work(options: list[str], message: str, tmp_path: Path) -> None:
    said = refused("build-engine", "--out", tmp_path / "engine", *options)
    assert message in " ".join(said.split()) and list(tmp_path.iterdir()) == []


def test_a_plan_for_a_cpu_is_refused(tmp_path: Path) -> None:
    said = refused("build-plan", "classifier", "--runtime", "openvino", "--out", tmp_path / "plan")
    assert "got openvino; `iosr-fast export` writes one ONNX file" in " ".join(said.split())
