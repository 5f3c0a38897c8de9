"""What gpu-check measures, with tiny shapes on the CPU and stand-ins for what only a GPU has."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("open_clip")

from tests.clip.test_dual_encoder import random_adapter, small_clip  # noqa: E402
from tests.encoders.test_cuda_graphs import Replaying  # noqa: E402
from tests.tools import gpu_report  # noqa: E402
from tests.tools.gpu_report import kept  # noqa: E402
from tools.bench import score as score_bench  # noqa: E402
from tools.gpu import compiled, encoder, latency, models, parity, score  # noqa: E402
from tools.gpu import device as gpu  # noqa: E402
from tools.gpu.report import Report, Setting  # noqa: E402

report, setting = gpu_report.report, gpu_report.setting  # pytest finds fixtures by these names
FAKES = "tests.tools.gpu_check_parts"


class Playing(Replaying):
    """The recorder's stand-in, whose records may also be replayed outside of a turn."""

    def __init__(self, stale: bool = False, refuses: bool = False) -> None:
        super().__init__(refuses)
        self.inside, self.stale = True, stale

    @contextmanager
    def turn(self) -> Iterator[None]:
        yield

    def record(self, run: Any) -> Any:
        if not self.stale:
            return super().record(run)
        first = run()
        return lambda: first


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Encoders of three narrow blocks; one thread, one repeat."""
    clip = small_clip()

    def config(precision: Any) -> Any:
        return models.build_dual_encoder(clip, random_adapter(clip, 1), precision).shapes

    monkeypatch.setitem(models.CONFIGS, "demo", config)
    monkeypatch.setattr(models, "loaded", lambda name: (clip, random_adapter(clip, 1)))
    monkeypatch.setattr(gpu, "name_of", lambda device: "NVIDIA Fake 9000")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("small")
def test_the_encoder_eager_and_as_graphs(report: Report, setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "make_recorder", lambda device: Playing())
    encoder.run(report, setting)
    rows = {row["impl"]: row for row in kept(report)["rows"]}
    assert list(rows) == ["fused", "fused-graph", "two-pass", "two-pass-graph"] and not report.failed + report.skipped
    assert set(rows["fused"]["ratios"]) == {"fused-graph", "two-pass", "two-pass-graph"}
    for row in rows.values():
        assert row["images_per_s"] > 0 and row["share_of_ceiling"] > 0 and row["min_cosine"] > 0.999
        assert row["device"] == "NVIDIA Fake 9000" and row["case"] == "demo-s1-b5" and row["precision"] == "fp16"


@pytest.mark.usefixtures("small")
def test_a_wrong_encoder_is_not_timed(report: Report, setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    make = models.make

    def spoilt(name: str, device: str) -> models.Models:
        made = make(name, device)
        made.fused.proj.weight.data.roll(1)
        made.fused.proj.weight.data = made.fused.proj.weight.data.roll(1, 0)
        return made

    monkeypatch.setattr(encoder, "make", spoilt)
    encoder.run(report, setting)
    assert not report.rows and "fused of demo is wrong: cosine" in report.failed[0]
    assert report.skipped == ["CUDA graphs: a cpu has none"]


@pytest.mark.usefixtures("small")
def test_outputs_that_are_not_finite_are_wrong(setting: Setting) -> None:
    made = models.make("demo", "cpu")
    outputs = [torch.from_numpy(np.concatenate([truth, truth])) for truth in made.truth]
    assert made.verify("twice", outputs) == pytest.approx(1.0)
    outputs[1][-1, 0] = float("nan")  # beyond the pictures that are checked
    with pytest.raises(ArithmeticError, match="cosine nan"):
        made.verify("twice", outputs)


@pytest.mark.usefixtures("small")
def test_without_open_clip_the_fused_encoder_is_still_timed(
    report: Report, setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "find_spec", lambda name: None if name == "open_clip" else find_spec(name))
    encoder.run(report, setting)
    (row,) = kept(report)["rows"]
    assert row["impl"] == "fused" and row["verified_against"] == "the fused encoder in float32 on the CPU"
    assert report.skipped[1] == "two passes of demo: open_clip is not installed"


def test_random_weights_keep_activations_alive() -> None:
    """ViT-B/32's own shapes: embeddings of unlike pictures differ, and half precision agrees with float32."""
    config = models.CONFIGS["demo"]("fp32")
    state = models.random_state(config)
    exact = models.DualEncoder.from_config(models.asdict(config))
    exact.load_state_dict(state)
    assert not any(value.isnan().any() for value in state.values())
    pixels = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    pixels[1] = 0
    plain, adapted = models.evaluate(exact, pixels)
    assert plain[0] @ plain[1] < 0.99 and (plain[0] @ adapted[0]) < 0.99999


