"""Quantisation of weights with the outliers of trained CLIPs: what is smoothed, what stays in float, and why."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytest.importorskip("open_clip")

from iosr_fast.clip.fuse import build_dual_encoder  # noqa: E402
from iosr_fast.clip.load import load_clip  # noqa: E402
from iosr_fast.export import quantize  # noqa: E402
from iosr_fast.export.pretrained import choose_adapter  # noqa: E402
from iosr_fast.export.quantize import quantize_onnx  # noqa: E402
from iosr_fast.export.quantize_graph import EncoderGraph  # noqa: E402
from iosr_fast.export.quantize_products import QuantisedGroup  # noqa: E402
from iosr_fast.export.quantize_sensitivity import GatedEncoder, choose_float  # noqa: E402
from iosr_fast.export.quantize_values import Quantised  # noqa: E402
from tests.clip.small_clip import random_adapter, random_pixels, small_clip  # noqa: E402
from tests.demo_cache import export_once  # noqa: E402
from tests.export.hard_weights import harden  # noqa: E402
from tests.export.test_quantize import decoded, emoji, encode, least_cosine, without_bounds  # noqa: E402


@pytest.mark.parametrize("first", [0, 1])
def test_hard_weights_give_the_same_embeddings(first: int) -> None:
    clip = small_clip()
    adapter = random_adapter(clip, first)
    before = {name: value.clone() for name, value in clip.model.state_dict().items()}
    hard, hard_adapter = harden(clip, adapter)
    assert all(torch.equal(value, before[name]) for name, value in clip.model.state_dict().items())
    pixels = torch.from_numpy(random_pixels(5, clip.image_size))
    exact, encoder = build_dual_encoder(clip, adapter), build_dual_encoder(hard, hard_adapter)
    for got, expected in zip(encoder(pixels), exact(pixels), strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-5)
    state, hard_state = exact.state_dict(), encoder.state_dict()
    for name in ("blocks.0.ln_1.weight", "blocks.1.ln_2.weight", "blocks.1.v_proj.weight", "blocks.2.down_proj.weight"):
        ratio = (hard_state[name] / state[name]).flatten()
        assert {1.0, 64.0} <= set(ratio.tolist()) <= {1.0, 64.0, 1 / 64}
    assert hard_state["blocks.1.c_fc.bias"].abs().max() > 50 * state["blocks.1.c_fc.bias"].abs().max()


@pytest.fixture(scope="module")
def hard_demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hard") / "encoder.onnx"
    clip = load_clip("demo")
    export_once(build_dual_encoder(*harden(clip, choose_adapter(clip, "auto"), factor=128.0)), path)
    return path


@pytest.mark.slow
def test_the_demo_with_hard_weights(hard_demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = decoded("held-out")[::20]
    expected = encode(hard_demo, pixels)

    def least() -> tuple[float, dict[str, Any]]:
        report = quantize_onnx(hard_demo, tmp_path / "int8.onnx", decoded("generic")[::22])
        return least_cosine(encode(tmp_path / "int8.onnx", pixels), expected), report

    cosine, report = least()
    assert cosine >= 0.99 and report["embedding_error"] <= 0.005 and report["smoothed"] >= 20
    monkeypatch.setitem(quantize.LARGEST_EMBEDDING_ERROR, "u8s8", 0.002)
    exacter, report = least()
    assert exacter >= 0.995 and report["embedding_error"] <= 0.002
    assert any("embeddings by" in reason for reason in report["kept"].values())
    without_bounds(monkeypatch)
    all_quantised, every = least()
    assert every["products"] > report["products"] and all_quantised < exacter
    monkeypatch.setattr(quantize, "EXPONENTS", ())
    naive, report = least()
    assert naive < 0.9 and report["smoothed"] == 0 and report["embedding_error"] > 0.1


@pytest.mark.slow
def test_gates_select_what_is_quantised(tmp_path: Path) -> None:
    """All gates open give the quantised file's embeddings, and none those of the source."""
    clip = small_clip()
    source, target = tmp_path / "encoder.onnx", tmp_path / "int8.onnx"
    export_once(build_dual_encoder(*harden(clip, random_adapter(clip, 1))), source)
    attempts: list[QuantisedGroup | None] = []

    class Recorded(GatedEncoder):
        def __init__(self, graph: EncoderGraph, chosen: Sequence[QuantisedGroup | None], pictures: np.ndarray) -> None:
            attempts.extend(chosen)
            super().__init__(graph, chosen, pictures)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantize, "GatedEncoder", Recorded)
        without_bounds(patch)
        report = quantize_onnx(source, target, emoji("generic", 32))
    pixels = emoji("held-out", 12)
    gated = GatedEncoder(EncoderGraph(onnx.load(source)), attempts, pixels)
    everything = np.array([attempt is not None for attempt in attempts])
    for gates, path in ((np.zeros_like(everything), source), (everything, target)):
        for got, expected in zip(gated._run(gates), encode(path, pixels), strict=True):
            np.testing.assert_allclose(got, expected, atol=2e-3 if gates.any() else 1e-6)
    assert gated.error(np.zeros_like(everything)) < 1e-9 < gated.error(everything)
    assert report["smoothed"] > 0 and gated.error(everything, 4) <= gated.error(everything) + 1e-9


class Additive:
    """The error of quantised groups is the sum of `errors`."""

    def __init__(self, errors: list[float]) -> None:
        self.errors, self.calls = np.array(errors), 0

    def error(self, quantised: np.ndarray, count: int | None = None) -> float:
        self.calls += 1
        return float(self.errors[quantised].sum())


def test_the_most_costly_return_to_float_for_the_time_they_take() -> None:
    blank = Quantised(np.ones(()), np.zeros(()))

    def attempts(errors: list[float | None]) -> list[QuantisedGroup | None]:
        return [None if error is None else QuantisedGroup(blank, [], None, error) for error in errors]

    encoder: Any = Additive([0.0, 0.0004, 0.0004, 0.0001])
    assert choose_float(encoder, attempts([None, 1, 1, 1]), [1] * 4, 0.002) == ({}, pytest.approx(0.0009))
    assert encoder.calls == 1  # nothing is measured alone where all together are good enough
    encoder = Additive([0.0, 0.004, 0.004, 0.0005])
    floats, error = choose_float(encoder, attempts([None, 1, 1, 1]), [1, 10, 1, 1], 0.0049)
    assert floats == {2: 0.004} and error == pytest.approx(0.0045)
    # More suspects than are measured at once: those with small errors of their own are measured last.
    encoder = Additive([0.001] * 40)
    floats, error = choose_float(encoder, attempts([i / 100 for i in range(40)]), [1] * 40, 0.0105)
    assert error <= 0.0105 and set(floats) >= set(range(24, 40)) and len(floats) == 30
