"""Encoders on a GPU: fixed batch sizes, CUDA graphs, uploads, contexts of TensorRT. A stand-in for CUDA shows what is
called, in which order, on which memory; the tests marked `gpu` show that it works."""

from __future__ import annotations

import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
from msgspec.structs import asdict

torch = pytest.importorskip("torch")
pytest.importorskip("open_clip")
pytest.importorskip("onnxscript")

from iosr_fast import Classifier  # noqa: E402
from iosr_fast.backbones.adapter import random_adapter  # noqa: E402
from iosr_fast.backbones.two_pass import two_passes  # noqa: E402
from iosr_fast.cli import benchmark  # noqa: E402
from iosr_fast.encoders.engine_folder import Target, unavailable_reason  # noqa: E402
from iosr_fast.encoders.runtimes import gpu, graph, open_engine, tensorrt  # noqa: E402
from iosr_fast.encoders.runtimes import torch as torch_runtime  # noqa: E402
from iosr_fast.encoders.runtimes.graph import graph_of_plan  # noqa: E402
from iosr_fast.encoders.runtimes.tensorrt import TensorRTEncoder, build_plan, optimization_profiles  # noqa: E402
from iosr_fast.encoders.runtimes.torch import TorchEncoder  # noqa: E402
from iosr_fast.export.build import write_engine  # noqa: E402
from iosr_fast.export.source import source_of  # noqa: E402
from iosr_fast.sealed.manifest import read_manifest  # noqa: E402
from tests.backbones.small_clip import random_pixels, small_clip  # noqa: E402
from tests.cli.runs import done  # noqa: E402
from tests.encoders.fake_gpu import FakeGpu, Stream  # noqa: E402
from tests.store.live_parts import pictures  # noqa: E402

FACTS = {"image_size": 4, "width": 3, "fingerprint": "f" * 64, "max_batch": 6, "first_adapted_block": 1}


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    """In place of CUDA, where the GPU runtimes ask for torch."""
    fake = FakeGpu()
    for module in (gpu, torch_runtime):
        monkeypatch.setattr(module, "require", lambda module, extra: fake.torch)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: fake.results_kept_for.append(stream))
    return fake


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    clip, folder = small_clip(), tmp_path_factory.mktemp("engine") / "engine"
    write_engine(source_of(clip, random_adapter(clip, 1)), folder, "torch", max_batch=6)
    return folder


