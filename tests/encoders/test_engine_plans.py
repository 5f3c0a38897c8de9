"""Plans by runtime, GPU and version: which one is opened, and what is built again, kept and refused."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytest.importorskip("open_clip")

from iosr_fast.clip.adapter import random_adapter  # noqa: E402
from iosr_fast.encoders.runtimes import engine, open_engine, plans  # noqa: E402
from iosr_fast.encoders.runtimes.plans import Target, open_plan  # noqa: E402
from iosr_fast.encoders.runtimes.tensorrt import target  # noqa: E402
from iosr_fast.export import build, pretrained  # noqa: E402
from iosr_fast.export.build import LAYOUT, add_plan, write_engine  # noqa: E402
from iosr_fast.utils import machine  # noqa: E402
from iosr_fast.utils.files import cache_folder  # noqa: E402
from iosr_fast.utils.folders import new_folder  # noqa: E402
from iosr_fast.utils.machine import Gpu  # noqa: E402
from iosr_fast.utils.manifest import SCHEMA, read_manifest, write_manifest  # noqa: E402
from tests.clip.small_clip import random_pixels, small_clip  # noqa: E402
from tests.demo_cache import export_once  # noqa: E402
from tests.store.manifests import rewrite_manifest  # noqa: E402

H100, A100 = Gpu("NVIDIA H100 80GB HBM3", (9, 0)), Gpu("NVIDIA A100-SXM4-40GB", (8, 0))
RTX = Gpu("NVIDIA GeForce RTX 4090", (8, 9))
THERE = Target("tensorrt", "10.3.0", A100)
HERE = Target("tensorrt", "10.13.3.9", H100)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("IOSR_FAST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "engine", THERE)


def write_folder(folder: Path, *targets: Target, onnx: bytes = b"a graph", weights: bytes = b"") -> Path:
    """What open_plan reads of an engine: plans, which are never loaded here, the graph and its weights."""
    with new_folder(folder, "engine") as made:
        for one in targets:
            (made / "plans").mkdir(exist_ok=True)
            (made / one.file).write_bytes(f"for {one}".encode())
        if onnx:
            (made / "encoder.onnx").write_bytes(onnx)
        if weights:
            (made / "encoder.weights").write_bytes(weights)
        write_manifest(made, "engine", {"max_batch": 8, "plans": {one.file: one.facts() for one in targets}})
    return folder


class Builder:
    """Counts what is built; a plan is its number."""

    def __init__(self) -> None:
        self.built: list[bytes] = []

    def __call__(self, onnx: Path) -> tuple[bytes, dict[str, Any]]:
        self.built.append(onnx.read_bytes())
        return f"built {len(self.built)}".encode(), {"max_batch": 8}


def opened(folder: Path, wanted: Target, build: plans.Build) -> bytes:
    return open_plan(folder, read_manifest(folder, "engine"), wanted, build).data


def never(onnx: Path) -> tuple[bytes, dict[str, Any]]:
    raise AssertionError("built again")


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_plans_are_named_after_what_they_run_on() -> None:
    assert HERE.file == "plans/tensorrt-nvidia-h100-80gb-hbm3-10.13.3.9.plan"
    assert HERE.facts() == {
        "runtime": "tensorrt",
        "version": "10.13.3.9",
        "gpu": "NVIDIA H100 80GB HBM3",
        "compute_capability": "9.0",
    }
    for gpu in (RTX, None):
        portable = Target("tensorrt_rtx", "1.7.1+local/1", gpu)
        assert portable.file == "plans/tensorrt_rtx-any-1.7.1-local-1.plan"
        assert portable.facts()["gpu"] is portable.facts()["compute_capability"] is None
    assert Target("tensorrt_rtx", "1.7", RTX).kernels_file("f" * 64).name == (
        "tensorrt_rtx-nvidia-geforce-rtx-4090-1.7-ffffffffffffffff.cache"
    )
    with pytest.raises(RuntimeError, match="PyTorch sees none here; build the engine on the machine that will run it"):
        _ = Target("tensorrt", "10", None).file


def test_the_plan_that_fits_is_taken_from_the_engine(tmp_path: Path, cache: Path) -> None:
    folder = write_folder(tmp_path / "engine", THERE, HERE, Target("tensorrt_rtx", "1.7", None))
    assert opened(folder, HERE, never) == f"for {HERE}".encode()
    assert opened(folder, THERE, never) == f"for {THERE}".encode()
    assert opened(folder, Target("tensorrt_rtx", "1.7", RTX), never).startswith(b"for a machine without a GPU")
    assert not cache.exists()


@pytest.mark.parametrize(
    "wanted",
    [
        HERE,
        Target("tensorrt", "10.3.0", H100),
        Target("tensorrt", "10.4.0", A100),
        Target("tensorrt", "10.3.0", Gpu(A100.name, (8, 9))),
        Target("tensorrt_rtx", "10.3.0", A100),
    ],
)
def test_another_plan_is_named_and_one_is_built_once(
    wanted: Target, folder: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    build, before = Builder(), tree(folder)
    assert opened(folder, wanted, build) == b"built 1"
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    for words in (THERE.file, "A100-SXM4-40GB (compute capability 8.0) with tensorrt 10.3.0", f"this is {wanted}"):
        assert words in warning
    assert "building a plan from encoder.onnx once, in" in warning and str(cache) in warning
    caplog.clear()
    assert opened(folder, wanted, build) == opened(folder, wanted, never) == b"built 1"
    assert build.built == [b"a graph"] and not [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert tree(folder) == before, "nothing is written into the engine"
    (kept,) = (cache / "plans").iterdir()
    assert read_manifest(kept, plans.CACHED_KIND)["version"] == wanted.version


def test_what_is_kept_depends_on_all_that_decides_a_plan(folder: Path, tmp_path: Path, cache: Path) -> None:
    build = Builder()
    opened(folder, HERE, build)
    opened(folder, Target("tensorrt", "10.14", H100), build)
    opened(folder, Target("tensorrt", HERE.version, RTX), build)
    opened(write_folder(tmp_path / "other", onnx=b"another graph"), HERE, build)
    for weights in (b"these", b"others", b"these"):
        opened(write_folder(tmp_path / "weighed", weights=weights), HERE, build)
    rewrite_manifest(folder, max_batch=16)
    opened(folder, HERE, build)
    assert build.built == [b"a graph"] * 3 + [b"another graph"] + [b"a graph"] * 3
    assert len(list((cache / "plans").iterdir())) == 7
    opened(write_folder(tmp_path / "copy", HERE, onnx=b"x"), HERE, never)


@pytest.mark.parametrize("damage", ["flipped", "gone", "no manifest", "file"])
def test_a_damaged_plan_in_the_cache_is_built_again(
    damage: str, folder: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    build = Builder()
    opened(folder, HERE, build)
    (kept,) = (cache / "plans").iterdir()
    if damage == "flipped":
        (kept / plans.CACHED_FILE).write_bytes(b"built 7")
    elif damage == "gone":
        (kept / plans.CACHED_FILE).unlink()
    elif damage == "no manifest":
        (kept / "manifest.json").unlink()
    else:
        shutil.rmtree(kept)
        kept.write_text("in the way")
    assert opened(folder, HERE, build) == b"built 2"
    assert "the plan in the cache is damaged and removed" in caplog.text
    if damage != "file":
        assert opened(folder, HERE, never) == b"built 2"


def test_a_cache_that_can_not_be_written_costs_time_only(
    folder: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache.write_text("a file")
    assert opened(folder, HERE, Builder()) == b"built 1"
    assert "the plan can't be stored" in caplog.text and "IOSR_FAST_CACHE" in caplog.text
    assert cache.read_text() == "a file"


def test_what_can_not_be_built_is_named_with_all_there_is(folder: Path, tmp_path: Path, cache: Path) -> None:
    with pytest.raises(RuntimeError) as refused:
        opened(write_folder(tmp_path / "no graph", THERE, onnx=b""), HERE, never)
    for words in (THERE.file, "A100", "10.3.0", f"this is {HERE}", "no encoder.onnx", "--runtime tensorrt"):
        assert words in str(refused.value)

    def refusing(onnx: Path) -> tuple[bytes, dict[str, Any]]:
        raise RuntimeError("no tactic for MatMul")

    with pytest.raises(RuntimeError) as refused:
        opened(folder, HERE, refusing)
    for words in (THERE.file, f"this is {HERE}", "no tactic for MatMul", "runtime='onnxruntime'"):
        assert words in str(refused.value)
    manifest = read_manifest(folder, "engine")
    (folder / "encoder.onnx").write_bytes(b"b graph")
    with pytest.raises(ValueError, match=r"encoder\.onnx in .* does not match its manifest"):
        open_plan(folder, manifest, HERE, never)
    folder = write_folder(tmp_path / "another", THERE, weights=b"right")
    manifest = read_manifest(folder, "engine")
    (folder / "encoder.weights").write_bytes(b"wrong")
    with pytest.raises(ValueError, match=r"encoder\.weights in .* does not match its manifest"):
        open_plan(folder, manifest, HERE, never)
    assert not cache.exists()


def test_gpus_are_asked_in_one_place(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorrt_rtx")
    told = {
        None: "sees no NVIDIA GPU",
        H100: "not for NVIDIA H100",
        Gpu("NVIDIA T4", (7, 5)): "from compute capability",
    }
    for gpu, words in told.items():
        monkeypatch.setattr(machine, "this_gpu", lambda gpu=gpu: gpu)
        assert words in (engine.unavailable_reason("tensorrt_rtx") or "")
        assert target("tensorrt_rtx").gpu == gpu
    monkeypatch.setattr(machine, "this_gpu", lambda: RTX)
    assert engine.unavailable_reason("tensorrt_rtx") is None
    assert engine.choose_runtime("auto", {"tensorrt_rtx", "onnxruntime"}) == "tensorrt_rtx"


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="what this machine can't do is the test")
def test_tensorrt_rtx_is_built_again_for_its_own_version(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    version = pytest.importorskip("tensorrt_rtx").__version__
    monkeypatch.setattr(build, "export_onnx", export_once)
    clip, folder = small_clip(), tmp_path / "engine"
    write_engine(clip, random_adapter(clip, 1), folder, "onnxruntime", max_batch=2)
    with pytest.raises(ValueError, match=r"to add a plan, got 'torch'"):
        add_plan(folder, "torch")
    manifest = add_plan(folder, "tensorrt_rtx")
    (name,) = manifest["plans"]
    assert manifest["plans"][name]["version"] == version and manifest["check"]["tensorrt_rtx"] is None
    assert open_engine(folder).runtime in engine.ONNX_RUNTIMES
    # As an older TensorRT-RTX would have written it.
    old = "plans/tensorrt_rtx-any-0.9.plan"
    (folder / name).rename(folder / old)
    files = {old if file == name else file: entry for file, entry in manifest["files"].items()}
    rewrite_manifest(folder, plans={old: {**manifest["plans"][name], "version": "0.9"}}, files=files)
    monkeypatch.setattr(machine, "this_gpu", lambda: RTX)
    for _ in range(2):  # what comes after building needs the GPU that is made up here
        with pytest.raises(RuntimeError, match=rf"RTX 4090 .* with tensorrt_rtx {version} can't load .*cudaError"):
            open_engine(folder, "tensorrt_rtx")
    assert caplog.text.count(f"{old} was built for any GPU with tensorrt_rtx 0.9; this is {RTX}") == 1
    (kept,) = (cache / "plans").iterdir()
    facts = read_manifest(kept, plans.CACHED_KIND)
    assert facts["version"] == version and facts["bytes"] == (kept / plans.CACHED_FILE).stat().st_size > 10_000
    monkeypatch.setattr(machine, "this_gpu", lambda: None)
    both = add_plan(folder, "tensorrt_rtx")
    assert set(both["plans"]) == {old, name} and open_engine(folder).encode(random_pixels(3, 32)).adapted is not None


def test_the_cached_engine_is_built_again_where_it_is_damaged_or_of_another_schema(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(pretrained, "load_clip", lambda *_: small_clip())

    def engine_folder() -> Path:
        return pretrained.open_pretrained("ViT-B-32", "none", None, "torch", "fp32", None).engine

    folder = engine_folder()
    assert folder.parent == cache / "engines" and cache == cache_folder()
    made = (folder / "manifest.json").stat().st_mtime_ns
    assert engine_folder() == folder and (folder / "manifest.json").stat().st_mtime_ns == made
    with (folder / "encoder.safetensors").open("ab") as file:
        file.write(b"x")
    assert engine_folder() == folder and "damaged and built again: encoder.safetensors" in caplog.text
    (folder / "manifest.json").unlink()
    assert engine_folder() == folder and caplog.text.count("damaged and built again") == 2
    older = folder.with_name(folder.name.removesuffix(f"-v{SCHEMA}.{LAYOUT}") + "-v1")
    rewrite_manifest(folder, schema=1)
    folder.rename(older)
    assert engine_folder() == folder and older.exists() and caplog.text.count("damaged and built again") == 2
