"""Engines: what is refused and why, what each runtime returns, and plans that are really compiled."""

from __future__ import annotations

import logging
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytest.importorskip("open_clip")

from iosr_fast.clip.adapter import random_adapter  # noqa: E402
from iosr_fast.clip.two_pass import two_passes  # noqa: E402
from iosr_fast.encoders.runtimes import choose_runtime, engine, open_engine, openvino  # noqa: E402
from iosr_fast.encoders.runtimes.openvino import openvino_core  # noqa: E402
from iosr_fast.encoders.runtimes.tensorrt import build_plan  # noqa: E402
from iosr_fast.export import build  # noqa: E402
from iosr_fast.export.build import write_engine  # noqa: E402
from iosr_fast.export.precision import choose_builder  # noqa: E402
from iosr_fast.utils import machine  # noqa: E402
from iosr_fast.utils.manifest import SCHEMA, read_manifest  # noqa: E402
from tests import ROOT  # noqa: E402
from tests.clip.small_clip import random_pixels, small_clip  # noqa: E402
from tests.demo_cache import export_once  # noqa: E402
from tests.store.manifests import rewrite_manifest  # noqa: E402

pytestmark = pytest.mark.slow

MAX_BATCH = 3


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small engine for each runtime of the CPU, and one without an adapter."""
    folder, clip = tmp_path_factory.mktemp("engines"), small_clip()
    adapter = random_adapter(clip, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "export_onnx", export_once)
        for runtime in ("onnxruntime", "torch"):
            write_engine(clip, adapter, folder / runtime, runtime, max_batch=MAX_BATCH)
        if find_spec("openvino") is not None:
            write_engine(clip, adapter, folder / "openvino", "openvino", "bf16", max_batch=MAX_BATCH)
    write_engine(clip, None, folder / "plain", "torch", max_batch=MAX_BATCH)
    return {path.name: path for path in folder.iterdir()}


@pytest.fixture
def copied(engines: dict[str, Path], tmp_path: Path) -> Path:
    """An ONNX Runtime engine to damage."""
    return Path(shutil.copytree(engines["onnxruntime"], tmp_path / "engine"))


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino", "torch"])
@pytest.mark.parametrize("batch", [1, 3, 4, 7])
def test_encodes_any_batch(engines: dict[str, Path], runtime: str, batch: int) -> None:
    if runtime == "openvino":
        pytest.importorskip("openvino")
    encoder = open_engine(engines["torch" if runtime == "torch" else "onnxruntime"], runtime, threads=1)
    assert (encoder.runtime, encoder.image_size, encoder.width) == (runtime, 32, 24)
    clip, pixels = small_clip(), random_pixels(batch, 32)
    embeddings = encoder.encode(pixels)
    for got, expected in zip(
        (embeddings.plain, embeddings.adapted), two_passes(clip, random_adapter(clip, 1), pixels), strict=True
    ):
        assert got is not None and got.dtype == np.float32
        np.testing.assert_allclose(got, expected, atol=1e-5)


class Core:
    """OpenVINO's Core on a processor of which it says that it has bf16, or has not."""

    def __init__(self, capabilities: list[str]) -> None:
        self.core, self.capabilities = openvino_core(), capabilities
        self.options: dict[str, str] = {}

    def get_property(self, device: str, name: str) -> list[str]:
        assert (device, name) == ("CPU", "OPTIMIZATION_CAPABILITIES")
        return self.capabilities

    def compile_model(self, path: str, device: str, options: dict[str, str]) -> Any:
        self.options = dict(options)
        return self.core.compile_model(path, device, options)


