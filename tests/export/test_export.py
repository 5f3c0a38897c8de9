"""The ONNX file and the engine folder: dynamic batch, right numbers in both precisions, whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytest.importorskip("open_clip")

from iosr_fast.clip.fuse import build_dual_encoder  # noqa: E402
from iosr_fast.clip.two_pass import two_passes  # noqa: E402
from iosr_fast.export import export  # noqa: E402
from iosr_fast.export.engine_precision import quantised_by  # noqa: E402
from iosr_fast.export.export import engine_fingerprint, random_adapter, write_engine  # noqa: E402
from iosr_fast.export.onnx_export import export_onnx  # noqa: E402
from iosr_fast.utils.manifest import read_manifest  # noqa: E402
from tests.clip.small_clip import random_pixels, small_clip  # noqa: E402
from tests.clip.test_dual_encoder import run  # noqa: E402
from tests.demo_cache import export_once  # noqa: E402
from tests.export.graphs import FLOAT, FLOAT16, element_types  # noqa: E402

pytestmark = [pytest.mark.usefixtures("exports_once"), pytest.mark.slow]


@pytest.mark.parametrize(("first", "quick_gelu"), [(0, True), (1, False), (2, True), (None, False)])
def test_every_batch_gives_pytorchs_numbers(first: int | None, quick_gelu: bool, tmp_path: Path) -> None:
    clip = small_clip(quick_gelu)
    encoder = build_dual_encoder(clip, None if first is None else random_adapter(clip, first))
    export_once(encoder, tmp_path / "encoder.onnx")
    session = ort.InferenceSession(tmp_path / "encoder.onnx", providers=["CPUExecutionProvider"])
    assert [value.name for value in session.get_inputs()] == ["pixels"]
    assert [value.name for value in session.get_outputs()] == ["plain", "adapted"][: 1 if first is None else 2]
    for batch in (1, 2, 3, 7):
        pixels = random_pixels(batch, 32)
        for got, expected in zip(session.run(None, {"pixels": pixels}), run(encoder, pixels), strict=True):
            assert got.dtype == np.float32 and got.shape == (batch, 24)
            np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize("family", ["vit", "siglip", "pe-core", "eva02"])
def test_fp16_graphs_keep_softmax_and_layer_norm_in_fp32(
    family: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Squares and exponentials overflow in fp16. The families have each form of attention and each pool."""
    pytest.importorskip("timm")
    from tests.clip.families import family_clip

    clip, path = family_clip(family), tmp_path / "encoder.onnx"
    encoder = build_dual_encoder(clip, random_adapter(clip, 1), "fp16")
    export_onnx(encoder, path)
    assert capfd.readouterr() == ("", "")
    assert b".py" not in path.read_bytes(), "the graph names local paths"
    model, types = onnx.load(path, load_external_data=False), element_types(path)
    assert [entry.version for entry in model.opset_import if entry.domain == ""] == [20]
    nodes: dict[str, list[Any]] = {}
    for node in model.graph.node:
        nodes.setdefault(node.op_type, []).append(node)
    for kind in ("Softmax", "LayerNormalization", "ReduceMean", "ReduceL2", "ReduceSum", "Pow", "Exp", "Sqrt"):
        assert all(types[node.input[0]] == FLOAT for node in nodes.get(kind, [])), kind
    for kind in ("MatMul", "Gemm", "Gelu"):
        assert all(types[node.input[0]] == FLOAT16 for node in nodes.get(kind, [])), kind
    norms = [module for module in encoder.modules() if isinstance(module, torch.nn.LayerNorm)]
    assert len(nodes["LayerNormalization"]) == len(norms), "a LayerNorm is decomposed"
    assert len(nodes["Softmax"]) == 3 + (family in ("siglip", "pe-core"))
    assert [types[value.name] for value in model.graph.output] == [FLOAT, FLOAT]


