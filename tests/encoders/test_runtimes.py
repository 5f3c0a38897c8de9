"""Engines in the runtimes that are installed here: both embeddings or the plain one alone, and what is refused."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from iosr_fast.backbones.adapter import random_adapter
from iosr_fast.backbones.two_pass import two_passes
from iosr_fast.encoders.engine_folder import ONNX_RUNTIMES
from iosr_fast.encoders.runtimes import open_engine
from iosr_fast.encoders.runtimes.openvino import openvino_core
from iosr_fast.export import pretrained
from iosr_fast.export.build import write_engine
from iosr_fast.export.source import source_of
from iosr_fast.utils import machine
from tests import ROOT
from tests.backbones.small_clip import random_pixels, small_clip
from tests.demo_cache import export_once
from tests.interpreter import printed
from tests.store.manifests import rewrite_manifest

pytestmark = pytest.mark.slow

MAX_BATCH = 3
INSTALLED = ("onnxruntime", "torch", *(["openvino"] if find_spec("openvino") else []))


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small engine for each runtime of the CPU."""
    folder, clip = tmp_path_factory.mktemp("engines"), small_clip()
    adapter = random_adapter(clip, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("iosr_fast.export.source.export_onnx", export_once)
        for name in INSTALLED:
            precision = "bf16" if name == "openvino" else "fp32"
            write_engine(source_of(clip, adapter), folder / name, name, precision, MAX_BATCH)
    return {path.name: path for path in folder.iterdir()}


@pytest.fixture
def copied(engines: dict[str, Path], tmp_path: Path) -> Path:
    """An ONNX Runtime engine to damage."""
    return Path(shutil.copytree(engines["onnxruntime"], tmp_path / "engine"))


@pytest.mark.parametrize("runtime", INSTALLED)
def test_any_batch_has_the_embeddings_of_two_passes_or_the_plain_one_alone(
    engines: dict[str, Path], runtime: str
) -> None:
    folder = engines["torch" if runtime == "torch" else "onnxruntime"]
    both, alone = (open_engine(folder, runtime, threads=1, adapted=adapted) for adapted in (True, False))
    assert (both.runtime, both.image_size, both.width, both.buckets) == (runtime, 32, 24, None)
    assert (both.adapted, alone.adapted) == (True, False) and both.fingerprint == alone.fingerprint
    clip, pixels = small_clip(), random_pixels(7, 32)
    plain, adapted = two_passes(clip, random_adapter(clip, 1), pixels)
    for rows in (slice(0, 1), slice(0, 3), slice(0, 4), slice(0, 7), slice(6, None, -2)):  # MAX_BATCH is 3
        given = pixels[rows]
        given.setflags(write=False)
        for encoder in (both, alone):
            got = encoder.encode(given)
            assert got.plain.dtype == np.float32
            np.testing.assert_allclose(got.plain, plain[rows], atol=1e-5)
            if encoder.adapted:
                np.testing.assert_allclose(got.adapted, adapted[rows], atol=1e-5)
            else:
                assert got.adapted is None


def test_bf16_is_computed_where_it_was_built_for_and_the_processor_has_it(
    engines: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    pixels = random_pixels(5, 32)
    expected, _ = two_passes(small_clip(), random_adapter(small_clip(), 1), pixels)
    has_bf16 = "BF16" in openvino_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    for name, rounds in (("onnxruntime", False), ("openvino", has_bf16)):  # in fp32 and in bf16
        encoder: Any = open_engine(engines[name], "openvino")
        assert encoder._compiled.get_property("INFERENCE_PRECISION_HINT").to_string() == ("bf16" if rounds else "f32")
        got = encoder.encode(pixels).plain
        assert (got * expected).sum(1).min() > 0.999 and (np.abs(got - expected).max() > 1e-5) == rounds
    assert ("no bf16 instructions" in caplog.text) == (not has_bf16)


@pytest.mark.parametrize("runtime", [name for name in INSTALLED if name != "torch"])
def test_threads_share_an_engine(runtime: str, engines: dict[str, Path]) -> None:
    encoder: Any = open_engine(engines["onnxruntime"], runtime, threads=1, runs=2)
    assert (encoder.parallel, encoder.runs, encoder.threads) == (True, 2, 1)
    pixels = random_pixels(40, 32)
    expected = encoder.encode(pixels).plain
    with ThreadPoolExecutor(5) as pool:
        for i, got in enumerate(pool.map(lambda i: encoder.encode(pixels[i : i + 1]).plain[0], range(40))):
            np.testing.assert_allclose(got, expected[i], atol=1e-6)
    if runtime == "openvino":
        names = ("NUM_STREAMS", "INFERENCE_NUM_THREADS")
        assert [encoder._compiled.get_property(name) for name in names] == [2, 2]


def test_threads_of_pytorch_are_given_back(engines: dict[str, Path]) -> None:
    """Of two runs, the second of which begins within the first and ends after it, neither leaves its own number."""
    before, pixels, seen = torch.get_num_threads(), random_pixels(1, 32), []
    began, within, ended = threading.Event(), threading.Event(), threading.Event()
    encoders: list[Any] = [open_engine(engines["torch"], threads=before + more) for more in (1, 2)]

    def record(wait: Callable[[], Any], *_: Any) -> None:
        seen.append(torch.get_num_threads())
        wait()

    waits = (lambda: (began.set(), within.wait(0.5)), lambda: (within.set(), ended.wait()))
    for encoder, wait in zip(encoders, waits, strict=True):
        encoder._encoder.register_forward_hook(partial(record, wait))
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(encoders[0].encode, pixels)]
        began.wait()
        runs.append(pool.submit(encoders[1].encode, pixels))
        runs[0].result()
        ended.set()
        runs[1].result()
    with ThreadPoolExecutor(1) as pool:  # a new thread has the process's number
        assert pool.submit(torch.get_num_threads).result() == torch.get_num_threads() == before
    assert seen == [before + 1, before + 2]


@pytest.mark.parametrize(
    ("pixels", "got"),
    [
        (np.zeros((2, 32, 32, 3), np.float32), "float32 of shape"),
        (torch.zeros((2, 32, 32, 3), dtype=torch.uint8), "Tensor"),
        (np.zeros((2, 3, 32, 32), np.uint8), r"uint8 of shape \(2, 3, 32, 32\); iosr_fast\.images\.preprocess"),
        (np.zeros((0, 32, 32, 3), np.uint8), r"uint8 of shape \(0, "),
        (np.zeros((), np.uint8), "uint8"),
    ],
)
def test_other_pixels_are_refused(engines: dict[str, Path], pixels: Any, got: str) -> None:
    with pytest.raises(ValueError, match=rf"a uint8 array \(B, 32, 32, 3\) with B >= 1, got {got}"):
        open_engine(engines["torch"]).encode(pixels)


def test_damaged_files_are_refused(copied: Path) -> None:
    with (copied / "encoder.onnx").open("ab") as file:
        file.write(b"x")
    with pytest.raises(ValueError, match=r"encoder\.onnx in .*does not match its manifest \(expected sha256"):
        open_engine(copied)
    (copied / "encoder.onnx").write_bytes(b"not a graph")
    for runtime in (name for name in INSTALLED if name != "torch"):
        with pytest.raises(RuntimeError, match=r"can't load encoder\.onnx"):
            open_engine(copied, runtime, verify=False)


@pytest.mark.parametrize(("first", "precision"), [(0, "fp32"), (2, "int8"), (1, "fp16")])
def test_the_plain_form_has_the_weights_and_the_cost_of_an_engine_without_an_adapter(
    first: int, precision: str, tmp_path: Path, exports_once: None
) -> None:
    clip, pixels, graphs = small_clip(quick_gelu=first != 1), random_pixels(16, 32), {}
    for name, adapter in (("both", random_adapter(clip, first)), ("without", None)):
        write_engine(source_of(clip, adapter), tmp_path / name, "onnxruntime", precision, 4, pixels)
        for file in (tmp_path / name).glob("*.onnx"):
            graphs[name, file.stem] = onnx.load(file, load_external_data=False).graph
    assert set(graphs) == {("both", "encoder"), ("both", "plain"), ("without", "encoder")}
    products = {name: sum(node.op_type in ("MatMul", "Gemm") for node in graph.node) for name, graph in graphs.items()}
    assert products["both", "plain"] == products["without", "encoder"] < products["both", "encoder"]
    large = {name: [str(t) for t in graph.initializer if t.external_data] for name, graph in graphs.items()}
    assert large["both", "plain"] and {*large["both", "plain"]} < {*large["both", "encoder"]}, "they share weights"
    assert not any("down_proj" in tensor or "up_proj" in tensor for tensor in large["both", "plain"])


@pytest.mark.parametrize(
    ("engine", "missing"), [("torch", ("open_clip", "onnxruntime")), ("onnxruntime", ("torch", "onnx"))]
)
def test_engines_open_without_the_packages_that_built_them(
    engine: str, missing: tuple[str, ...], engines: dict[str, Path]
) -> None:
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({missing!r})); import numpy as np; "
        "from iosr_fast.encoders.runtimes import open_engine; "
        f"print(open_engine({str(engines[engine])!r}).encode(np.zeros((1, 32, 32, 3), np.uint8)).plain.shape)"
    )
    assert printed(code) == "(1, 24)"


