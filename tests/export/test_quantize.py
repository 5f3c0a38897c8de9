"""Quantised encoders: what their graphs hold, how far their embeddings are off, that runtimes take them."""

from __future__ import annotations

import functools
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from iosr_fast.backbones.adapter import random_adapter
from iosr_fast.backbones.demo.pictures import load_pictures
from iosr_fast.backbones.fuse import build_dual_encoder
from iosr_fast.encoders.engine_folder import ONNX_FILE as FILE
from iosr_fast.encoders.runtimes.openvino import openvino_core
from iosr_fast.encoders.runtimes.tensorrt import build_plan
from iosr_fast.export.quantize import encoder as quantize
from iosr_fast.export.quantize.calibration import evenly
from iosr_fast.export.quantize.encoder import quantize_onnx
from iosr_fast.export.quantize.graph import EncoderGraph
from iosr_fast.export.quantize.sensitivity import LEAST_VARIANCE, choose_float
from iosr_fast.export.quantize.values import (
    Quantised,
    QuantisedGroup,
    activation_scale,
    dequantised,
    quantise_matrix,
    rounded,
)
from tests.backbones.small_clip import small_clip
from tests.demo_cache import demo_engine, export_once

pytestmark = pytest.mark.slow
FORMS = [("fp32", "u8s8"), ("fp16", "s8s8"), ("fp16", "fp8")]  # on a CPU, and for TensorRT


@functools.cache
def decoded(split: Any) -> np.ndarray:
    return load_pictures(split).images


