"""Engines in another precision: right numbers, the fingerprint of write_engine, whole or not at all, without torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("openvino")

from iosr_fast.clip.demo.pictures import load_pictures
from iosr_fast.encoders.runtimes import open_engine
from iosr_fast.exceptions import IosrFastError
from iosr_fast.export import candidates, convert
from iosr_fast.export.convert import convert_engine
from iosr_fast.utils.machine import Gpu
from iosr_fast.utils.manifest import read_manifest
from tests.demo_cache import demo_engine

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def generic() -> np.ndarray:
    return load_pictures("generic").images[:64]


def _cosine(folder: Path, pictures: np.ndarray) -> float:
    ours, exact = open_engine(folder).encode(pictures), open_engine(demo_engine()).encode(pictures)
    return float(min((ours.plain * exact.plain).sum(1).min(), (ours.adapted * exact.adapted).sum(1).min()))


@pytest.mark.parametrize(
    ("runtime", "precision"), [("onnxruntime", "int8"), ("openvino", "int8"), ("openvino", "bf16")]
)
def test_another_precision(runtime: str, precision: str, generic: np.ndarray, tmp_path: Path) -> None:
    manifest = convert_engine(demo_engine(), tmp_path / "engine", runtime, precision, generic[:32])
    assert manifest == read_manifest(tmp_path / "engine", "engine")
    assert (manifest["runtime"], manifest["precision"]) == (runtime, precision)
    assert list(manifest["check"]) == [runtime, f"{runtime}, plain.onnx"]
    source = read_manifest(demo_engine(), "engine")
    same = ("model", "width", "clip_fingerprint", "adapter_fingerprint", "dual_encoder", "max_batch", "export_version")
    assert all(manifest[name] == source[name] for name in same)
    assert 0.99 < _cosine(tmp_path / "engine", generic[32:40]) < 1.0 or precision == "bf16"
    size = {
        name: sum(entry["bytes"] for entry in m["files"].values()) for name, m in (("new", manifest), ("old", source))
    }
    assert size["new"] < 0.5 * size["old"] if precision == "int8" else size["new"] == size["old"]


def test_the_fingerprint_is_that_of_write_engine(generic: np.ndarray, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from iosr_fast.clip.load import load_clip
    from iosr_fast.export.engine_precision import quantised_by
    from iosr_fast.export.export import engine_fingerprint
    from iosr_fast.export.pretrained import choose_adapter

    clip = load_clip("demo")
    adapter, size = choose_adapter(clip, "auto"), clip.image_size
    for runtime, precision in (("onnxruntime", "int8"), ("openvino", "bf16"), ("openvino", "fp32")):
        manifest = convert_engine(demo_engine(), tmp_path / precision, runtime, precision, generic[:8])
        quantised = quantised_by(size, runtime, precision, generic[:8])
        assert manifest["fingerprint"] == engine_fingerprint(clip, adapter, precision, quantised)


def test_a_conversion_that_is_off_is_not_written(
    generic: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convert, "checked_pictures", lambda size, real, noise: {"real": generic[:8]})
    with pytest.raises(ArithmeticError, match=r"in int8 are wrong: expected cosine >= 0\.99"):
        convert_engine(demo_engine(), tmp_path / "engine", "onnxruntime", "int8", np.zeros_like(generic[:8]))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("onnxruntime", "int8", None), r"expected calibration pictures .* for int8, got none"),
        (("onnxruntime", "int8", 7), r"N >= 8 for int8, got shape \(7, 64, 64, 3\)"),
        (("onnxruntime", "fp16", None), "exported from the CLIP: iosr-fast build-engine --precision fp16"),
        (("tensorrt", "int8", 8), "exported from the CLIP"),
    ],
)
def test_refusals(given: tuple[str, str, int | None], message: str, generic: np.ndarray, tmp_path: Path) -> None:
    runtime, precision, count = given
    with pytest.raises(IosrFastError, match=message):
        convert_engine(demo_engine(), tmp_path / "new", runtime, precision, None if count is None else generic[:count])
    assert list(tmp_path.iterdir()) == []


def test_an_engine_in_int8_is_not_converted(generic: np.ndarray, tmp_path: Path) -> None:
    convert_engine(demo_engine(), tmp_path / "int8", "onnxruntime", "int8", generic[:8])
    with pytest.raises(IosrFastError, match=r"an engine in fp32 with encoder\.onnx to convert, got one in int8"):
        convert_engine(tmp_path / "int8", tmp_path / "new", "openvino", "bf16")


def test_fp8_is_tried_on_gpus_that_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(candidates, "unavailable_reason", lambda runtime: None)
    source: Any = SimpleNamespace(manifest=read_manifest(demo_engine(), "engine"))
    for capability, reason in (((8, 9), ""), ((8, 6), "NVIDIA A10 has no fp8 instructions"), (None, None)):
        gpu = None if capability is None else Gpu("NVIDIA A10", capability)
        monkeypatch.setattr(candidates, "this_gpu", lambda gpu=gpu: gpu)
        listed = candidates.list_candidates(source, 16, "auto", "fp8", with_clip=True)
        expected = [] if gpu is None else [("tensorrt", reason), ("tensorrt_rtx", reason)]
        assert [(one.runtime, one.left_out) for one in listed] == expected


def test_it_needs_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from iosr_fast.clip.demo.pictures import load_pictures\n"
        "from iosr_fast.export.convert import convert_engine\n"
        "pictures = load_pictures('generic').images[:8]\n"
        f"convert_engine({str(demo_engine())!r}, {str(tmp_path / 'new')!r}, 'openvino', 'int8', pictures)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "new" / "encoder.onnx").is_file()
