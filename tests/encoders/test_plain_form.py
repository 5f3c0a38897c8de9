"""The plain form of an engine: the same plain embeddings from the same weights, without the adapted stream."""

from __future__ import annotations

import logging
import shutil
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytest.importorskip("open_clip")

from iosr_fast.clip.adapter import random_adapter  # noqa: E402
from iosr_fast.encoders.runtimes import open_engine  # noqa: E402
from iosr_fast.exceptions import IosrFastError  # noqa: E402
from iosr_fast.export.build import write_engine  # noqa: E402
from iosr_fast.export.onnx import plain_graph  # noqa: E402
from iosr_fast.utils.manifest import read_manifest  # noqa: E402
from tests.clip.small_clip import random_pixels, small_clip  # noqa: E402
from tests.store.manifests import rewrite_manifest  # noqa: E402

PRODUCTS = ("MatMul", "Gemm")
ONNX_RUNTIMES = ("onnxruntime", *(["openvino"] if find_spec("openvino") else []))


pytestmark = [pytest.mark.usefixtures("exports_once"), pytest.mark.slow]


def engine(folder: Path, first: int | None, precision: str = "fp32", runtime: str = "onnxruntime") -> Path:
    clip = small_clip(quick_gelu=first in (0, 2))  # the encoders that test_export exports, too
    adapter = None if first is None else random_adapter(clip, first)
    write_engine(clip, adapter, folder, runtime, precision, 4, random_pixels(16, 32))
    return folder


def products(graph: Path) -> int:
    return sum(node.op_type in PRODUCTS for node in onnx.load(graph, load_external_data=False).graph.node)


def external(graph: Path) -> dict[str, dict[str, str]]:
    """Where each large tensor of a graph is stored, by its name."""
    tensors = onnx.load(graph, load_external_data=False).graph.initializer
    return {t.name: {entry.key: entry.value for entry in t.external_data} for t in tensors if t.external_data}


@pytest.mark.parametrize(("first", "precision"), [(0, "fp32"), (2, "fp32"), (1, "int8"), (1, "fp16")])
def test_plain_embeddings_are_equal_and_the_adapter_is_gone(first: int, precision: str, tmp_path: Path) -> None:
    folder, without = engine(tmp_path / "both", first, precision), engine(tmp_path / "without", None, precision)
    for batch in (1, 3, 9):  # 9 is more than max_batch
        pixels = random_pixels(batch, 32)
        for runtime in ONNX_RUNTIMES:
            both, plain = (open_engine(folder, runtime, threads=1, adapted=adapted) for adapted in (True, False))
            assert (both.adapted, plain.adapted) == (True, False) and both.fingerprint == plain.fingerprint
            expected, got = both.encode(pixels), plain.encode(pixels)
            assert got.adapted is None and expected.adapted is not None
            np.testing.assert_allclose(got.plain, expected.plain, atol=5e-4 if precision == "fp16" else 1e-5)
    # It costs what an engine without an adapter costs.
    assert products(folder / "plain.onnx") == products(without / "encoder.onnx") < products(folder / "encoder.onnx")
    stored = external(folder / "encoder.onnx")
    shared = external(folder / "plain.onnx")
    assert shared and shared.items() <= stored.items()
    assert not any("down_proj" in name or "up_proj" in name for name in shared)
    assert {entry["location"] for entry in shared.values()} == {"encoder.weights"}


def test_torch_leaves_the_adapter_out(tmp_path: Path) -> None:
    folder, pixels = engine(tmp_path / "torch", 1, runtime="torch"), random_pixels(3, 32)
    both, plain = open_engine(folder, "torch"), open_engine(folder, "torch", adapted=False)
    np.testing.assert_allclose(plain.encode(pixels).plain, both.encode(pixels).plain, atol=1e-5)
    assert not plain.adapted and plain.encode(pixels).adapted is None
    names: list[str] = list(plain._encoder.state_dict())  # type: ignore[attr-defined]
    assert names and not any("down_proj" in name or "up_proj" in name for name in names)


def test_an_earlier_engine_runs_both_streams(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder, pixels = engine(tmp_path / "engine", 1), random_pixels(2, 32)
    facts = read_manifest(folder, "engine")
    (folder / "plain.onnx").unlink()
    rewrite_manifest(folder, files={name: entry for name, entry in facts["files"].items() if name != "plain.onnx"})
    with caplog.at_level(logging.INFO):
        encoder = open_engine(folder, "onnxruntime", adapted=False)
    assert "has no plain form for onnxruntime, so both streams run" in caplog.text
    assert encoder.adapted and encoder.encode(pixels).adapted is not None
    assert encoder.fingerprint == facts["fingerprint"]
    # A file that the manifest does not name is not opened.
    shutil.copyfile(folder / "encoder.onnx", folder / "plain.onnx")
    assert open_engine(folder, "onnxruntime", adapted=False).adapted


def test_an_engine_without_an_adapter_has_one_form(tmp_path: Path) -> None:
    folder = engine(tmp_path / "engine", None)
    assert not (folder / "plain.onnx").exists()
    assert open_engine(folder, "onnxruntime", adapted=False).encode(random_pixels(2, 32)).adapted is None
    model = onnx.load(folder / "encoder.onnx", load_external_data=False)
    with pytest.raises(IosrFastError, match="joins 0 and splits 0"):
        plain_graph(model)