@pytest.mark.parametrize("runtime", ["onnxruntime", "torch"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_write_engine_checks_and_records(runtime: str, precision: str, tmp_path: Path) -> None:
    clip = small_clip()
    adapter = random_adapter(clip, 1)
    manifest = write_engine(clip, adapter, tmp_path / "engine", runtime, precision, 4, random_pixels(20, 32))
    assert read_manifest(tmp_path / "engine", "engine") == manifest
    assert [path.name for path in tmp_path.iterdir()] == ["engine"]
    assert manifest["runtime"] == runtime and manifest["precision"] == precision and manifest["max_batch"] == 4
    assert manifest["adapter"] == "random" and manifest["first_adapted_block"] == 1 and manifest["bottleneck"] == 64
    assert manifest["fingerprint"] == engine_fingerprint(clip, adapter, precision)
    assert list(manifest["check"]) == ([runtime] if runtime == "torch" else [runtime, f"{runtime}, plain.onnx"])
    for kind, pictures in (("random", 3), ("real", 8)):
        found = manifest["check"][runtime][kind]
        assert found["pictures"] == pictures
        for name in ("plain", "adapted"):
            assert found[name]["min_cosine"] > 0.9999
            assert 0 < found[name]["max_abs_error"] < (1e-5 if precision == "fp32" else 5e-3)


def test_fingerprint_follows_what_changes_embeddings() -> None:
    clip, other = small_clip(), small_clip(fingerprint="other")
    black, white = np.zeros((8, 32, 32, 3), np.uint8), np.full((8, 32, 32, 3), 255, np.uint8)
    quantised = (("onnxruntime", "int8", black), ("onnxruntime", "int8", white), ("tensorrt", "int8", black))
    prints = [
        engine_fingerprint(clip, None, "fp32"),
        engine_fingerprint(clip, None, "fp16"),
        engine_fingerprint(other, None, "fp32"),
        engine_fingerprint(clip, random_adapter(clip, 0), "fp32"),
        engine_fingerprint(clip, random_adapter(clip, 1), "fp32"),
        *(engine_fingerprint(clip, None, "int8", quantised_by(clip.image_size, *given)) for given in quantised),
    ]
    assert len(set(prints)) == len(prints)
    assert engine_fingerprint(clip, random_adapter(clip, 1), "fp32") == prints[4]
    size = clip.image_size
    assert quantised_by(size, "openvino", "int8", black) == quantised_by(size, "onnxruntime", "int8", black)


def test_the_random_adapter_changes_the_embedding() -> None:
    clip = small_clip()
    plain, adapted = two_passes(clip, random_adapter(clip, 2), random_pixels(2, 32))
    assert np.abs(plain - adapted).max() > 1e-4


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_wrong_numbers_are_not_written(precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def slightly_wrong(*arguments: Any) -> Any:
        encoder = build_dual_encoder(*arguments)
        encoder.cls_token.data[..., 0] += 5  # one channel: ln_pre would take a shift of all of them out again
        return encoder

    monkeypatch.setattr(export, "build_dual_encoder", slightly_wrong)
    clip = small_clip()
    with pytest.raises(ArithmeticError, match="plain embeddings of random pictures by torch"):
        write_engine(clip, None, tmp_path / "engine", "torch", precision)
    assert list(tmp_path.iterdir()) == []


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clip = small_clip()
    with pytest.raises(ValueError, match="max_batch from 1 to 65536"):
        write_engine(clip, None, tmp_path / "engine", max_batch=0)
    with pytest.raises(ValueError, match="got 'tvm'"):
        write_engine(clip, None, tmp_path / "engine", "tvm")
    for runtime, precision, message in (
        ("auto", "int4", "expected a precision of .* got 'int4'"),
        ("torch", "int8", "which compute in int8, got the runtime 'torch'"),
        ("onnxruntime", "bf16", r"\['openvino'\], which compute in bf16"),
        ("onnxruntime", "fp8", "which compute in fp8, got the runtime 'onnxruntime'"),
        ("onnxruntime", "int8", "expected calibration pictures as uint8 .* for int8, got none"),
    ):
        with pytest.raises(ValueError, match=message):
            write_engine(clip, None, tmp_path / "engine", runtime, precision)
    with pytest.raises(ValueError, match=r"got shape \(4, 31, 32, 3\)"):
        write_engine(clip, None, tmp_path / "engine", "onnxruntime", "int8", calibration=np.zeros((4, 31, 32, 3), "u1"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("kept")
    with pytest.raises(FileExistsError, match="choose another place"):
        write_engine(clip, None, tmp_path / "mine", "torch")
    assert (tmp_path / "mine" / "notes.txt").read_text() == "kept"


def test_no_weight_is_in_the_model_that_protobuf_serialises(tmp_path: Path) -> None:
    """So that it may have more than the 2 GB of one protobuf message."""
    onnx = pytest.importorskip("onnx")
    export_onnx(build_dual_encoder(small_clip()), tmp_path / "encoder.onnx")
    model = onnx.load(tmp_path / "encoder.onnx", load_external_data=False)
    outside = [tensor for tensor in model.graph.initializer if tensor.external_data]
    assert len(outside) > 15 and not any(tensor.raw_data for tensor in outside)
    assert all(len(tensor.raw_data) <= 1024 for tensor in model.graph.initializer)
