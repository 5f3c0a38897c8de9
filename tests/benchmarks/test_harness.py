"""The harness verifies before it times, and its rows are complete and written as they come. No time is asserted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import ceilings, devices, harness
from benchmarks.devices import Device
from benchmarks.harness import Candidate, Run

FIELDS = {
    "bench",
    "case",
    "impl",
    "precision",
    "runtime_ms",
    "runtime_ms_spread",
    "repeats",
    "ratios",
    "rate",
    "first_s",
}
FIELDS |= {"rate_unit", "ceiling", "share_of_ceiling", "threads", "device", "versions", "commit"}


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "PAUSE_S", 0)


def calling(calls: list[str], name: str, result: Any = None) -> Callable[[], Callable[[], Any]]:
    """The `prepare` of a candidate that notes its calls."""

    def call() -> Any:
        calls.append(name)
        return result

    return lambda: call


def test_candidates_are_verified_first_and_then_timed_in_turn() -> None:
    calls: list[str] = []

    def check(result: int) -> dict[str, Any]:
        calls.append("check")
        return {"answer": result}

    run = Run("subject", repeats=2)
    run.case("case", {"a": Candidate(calling(calls, "a", 7), check), "b": Candidate(calling(calls, "b"))}, bursts=False)
    assert calls == ["a", "check", "a", "b", "b", "a", "b"]
    assert [row["answer"] for row in run.rows if row["impl"] == "a"] == [7] and run.failed == []
    calls.clear()
    run.case("case", {"short": Candidate(calling(calls, "short"))})
    assert len(calls) > 100, "short calls are timed in bursts"


def test_what_is_wrong_is_not_timed_and_named(capsys: pytest.CaptureFixture[str]) -> None:
    def wrong(result: Any) -> dict[str, Any]:
        raise ArithmeticError("off by 2")

    def broken() -> Callable[[], Any]:
        raise RuntimeError("no compiler\nat all")

    candidates = {
        "wrong": Candidate(calling([], "wrong"), wrong),
        "absent-rival": Candidate(broken, rival=True),
        "broken": Candidate(broken),
        "right": Candidate(calling([], "right")),
    }
    run = Run("subject", repeats=1)
    run.case("case", candidates)
    assert [row["impl"] for row in run.rows] == ["right"]
    assert run.failed == ["case: wrong", "case: broken"], "a rival may be missing, ours may not"
    errors = capsys.readouterr().err
    assert "WRONG: case: wrong: off by 2; not timed" in errors
    assert "left out: case: absent-rival: RuntimeError: no compiler\n" in errors


def test_rows_are_complete(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    times = iter([10.0, 2.0, 8.0, 5.0, 1.0, 8.0, 20.0, 3.0, 8.0])
    monkeypatch.setattr(Device, "time_ms", lambda *_: next(times))
    candidates = {
        "ceiling-gemm": Candidate(calling([], ""), work=0.02, ceiling="ceiling-gemm"),
        "ours": Candidate(calling([], ""), work=0.001, precision="int8", ceiling="ceiling-gemm"),
        "rival": Candidate(calling([], ""), rival=True),
    }
    run = Run("subject", threads=3, repeats=3)
    run.case("case", candidates, "GFLOP/s", ("numpy",), bursts=False)
    ceiling, ours, rival = run.rows
    assert all(set(row) == FIELDS for row in run.rows)
    assert (ours["runtime_ms"], ours["runtime_ms_spread"], ours["repeats"]) == (2.0, [1.2, 2.8], 3)
    assert (ours["ratios"], rival["ratios"], ceiling["ratios"]) == ({"rival": 4.0}, {}, {})
    # The best turn of the ceiling counts: 0.02 GFLOP in 5 ms.
    assert (ours["rate"], ours["ceiling"], ours["share_of_ceiling"]) == (0.5, 4.0, 0.125)
    assert (rival["rate"], rival["share_of_ceiling"], ours["precision"], ours["threads"]) == (None, None, "int8", 3)
    assert ours["versions"]["numpy"] == np.__version__ and ours["device"] and ours["commit"]
    printed = capsys.readouterr().out
    assert "|  | case |" in printed and "| ours | 2 (1.2 to 2.8) |" in printed and ours["commit"] in printed


@pytest.mark.parametrize(("calls_of_b", "kept"), [(0, [1]), (2, [1, 1]), (3, [2, 2])])
def test_a_process_that_is_stopped_keeps_the_rounds_that_ended(
    calls_of_b: int, kept: list[int], tmp_path: Path
) -> None:
    """Also those of a candidate whose successor has not been prepared, which may take minutes of compiling."""
    calls: list[str] = []

    def stop() -> None:
        calls.append("")
        if len(calls) > calls_of_b:  # the first is verified
            raise KeyboardInterrupt

    run = Run("subject", repeats=5, out=tmp_path / "rows.json")
    run.case("first", {"a": Candidate(calling([], ""))})
    with pytest.raises(KeyboardInterrupt):
        run.case("second", {"a": Candidate(calling([], "")), "b": Candidate(lambda: stop)}, bursts=False)
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [(row["case"], row["repeats"]) for row in rows] == [("first", 5), *(("second", count) for count in kept)]
    assert [path.name for path in tmp_path.iterdir()] == ["rows.json"]


def test_a_gpu_is_timed_without_pauses_and_records_what_has_no_graph_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recorded: list[str] = []
    gpu: Any = SimpleNamespace(is_gpu=True, description="a GPU", synchronize=lambda: None)
    gpu.record = lambda call: recorded.append(call()) or call
    gpu.calls_in, gpu.time_ms = lambda seconds, call: 1, lambda call, calls: 2.0
    monkeypatch.setattr(harness.time, "sleep", lambda seconds: pytest.fail("a pause"))
    run = Run("subject", gpu, repeats=2)
    names = {"kernel": True, "engine": False}
    run.case("case", {name: Candidate(calling([], "", name), recorded=graph) for name, graph in names.items()})
    assert recorded == ["kernel"] and [row["runtime_ms"] for row in run.rows] == [2.0, 2.0]


def test_on_a_gpu_a_turn_is_of_many_launches_and_a_lost_graph_is_a_lost_row(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    launches: list[str] = []
    event = SimpleNamespace(record=lambda: None, elapsed_time=lambda end: 3.0)
    cuda = {"is_available": lambda: True, "synchronize": lambda: None, "Event": lambda **_: event, "Stream": object}
    for name, fake in (cuda | {"get_device_name": lambda: "a GPU"}).items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(Device, "_flush", torch.zeros(1))

    def record(call: Callable[[], Any], stream: Any) -> Callable[[], Any]:
        if call() == "waits":
            raise RuntimeError("operation not permitted when stream is capturing")
        return call

    monkeypatch.setattr(devices, "record_graph", record)
    run = Run("subject", Device("cuda"), repeats=2)
    names = ("kernel", "waits")
    run.case("case", {name: Candidate(calling(launches, name, name)) for name in names})
    assert [row["impl"] for row in run.rows] == ["kernel"] and run.failed == ["case: waits"]
    assert "left out: case: waits: RuntimeError: operation not permitted" in capsys.readouterr().err
    assert run.rows[0]["runtime_ms"] == 3.0 and launches.count("kernel") > 2 * 20


def test_a_case_ends_after_its_seconds() -> None:
    run = Run("subject", repeats=50, seconds=0.0)
    run.case("case", {"a": Candidate(calling([], ""))})
    assert run.rows[0]["repeats"] == harness.FEWEST


def test_ceilings_are_verified_and_have_rates_that_a_machine_can_have() -> None:
    run = Run("subject", threads=1, repeats=1)
    run.case("case", {ceilings.GEMM: ceilings.gemm(Device(), 1, size=128)})
    [row] = run.rows
    assert 1 < row["rate"] < 1e5 and row["library"] in ("torch", "openvino")
    with pytest.raises(ArithmeticError, match="the product is off"):
        ceilings.verify(torch.zeros(1, 4), torch.ones(1, 4), torch.ones(4, 4), 1e-3)
    memory = ceilings.memory(Device())
    assert memory.prepare()() == memory.work * 1e9 / 4
