"""The benches on a GPU, without one: tiny shapes on the CPU, and a stand-in for CUDA."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from iosr_fast.benchmarks import encoder_gpu, harness, parity, score  # noqa: E402
from iosr_fast.benchmarks.ceilings import Ceilings, exact_products  # noqa: E402
from iosr_fast.benchmarks.devices import Device  # noqa: E402
from iosr_fast.encoders.runtimes import cuda_graphs  # noqa: E402
from iosr_fast.scoring.reference import score_reference  # noqa: E402
from iosr_fast.scoring.scorer import Scorer  # noqa: E402

REHEARSAL = Device("rehearsal")


# Timing, with a stand-in for CUDA.


class FakeCuda:
    """Events on a clock that only calls and flushes move."""

    def __init__(self) -> None:
        self.now, self.log = 0.0, []

    def event(self, enable_timing: bool) -> Any:
        assert enable_timing
        event = SimpleNamespace(time=None)
        event.record = lambda: setattr(event, "time", self.now)
        event.elapsed_time = lambda end: end.time - event.time
        return event

    def work(self, name: str, milliseconds: float) -> None:
        self.log.append(name)
        self.now += milliseconds


def test_a_gpu_is_timed_between_events_after_a_flush(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeCuda()
    monkeypatch.setattr(torch.cuda, "Event", fake.event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: fake.log.append("synchronize"))
    flush = SimpleNamespace(sum=lambda: fake.work("flush", 7.0))
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: flush)
    monkeypatch.setattr(harness.time, "sleep", lambda _: pytest.fail("slept beside a GPU"))
    calls = {"a": lambda: fake.work("a", 1.0), "b": lambda: fake.work("b", 2.0)}
    times = Device("cuda").measure(calls, 3)
    assert times == {"a": [1.0] * 3, "b": [2.0] * 3}
    assert fake.log == ["a", "b"] + ["flush", "a", "flush", "b"] * 3 + ["synchronize"], "waited for once, at the end"


def test_calls_are_recorded_as_graphs_or_launched_from_the_stream(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    warm: list[int] = []

    def call() -> int:
        warm.append(0)
        return 5

    monkeypatch.setattr(cuda_graphs, "Recorder", lambda: SimpleNamespace(record=lambda run: lambda: run() + 1))
    replay, launch = Device("cuda").record(call)
    assert launch == "graph" and len(warm) == 3 and replay() == 6

    def refuses(run: Any) -> Any:
        raise RuntimeError("an operation waits for the device\nat length")

    monkeypatch.setattr(cuda_graphs, "Recorder", lambda: SimpleNamespace(record=refuses))
    assert Device("cuda").record(call) == (call, "stream")
    assert capsys.readouterr().out == "no CUDA graph: an operation waits for the device\n"
    assert Device().record(call) == (call, "call")
    with pytest.raises(ValueError, match="expected a device out of cpu, cuda, rehearsal, got 'gpu'"):
        Device("gpu")


def test_ceilings_of_a_gpu_are_measured_once_a_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "PAUSE_S", 0)
    ceilings = Ceilings(REHEARSAL, 1)
    rates = [ceilings.gemm_flops(kind) for kind in ("fp32", "fp16", "int8", "bf16")]
    assert min(rates) > 0 and rates[1] == rates[2] and ceilings.bytes_per_s > 0
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    with exact_products():
        assert torch.get_float32_matmul_precision() == "highest" and not torch.backends.cudnn.allow_tf32
    assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == before


# Scoring and encoders.


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "PAUSE_S", 0)
    monkeypatch.setattr(harness, "BURST_S", 0)
    monkeypatch.setattr(Device, "compile", lambda self, function: function)


def test_scoring_leaves_out_wrong_rivals_and_reports_ours(
    quick: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    verify = score.verify

    def strict(name: str, *rest: Any) -> None:
        if name in ("eager-best", "torch:int8"):
            raise ArithmeticError(f"{name} is wrong by 0.1")
        if name == "torch:bf16":  # as Triton's OutOfResources, which is no RuntimeError
            raise TypeError("out of resource: shared memory\nat length")
        verify(name, *rest)

    monkeypatch.setattr(score, "verify", strict)
    rows = {row["impl"]: row for row in score.run(["q2-k64-d32-c4"], 1, 1, "rehearsal")}
    assert capsys.readouterr().out.splitlines() == [
        "WRONG: q2-k64-d32-c4: torch:bf16: TypeError: out of resource: shared memory",
        "WRONG: q2-k64-d32-c4: torch:int8 is wrong by 0.1",
        "left out: q2-k64-d32-c4: eager-best is wrong by 0.1",
    ]
    ours = {"torch", "torch:fp16", "torch:fp16:q16", "torch:bf16:q16", "torch:int8:q16"}
    assert set(rows) == ours | {"papers-formula", "torch-fp32", "torch-mm", "compiled-best", "one-launch"}
    launch = rows.pop("one-launch")
    assert launch["runtime_ms"] > 0 and launch["rate"] is None is launch["share_of_ceiling"], "it does no work"
    for row in rows.values():
        assert row["rate"] > 0 and row["share_of_ceiling"] is not None and row["launch"] == "call"
        assert row["rate_unit"] == "GFLOP/s" and row["extra_memory_mb"] is None
    assert "torch-mm" in rows["torch:fp16"]["ratios"], "the share of a product of the same shape"
    (few,) = (row for row in score.run(["q1-k12-d8-c5"], 1, 1, "rehearsal") if row["impl"] == "torch")
    assert few["rate_unit"] == "GB/s" and "compiled-best" not in few["ratios"], "unequal classes"


def test_a_kernel_that_forgets_a_key_is_wrong() -> None:
    """Whatever rounding is allowed on a GPU: a cache term is as large as a text term, and looked at where it is."""
    for text in ("q64-k1600-d64-c100", "q5-k123-d72-c7"):
        case = score.Case.parse(text)
        plan, embeddings = case.build(case.balance)
        assert plan.keys is not None and plan.class_offsets is not None
        kept = np.delete(np.arange(len(plan.keys)), plan.class_offsets[1:] - 1)
        offsets = plan.class_offsets - np.arange(case.classes + 1)
        less = replace(plan, keys=plan.keys[kept], class_offsets=offsets)
        for scored, right in ((plan, True), (less, False)):
            candidate = score.Candidate(partial(score_reference, scored, embeddings), plan, "bf16")
            assert (score.error_of(candidate, embeddings) <= score.GPU_TOLERANCES["bf16"]) == right


def test_scoring_on_a_gpu_checks_nothing(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    checks: list[bool] = []
    with_path = Scorer.with_path

    def watched(scorer: Scorer, *arguments: Any, check: bool = True) -> Any:
        checks.append(check)
        return with_path(scorer, *arguments, check=check)

    monkeypatch.setattr(Scorer, "with_path", watched)
    score.run(["q2-k6-d8-c3"], 1, 1, "rehearsal", wanted=lambda name: name == "torch")
    assert checks and not any(checks)


def test_an_encoder_without_open_clip(
    quick: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Random weights keep activations alive: unlike pictures differ, and half precision agrees with float32."""
    monkeypatch.setattr(encoder_gpu, "find_spec", lambda name: None)
    encoders = encoder_gpu.load("demo", REHEARSAL)
    plain, adapted = encoders.truth
    assert plain[0] @ plain[1] < 0.999999 and plain[0] @ adapted[0] < 0.99999 and np.isfinite(plain).all()
    monkeypatch.setattr(encoder_gpu, "load", lambda *_: encoders)
    rows = {row["impl"]: row for row in encoder_gpu.run("demo", 3, 1, "rehearsal", compiled=True)}
    assert list(rows) == ["fused-compiled", "one-pass-compiled"]
    assert "two passes of demo: open_clip is not installed" in capsys.readouterr().out
    for row in rows.values():
        assert row["case"] == "demo-s3-b3" and row["precision"] == "fp16" and row["min_cosine"] > 0.999
        assert row["images_per_s"] > 0 and row["share_of_ceiling"] > 0
    *kernels, fused, plain = encoder_gpu.run("demo", 2, 1, "rehearsal")  # fewer than the checked pictures
    assert fused["case"] == plain["case"] == "demo-s3-b2" and min(fused["min_cosine"], plain["min_cosine"]) > 0.999
    assert [(row["impl"], row["case"]) for row in kernels] == [(n, "demo-s3-b2-attention") for n in ("flash", "math")]
    assert all(0 < row["max_relative_error"] < 0.002 and row["rate"] > 0 for row in kernels)
    out = capsys.readouterr().out
    for name in ("cudnn", "efficient"):
        assert f"left out: demo-s3-b2: attention by {name}: " in out
    right = encoders.modules["fused"]
    monkeypatch.setitem(encoders.modules, "fused", lambda pixels: tuple(reversed(right(pixels))))
    monkeypatch.setattr(encoders.modules["fused"], "shapes", right.shapes, raising=False)
    assert [row["impl"] for row in encoder_gpu.run("demo", 3, 1, "rehearsal")] == ["flash", "math", "one-pass"]
    assert "WRONG: demo-s3-b3: fused has a cosine of" in capsys.readouterr().out
    with pytest.raises(ValueError, match="expected a model out of ViT-B-16, ViT-B-32, demo on a GPU, got RN50"):
        encoder_gpu.run("RN50", 1, 1, "rehearsal")