@pytest.fixture
def encoder(engine: Path, fake_gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> TorchEncoder:
    """PyTorch's encoder for batches of up to 6, on the stand-in for a GPU."""
    on_gpu = lambda module: lambda pixels: fake_gpu.launch(lambda: module(pixels))  # noqa: E731
    monkeypatch.setattr(torch.nn.Module, "cuda", on_gpu)
    opened = TorchEncoder(engine, read_manifest(engine, "engine"))
    assert hasattr(opened._encoder.blocks[0], "qkv_weight"), "in its form for a GPU"
    return opened


def check_embeddings(encoder: TorchEncoder, batch: int) -> None:
    pixels, clip = random_pixels(14, 32), small_clip()
    there = encoder.encode_on_device(pixels[:batch])
    encoder.encode(pixels[::-1][:6])  # overwrites the memory of the runs before it
    assert isinstance(there.plain, torch.Tensor)
    expected = two_passes(clip, random_adapter(clip, 1), pixels[:batch])
    for got, right in zip(vars(there.to_numpy()).values(), expected, strict=True):
        np.testing.assert_allclose(got, right, atol=1e-5)


def test_batches_are_split_padded_to_powers_of_two_and_cut_again(
    engine: Path, encoder: TorchEncoder, fake_gpu: FakeGpu
) -> None:
    facts = read_manifest(engine, "engine")
    buckets = [TorchEncoder(engine, facts | {"max_batch": largest}).buckets for largest in (1, 8, 12)]
    assert buckets == [(1,), (1, 2, 4, 8), (1, 2, 4, 8, 12)]
    for batch, sizes in ((1, [1]), (3, [4]), (14, [6, 6, 2])):
        fake_gpu.sizes.clear()
        check_embeddings(encoder, batch)
        assert fake_gpu.sizes[: len(sizes)] == sizes


@pytest.mark.parametrize("refuses", [False, True])
def test_warm_sizes_replay_a_graph_and_return_copies(
    refuses: bool, encoder: TorchEncoder, fake_gpu: FakeGpu, caplog: pytest.LogCaptureFixture
) -> None:
    fake_gpu.refuses = refuses
    with pytest.raises(ValueError, match=r"batch sizes of 1 to 6, got \[0, 7\]"):
        encoder.warm([0, 1, 7])
    check_embeddings(encoder, 5)
    assert not fake_gpu.records, "nothing is recorded before warm"
    encoder.warm()
    encoder.warm([3])
    assert len(fake_gpu.records) == (0 if refuses else len(encoder.buckets or ()))
    before = fake_gpu.replays
    for batch in (1, 2, 3, 6, 9):
        check_embeddings(encoder, batch)
    assert (fake_gpu.replays > before) == (not refuses)
    assert ("run without a CUDA graph, which can't be recorded: an operation waits" in caplog.text) == refuses
    assert fake_gpu.current is fake_gpu.caller


def test_the_callers_stream_of_the_encoders_device_waits_for_results(encoder: TorchEncoder, fake_gpu: FakeGpu) -> None:
    fake_gpu.device = 0  # the thread's own, after the encoder was opened on 1
    encoder.encode_on_device(random_pixels(2, 32))
    assert fake_gpu.asked == {None, ("cuda", 1)}
    (stream,) = fake_gpu.caller.waited
    assert isinstance(stream, Stream) and stream.waited == [fake_gpu.caller], "weights are written before the first run"
    assert fake_gpu.results_kept_for == [fake_gpu.caller] * 2


def test_pictures_are_copied_for_their_upload_while_another_thread_launches(
    encoder: TorchEncoder, fake_gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels, expected = random_pixels(2, 32), encoder.encode(random_pixels(2, 32)).plain
    assert encoder._gpu is not None
    launch, launching, go_on = encoder._gpu._launch, threading.Event(), threading.Event()

    def slow(batch: Any) -> Any:
        launching.set()
        assert go_on.wait(60)
        return launch(batch)

    monkeypatch.setattr(encoder._gpu, "_launch", slow)
    while fake_gpu.pinned.acquire(blocking=False):
        pass
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(encoder.encode, pixels)
        assert launching.wait(60) and fake_gpu.pinned.acquire(timeout=60)
        second = threads.submit(encoder.encode, pixels[::-1])
        try:
            assert fake_gpu.pinned.acquire(timeout=60), "the second run waits for the first one's launches alone"
        finally:
            go_on.set()
        np.testing.assert_allclose(first.result().plain, expected, atol=1e-5)
        np.testing.assert_allclose(second.result().plain, expected[::-1], atol=1e-5)


class Context:
    """An execution context of TensorRT that notes what is called."""

    def __init__(self) -> None:
        self.calls: dict[str, list[Any]] = {}

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: self.calls.setdefault(name, []).append(arguments) or True


class TensorRT:
    """The modules tensorrt and tensorrt_rtx, with a plan that has `profiles`, and what was asked of them."""

    nptype = staticmethod(np.dtype)
    outputs: ClassVar = {"plain": ("float32", (-1, 3)), "adapted": ("float32", (-1, 3))}  # of the plan
    ExecutionContextAllocationStrategy = SimpleNamespace(USER_MANAGED="managed")
    DynamicShapesKernelSpecializationStrategy = SimpleNamespace(EAGER="eager")

    def __init__(self, profiles: int = 2) -> None:
        self.contexts: list[Context] = []
        self.read: list[bytes] = []  # by RTX's runtime cache
        kernels = SimpleNamespace(
            serialize=lambda: b"kernels", deserialize=lambda data: self.read.append(data) or data == b"kernels"
        )
        self.ILogger = type("ILogger", (), {})
        self.config = SimpleNamespace(
            set_execution_context_allocation_strategy=lambda chosen: None,
            create_runtime_cache=lambda: kernels,
            set_runtime_cache=lambda cache: None,
        )
        self.engine = SimpleNamespace(
            device_memory_size_v2=32,
            num_optimization_profiles=profiles,
            create_runtime_config=lambda: self.config,
            create_execution_context=self.create_context,
            get_tensor_dtype=lambda name: self.outputs[name][0],
            get_tensor_shape=lambda name: self.outputs[name][1],
        )

    def Runtime(self, logger: Any) -> Any:
        return SimpleNamespace(deserialize_cuda_engine=lambda plan: self.engine)

    def create_context(self, options: Any) -> Context:
        assert options == "managed" or options is self.config
        self.contexts.append(Context())
        return self.contexts[-1]


@pytest.fixture(params=["tensorrt", "tensorrt_rtx"])
def open_plan_of(
    request: pytest.FixtureRequest, fake_gpu: FakeGpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Any:
    """Opens an engine of pictures of 4 x 4 pixels, with a plan for this machine."""
    here = Target(runtime=request.param, version="10.1", gpu="RTX 4090", compute_capability="8.9")
    monkeypatch.setenv("IOSR_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tensorrt, "unavailable_reason", lambda runtime: None)
    monkeypatch.setattr(tensorrt, "target", lambda runtime: here)
    (tmp_path / "plans").mkdir()
    (tmp_path / here.file).write_bytes(b"a plan")

    def opened(trt: TensorRT) -> TensorRTEncoder:
        monkeypatch.setattr(tensorrt, "require", lambda module, extra: fake_gpu.torch if module == "torch" else trt)
        return TensorRTEncoder(tmp_path, FACTS | {"plans": {here.file: asdict(here)}}, request.param)

    return opened


@pytest.mark.parametrize(("profiles", "chosen"), [(2, [0, 1, 1, 1]), (1, [0, 0, 0, 0])])
def test_each_batch_size_of_a_plan_has_one_context_with_its_profile_and_one_graph(
    profiles: int, chosen: list[int], open_plan_of: Any, fake_gpu: FakeGpu
) -> None:
    """The second plan is one of version 0.2."""
    trt = TensorRT(profiles)
    encoder = open_plan_of(trt)
    for batch in (1, 3, 8):
        assert encoder.encode(random_pixels(batch, 4)).adapted.shape == (batch, 3)
    encoder.warm()
    encoder.warm()
    calls = sorted((context.calls for context in trt.contexts), key=lambda calls: calls["set_input_shape"])
    assert [call["set_input_shape"] for call in calls] == [[("pixels", (size, 4, 4, 3))] for size in (1, 2, 4, 6)]
    stream = Stream.cuda_stream
    assert [call["set_optimization_profile_async"] for call in calls] == [[(index, stream)] for index in chosen]
    assert all(set(call["execute_async_v3"]) == {(stream,)} for call in calls) and len(fake_gpu.records) == 4
    assert [name for name, _ in calls[0]["set_tensor_address"]] == ["pixels", "plain", "adapted"]
    for name in ("set_tensor_address", "set_device_memory"):
        assert all(call[name] == calls[0][name] for call in calls), "all contexts share the buffers"


@pytest.mark.parametrize("runtime", ["tensorrt", "tensorrt_rtx"])
def test_a_plan_of_other_outputs_runs_as_an_encoders(
    runtime: str, fake_gpu: FakeGpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trt, file = TensorRT(), tmp_path / "classifier.onnx"
    trt.outputs = {"label": ("int64", (-1,)), "probabilities": ("float32", (-1, 5)), "accepted": ("bool", (-1,))}
    file.write_bytes(b"a graph")
    monkeypatch.setenv("IOSR_FAST_CACHE", str(tmp_path / "cache"))
    here = Target(runtime=runtime, version="10.1", gpu="RTX 4090", compute_capability="8.9")
    monkeypatch.setattr(graph, "target", lambda runtime: here)
    monkeypatch.setattr(tensorrt, "require", lambda module, extra: fake_gpu.torch if module == "torch" else trt)
    run = graph_of_plan(file, b"a plan", runtime, tuple(trt.outputs), (6, 4, 4, 3))
    for batch in (1, 14, 3):
        forms = {name: (got.dtype.name, got.shape) for name, got in run(random_pixels(batch, 4)).items()}
        assert forms == {name: (dtype, (batch, *shape[1:])) for name, (dtype, shape) in trt.outputs.items()}
    assert [context.calls["set_input_shape"][0][1][0] for context in trt.contexts] == [1, 6, 2, 4]
    assert all(
        [name for name, _ in context.calls["set_tensor_address"]] == ["pixels", *trt.outputs]
        for context in trt.contexts
    )


def test_compiled_kernels_are_kept_in_the_cache_and_never_in_the_engine(
    open_plan_of: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trt = TensorRT()
    runtime = open_plan_of(trt).runtime
    assert not list(tmp_path.rglob("*.kernels")), "none are compiled before the first run"
    open_plan_of(trt).encode(random_pixels(1, 4))
    kept = list(tmp_path.rglob("*.kernels"))
    assert len(kept) == (runtime == "tensorrt_rtx") and all(path.is_relative_to(tmp_path / "cache") for path in kept)
    if kept:
        assert trt.config.dynamic_shapes_kernel_specialization_strategy == "eager"
        content = kept[0].read_bytes()
        open_plan_of(trt)
        assert trt.read == [b"kernels"]
        kept[0].write_bytes(content[:-1])
        open_plan_of(trt).warm([1])
        assert "damaged and compiled again" in caplog.text and kept[0].read_bytes() == content


def test_the_called_names_of_tensorrt_rtx_exist() -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    fake, context = TensorRT(), trt.IExecutionContext
    assert context.set_device_memory and context.set_optimization_profile_async and context.set_tensor_address
    assert context.set_input_shape and context.execute_async_v3
    assert set(vars(fake.engine)) <= set(dir(trt.ICudaEngine))
    assert {*vars(fake.config), "dynamic_shapes_kernel_specialization_strategy"} <= set(dir(trt.IRuntimeConfig))
    assert {"serialize", "deserialize"} <= set(dir(trt.IRuntimeCache))
    assert trt.nptype(trt.DataType.INT64) is np.int64
    assert trt.DynamicShapesKernelSpecializationStrategy.EAGER and trt.ExecutionContextAllocationStrategy.USER_MANAGED
    assert [int(getattr(trt.ILogger.Severity, name)) for name in ("INTERNAL_ERROR", "VERBOSE")] == [0, 4]


def write_onnx(path: Path, operator: str) -> Path:
    """A graph of one operator on "pixels", beside the Cast to float."""
    onnx = pytest.importorskip("onnx")
    nodes = f"x = Cast<to: int = 1>(pixels) plain = {operator}(x)"
    graph = f"graph (uint8[batch, 4, 4, 3] pixels) => (float[batch, 4, 4, 3] plain) {{ {nodes} }}"
    onnx.save(onnx.parser.parse_model(f'<ir_version: 9, opset_import: ["": 20]> {graph}'), path)
    return path


@pytest.mark.parametrize(
    ("max_batch", "expected"), [(1, [(1, 1, 1)]), (2, [(1, 1, 1), (2, 2, 2)]), (32, [(1, 1, 1), (2, 32, 32)])]
)
def test_a_plan_has_a_profile_for_one_picture_and_one_for_batches(
    max_batch: int, expected: list[tuple[int, int, int]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    profiles = optimization_profiles(builder, (4, 4, 3), max_batch)
    shapes = [[tuple(shape) for shape in profile.get_shape("pixels")] for profile in profiles]
    assert shapes == [[(size, 4, 4, 3) for size in sizes] for sizes in expected]
    caplog.set_level(logging.INFO, tensorrt.__name__)
    assert len(build_plan(write_onnx(tmp_path / "relu.onnx", "Relu"), "tensorrt_rtx", max_batch)) > 10_000
    assert "1 output network tensor" in caplog.text  # TensorRT's own words, in Python's logging


def test_the_parsers_refusal_is_reported(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    with pytest.raises(RuntimeError, match=r"can't parse bad\.onnx.*NoSuchOperator"):
        build_plan(write_onnx(tmp_path / "bad.onnx", "NoSuchOperator"), "tensorrt_rtx", 2)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("name", "precision", "error"),
    [("torch", "fp32", 1e-4), ("torch", "fp16", 5e-3), ("torch", "bf16", 4e-2)]
    + [(name, "fp16", 5e-3) for name in ("tensorrt", "tensorrt_rtx")],
)
def test_graphs_and_eager_runs_on_a_gpu(
    name: str, precision: str, error: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if (reason := unavailable_reason(name)) is not None or not torch.cuda.is_available():
        pytest.skip(reason or "PyTorch sees no NVIDIA GPU")
    monkeypatch.setenv("IOSR_FAST_CACHE", str(tmp_path / "cache"))
    clip, pixels = small_clip(), random_pixels(9, 32)
    adapter = random_adapter(clip, 1)
    made = write_engine(source_of(clip, adapter), tmp_path / "engine", name, precision, 6)
    assert made["check"][name]["random"]["adapted"]["min_cosine"] > 0.999
    files = sorted((tmp_path / "engine").rglob("*"))
    encoders: list[Any] = [open_engine(tmp_path / "engine", name) for _ in range(2)]  # the second finds RTX's kernels
    encoders[1].warm()
    assert sorted(encoders[1]._gpu._graphs) == [1, 2, 4, 6] and not encoders[0]._gpu._graphs
    for batch in (1, 2, 3, 5, 6, 9, 1):
        expected = two_passes(clip, adapter, pixels[:batch])
        for encoder in encoders:
            there = encoder.encode_on_device(pixels[:batch])
            encoder.encode(pixels[::-1])
            assert there.plain.is_cuda
            for got, right in zip((there.to_numpy().plain, there.to_numpy().adapted), expected, strict=True):
                np.testing.assert_allclose(got, right, atol=error)
    assert len(list((tmp_path / "cache").rglob("*.kernels"))) == (name == "tensorrt_rtx")
    assert sorted((tmp_path / "engine").rglob("*")) == files, "running an engine leaves its folder as it is"


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["tensorrt", "tensorrt_rtx"])
def test_a_classifiers_plan_answers_as_the_classifier_on_a_gpu(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if (reason := unavailable_reason(name)) is not None:
        pytest.skip(reason)
    monkeypatch.setenv("IOSR_FAST_CACHE", str(tmp_path / "cache"))
    images, labels = pictures(np.random.default_rng(0), 3, 3)
    Classifier("demo", method="tip-adapter++", runtime=name).fit(images, labels).save(tmp_path / "saved")
    words = ("build-plan", tmp_path / "saved", "--out", tmp_path / "plan", "--runtime", name)
    assert "so does the plan, on the GPU here" in done(*words)
    parts, _ = benchmark.open_parts(tmp_path / "saved", benchmark.read_files(None, 9)[0], name, None)
    assert "one plan" in parts, "it is verified"
