"""The graph with ONNX's operator Attention, in ONNX Runtime beside the graph in parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="onnx comes with the cpu extra")
runtime = pytest.importorskip("onnxruntime", reason="onnxruntime comes with the cpu extra")
pytest.importorskip("torch", reason="torch comes with the cpu extra")
pytest.importorskip("open_clip", reason="open_clip comes with the cpu extra")

from iosr_fast.clip.fuse import build_dual_encoder  # noqa: E402
from iosr_fast.encoders.runtimes.attention import fused_attention  # noqa: E402
from iosr_fast.export.export import random_adapter  # noqa: E402
from iosr_fast.export.onnx_export import export_onnx  # noqa: E402
from tests.clip.small_clip import random_pixels, small_clip  # noqa: E402


def run(path: Path, pixels: np.ndarray) -> list[np.ndarray]:
    outputs: list[np.ndarray] = runtime.InferenceSession(str(path)).run(None, {"pixels": pixels})
    return outputs


def operators(path: Path) -> list[str]:
    return [node.op_type for node in onnx.load(str(path), load_external_data=False).graph.node]


def exported(path: Path, precision: Any) -> Path:
    clip = small_clip()
    export_onnx(build_dual_encoder(clip, random_adapter(clip, 1), precision), path)
    return path


def test_attention_in_half_precision_is_one_operator(tmp_path: Path) -> None:
    path, fused = exported(tmp_path / "encoder.onnx", "fp16"), tmp_path / "fused.onnx"
    model, count = fused_attention(path)
    fused.write_bytes(model)  # beside the weights, whose file both graphs name
    onnx.checker.check_model(str(fused))
    before, after = operators(path), operators(fused)
    assert count == after.count("Attention") == 2 and before.count("Softmax") == 3
    assert after.count("Softmax") == 1, "the last block's, for one query a head"
    assert len(after) < len(before) and before.count("Attention") == 0
    pixels = random_pixels(5, 32)
    for got, expected in zip(run(fused, pixels), run(path, pixels), strict=True):
        np.testing.assert_allclose(got, expected, atol=5e-4)


def test_attention_in_float32_stays_in_parts(tmp_path: Path) -> None:
    path = exported(tmp_path / "encoder.onnx", "fp32")
    model, count = fused_attention(path)
    assert count == 0 and model == onnx.load(str(path), load_external_data=False).SerializeToString()