def test_bf16_is_computed_where_the_processor_has_it(
    engines: dict[str, Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("openvino")
    encoder = open_engine(engines["openvino"])
    assert encoder.runtime == "openvino"
    found = "BF16" in openvino_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    assert encoder.computes_in == ("bf16" if found else "fp32")
    pixels = random_pixels(5, 32)
    for got, expected in zip(
        (encoder.encode(pixels).plain, encoder.encode(pixels).adapted),
        two_passes(small_clip(), random_adapter(small_clip(), 1), pixels),
        strict=True,
    ):
        assert got is not None and (got * expected).sum(1).min() > 0.999
        assert np.abs(got - expected).max() > 1e-5 or not found, "bf16 rounds"
    core = Core(["FP32", "BF16"])
    monkeypatch.setattr(openvino, "openvino_core", lambda: core)
    open_engine(engines["onnxruntime"], "openvino", threads=1)
    assert core.options["INFERENCE_PRECISION_HINT"] == "f32", "bf16 is never taken without being asked for"
    assert core.options["INFERENCE_NUM_THREADS"] == "1"
    core.capabilities = ["FP32"]
    encoder = open_engine(engines["openvino"])
    assert encoder.computes_in == "fp32" and "no bf16 instructions" in caplog.text
    caplog.clear()
    assert open_engine(engines["openvino"], "onnxruntime").runtime == "onnxruntime"
    assert "ONNX Runtime computes this bf16 engine in fp32" in caplog.text


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("runs", [1, 3])
def test_threads_share_an_engine(runtime: str, runs: int, engines: dict[str, Path]) -> None:
    pytest.importorskip(runtime)
    encoder = open_engine(engines["onnxruntime"], runtime, threads=1, runs=runs)
    assert (encoder.parallel, encoder.runs, encoder.threads) == (True, runs, 1)
    pixels = random_pixels(40, 32)
    expected = encoder.encode(pixels).plain
    with ThreadPoolExecutor(5) as pool:
        for i, got in enumerate(pool.map(lambda i: encoder.encode(pixels[i : i + 1]).plain[0], range(40))):
            np.testing.assert_allclose(got, expected[i], atol=1e-6)


def test_openvino_executes_as_many_runs_as_it_was_opened_for(engines: dict[str, Path]) -> None:
    pytest.importorskip("openvino")
    encoder: Any = open_engine(engines["onnxruntime"], "openvino", threads=1, runs=2)
    assert encoder._compiled.get_property("NUM_STREAMS") == 2
    assert encoder._compiled.get_property("INFERENCE_NUM_THREADS") == 2
    requests = [encoder._idle.get_nowait() for _ in range(2)]
    assert encoder._idle.empty(), "a third thread waits for one of the two"
    for request in requests:
        encoder._idle.put(request)
    with pytest.raises(ValueError, match="expected runs of at least 1, got 0"):
        open_engine(engines["onnxruntime"], runs=0)


def test_large_batches_are_split(engines: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    encoder: Any = open_engine(engines["torch"])
    run, sizes = encoder._run, []
    monkeypatch.setattr(encoder, "_run", lambda pixels, size: (sizes.append(size), run(pixels, size))[1])
    assert len(encoder.encode(random_pixels(7, 32))) == 7
    assert sizes == [3, 3, 1]


def test_runtimes_of_one_export_share_a_fingerprint(engines: dict[str, Path]) -> None:
    assert open_engine(engines["torch"]).fingerprint == open_engine(engines["onnxruntime"]).fingerprint
    assert open_engine(engines["plain"]).fingerprint != open_engine(engines["torch"]).fingerprint


def test_without_adapter_no_adapted_embedding(engines: dict[str, Path]) -> None:
    assert open_engine(engines["plain"]).encode(random_pixels(4, 32)).adapted is None


def test_strided_and_read_only_pixels(engines: dict[str, Path]) -> None:
    pixels = random_pixels(4, 32)
    flipped = pixels[:, :, ::-1]
    flipped.setflags(write=False)
    for runtime in ("torch", "onnxruntime"):
        encoder = open_engine(engines[runtime])
        expected = encoder.encode(np.ascontiguousarray(flipped)).plain
        np.testing.assert_allclose(encoder.encode(flipped).plain, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("pixels", "error", "message"),
    [
        (np.zeros((2, 32, 32, 3), np.float32), ValueError, "uint8 array .*got float32"),
        ([[0]], ValueError, "got list"),
        (
            np.zeros((2, 3, 32, 32), np.uint8),
            ValueError,
            r"expected pixels of shape \(B, 32, 32, 3\).*\(2, 3, 32, 32\)",
        ),
        (np.zeros((32, 32, 3), np.uint8), ValueError, "expected pixels of shape"),
        (np.zeros((0, 32, 32, 3), np.uint8), ValueError, "B >= 1"),
        (np.zeros((1, 64, 64, 3), np.uint8), ValueError, "iosr_fast.images.preprocess"),
    ],
)
def test_refuses_other_pixels(engines: dict[str, Path], pixels: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        open_engine(engines["torch"]).encode(pixels)


def test_threads_of_pytorch_are_given_back(engines: dict[str, Path]) -> None:
    before = torch.get_num_threads()
    encoder = open_engine(engines["torch"], threads=before + 1)
    seen = []
    encoder._encoder.register_forward_hook(lambda *_: seen.append(torch.get_num_threads()))  # type: ignore[attr-defined]
    encoder.encode(random_pixels(1, 32))
    assert seen == [before + 1] and torch.get_num_threads() == before
    with pytest.raises(ValueError, match="threads of at least 1"):
        open_engine(engines["torch"], threads=0)


def test_a_changed_file_is_refused(copied: Path) -> None:
    with (copied / "encoder.onnx").open("ab") as file:
        file.write(b"x")
    with pytest.raises(ValueError, match=r"encoder\.onnx in .*does not match its manifest \(expected sha256"):
        open_engine(copied)


def test_a_damaged_file_is_refused_without_verification_too(copied: Path) -> None:
    (copied / "encoder.onnx").write_bytes(b"not a graph")
    with pytest.raises(RuntimeError, match=r"can't load encoder\.onnx"):
        open_engine(copied, verify=False)


def test_missing_and_foreign_folders(copied: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"manifest\.json"):
        open_engine(tmp_path / "nowhere")
    rewrite_manifest(copied, schema=99)
    with pytest.raises(ValueError, match=r"schema 99.*iosr-fast build-engine builds it again"):
        open_engine(copied)
    rewrite_manifest(copied, schema=SCHEMA, kind="classifier")
    with pytest.raises(ValueError, match="got a classifier"):
        open_engine(copied)
    rewrite_manifest(copied, ["fingerprint"], kind="engine")
    with pytest.raises(ValueError, match=r"missing required field `fingerprint`.*builds it again"):
        open_engine(copied)
    (copied / "encoder.onnx").unlink()
    with pytest.raises(FileNotFoundError, match=r"encoder\.onnx is missing"):
        open_engine(copied)


def test_the_wrong_runtime_is_refused(engines: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match=r"\['onnxruntime', 'openvino'\], got 'torch'"):
        open_engine(engines["onnxruntime"], "torch")
    with pytest.raises(ValueError, match="got 'tvm'"):
        open_engine(engines["onnxruntime"], "tvm")
    with pytest.raises(ValueError, match=r"\['torch'\], got 'openvino'"):
        open_engine(engines["torch"], "openvino")


def test_auto_takes_the_best_and_says_why_not_the_others(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    missing = {"tensorrt": "no GPU", "onnxruntime": None, "openvino": None, "torch": None, "tensorrt_rtx": None}
    monkeypatch.setattr(engine, "unavailable_reason", missing.get)
    caplog.set_level(logging.INFO, "iosr_fast.encoders.runtimes.engine")
    assert choose_runtime("auto") == "tensorrt_rtx"
    assert choose_runtime("auto", {"torch", "onnxruntime", "tensorrt"}) == "onnxruntime"
    assert choose_runtime("auto", {"onnxruntime", "openvino", "tensorrt_rtx"}) == "tensorrt_rtx"
    assert "no GPU" in caplog.text and "not built for it" in caplog.text
    with pytest.raises(RuntimeError, match="tensorrt: no GPU"):
        choose_runtime("auto", {"tensorrt"})


@pytest.mark.parametrize(
    ("processor", "best", "second"),
    [
        ("x86_64", "openvino", "onnxruntime"),
        ("AMD64", "openvino", "onnxruntime"),
        ("aarch64", "onnxruntime", "openvino"),
    ],
)
def test_auto_on_a_cpu_is_openvino_on_x86_and_onnx_runtime_elsewhere(
    processor: str, best: str, second: str, monkeypatch: pytest.MonkeyPatch, engines: dict[str, Path]
) -> None:
    missing: dict[str, str | None] = {"openvino": None, "onnxruntime": None, "torch": None}
    monkeypatch.setattr(engine, "unavailable_reason", missing.get)
    monkeypatch.setattr(machine, "this_gpu", lambda: None)
    monkeypatch.setattr(platform, "machine", lambda: processor)
    assert choose_runtime("auto", {"torch", "onnxruntime", "openvino"}) == best
    for built in ("onnxruntime", "openvino"):
        if built in engines:
            assert open_engine(engines[built]).runtime == best, "whichever of the two it was built for"
    missing[best] = "not installed"
    assert choose_runtime("auto", {"torch", "onnxruntime", "openvino"}) == second
    missing[second] = "not installed"
    assert choose_runtime("auto", {"torch", "onnxruntime", "openvino"}) == "torch"


def test_auto_is_torch_on_a_gpu_without_tensorrt(monkeypatch: pytest.MonkeyPatch, engines: dict[str, Path]) -> None:
    monkeypatch.setattr(engine, "find_spec", lambda name: None if name in engine.EXTRAS else find_spec(name))
    monkeypatch.setattr(machine, "this_gpu", lambda: machine.Gpu("NVIDIA H100", (9, 0)))
    assert choose_runtime("auto") == "torch"
    assert choose_runtime("auto", {"torch", "onnxruntime"}) == "torch"
    on_cpu = choose_runtime("auto", {"onnxruntime", "openvino"})
    assert on_cpu in engine.ONNX_RUNTIMES
    assert choose_builder("auto", "fp16") == "torch" and choose_builder("auto", "int8") == on_cpu
    monkeypatch.setattr(machine, "this_gpu", lambda: None)
    assert choose_runtime("auto") == choose_builder("auto", "fp32") == on_cpu
    assert choose_runtime("auto", {"torch"}) == "torch"

    def never() -> None:
        raise AssertionError("this_gpu imports torch, which an ONNX engine does not need")

    monkeypatch.setattr(machine, "this_gpu", never)
    assert open_engine(engines["onnxruntime"]).runtime == on_cpu


def test_the_torch_runtime_needs_no_open_clip(engines: dict[str, Path]) -> None:
    code = (
        "import sys; sys.modules['open_clip'] = sys.modules['onnxruntime'] = None; import numpy as np; "
        "from iosr_fast.encoders.runtimes import open_engine; "
        f"print(open_engine({str(engines['torch'])!r}).encode(np.zeros((1, 32, 32, 3), np.uint8)).plain.shape)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "(1, 24)"


def test_opening_imports_no_torch_for_onnx_runtime(engines: dict[str, Path]) -> None:
    code = (
        "import sys; sys.modules['torch'] = None; from iosr_fast.encoders.runtimes import open_engine; "
        f"print(open_engine({str(engines['onnxruntime'])!r}, 'onnxruntime').runtime)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "onnxruntime"


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_tensorrt_rtx_compiles_without_a_gpu(
    precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("tensorrt_rtx")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(build, "export_onnx", export_once)
    caplog.set_level(logging.INFO, "iosr_fast.encoders.runtimes.tensorrt")
    clip = small_clip()
    manifest = write_engine(clip, random_adapter(clip, 1), tmp_path / "engine", "tensorrt_rtx", precision, MAX_BATCH)
    (name,) = manifest["plans"]
    assert set(manifest["files"]) == {"encoder.onnx", "plain.onnx", "encoder.weights", name}
    assert name.startswith("plans/tensorrt_rtx-any-")
    plan = manifest["plans"][name]
    assert (plan["runtime"], plan["version"]) == ("tensorrt_rtx", manifest["versions"]["tensorrt_rtx"])
    assert (plan["gpu"], plan["compute_capability"], plan["precision"]) == (None, None, precision)
    assert plan["profile"]["max"] == plan["max_batch"] == MAX_BATCH
    assert manifest["check"]["tensorrt_rtx"] is None and "random" in manifest["check"]["onnxruntime"]
    assert "2 output network tensors" in caplog.text  # TensorRT's own words, in Python's logging
    assert open_engine(tmp_path / "engine").runtime in engine.ONNX_RUNTIMES
    with pytest.raises(RuntimeError, match="needs an NVIDIA GPU"):
        open_engine(tmp_path / "engine", "tensorrt_rtx")


def test_the_parsers_refusal_is_reported(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    onnx = pytest.importorskip("onnx")
    pixels = onnx.helper.make_tensor_value_info("pixels", onnx.TensorProto.FLOAT, ["batch", 4, 4, 3])
    out = onnx.helper.make_tensor_value_info("plain", onnx.TensorProto.FLOAT, None)
    node = onnx.helper.make_node("NoSuchOperator", ["pixels"], ["plain"], domain="nowhere")
    graph = onnx.helper.make_graph([node], "graph", [pixels], [out])
    opsets = [onnx.helper.make_opsetid("", 20), onnx.helper.make_opsetid("nowhere", 1)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opsets), tmp_path / "bad.onnx")
    with pytest.raises(RuntimeError, match=r"can't parse bad\.onnx.*NoSuchOperator"):
        build_plan(tmp_path / "bad.onnx", "tensorrt_rtx", 2)
    with pytest.raises(ValueError, match="expected one of"):
        build_plan(tmp_path / "bad.onnx", "os", 2)


@pytest.mark.gpu
@pytest.mark.parametrize("runtime", ["tensorrt", "tensorrt_rtx"])
def test_plans_run(runtime: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if engine.unavailable_reason(runtime) is not None:
        pytest.skip(str(engine.unavailable_reason(runtime)))
    monkeypatch.setenv("IOSR_FAST_CACHE", str(tmp_path / "cache"))
    clip = small_clip()
    adapter = random_adapter(clip, 1)
    manifest = write_engine(clip, adapter, tmp_path / "engine", runtime, "fp16", MAX_BATCH)
    assert manifest["check"][runtime]["random"]["adapted"]["min_cosine"] > 0.999
    files = sorted((tmp_path / "engine").rglob("*"))
    for _ in range(2):  # the second time TensorRT-RTX takes its kernels from the cache
        encoder = open_engine(tmp_path / "engine")
        assert encoder.runtime == runtime
        for batch in (1, 3, 7):
            pixels = random_pixels(batch, 32)
            embeddings = encoder.encode(pixels)
            plain, adapted = two_passes(clip, adapter, pixels)
            assert embeddings.adapted is not None
            assert (embeddings.plain * plain).sum(1).min() > 0.999
            assert (embeddings.adapted * adapted).sum(1).min() > 0.999
    assert len(list((tmp_path / "cache").rglob("*.cache"))) == (runtime == "tensorrt_rtx")
    assert sorted((tmp_path / "engine").rglob("*")) == files, "running an engine leaves its folder as it is"


def test_int8_weights_of_eight_bits_are_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(build, "export_onnx", export_once)
    clip, pixels = small_clip(), random_pixels(12, 32)
    write_engine(clip, None, tmp_path / "int8", "onnxruntime", "int8", pictures=pixels)
    open_engine(tmp_path / "int8")
    assert "VNNI" not in caplog.text
    facts = read_manifest(tmp_path / "int8", "engine")
    rewrite_manifest(tmp_path / "int8", quantised=facts["quantised"] | {"version": 2})
    open_engine(tmp_path / "int8")
    assert "int8 weights of 8 bits, whose sums overflow on processors without VNNI" in caplog.text


WITHOUT_CONVERTER = """
import sys
from iosr_fast.encoders.runtimes.openvino import openvino_core
openvino_core()
assert "openvino.tools.ovc" not in sys.modules, "it takes two thirds of the time of the import"
import openvino
try:
    openvino.nothing
except AttributeError as error:
    assert str(error) == "module 'openvino' has no attribute 'nothing'"
from openvino import convert_model
print(convert_model.__name__, "openvino.tools.ovc" in sys.modules)
"""


def test_openvino_is_imported_without_its_converter() -> None:
    pytest.importorskip("openvino")
    done = subprocess.run([sys.executable, "-c", WITHOUT_CONVERTER], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["convert_model", "True"], done.stderr


RELEASES_MODELS = """
import faulthandler, gc, os, signal
import numpy as np
from iosr_fast.encoders.runtimes.openvino import openvino_core, signal_stack
from benchmarks.ceilings import openvino_gemm

faulthandler.enable()
before, seen = signal_stack(), []
signal.signal(signal.SIGUSR1, lambda *_: seen.append(1))
left, weight = np.ones((2, 128, 128), np.float32)
models = [openvino_gemm(left, weight, 1) for _ in range(3)]
for model in models:
    model()
assert openvino_core() is openvino_core()
while models:
    models.pop(0)
    gc.collect()
assert signal_stack() == before, (signal_stack(), before)
os.kill(os.getpid(), signal.SIGUSR1)
assert seen == [1]
openvino_core.cache_clear()  # as if the plugin were loaded by two, in the order in which they release it
first, second = openvino_core(), openvino_core.__wrapped__()
openvino_core.cache_clear()
del first
gc.collect()
del second
gc.collect()
assert signal_stack() == before, (signal_stack(), before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="sigaltstack is asked for on Linux only")
def test_openvino_leaves_the_signal_stack() -> None:
    pytest.importorskip("openvino")
    pytest.importorskip("onnx")
    done = subprocess.run(
        [sys.executable, "-c", RELEASES_MODELS], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


FIRST_RESULTS = """
import sys, threading
import numpy as np
from iosr_fast.encoders.runtimes.openvino import import_openvino, openvino_core

openvino = import_openvino()
from openvino import opset13
pixels = opset13.parameter([1, 8], np.float32)
model = openvino.Model([opset13.relu(pixels)], [pixels])
compiled = openvino_core().compile_model(model, "CPU", {"NUM_STREAMS": "8"})
sys.setswitchinterval(1e-6)
go = []

def read(request):
    while not go:
        pass
    np.array(request.infer({0: np.zeros((1, 8), np.float32)})[0])

threads = [threading.Thread(target=read, args=(compiled.create_infer_request(),)) for _ in range(8)]
for thread in threads:
    thread.start()
go.append(True)
for thread in threads:
    thread.join()
"""


def test_threads_may_read_openvinos_first_results_at_once() -> None:
    """Every second run hangs without the tensor that openvino_core reads."""
    pytest.importorskip("openvino")
    subprocess.run([sys.executable, "-c", FIRST_RESULTS], cwd=ROOT, check=True, timeout=60)
