"""The encoder benchmark: its FLOP count, its rows, and that nothing wrong is timed."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytest.importorskip("open_clip")

from iosr_fast.offline.dual_encoder import build_dual_encoder  # noqa: E402
from iosr_fast.offline.export import random_adapter  # noqa: E402
from tests.test_dual_encoder import random_pixels, small_clip  # noqa: E402
from tools.bench import encoder, harness  # noqa: E402


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
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder, "load_clip", lambda *_: small_clip())
    monkeypatch.setattr(harness, "gemm_ceiling_flops", lambda threads: 1e12)


def test_rows(small: None) -> None:
    made = encoder.run("Small", batch=3, first_adapted_block=1, threads=1, repeats=1)
    assert [row["impl"] for row in made] == ["onnxruntime", "two-pass", "eager-two-pass", "one-pass"]
    for row in made:
        assert row["case"] == "small-b3-s1" and row["threads"] == 1 and row["runtime_ms"] > 0
    assert set(made[0]["ratios"]) == set(encoder.RIVALS)


def test_a_wrong_candidate_is_not_timed(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    right = encoder.candidates

    def swapped(*arguments: object) -> dict[str, encoder.Embed]:
        runs = right(*arguments)  # type: ignore[arg-type]
        fused = runs["onnxruntime"]
        return runs | {"onnxruntime": lambda: tuple(reversed(fused()))}

    monkeypatch.setattr(encoder, "candidates", swapped)
    monkeypatch.setattr(harness, "measure", lambda *_: pytest.fail("timed a wrong candidate"))
    with pytest.raises(ArithmeticError, match="onnxruntime is off by"):
        encoder.run("Small", batch=2, first_adapted_block=1, threads=1, repeats=1)
    with pytest.raises(ArithmeticError, match="nan"):
        encoder.verify({"eager-two-pass": lambda: (np.full((1, 2), np.nan),) * 2})
