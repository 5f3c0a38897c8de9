"""Which runtime opens an engine here, and the plans by runtime, GPU and version: opened, built again, kept, refused."""

from __future__ import annotations

import logging
import platform
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
from msgspec.structs import asdict

from iosr_fast.encoders import engine_folder
from iosr_fast.encoders.engine_folder import Target, choose_runtime, has_plain_form, target, unavailable_reason
from iosr_fast.encoders.runtimes.plan_cache import open_plan
from iosr_fast.sealed.folders import new_folder
from iosr_fast.sealed.manifest import read_manifest, write_manifest
from iosr_fast.utils import machine
from iosr_fast.utils.machine import Gpu

H100, A100 = Gpu("NVIDIA H100 80GB HBM3", (9, 0)), Gpu("NVIDIA A100-SXM4-40GB", (8, 0))
RTX = Gpu("NVIDIA GeForce RTX 4090", (8, 9))


def target_of(gpu: Gpu | None, version: str) -> Target:
    """A plan of TensorRT for this GPU, or of TensorRT-RTX for any."""
    runtime: Any = "tensorrt_rtx" if gpu is None else "tensorrt"
    capability = None if gpu is None else f"{gpu.capability[0]}.{gpu.capability[1]}"
    return Target(runtime=runtime, version=version, gpu=gpu and gpu.name, compute_capability=capability)


THERE, HERE = target_of(A100, "10.3.0"), target_of(H100, "10.13.3.9")


def installed(monkeypatch: pytest.MonkeyPatch, *names: str, gpu: Gpu | None = None) -> None:
    """Only these packages are installed, on a machine with this GPU."""
    monkeypatch.setattr(engine_folder, "find_spec", lambda name: find_spec("sys") if name in names else None)
    monkeypatch.setattr(machine, "this_gpu", lambda: gpu)


