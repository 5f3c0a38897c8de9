"""What TensorRTEncoder asks of TensorRT, with a stand-in that computes on the CPU: calls, buffers, kept files.

Plans are really built elsewhere (test_runtimes.py); that the calls do what they promise only a GPU can show
(test_cuda_graphs.py).
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from iosr_fast.encoders.runtimes import tensorrt  # noqa: E402
from iosr_fast.encoders.runtimes.plans import Target  # noqa: E402
from iosr_fast.encoders.runtimes.tensorrt import TensorRTEncoder  # noqa: E402
from iosr_fast.utils import machine as machine_facts  # noqa: E402
from iosr_fast.utils.machine import Gpu  # noqa: E402
from tests.encoders.test_cuda_graphs import WIDTH, manifest, pictures  # noqa: E402

GPU, VERSION, MAX_BATCH = Gpu("NVIDIA GeForce RTX 4090", (8, 9)), "10.1", 6


# As TensorRT writes them: names alone, or more of each layer.


class Context:
    """Computes a picture's mean colour at the addresses that it was given."""

    def __init__(self) -> None:
        self.addresses: dict[str, int] = {}
        self.shape: tuple[int, ...] = ()
        self.memory = 0

    def set_device_memory(self, pointer: int, size: int) -> None:
        assert size >= 32
        self.memory = pointer

    def set_tensor_address(self, name: str, pointer: int) -> None:
        self.addresses[name] = pointer

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert name == "pixels" and not self.shape, "a context keeps its one shape: graphs depend on it"
        self.shape = shape
        return shape[0] <= MAX_BATCH

    def execute_async_v3(self, stream: int) -> bool:
        assert self.memory and stream == 7
        means = floats(self.addresses["pixels"], self.shape, ctypes.c_uint8).mean((1, 2))
        floats(self.addresses["plain"], (self.shape[0], WIDTH), ctypes.c_float)[...] = means
        floats(self.addresses["adapted"], (self.shape[0], WIDTH), ctypes.c_float)[...] = -means
        return True


def floats(pointer: int, shape: tuple[int, ...], kind: Any) -> np.ndarray:
    return np.ctypeslib.as_array(ctypes.cast(pointer, ctypes.POINTER(kind)), shape)


class Kernels:
    """TensorRT-RTX's runtime cache."""

    def __init__(self) -> None:
        self.read: list[bytes] = []

    def deserialize(self, data: bytes) -> bool:
        self.read.append(data)
        return data == b"kernels"

    def serialize(self) -> bytes:
        return b"kernels"


class Machine:
    """The modules that the encoder imports, and what was asked of them."""

    def __init__(self, rtx: bool) -> None:
        self.contexts: list[Context] = []
        self.kernels = Kernels()
        strategy = SimpleNamespace(USER_MANAGED="managed")
        self.config = SimpleNamespace(
            set_execution_context_allocation_strategy=lambda chosen: self.asked.append(chosen),
            create_runtime_cache=lambda: self.kernels,
            set_runtime_cache=lambda cache: self.asked.append(cache),
        )
        self.asked: list[Any] = []
        self.engine = SimpleNamespace(
            device_memory_size_v2=32,
            create_runtime_config=lambda: self.config,
            create_execution_context=self.create_context,
        )

        class Logger:
            Severity = SimpleNamespace(INTERNAL_ERROR=0, ERROR=1, WARNING=2, INFO=3, VERBOSE=4)

        runtime = SimpleNamespace(deserialize_cuda_engine=lambda data: self.engine if data == b"good" else None)
        self.trt = SimpleNamespace(
            __version__=VERSION,
            ILogger=Logger,
            Runtime=lambda logger: runtime,
            ExecutionContextAllocationStrategy=strategy,
            DynamicShapesKernelSpecializationStrategy=SimpleNamespace(EAGER="eager"),
        )
        if rtx:
            self.trt.IRuntimeCache = Kernels
        stream = SimpleNamespace(
            cuda_stream=7,
            synchronize=lambda: None,
            device="cuda:1",
        )
        self.caller = SimpleNamespace(wait_stream=lambda other: self.handed_over.append(other is stream))
        self.handed_over: list[bool] = []  # results that the caller's stream waits for, or that live until it has read
        streams = {None: stream, "cuda:1": self.caller}
        cuda = SimpleNamespace(Stream=lambda: stream, stream=nullcontext, current_stream=lambda on=None: streams[on])
        self.torch = SimpleNamespace(uint8=torch.uint8, cuda=cuda, zeros=self.zeros, empty=self.zeros)
        self.recorded = 0

    def zeros(self, shape: Any, dtype: Any = torch.float32, device: str = "cpu", pin_memory: bool = False) -> Any:
        return torch.zeros(shape, dtype=dtype)

    def create_context(self, how: Any) -> Context:
        assert how == ("managed" if not hasattr(self.trt, "IRuntimeCache") else self.config)
        self.contexts.append(Context())
        return self.contexts[-1]

    def require(self, module: str, extra: str) -> Any:
        return self.torch if module == "torch" else self.trt

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        run()
        run()
        self.recorded += 1
        return run


