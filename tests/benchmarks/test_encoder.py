"""The encoder benchmarks: FLOP counts, rows, what rivals they are compared with, and that nothing wrong is timed."""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytest.importorskip("open_clip")

from iosr_fast.benchmarks import ceilings, encoder, encoder_rivals, harness  # noqa: E402
from iosr_fast.benchmarks.devices import Device  # noqa: E402
from iosr_fast.clip.fuse import build_dual_encoder  # noqa: E402
from iosr_fast.export.export import random_adapter  # noqa: E402
from tests.clip.small_clip import random_pixels, small_clip  # noqa: E402


@pytest.mark.parametrize("first", [0, 1, 2, None])
def test_flops_are_those_that_pytorch_counts(first: int | None) -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    clip = small_clip()
    dual = build_dual_encoder(clip, None if first is None else random_adapter(clip, first))
    # The fused attention of the CPU is not counted by PyTorch; the spelled-out one is.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        dual(torch.from_numpy(random_pixels(5, 32)))
    assert encoder.fused_flops(dual.shapes, 5) == counter.get_total_flops()


@pytest.fixture
def small(cached_exports: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny CLIP, a ceiling that takes no time, and torch.compile without its compiler, which takes seconds."""
    monkeypatch.setattr(encoder, "load_clip", lambda *_: small_clip(layers=2))
    best_gemm = ceilings.best_gemm
    monkeypatch.setattr(ceilings, "best_gemm", lambda threads: best_gemm(threads, size=64, repeats=1))
    monkeypatch.setattr(harness, "PAUSE_S", 0)
    monkeypatch.setattr(torch, "compile", lambda module, **options: module)


@pytest.mark.slow
def test_rows(small: None) -> None:
    made = encoder.run("Small", batch=3, first_adapted_blocks=(0, 1), threads=1, repeats=1)
    ways = ("eager", "onnxruntime", "torch-compile", *(["openvino"] if find_spec("openvino") else []))
    compiled = [way for way in ways if way in ("onnxruntime", "openvino")]
    expected = {f"{way}-two-pass-s{s}" for way in ways for s in (0, 1)} | {"open-clip-one-pass"}
    expected |= {f"{way}-one-pass" for way in compiled} | {f"{way}-s{s}" for way in compiled for s in (0, 1)}
    by_name = {row["impl"]: row for row in made}
    if find_spec("openvino"):
        expected |= {"openvino-int8-s1"}
        assert by_name["openvino-int8-s1"]["precision"] == "int8" and by_name["openvino-int8-s1"]["min_cosine"] > 0.99
        assert by_name["openvino-int8-s1"]["ratios"]["best-compiled-two-pass"] > 0
    assert set(by_name) - {"openvino-bf16-s1"} == expected and len(made) == len(by_name)
    for name, row in by_name.items():
        assert row["case"] == "small-b3" and row["threads"] == 1 and row["runtime_ms"] > 0
        ours = name in {f"{way}-s{s}" for way in compiled for s in (0, 1)}
        assert (row["share_of_ceiling"] is not None) == ours == ("ceiling_library" in row)
    ours = by_name["onnxruntime-s1"]
    fastest = min(by_name[name]["runtime_ms"] for name in by_name if "two-pass-s1" in name and "eager" not in name)
    assert ours["ratios"]["best-compiled-two-pass"] == pytest.approx(fastest / ours["runtime_ms"], abs=2e-3)
    fastest = min(by_name[f"{way}-one-pass"]["runtime_ms"] for way in compiled)
    assert ours["ratios"]["best-compiled-one-pass"] == pytest.approx(fastest / ours["runtime_ms"], abs=2e-3)
    assert ours["ratios"]["eager-two-pass"] > 0 and ours["first_adapted_block"] == 1


def test_rivals_of_the_nearest_block_are_compared_with() -> None:
    medians = {
        "onnxruntime-s6": 5.0,
        "onnxruntime-s9": 4.0,
        "eager-two-pass-s0": 20.0,
        "eager-two-pass-s8": 16.0,
        "onnxruntime-two-pass-s8": 10.0,
        "openvino-two-pass-s8": 8.0,
        "onnxruntime-two-pass-s0": 6.0,
        "open-clip-one-pass": 1.0,
        "onnxruntime-one-pass": 3.0,
    }
    of_six = {"eager-two-pass": 3.2, "best-compiled-two-pass": 1.6, "best-compiled-one-pass": 0.6}
    assert encoder.ratios("onnxruntime-s6", medians) == of_six
    assert encoder.ratios("openvino-two-pass-s8", medians) == {"eager-two-pass": 2.0, "best-compiled-one-pass": 0.375}
    assert encoder.ratios("open-clip-one-pass", medians) == {"best-compiled-one-pass": 3.0}


@pytest.mark.slow
def test_what_cannot_run_is_left_out_and_named(
    small: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_compiler(*_: object, **__: object) -> None:
        raise RuntimeError("no C++ compiler\nat all")

    monkeypatch.setattr(torch, "compile", no_compiler)
    monkeypatch.setattr(encoder, "find_spec", lambda name: None)
    made = encoder.run("Small", batch=1, first_adapted_blocks=(1,), threads=1, repeats=1)
    assert not [row for row in made if "openvino" in row["impl"] or "compile" in row["impl"]]
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("left out: openvino: it is not installed")
    assert lines[1] == "left out: torch-compile-two-pass-s1: RuntimeError: no C++ compiler"


@pytest.mark.parametrize("opened", ["rival", "gpu"])
def test_what_stays_eager_is_not_taken_for_compiled(opened: str) -> None:
    class Broken(torch.nn.Module):
        def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
            torch._dynamo.graph_break()
            return (pixels.float(),)

    pixels = random_pixels(1, 32)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        if opened == "rival":
            encoder_rivals.in_torch_compile(Broken(), pixels)()
        else:
            Device("cuda").compile(Broken())(torch.from_numpy(pixels))


@pytest.mark.slow
def test_a_wrong_candidate_is_not_timed(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    right = encoder.candidates

    def swapped(*arguments: object) -> tuple[dict[str, encoder.Embed], dict[str, float]]:
        runs, flops = right(*arguments)  # type: ignore[arg-type]
        fused = runs["onnxruntime-s1"]
        return runs | {"onnxruntime-s1": lambda: tuple(reversed(fused()))}, flops

    monkeypatch.setattr(encoder, "candidates", swapped)
    monkeypatch.setattr(harness, "measure", lambda *_: pytest.fail("timed a wrong candidate"))
    with pytest.raises(ArithmeticError, match="onnxruntime-s1 is off by"):
        encoder.run("Small", batch=2, first_adapted_blocks=(1,), threads=1, repeats=1)
    with pytest.raises(ArithmeticError, match=r"openvino-int8-s0 has a cosine of 0\.98"):
        encoder.verify({"openvino-int8-s0": lambda: (np.array([[0.6, 0.8]]),)}, {0: (np.array([[0.74, 0.6726]]),)})
    assert encoder.verify({"openvino-bf16-s0": lambda: (np.eye(2),)}, {0: (np.eye(2),)}) == {"openvino-bf16-s0": 1.0}
    with pytest.raises(ArithmeticError, match="nan"):
        encoder.verify({"a-one-pass": lambda: (np.full((1, 2), np.nan),)}, {0: (np.zeros((1, 2)),) * 2})