@pytest.mark.parametrize(
    ("processor", "packages", "gpu", "best"),
    [
        ("x86_64", ("openvino", "onnxruntime", "torch"), None, "openvino"),
        ("aarch64", ("openvino", "onnxruntime", "torch"), None, "onnxruntime"),
        ("x86_64", ("openvino", "onnxruntime", "torch"), H100, "torch"),
        ("x86_64", ("openvino", "torch", "tensorrt", "tensorrt_rtx"), H100, "tensorrt"),
        ("x86_64", ("openvino", "torch", "tensorrt_rtx"), RTX, "tensorrt_rtx"),
        ("x86_64", ("openvino", "torch", "tensorrt_rtx"), H100, "torch"),
    ],
)
def test_auto_is_the_best_runtime_of_a_machine(
    processor: str, packages: tuple[str, ...], gpu: Gpu | None, best: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed(monkeypatch, *packages, gpu=gpu)
    monkeypatch.setattr(platform, "machine", lambda: processor)
    assert choose_runtime("auto") == best
    assert choose_runtime("tensorrt") == "tensorrt", "a name is taken as it is"


def test_auto_opens_only_what_an_engine_was_built_for_and_logs_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    installed(monkeypatch, "torch", "onnxruntime", "tensorrt")
    caplog.set_level(logging.INFO, engine_folder.__name__)
    assert choose_runtime("auto", {"onnxruntime", "tensorrt"}) == "onnxruntime"
    assert "sees no NVIDIA GPU" in caplog.text and "not built for it" in caplog.text
    with pytest.raises(RuntimeError, match=r"tensorrt: PyTorch.* sees no NVIDIA GPU"):
        choose_runtime("auto", {"tensorrt"})
    installed(monkeypatch, "torch", "tensorrt_rtx", gpu=H100)
    assert "from compute capability 8.0 on, not for NVIDIA H100" in (unavailable_reason("tensorrt_rtx") or "")
    with pytest.raises(ValueError, match=r"\['onnxruntime', 'openvino'\], got 'torch'.*build-engine --runtime torch"):
        choose_runtime("torch", {"onnxruntime", "openvino"})
    with pytest.raises(ValueError, match="got 'tvm'"):
        choose_runtime("tvm")
    with pytest.raises(ImportError, match=r"openvino is not installed \(pip install 'iosr_fast\[cpu\]'\)"):
        choose_runtime("openvino")


def test_the_plain_form_is_a_file_of_onnx_runtimes_and_a_part_of_pytorchs() -> None:
    facts = {"first_adapted_block": 1, "files": {"encoder.onnx": {}, "plain.onnx": {}}}
    forms = {name: has_plain_form(facts, name) for name in engine_folder.RUNTIMES}
    assert forms == {name: name not in engine_folder.EXTRAS for name in engine_folder.RUNTIMES}
    assert not has_plain_form({**facts, "files": {"encoder.onnx": {}}}, "openvino"), "an engine of earlier versions"
    assert not has_plain_form({**facts, "first_adapted_block": None}, "torch")


def test_a_target_is_the_installed_version_and_for_tensorrt_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert HERE.file == "plans/tensorrt-nvidia-h100-80gb-hbm3-10.13.3.9.plan"
    assert target_of(None, "1.7.1+local/1").file == "plans/tensorrt_rtx-any-1.7.1-local-1.plan"
    monkeypatch.setattr(engine_folder, "require", lambda *_: SimpleNamespace(__version__="10.13.3.9"))
    monkeypatch.setattr(machine, "this_gpu", lambda: H100)
    assert target("tensorrt") == HERE and target("tensorrt_rtx") == target_of(None, "10.13.3.9")
    monkeypatch.setattr(machine, "this_gpu", lambda: None)
    assert target("tensorrt_rtx") == target_of(None, "10.13.3.9")
    with pytest.raises(RuntimeError, match="PyTorch sees none here; build the engine on the machine that will run it"):
        target("tensorrt")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("IOSR_FAST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "engine", THERE)


def write_folder(
    folder: Path, *targets: Target, onnx: bytes = b"a graph", weights: bytes = b"weights", max_batch: int = 8
) -> Path:
    """What open_plan reads of an engine: plans, which are never loaded here, the graph and its weights."""
    with new_folder(folder, "engine") as made:
        for one in targets:
            (made / "plans").mkdir(exist_ok=True)
            (made / one.file).write_bytes(f"for {one}".encode())
        (made / "encoder.onnx").write_bytes(onnx)
        (made / "encoder.weights").write_bytes(weights)
        write_manifest(made, "engine", {"max_batch": max_batch, "plans": {one.file: asdict(one) for one in targets}})
    return folder


def builder() -> Mock:
    """Builds plans that are their numbers."""
    return Mock(side_effect=(f"built {i}".encode() for i in range(1, 9)))


def opened(folder: Path, wanted: Target, build: Any) -> bytes:
    return open_plan(folder, read_manifest(folder, "engine"), wanted, build)[0]


never = Mock(side_effect=AssertionError("built again"))


def test_the_plan_that_fits_is_taken_from_the_engine(tmp_path: Path, cache: Path) -> None:
    folder = write_folder(tmp_path / "engine", THERE, HERE, target_of(None, "1.7"))
    assert opened(folder, HERE, never) == f"for {HERE}".encode()
    assert opened(folder, target_of(None, "1.7"), never) == b"for any GPU with tensorrt_rtx 1.7"
    assert not cache.exists()


@pytest.mark.parametrize("wanted", [HERE, target_of(A100, "10.4.0"), target_of(None, "10.3.0")])
def test_plans_for_others_are_named_and_one_is_built_once(
    wanted: Target, folder: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    build, before = builder(), sorted(folder.rglob("*"))
    assert opened(folder, wanted, build) == b"built 1"
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    for words in (THERE.file, "A100-SXM4-40GB (compute capability 8.0) with tensorrt 10.3.0", f"this is {wanted}"):
        assert words in warning
    assert "building a plan from encoder.onnx once, in" in warning and str(cache) in warning
    caplog.clear()
    assert opened(folder, wanted, never) == b"built 1"
    build.assert_called_once_with(folder / "encoder.onnx")
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert sorted(folder.rglob("*")) == before, "nothing is written into the engine"


def test_a_kept_plan_depends_on_version_gpu_graph_weights_and_largest_batch(folder: Path, tmp_path: Path) -> None:
    build = builder()
    for wanted in (HERE, target_of(H100, "10.14"), target_of(RTX, HERE.version)):
        opened(folder, wanted, build)
    for changed in ({"onnx": b"another"}, {"weights": b"others"}, {"max_batch": 16}):
        opened(write_folder(tmp_path / "other", **changed), HERE, build)
    assert build.call_count == 6
    opened(write_folder(tmp_path / "other", weights=b"others"), HERE, never)


@pytest.mark.parametrize("kept", [0, -1])
def test_a_damaged_plan_in_the_cache_is_built_again(
    kept: int, folder: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    build = builder()
    opened(folder, HERE, build)
    (plan,) = (cache / "plans").iterdir()
    plan.write_bytes(plan.read_bytes()[:kept])
    assert opened(folder, HERE, build) == b"built 2" == opened(folder, HERE, never)
    assert f"{plan} in the cache is damaged and compiled again" in caplog.text


def test_a_cache_that_can_not_be_written_costs_time_only(
    folder: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache.write_text("a file")
    assert opened(folder, HERE, builder()) == b"built 1"
    assert ".plan can't be stored" in caplog.text and "IOSR_FAST_CACHE" in caplog.text


def test_an_engine_without_a_plan_to_open_or_build_is_refused_with_all_reasons(folder: Path) -> None:
    with pytest.raises(RuntimeError) as refused:
        opened(folder, HERE, Mock(side_effect=RuntimeError("no tactic for MatMul")))
    for words in (THERE.file, f"this is {HERE}", "no tactic for MatMul", "--runtime tensorrt", "runtime='onnxruntime'"):
        assert words in str(refused.value)


@pytest.mark.parametrize("name", ["encoder.onnx", "encoder.weights"])
def test_no_plan_is_built_from_a_damaged_graph(name: str, tmp_path: Path, cache: Path) -> None:
    folder = write_folder(tmp_path / "engine")
    (folder / name).write_bytes(b"wrong")
    with pytest.raises(ValueError, match=rf"{name} in .* does not match its manifest"):
        open_plan(folder, read_manifest(folder, "engine"), HERE, never)
    assert not cache.exists()