def emoji(split: Any, count: int) -> np.ndarray:
    """Real pictures at half size, for the small CLIP."""
    pictures = decoded(split)
    chosen: np.ndarray = np.ascontiguousarray(pictures[:: len(pictures) // count][:count, ::2, ::2])
    return chosen


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The small CLIP with an adapter from the second of three blocks on, by precision."""
    clip = small_clip()
    paths: dict[Any, Path] = {
        precision: tmp_path_factory.mktemp(precision) / "encoder.onnx" for precision in ("fp32", "fp16")
    }
    for precision, path in paths.items():
        export_once(build_dual_encoder(clip, random_adapter(clip, 1), precision), path)
    return paths


@pytest.fixture(scope="module", params=FORMS, ids="-".join)
def made(
    request: pytest.FixtureRequest, sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, dict[str, Any]]:
    """A form, the small CLIP quantised to it and the report."""
    precision, form = request.param
    path = tmp_path_factory.mktemp("quantised") / "encoder.onnx"
    with pytest.MonkeyPatch.context() as patch:
        without_bounds(patch)
        return form, path, quantize_onnx(sources[precision], path, emoji("generic", 64), form)


def encode(path: Path, pixels: np.ndarray) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    outputs: list[np.ndarray] = session.run(["plain", "adapted"], {"pixels": pixels})
    return outputs


def in_openvino(path: Path, values: np.ndarray) -> Any:
    options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    return openvino_core().compile_model(str(path), "CPU", options).create_infer_request().infer([values])


def off(got: list[np.ndarray], expected: list[np.ndarray]) -> float:
    """Squared error, as a share of the embeddings' variance: random weights give all pictures cosines above 0.9."""
    return max(float(((a - b) ** 2).sum() / ((b - b.mean(0)) ** 2).sum()) for a, b in zip(got, expected, strict=True))


def test_every_constant_product_is_quantised_or_kept_by_name(made: tuple[str, Path, dict[str, Any]]) -> None:
    form, path, report = made
    on_cpu = form == "u8s8"
    model = onnx.load(path)
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    makers = {node.output[0]: node for node in model.graph.node}
    seen: Counter[str] = Counter()
    for node in model.graph.node:
        if node.op_type not in ("MatMul", "Gemm"):
            continue
        weight = makers.get(node.input[1])
        if weight is None or weight.op_type != "DequantizeLinear":
            factor = constants.get(node.input[1])
            seen["attention" if factor is None else "heads" if len(factor.dims) == 3 else "kept"] += 1
            continue
        seen["quantised"] += 1
        values, scale, _ = (constants[name] for name in weight.input)
        axis = next(a.i for a in weight.attribute if a.name == "axis")
        assert list(scale.dims) == [values.dims[axis]] and makers[node.input[0]].op_type == "DequantizeLinear"
    # Blocks of 6 matrices and 2 of the adapter from the second block on, keys and values of the last one by heads.
    assert seen["quantised"] == report["products"] == 6 + 8 + 6 + on_cpu
    assert seen["heads"] == 2 and seen["kept"] == 2 - on_cpu and report["total_products"] == seen.total()
    named = {"blocks.2.k_weight", "blocks.2.v_weight", "proj", "attention"}
    assert named <= set(report["kept"]) and len(report["kept"]) == seen["heads"] + seen["kept"] + 1
    quantised = [node.input[0] for node in model.graph.node if node.op_type == "QuantizeLinear"]
    assert len(quantised) == len(set(quantised)) < report["products"]  # one pair for queries, keys and values


def test_embeddings_of_other_pictures_in_batches_and_runtimes(
    made: tuple[str, Path, dict[str, Any]], sources: dict[str, Path]
) -> None:
    form, path, _ = made
    pixels = emoji("held-out", 40)
    expected, got = encode(sources["fp32"], pixels), encode(path, pixels)
    assert all(output.dtype == np.float32 for output in got)
    assert off(got, expected) <= (0.1 if form == "fp8" else 0.01)
    if form != "u8s8":
        pytest.importorskip("tensorrt_rtx")
        assert build_plan(path, "tensorrt_rtx", 3)
    else:
        found = in_openvino(path, pixels)
        assert off([found["plain"], found["adapted"]], expected) <= 0.01
    for start, batch in ((0, 1), (1, 3), (4, 7)):
        part = encode(path, pixels[start : start + batch])
        for alone, together in zip(part, got, strict=True):
            np.testing.assert_allclose(alone, together[start : start + batch], atol=5e-3)


def test_the_demo_with_its_adapter(tmp_path: Path) -> None:
    source = demo_engine() / FILE
    report = quantize_onnx(source, tmp_path / "int8.onnx", decoded("generic")[::50])
    pixels = decoded("held-out")[::40]
    for got, exact in zip(encode(tmp_path / "int8.onnx", pixels), encode(source, pixels), strict=True):
        assert (got * exact).sum(1).min() >= 0.998
    assert set(report["kept"]) == {"blocks.5.k_weight", "blocks.5.v_weight", "proj", "attention"}
    sizes = [path.with_suffix(".weights").stat().st_size for path in (source, tmp_path / "int8.onnx")]
    assert sizes[1] < 0.35 * sizes[0]


def with_large_channels(source: Path, target: Path) -> None:
    """What trained CLIPs have: LayerNorms with a few channels far above the others, whose weights make up for it."""
    graph = EncoderGraph(source)
    for group in graph.groups()[0]:
        if group.norm is not None:
            by = np.ones(graph.weight(group.products[0]).shape[0], np.float32)
            by[3:5] = 1 / 80
            graph._divide(group.norm, by)
            for product in group.products:
                weight = graph.weight(product) * by[:, None]
                stored = np.ascontiguousarray(weight.T if product.transposed else weight)
                name = product.node.input[1]
                graph.constants[name].CopyFrom(onnx.numpy_helper.from_array(stored, name))
    onnx.save(graph.load(), target)


def test_large_channels_are_shifted_into_the_weights(
    sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = tmp_path / "large.onnx", tmp_path / "int8.onnx"
    with_large_channels(sources["fp32"], source)
    pixels = emoji("held-out", 20)
    expected = encode(sources["fp32"], pixels)
    for got, same in zip(encode(source, pixels), expected, strict=True):
        np.testing.assert_allclose(got, same, atol=1e-5)

    def loss() -> tuple[float, dict[str, Any]]:
        report = quantize_onnx(source, target, emoji("generic", 64))
        return off(encode(target, pixels), expected), report

    smooth, report = loss()
    assert smooth < 0.01 and report["smoothed"] >= 5 and "blocks.1.c_fc" not in report["kept"]
    monkeypatch.setattr(quantize, "EXPONENTS", ())
    left_out, report = loss()
    assert report["smoothed"] == 0 and "of its square" in report["kept"]["blocks.1.c_fc"]
    monkeypatch.setattr(quantize, "LARGEST_ERROR", np.inf)
    measured, report = loss()
    assert report["embedding_error"] <= 0.005 and any("embeddings by" in reason for reason in report["kept"].values())
    assert left_out < 0.01 and measured < 0.01
    monkeypatch.setattr(quantize, "LARGEST_ERROR", 0.0)
    target.unlink()
    with pytest.raises(ArithmeticError, match=r"accurate enough in 8 bits .* got 0 of 30; .* build the engine in fp32"):
        loss()
    assert not target.exists()


def without_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Quantise whatever it costs."""
    monkeypatch.setattr(quantize, "LARGEST_ERROR", np.inf)
    monkeypatch.setattr(quantize, "LARGEST_EMBEDDING_ERROR", dict.fromkeys(("u8s8", "s8s8", "fp8"), np.inf))


@pytest.mark.parametrize("form", ["u8s8", "fp8"])
def test_the_error_that_is_reported_is_that_of_the_file(form: Any, sources: dict[str, Path], tmp_path: Path) -> None:
    source, target, pictures = tmp_path / "large.onnx", tmp_path / "int8.onnx", emoji("generic", 32)
    with_large_channels(sources["fp32"], source)
    report = quantize_onnx(source, target, pictures, form)
    judged = evenly(pictures, quantize.JUDGED_PICTURES)
    shares = []
    for got, exact in zip(encode(target, judged), encode(source, judged), strict=True):
        variance = ((exact - exact.mean(0)) ** 2).sum(1).mean()
        shares.append(((got - exact) ** 2).sum(1).max() / max(variance, LEAST_VARIANCE))
    assert report["smoothed"] > 0 and report["embedding_error"] == pytest.approx(max(shares), rel=1e-3, abs=2e-6)


def test_the_most_costly_products_return_to_float_for_the_time_they_take() -> None:
    def choose(errors: list[float], own: list[float], work: list[int], largest: float) -> Any:
        """Errors of the embeddings add up; each group has an error of its own."""
        blank = Quantised(np.ones(()), np.zeros(()))
        attempts = [QuantisedGroup(blank, [], None, error) for error in own]
        return choose_float(lambda chosen, *_: float(np.array(errors)[chosen].sum()), attempts, work, largest)

    assert choose([0.0004, 0.0004, 0.0001], [1] * 3, [1] * 3, 0.002) == ({}, pytest.approx(0.0009))
    assert choose([0.004, 0.004, 0.0005], [1] * 3, [10, 1, 1], 0.0049) == ({1: 0.004}, pytest.approx(0.0045))
    # More suspects than are measured at once: those with small errors of their own are measured last.
    floats, error = choose([0.001] * 40, [i / 100 for i in range(40)], [1] * 40, 0.0105)
    assert error <= 0.0105 and set(floats) >= set(range(24, 40)) and len(floats) == 30


def test_constants_that_layers_share_are_not_changed_for_all(
    sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The exporter stores equal constants once: those of LayerNorms and biases as they are before any training."""
    model = onnx.load(sources["fp32"])
    norms = [node for node in model.graph.node if node.op_type == "LayerNormalization"]
    for node in norms:
        node.input[1], node.input[2] = norms[0].input[1], norms[0].input[2]
    onnx.save(model, tmp_path / "shared.onnx")
    monkeypatch.setattr(quantize, "SMOOTHED_ABOVE", 0.0)
    report = quantize_onnx(tmp_path / "shared.onnx", tmp_path / "int8.onnx", emoji("generic", 64))
    assert report["smoothed"] >= 2
    pixels = emoji("held-out", 20)
    assert off(encode(tmp_path / "int8.onnx", pixels), encode(tmp_path / "shared.onnx", pixels)) <= 0.01


PRODUCT = """<ir_version: 9, opset_import: ["": 20]> product (float[batch, 64] x) => (float[batch, 32] y) {
    q = QuantizeLinear(x, scale, zero)
    d = DequantizeLinear(q, scale, zero)
    m = DequantizeLinear<axis = 1>(w, ws, wz)
    y = MatMul(d, m)
}"""


@pytest.mark.isa
@pytest.mark.parametrize("form", ["u8s8", "s8s8"])
@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_the_largest_sums_of_products_do_not_overflow(runtime: str, form: Any, tmp_path: Path) -> None:
    """Without VNNI, processors add pairs of products in 16 bits: all values are as large as they can be."""
    weight, x, path = np.full((64, 32), 2.0, np.float32), np.full((5, 64), 3.0, np.float32), tmp_path / "product.onnx"
    weight[:, ::2] *= -1
    matrix, activation = quantise_matrix(weight, False, form, np.float32), activation_scale(0, 3, form, np.float32)
    tensors = {"scale": activation.scale, "zero": activation.zero, "w": matrix.values, "ws": matrix.scale}
    model = onnx.parser.parse_model(PRODUCT)
    for name, value in (tensors | {"wz": matrix.zero}).items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(value, name))
    onnx.save(model, path)
    if runtime == "openvino":
        got = in_openvino(path, x)["y"]
    else:
        got = ort.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]
    np.testing.assert_allclose(got, x @ weight, rtol=1e-2)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("form", ["u8s8", "s8s8", "fp8"])
def test_scales_hold_the_largest_value(form: Any, dtype: Any, rng: np.random.Generator) -> None:
    weight = (rng.standard_normal((40, 30)) * 10.0 ** rng.uniform(-3, 1, 30)).astype(np.float32)
    weight[:, 7] = 0
    largest = 448 if form == "fp8" else 64
    for transposed in (False, True):
        found = quantise_matrix(weight, transposed, form, dtype)
        assert found.values is not None and found.values.shape == ((30, 40) if transposed else (40, 30))
        assert found.scale.dtype == dtype and (found.scale > 0).all()
        step = found.scale.astype(np.float32)
        assert (np.abs(weight) <= largest * step).all() and np.abs(found.values.astype(np.float32)).max() == largest
        bound = np.maximum(np.abs(weight) / 16, step * 2.0**-10) * 1.0001 if form == "fp8" else 0.5001 * step
        assert (np.abs(dequantised(found) - weight) <= bound).all()
    x = rng.uniform(-0.5, 3.0, (9, 5)).astype(np.float32)
    bits = activation_scale(-0.5, 3.0, form, dtype)
    bound = {"u8s8": 0.51 * 3.5 / 255 + 1e-3 * (dtype == np.float16), "s8s8": 0.51 * 3 / 127, "fp8": 3 / 16}[form]
    assert np.abs(rounded(x, bits) - x).max() <= bound
    assert not rounded(np.zeros((1, 5), np.float32), bits).any()