@pytest.mark.skipif(torch.cuda.is_available(), reason="shows what a machine without a GPU builds and refuses")
def test_tensorrt_rtx_compiles_without_a_gpu_and_again_for_another_version(
    tmp_path: Path, exports_once: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = pytest.importorskip("tensorrt_rtx").__version__
    monkeypatch.setenv("IOSR_FAST_CACHE", str(tmp_path / "cache"))
    clip, folder = small_clip(), tmp_path / "engine"
    manifest = write_engine(source_of(clip, random_adapter(clip, 1)), folder, "tensorrt_rtx", "fp16", MAX_BATCH)
    (name,) = manifest["plans"]
    assert name == f"plans/tensorrt_rtx-any-{version}.plan"
    assert set(manifest["files"]) == {"encoder.onnx", "plain.onnx", "encoder.weights", name}
    assert manifest["check"]["tensorrt_rtx"] is None and "random" in manifest["check"]["onnxruntime"]
    assert open_engine(folder).runtime in ONNX_RUNTIMES
    with pytest.raises(RuntimeError, match=r"sees no NVIDIA GPU; open the engine with runtime='onnxruntime'"):
        open_engine(folder, "tensorrt_rtx")
    # As an older TensorRT-RTX wrote it.
    old = "plans/tensorrt_rtx-any-0.9.plan"
    (folder / name).rename(folder / old)
    files = {old if file == name else file: entry for file, entry in manifest["files"].items()}
    rewrite_manifest(folder, plans={old: {**manifest["plans"][name], "version": "0.9"}}, files=files)
    with monkeypatch.context() as patch:
        patch.setattr(machine, "this_gpu", lambda: machine.Gpu("NVIDIA GeForce RTX 4090", (8, 9)))
        with pytest.raises(RuntimeError, match=rf"any GPU with tensorrt_rtx {version} can't load .*cudaError"):
            open_engine(folder, "tensorrt_rtx")  # loading needs the GPU that this machine lacks
    assert len(list((tmp_path / "cache" / "plans").iterdir())) == 1, "a new plan was built"


def test_int8_weights_of_eight_bits_cause_a_warning(copied: Path, caplog: pytest.LogCaptureFixture) -> None:
    for version, warned in ((3, False), (2, True)):
        rewrite_manifest(copied, quantised={"version": version})
        open_engine(copied)
        assert ("8 bits, whose sums overflow on processors without VNNI" in caplog.text) == warned


def test_the_cached_engine_is_built_again_where_it_is_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("IOSR_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(pretrained, "load_model", lambda *_: small_clip())
    times = []
    for damage in (b"", b"", b"x"):
        for file in (tmp_path / "cache").rglob("encoder.safetensors"):
            file.write_bytes(file.read_bytes() + damage)
        folder = pretrained.open_pretrained("ViT-B-32", "none", None, "torch", "fp32", None).engine
        times.append((folder / "manifest.json").stat().st_mtime_ns)
    assert times[0] == times[1] < times[2] and folder.parent == tmp_path / "cache" / "engines"
    assert caplog.text.count("damaged and built again: encoder.safetensors") == 1


OPENVINO_IN_THREADS = """
import sys, threading
import numpy as np
from iosr_fast.encoders.runtimes.openvino import openvino_core

core = openvino_core()
import openvino
from openvino import opset13
pixels = opset13.parameter([1, 8], np.float32)
model = openvino.Model([opset13.relu(pixels)], [pixels])
compiled = core.compile_model(model, "CPU", {"NUM_STREAMS": "8"})
sys.setswitchinterval(1e-6)
go = []

def read(request):
    while not go:  # threads that wait in a lock do not start together
        pass
    np.array(request.infer({0: np.zeros((1, 8), np.float32)})[0])

threads = [threading.Thread(target=read, args=(compiled.create_infer_request(),)) for _ in range(8)]
for thread in threads:
    thread.start()
go.append(True)
for thread in threads:
    thread.join()
"""


def test_threads_read_the_results_of_openvino_at_once() -> None:
    """Without the tensor that openvino_core reads, every third run of eight threads hangs."""
    subprocess.run([sys.executable, "-c", OPENVINO_IN_THREADS], cwd=ROOT, check=True, timeout=60)