def test_outputs_that_are_not_finite_are_wrong() -> None:
    truth = (np.eye(3, 4, dtype=np.float32),) * 2
    encoders = encoder_gpu.Encoders({}, np.zeros((3, 2, 2, 3), np.uint8), truth)
    outputs = [torch.from_numpy(np.concatenate([one, one])) for one in truth]
    assert encoders.errors(outputs) == {"max_abs_error": 0.0, "min_cosine": 1.0}
    outputs[1][-1, 0] = float("nan")  # beyond the pictures that are compared
    errors = encoders.errors(outputs)
    assert np.isnan(errors["min_cosine"]) and not encoder_gpu.right(errors, "fp16")
    assert not encoder_gpu.right(errors, "fp32") and encoders.batch(7, REHEARSAL).shape == (7, 2, 2, 3)


@pytest.mark.slow
def test_parity_is_a_table_of_errors(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("open_clip")
    monkeypatch.setattr(parity, "TINY", ("q3-k8-d16-c3",))
    saved: list[int] = []
    result = parity.run("rehearsal", lambda result: saved.append(sum(map(len, result["tables"].values()))))
    assert saved == list(range(1, len(saved) + 1)), "whole after every line"
    lines = {(line["impl"], line["precision"]): line for line in result["tables"]["encoder"]}
    assert lines["fused", "fp32"]["max_abs_error"] < 1e-5 < lines["fused", "fp16"]["max_abs_error"]
    assert lines["two-pass", "fp16"]["min_cosine"] > 0.999 and all(line["right"] for line in lines.values())
    assert {line["impl"] for line in result["tables"]["scoring"]} >= {"torch", "torch:fp16:q16"}
    assert "torch" in result["facts"]["implementations"] and not capsys.readouterr().out
    monkeypatch.setattr(parity, "encoders", lambda device: iter(()))
    monkeypatch.setattr(score, "error_of", lambda *_: float("nan"))
    parity.run("rehearsal")
    assert "WRONG: case q3-k8-d16-c3 impl torch precision fp32 error nan" in capsys.readouterr().out


def test_parity_in_processes_reports_one_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parity, "usable_threads", lambda: 1)
    jobs = [("no-case", "fp16"), ("q3-k8-d16-c3", "fp16")]
    wrong, *lines = parity.scoring_in_processes(REHEARSAL, jobs)  # type: ignore[arg-type]
    assert not wrong["right"] and wrong["error"].startswith("no-case: IosrFastError: expected a case like q256-")
    assert [line["impl"] for line in lines] == ["torch:fp16", "torch:fp16:q16"] and all(line["right"] for line in lines)


def test_parity_goes_on_after_a_kernel_that_does_not_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    def error_of(candidate: score.Candidate, embeddings: Any) -> float:
        if candidate.precision == "fp32":
            raise TypeError("out of resource: shared memory")
        return 0.0

    monkeypatch.setattr(score, "error_of", error_of)
    first, *others = parity.scoring(REHEARSAL, ["q3-k8-d16-c3"], None)
    assert first["error"] == "torch: TypeError: out of resource: shared memory" and not first["right"]
    assert {line["precision"] for line in others} == {"fp16", "bf16", "int8"} and all(line["right"] for line in others)