def test_two_pass_flops_are_those_that_pytorch_counts() -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    clip = small_clip()
    adapter = random_adapter(clip, 1)
    two = models.TwoPasses(clip, adapter).train()  # nn.MultiheadAttention's fast path is not counted
    fused = models.build_dual_encoder(clip, adapter)
    pixels = torch.zeros(5, 32, 32, 3, dtype=torch.uint8)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        two(pixels)
    assert models.two_pass_flops(fused.shapes, 5) == counter.get_total_flops()


@pytest.mark.usefixtures("small")
def test_compiled_encoders_are_timed_with_the_graphs(
    report: Report, setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Traced as a whole, which TorchInductor would compile; the second mode of two passes can't be."""
    modes: list[str] = []

    def compile_module(module: Any, mode: str) -> Any:
        modes.append(mode)
        if len(modes) == 4:
            raise RuntimeError("no C compiler")
        return torch.compile(module, backend=lambda graph, _: graph, dynamic=False, fullgraph=True)

    monkeypatch.setattr(gpu, "compile_module", compile_module)
    compiled.run(report, setting)
    rows = {row["impl"]: row for row in kept(report)["rows"]}
    expected = ["fused", "two-pass", "fused-reduce-overhead", "two-pass-reduce-overhead", "fused-max-autotune"]
    assert list(rows) == expected and len(report.rows) == 5, "the last rows of a case stand for all of it"
    assert rows["fused-max-autotune"]["compile_seconds"] > 0 and not report.failed
    assert modes == ["reduce-overhead"] * 2 + ["max-autotune"] * 2
    assert report.skipped[-1].endswith("two-pass, demo in batches of 5: RuntimeError: no C compiler")


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("stale", [False, True])
def test_latency_of_single_pictures(
    report: Report, setting: Setting, stale: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "make_recorder", lambda device: Playing(stale))
    latency.run(report, setting)
    rows = {row["impl"]: row for row in kept(report)["rows"]}
    assert report.facts["pictures_apart"] > 2 * latency.TOLERANCE, "else an answer for another picture passes"
    if stale:
        assert (
            set(rows) == {"eager", "graph-cpu"}
            and len(report.failed) == 2
            and "one-graph is off by" in report.failed[0]
        )
        return
    assert set(rows) == {"eager", "one-graph", "graphs", "graph-cpu"} and not report.failed
    for row in rows.values():
        assert row["calls"] == 4 and 0 < row["p50_ms"] <= row["p99_ms"] and row["bench"] == "gpu-latency"


@pytest.mark.usefixtures("small")
def test_what_can_not_be_recorded_is_wrong_and_the_rest_goes_on(
    report: Report, setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "make_recorder", lambda device: Playing(refuses=True))
    encoder.run(report, setting)
    assert [row["impl"] for row in report.rows] == ["fused", "two-pass"]
    assert report.failed[0] == "fused of demo can't be recorded as a CUDA graph: an operation waits for the device"
    plan, embeddings = score_bench.Case.parse("q2-k64-d32-c4").build()
    ours = score_bench.ours(plan, embeddings, "cpu")
    assert not score.graphed({"numpy": ours["numpy"]}, embeddings, "cpu", report)
    assert report.failed[-1] == "numpy can't be recorded as a CUDA graph: an operation waits for the device"


@pytest.mark.usefixtures("small")
def test_scoring_leaves_out_wrong_rivals_and_fails_for_ours(
    report: Report, setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "make_recorder", lambda device: Playing())
    verify = score_bench.verify

    def strict(name: str, *rest: Any) -> None:
        if name in ("eager-best", "numpy"):
            raise ArithmeticError(f"{name} is wrong by 0.1")
        verify(name, *rest)

    monkeypatch.setattr(score_bench, "verify", strict)
    score.run(report, setting)
    rows = {row["impl"]: row for row in kept(report)["rows"]}
    assert report.failed == ["q2-k64-d32-c4: numpy is wrong by 0.1"]
    assert report.skipped == ["q2-k64-d32-c4: eager-best is wrong by 0.1"]
    assert {"torch/cpu", "papers-formula"} <= set(rows) and not {"numpy", "eager-best"} & set(rows)
    assert sum(name.startswith("cpp/") and name.endswith(":fp16:graph") for name in rows) == 1
    for row in rows.values():
        assert row["rate"] > 0 and row["ceiling"] > 0 and row["share_of_ceiling"] is not None


def test_a_million_keys_take_time_and_memory(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    large = score_bench.Case.parse("q1-k1000000-d512-c1000")
    assert score.too_large(large, setting) is None
    late = Setting("cpu", True, setting.work, time.monotonic() + 10)
    assert "s are left of the part's time" in str(score.too_large(large, late))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(total_memory=8e9))
    on_gpu = Setting("cuda", False, setting.work, setting.deadline)
    assert score.too_large(large, on_gpu) == "it takes 16 GB, and the GPU has 8"
    assert score.too_large(score_bench.Case.parse("q1-k1600-d512-c100"), late) is None


@pytest.mark.usefixtures("small")
def test_parity_as_a_table_of_errors(report: Report, setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.backends.cudnn.allow_tf32
    try:
        parity.run(report, setting)
    finally:
        torch.backends.cudnn.allow_tf32 = before
    tables = kept(report)["tables"]
    lines = {(line["impl"], line["precision"]): line for line in tables["encoder"]}
    assert lines["fused", "fp32"]["max_abs_error"] < 1e-5 < lines["fused", "fp16"]["max_abs_error"]
    assert lines["two-pass", "fp16"]["min_cosine"] > 0.999
    assert {"numpy", "torch/cpu"} <= {line["impl"] for line in tables["scoring"]}
    assert all(line["error"] <= 2e-5 for line in tables["scoring"])
    assert tables["demo"][0]["changed_labels"] == 0 and tables["demo"][0]["pictures"] > 5 and not report.failed
    monkeypatch.setattr(parity, "MAX_ERROR", 0.0)
    monkeypatch.setattr(parity, "get_args", lambda precisions: ("fp32",))
    monkeypatch.setattr(parity, "largest_error", lambda *_: float("nan"))
    for step in (parity.encoders, parity.scoring):
        step(report, setting)
    assert "the fused encoder of demo in fp32 is wrong" in report.failed[0] and "wrong by nan" in report.failed[1]


@pytest.mark.usefixtures("small")
def test_tensorrt_against_the_graph(report: Report, setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    """With stand-ins for the exporter, and for a plan that computes in PyTorch."""
    from tools.gpu import tensorrt

    class Encoder(latency.TorchEncoder):
        def __init__(self, folder: Path, facts: dict[str, Any], runtime: str, buckets: tuple[int, ...]) -> None:
            assert (folder / "plans" / "here.plan").read_bytes() == b"plan" and facts["max_batch"] == max(buckets)
            assert facts["plans"] == {"plans/here.plan": {"runtime": runtime, "build_seconds": 1}}
            latency.open_torch(made, setting)
            super().__init__(setting.work / "torch-demo", facts, device="cpu")
            self._pixels = torch.zeros((max(buckets), 32, 32, 3), dtype=torch.uint8)
            self._results = [torch.zeros(max(buckets), 24) for _ in range(2)]
            self._stream, self._replay = None, {}

        def _launch(self, size: int) -> None:
            for result, found in zip(self._results, self._encoder(self._pixels[:size]), strict=True):
                result[:size] = found

    def export_onnx(given: models.DualEncoder, path: Path) -> None:
        pixels = made.batch(3, "cpu")
        with torch.inference_mode():
            assert all(map(torch.equal, given(pixels), made.fused(pixels)))
        path.write_text("a graph")

    def build_plan(path: Path, runtime: str, max_batch: int) -> tuple[bytes, dict[str, Any]]:
        assert path.read_text() == "a graph" and max_batch in (5, 1)
        return b"plan", {"build_seconds": 1}

    made = models.make("demo", "cpu")
    monkeypatch.setattr(gpu, "make_recorder", lambda device: Playing())
    monkeypatch.setattr(
        tensorrt, "unavailable_reason", lambda runtime: None if runtime == "tensorrt" else "not for this GPU"
    )
    here = SimpleNamespace(file="plans/here.plan", facts=lambda: {"runtime": "tensorrt"})
    monkeypatch.setattr(tensorrt, "target", lambda runtime: here)
    monkeypatch.setattr(tensorrt, "export_onnx", export_onnx)
    monkeypatch.setattr(tensorrt, "build_plan", build_plan)
    monkeypatch.setattr(tensorrt, "TensorRTEncoder", Encoder)
    tensorrt.run(report, setting)
    rows = kept(report)["rows"]
    large, single = (
        {row["impl"] for row in rows if row["bench"] == f"gpu-{kind}"} for kind in ("encoder-tensorrt", "latency")
    )
    assert large == {"fused", "fused-graph", "two-pass-graph", "tensorrt"} and not report.failed
    assert single == {"eager", "one-graph", "graphs", "graph-cpu", "tensorrt"}
    assert report.skipped == [
        "tensorrt_rtx: not for this GPU",
        "tensorrt under CUDA graphs in batches of [5]: none was recorded",
    ]
