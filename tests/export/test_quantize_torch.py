"""FP8 engines of the torch runtime; torch._scaled_mm computes their products on the CPU, too."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch comes with the cpu extra")
pytest.importorskip("open_clip", reason="open_clip comes with the cpu extra")

from safetensors.torch import load_file  # noqa: E402

from iosr_fast.clip import fp8_linear  # noqa: E402
from iosr_fast.clip.fp8_linear import Fp8Linear  # noqa: E402
from iosr_fast.clip.fuse import build_dual_encoder  # noqa: E402
from iosr_fast.clip.two_pass import two_passes  # noqa: E402
from iosr_fast.encoders.runtimes import open_engine  # noqa: E402
from iosr_fast.encoders.runtimes.torch import FILE, TorchEncoder  # noqa: E402
from iosr_fast.exceptions import UnavailableError  # noqa: E402
from iosr_fast.export import candidates, quantize_torch  # noqa: E402
from iosr_fast.export.export import write_engine  # noqa: E402
from iosr_fast.utils.machine import Gpu  # noqa: E402
from iosr_fast.utils.manifest import read_manifest  # noqa: E402
from tests.clip.small_clip import random_adapter, random_pixels, small_clip  # noqa: E402


@pytest.mark.parametrize("shape", [(1, 16, 48), (7, 64, 16), (33, 80, 112)])
def test_the_product_is_that_of_dequantised_values(shape: tuple[int, int, int]) -> None:
    rows, inputs, outputs = shape
    generator = torch.Generator().manual_seed(rows)
    linear = torch.nn.Linear(inputs, outputs).requires_grad_(False).half()
    x = torch.randn(2, rows, inputs, generator=generator).half()
    largest = 0.5 * float(x.abs().max())  # so that some are clipped
    layer = Fp8Linear.quantised(linear, largest, float(linear.weight.abs().max()))
    scale = layer.input_scale.double()
    x8 = (x.double().clamp(-largest, largest) / scale).float().to(fp8_linear.E4M3).double() * scale
    w8 = layer.weight.double() * layer.weight_scale.double()
    expected = x8 @ w8.T + linear.bias.double()
    got = layer(x)
    assert got.dtype == torch.float16 and got.shape == (2, rows, outputs)
    np.testing.assert_allclose(got.double(), expected, atol=2e-3 * float(expected.abs().max()))
    np.testing.assert_allclose(layer.dequantised(x).double(), expected, atol=1e-4 * float(expected.abs().max()))
    step = (w8 - linear.weight.double()).abs() / linear.weight.double().abs().clamp_min(layer.weight_scale * 2**-6)
    assert step.max() <= 2**-4 + 1e-6, "three bits behind the first"


@pytest.fixture(scope="module", params=[False, True], ids=["gelu", "quick_gelu"])
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Path]:
    clip, folder = small_clip(request.param), tmp_path_factory.mktemp("fp8") / "engine"
    adapter = random_adapter(clip, 1)
    write_engine(clip, adapter, folder, "torch", "fp8", 6, calibration=random_pixels(16, 32))
    return clip, adapter, folder


def test_an_engine_in_fp8_is_close_to_two_passes(engine: tuple[Any, Any, Path]) -> None:
    clip, adapter, folder = engine
    pixels = random_pixels(5, 32)
    facts = read_manifest(folder, "engine")["quantised"]
    assert (facts["kind"], facts["scheme"], facts["products"], facts["kept"]) == ("fp8", "torch", 2 * 6, {})
    encoder = open_engine(folder, "torch")
    blocks = encoder._encoder.blocks  # type: ignore[attr-defined]
    eight = {name for name, module in blocks.named_modules() if isinstance(module, Fp8Linear)}
    assert eight == {f"{i}.{name}" for i in (0, 1) for name in ("qkv_proj", "out_proj", "c_fc", "c_proj")}
    stored = {name for name, value in load_file(folder / FILE).items() if value.dtype == fp8_linear.E4M3}
    layers = ("q_proj", "k_proj", "v_proj", "out_proj", "c_fc", "c_proj")
    assert stored == {f"blocks.{i}.{name}.weight" for i in (0, 1) for name in layers}, "as in fp16, by their names"
    got = encoder.encode(pixels)
    for rows, right in zip((got.plain, got.adapted), two_passes(clip, adapter, pixels), strict=True):
        assert 0.99 < (rows * right).sum(1).min() < 0.99999
    plain = open_engine(folder, "torch", adapted=False).encode(pixels)
    np.testing.assert_allclose(plain.plain, got.plain, atol=2e-3)


def test_the_inference_form_in_fp8_equals_the_stored_one(engine: tuple[Any, Any, Path]) -> None:
    """q, k and v in one product, quick_gelu's factors in the scales."""
    _, _, folder = engine
    manifest = read_manifest(folder, "engine")
    executed = TorchEncoder(folder, manifest, device="cpu")
    stored = fp8_linear_encoder(folder, manifest)
    pixels = torch.from_numpy(random_pixels(5, 32))
    with torch.no_grad():
        for got, expected in zip(executed._encoder(pixels), stored(pixels), strict=True):
            np.testing.assert_allclose(got, expected, atol=0.02)
            assert (got * expected).sum(1).min() > 0.9999
        compiled = torch.compile(executed._encoder, backend="eager", fullgraph=True, dynamic=True)
        np.testing.assert_allclose(compiled(pixels)[0], executed._encoder(pixels)[0], atol=1e-3)
    assert executed._compile, "on a GPU"