@pytest.fixture(params=["tensorrt", "tensorrt_rtx"])
def runtime(request: pytest.FixtureRequest) -> str:
    chosen: str = request.param
    return chosen


@pytest.fixture
def machine(runtime: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Machine:
    made = Machine(runtime == "tensorrt_rtx")
    monkeypatch.setattr(tensorrt, "require", made.require)
    monkeypatch.setattr(tensorrt, "Recorder", lambda stream: made)
    record_stream = lambda tensor, stream: made.handed_over.append(stream is made.caller)  # noqa: E731
    monkeypatch.setattr(torch.Tensor, "record_stream", record_stream)
    monkeypatch.setattr(machine_facts, "this_gpu", lambda: GPU)
    monkeypatch.setenv("IOSR_FAST_CACHE", str(tmp_path / "cache"))
    return made


def encoder(runtime: str, folder: Path, plan: bytes = b"good", **options: Any) -> TensorRTEncoder:
    there = Target(runtime, VERSION, GPU)
    (folder / "plans").mkdir(exist_ok=True)
    (folder / there.file).write_bytes(plan)
    return TensorRTEncoder(folder, {**manifest(MAX_BATCH), "plans": {there.file: there.facts()}}, runtime, **options)


def test_each_bucket_has_one_context_and_after_warming_one_graph(
    runtime: str, machine: Machine, tmp_path: Path
) -> None:
    made = encoder(runtime, tmp_path, buckets=(1, 3))
    assert made.buckets == (1, 3, 6) and made.runtime == runtime
    for batch in (2, 3, 8, 1):
        pixels = pictures(batch)
        found = made.encode(pixels)
        np.testing.assert_allclose(found.plain, pixels.mean((1, 2)), rtol=1e-6)
        np.testing.assert_allclose(found.adapted, -pixels.mean((1, 2)), rtol=1e-6)
    assert sorted(context.shape[0] for context in machine.contexts) == [1, 3, 6] and not machine.recorded
    assert len({context.memory for context in machine.contexts}) == 1
    made.warm()
    made.warm()
    assert len(machine.contexts) == machine.recorded == 3
    pixels = pictures(5)
    machine.handed_over.clear()
    there = made.encode_on_device(pixels)
    made.encode(pictures(6))
    assert machine.handed_over == [True] * 6, "of both runs the caller's stream waits, and each output is its own"
    assert isinstance(there.plain, torch.Tensor)
    np.testing.assert_allclose(there.to_numpy().plain, pixels.mean((1, 2)), rtol=1e-6)


def test_compiled_kernels_are_kept_in_the_cache_and_never_in_the_engine(
    runtime: str, machine: Machine, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "engine").mkdir()
    encoder(runtime, tmp_path / "engine").encode(pictures(1))
    kept = list((tmp_path / "cache").rglob("*.cache"))
    assert [path.read_bytes() for path in kept] == ([b"kernels"] if runtime == "tensorrt_rtx" else [])
    assert [path.name for path in (tmp_path / "engine").rglob("*")][1:] == [
        Path(Target(runtime, VERSION, GPU).file).name
    ]
    if runtime == "tensorrt_rtx":
        assert machine.asked == ["managed", machine.kernels]
        assert machine.config.dynamic_shapes_kernel_specialization_strategy == "eager"
        encoder(runtime, tmp_path / "engine")
        assert machine.kernels.read == [b"kernels"] and "compiled again" not in caplog.text
        kept[0].write_bytes(b"half")
        encoder(runtime, tmp_path / "engine").warm([1])
        assert "can't be read; its kernels are compiled again" in caplog.text and kept[0].read_bytes() == b"kernels"


def test_what_can_not_be_loaded_or_run_is_told(runtime: str, machine: Machine, tmp_path: Path) -> None:
    where = re.escape(str(tmp_path / Target(runtime, VERSION, GPU).file))
    with pytest.raises(RuntimeError, match=rf"RTX 4090 .* with {runtime} {VERSION} can't load {where}"):
        encoder(runtime, tmp_path, b"bad")
    made = encoder(runtime, tmp_path)
    machine.engine.create_execution_context = lambda how: None
    with pytest.raises(RuntimeError, match="can't prepare the plan"):
        made.encode(pictures(1))


def test_the_names_that_are_called_exist() -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    assert {"EAGER"} <= set(dir(trt.DynamicShapesKernelSpecializationStrategy))
    assert {"USER_MANAGED"} <= set(dir(trt.ExecutionContextAllocationStrategy))
    assert {"device_memory_size_v2", "create_execution_context", "create_runtime_config"} <= set(dir(trt.ICudaEngine))
    context = {name for name in dir(Context) if not name.startswith("_")}
    assert len(context) == 4 and context <= set(dir(trt.IExecutionContext))
    assert {"serialize", "deserialize"} <= set(dir(trt.IRuntimeCache))
    config = set(dir(trt.IRuntimeConfig))
    assert {"set_execution_context_allocation_strategy", "create_runtime_cache", "set_runtime_cache"} <= config
    assert "dynamic_shapes_kernel_specialization_strategy" in config