def fp8_linear_encoder(folder: Path, manifest: dict[str, Any]) -> Any:
    from iosr_fast.clip.dual_encoder import DualEncoder

    encoder, state = DualEncoder.from_config(manifest["dual_encoder"]), load_file(folder / FILE)
    fp8_linear.insert_fp8_layers(encoder, state)
    encoder.load_state_dict(state)
    return encoder


def test_rough_products_and_odd_sizes_stay_in_fp16() -> None:
    clip = small_clip(mlp_ratio=3.125)  # 200 wide, no multiple of 16
    encoder = build_dual_encoder(clip, None, "fp16")
    norm = encoder.blocks[1].ln_1
    norm.weight[3], norm.bias[3] = 0.0, 1000.0  # a constant, whose rounded products drown the rest
    facts = quantize_torch.quantize_blocks(encoder, random_pixels(8, 32))
    odd = {f"blocks.{i}.{name}" for i in (0, 1) for name in ("c_fc", "c_proj")}
    assert {name for name, reason in facts["kept"].items() if "multiples of 16" in reason} == odd
    rough = {name for name, reason in facts["kept"].items() if "of its square" in reason}
    assert {f"blocks.1.{name}" for name in ("q_proj", "k_proj", "v_proj")} <= rough
    assert not any(name.startswith("blocks.0") for name in rough)
    assert facts["products"] + len(facts["kept"]) == 12
    for name in facts["kept"]:
        assert not isinstance(encoder.get_submodule(name), Fp8Linear)
    with pytest.raises(ValueError, match="at least 8 calibration pictures, got 7"):
        quantize_torch.quantize_blocks(encoder, random_pixels(7, 32))


def test_the_search_tries_fp8_on_a_gpu_that_has_it(
    engine: tuple[Any, Any, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    source: Any = SimpleNamespace(manifest=read_manifest(engine[2], "engine") | {"precision": "fp32"})
    for capability, reason in (((8, 9), ""), ((8, 6), "NVIDIA A10 has no fp8 instructions")):
        gpu = Gpu("NVIDIA A10", capability)
        monkeypatch.setattr(candidates, "this_gpu", lambda gpu=gpu: gpu)
        (one,) = candidates.list_candidates(source, 16, "torch", "fp8", with_clip=True)
        assert (one.runtime, one.precision, one.left_out) == ("torch", "fp8", reason)
    monkeypatch.setattr(candidates, "this_gpu", lambda: None)
    assert not candidates.list_candidates(source, 16, "torch", "fp8", with_clip=True), "no faster on a CPU"


def test_devices_without_fp8_are_refused(engine: tuple[Any, Any, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = engine[2]
    old = SimpleNamespace(get_device_capability=lambda device: (8, 6), get_device_name=lambda device: "NVIDIA A10")
    monkeypatch.setattr(fp8_linear.torch, "cuda", old)
    with pytest.raises(UnavailableError, match=r"no fp8 products here: NVIDIA A10 is older .* build an engine in fp16"):
        TorchEncoder(folder, read_manifest(folder, "engine"), device="cuda")
    monkeypatch.delattr(fp8_linear.torch, "_scaled_mm")
    with pytest.raises(UnavailableError, match=r"has no torch\._scaled_mm"):
        TorchEncoder(folder, read_manifest(folder, "engine"), device="cpu")
