"""The benchmark verifies before it times, and its rows carry what they need. Timings are never asserted."""

from __future__ import annotations

import csv
import json
import math
import subprocess
import sys
import time
from importlib import import_module
from inspect import signature
from pathlib import Path

import numpy as np
import pytest

from iosr_fast import _C, __version__
from iosr_fast.benchmarks import ceilings, harness
from iosr_fast.cli import benchmark
from iosr_fast.utils import provenance
from iosr_fast.utils.machine import usable_threads
from tests import ROOT


class Clock:
    """Time that passes only where a call says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_candidates_are_timed_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(harness, "time", clock)
    calls: list[str] = []

    def call(name: str, seconds: float) -> None:
        calls.append(name)
        clock.sleep(seconds)

    # One call to warm up and one to estimate its length; a short one is then timed as the mean of a burst.
    runs = {"a": lambda: call("a", harness.BURST_S), "b": lambda: call("b", harness.BURST_S / 2.5)}
    times = harness.measure(runs, repeats=3)
    assert "".join(calls) == "aabb" + "abbb" * 3
    assert times["a"] == pytest.approx([1e3 * harness.BURST_S] * 3)
    assert times["b"] == pytest.approx([1e3 * harness.BURST_S / 2.5] * 3)
    with pytest.raises(ValueError, match="repeats >= 1, got 0"):
        harness.measure(runs, repeats=0)


def test_rows_hold_medians_ratios_and_the_share_of_the_ceiling(tmp_path: Path) -> None:
    times = {"ours": [3.0, 1.0, 2.0], "rival": [8.0, 8.0, 8.0]}
    made = harness.rows("score", "q1", times, rivals=["rival"], threads=1, work=2e-3, ceiling=2.0)
    ours, rival = made
    assert (ours["runtime_ms"], ours["runtime_ms_spread"]) == (2.0, [1.2, 2.8])
    assert (ours["ratios"], rival["ratios"]) == ({"rival": 4.0}, {})
    assert (ours["share_of_ceiling"], rival["share_of_ceiling"]) == (0.5, 0.125)
    assert ours["versions"]["numpy"] == np.__version__
    fields = {"bench", "case", "impl", "runtime_ms", "runtime_ms_spread", "repeats", "ratios", "share_of_ceiling"}
    fields |= {"rate", "rate_unit", "ceiling", "device", "precision", "threads", "versions", "commit"}
    assert set(ours) == fields and ours["repeats"] == 3
    assert (ours["rate"], rival["rate"], ours["rate_unit"], ours["ceiling"]) == (1.0, 0.25, "GFLOP/s", 2.0)
    provenance.write_rows(tmp_path / "rows.json", made)
    assert json.loads((tmp_path / "rows.json").read_text()) == made
    bare = harness.rows("score", "q1", times, rivals=["never timed"], threads=1)[0]
    assert bare["ratios"] == {} and {bare[name] for name in ("rate", "rate_unit", "ceiling", "share_of_ceiling")} == {
        None
    }


def test_rates_of_other_work_and_fields_of_one_implementation(tmp_path: Path) -> None:
    made = harness.rows(
        "pipeline",
        "p",
        {"ours": [500.0], "alone": [400.0]},
        rivals=["alone"],
        threads=1,
        work={"ours": 50.0},
        rate_unit="images/s",
        ceiling={"ours": 125.0},
        extra={"ours": {"images": 50, "checks": {"pixels": 0.5}}},
    )
    ours, alone = made
    assert (ours["rate"], ours["rate_unit"], ours["ceiling"], ours["share_of_ceiling"]) == (100, "images/s", 125, 0.8)
    assert ours["images"] == 50 and "images" not in alone and alone["rate"] is None
    harness.write_csv(tmp_path / "rows.csv", made)
    with (tmp_path / "rows.csv").open(newline="") as file:
        first, second = csv.DictReader(file)
    assert (first["impl"], first["rate"], first["images"], second["images"]) == ("ours", "100.0", "50", "")
    assert (first["ratios.alone"], first["checks.pixels"], first["runtime_ms_spread.1"]) == ("0.8", "0.5", "500.0")
    assert first["versions.numpy"] == np.__version__


def test_ceilings_are_rates_that_a_machine_can_have() -> None:
    pytest.importorskip("torch")
    assert 1e8 < ceilings.memory_bandwidth(1, megabytes=16, repeats=1) < 1e13
    assert 1e8 < ceilings.gemm_ceiling_flops(1, size=256, repeats=1) < 1e15


def test_the_gemm_is_each_librarys_own_and_the_product(rng: np.random.Generator) -> None:
    torch = pytest.importorskip("torch")
    ort = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    left, weight = rng.standard_normal((2, 33, 33), dtype=np.float32)
    calls = {name: make(left, weight, usable_threads()) for name, make in ceilings._GEMMS.items()}
    made = {name: call() for name, call in calls.items() if call is not None}
    assert set(made) >= {"torch", "numpy", "onnxruntime"}
    assert ceilings._numpy_gemm(left, weight, 0) is None, "NumPy's threads can't be bounded"
    session = ort.InferenceSession(ceilings._product(weight), providers=["CPUExecutionProvider"])
    products = [torch.Tensor.numpy(made["torch"]), made["numpy"], *session.run(None, {"x": left})]
    products += [made["openvino"][0]] if "openvino" in made else []
    for product in products:
        np.testing.assert_allclose(product, left.astype(np.float64) @ weight, atol=1e-4)


@pytest.mark.slow
def test_a_gemm_takes_its_turn_in_every_round(monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[str] = []
    gemm = ceilings.Gemm("stub", 3e6, lambda: turns.append("gemm") or time.sleep(0.001))
    monkeypatch.setattr(ceilings, "best_gemm", lambda threads: gemm)
    monkeypatch.setattr(ceilings, "GEMMS_A_TURN", 2)
    monkeypatch.setattr(harness, "BURST_S", 0)
    found, flops, library = ceilings.measure_beside_gemm({"ours": lambda: turns.append("ours")}, 3, threads=1)
    assert list(found) == ["ours"] and len(found["ours"]) == 3 and library == "stub"
    assert turns[-9:] == ["ours", "gemm", "gemm"] * 3
    assert 0 < flops < 3e9


def test_the_table_names_each_case_once(capsys: pytest.CaptureFixture[str]) -> None:
    made = harness.rows("score", "q1-k2", {"ours": [1.0], "rival": [2.0]}, rivals=["rival"], threads=1)
    harness.print_rows(made)
    out = capsys.readouterr().out
    assert out.count("q1-k2") == 1 and "2.00" in out
    harness.print_rows([])
    assert capsys.readouterr().out == ""


def test_the_commit_says_when_the_tree_is_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> str:
        identity = ("-c", "user.name=Test", "-c", "user.email=test@example.org", "-c", "core.hooksPath=/dev/null")
        return subprocess.run(
            ["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout

    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert provenance.commit() == f"version {__version__}"
    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "first")
    head = git("rev-parse", "HEAD").strip()
    assert provenance.commit() == head[:12]
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "rows.json").write_text("")
    assert provenance.commit() == head[:12], "rows are what a run writes"
    (tmp_path / "new").write_text("")
    assert provenance.commit() == f"{head[:12]}+dirty"
    monkeypatch.setattr(provenance, "ROOT", tmp_path / "benchmarks")
    assert provenance.commit() == f"version {__version__}", "the repository is not the package's own"


def test_cases_are_read_or_refused() -> None:
    from iosr_fast.benchmarks.score import Case

    assert Case.parse("q256-k16000-d512-c1000") == Case(256, 16000, 512, 1000)
    for bad in ("q256", "q256-k16000-d512-c1000x", "q0-k1-d1-c1"):
        with pytest.raises(ValueError, match="expected"):
            Case.parse(bad)


@pytest.mark.slow
def test_the_score_benchmark_runs_from_the_command_line(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    # More classes than keys: some are empty.
    arguments = [
        "score",
        "--cases",
        "q5-k40-d32-c60",
        "--repeats",
        "1",
        "--threads",
        "1",
        "--json",
        tmp_path / "rows.json",
    ]
    command = [sys.executable, ROOT / "tools" / "benchmark.py", *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    made = json.loads((tmp_path / "rows.json").read_text())
    simd = next(name for name, supported in _C.simd_paths() if supported)
    narrow = {f"cpp/{simd}:{precision}" for precision in ("fp16", "bf16", "int8")}
    assert {row["impl"] for row in made} == {
        "numpy",
        "score()",
        f"cpp/{simd}",
        "torch/cpu",
        "papers-formula",
        "eager-best",
        "torch-fp32",
        *narrow,
    }
    for row in made:
        assert row["bench"] == "score" and row["case"] == "q5-k40-d32-c60" and row["threads"] == 1
        assert row["precision"] == row["impl"].partition(":")[2] or row["precision"] == "fp32"
        assert row["extra_memory_mb"] is None or 0 <= row["extra_memory_mb"] < 64
        assert row["runtime_ms"] > 0 and row["share_of_ceiling"] > 0 and math.isfinite(row["share_of_ceiling"])


def test_a_wrong_candidate_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    from iosr_fast.benchmarks import score

    true_rivals = score.torch_rivals

    def half_precision(*arguments: object) -> dict:
        right = true_rivals(*arguments)["papers-formula"]
        return {"papers-formula": lambda: right().half(), "eager-best": right}

    monkeypatch.setattr(score, "torch_rivals", half_precision)
    monkeypatch.setattr(ceilings, "gemm_ceiling_flops", lambda threads: 1e9)
    monkeypatch.setattr(harness, "measure", lambda *_: pytest.fail("timed a wrong candidate"))
    with pytest.raises(ArithmeticError, match="papers-formula is wrong by"):
        score.run(["q3-k40-d32-c4"], threads=1, repeats=1)


def test_a_few_classes_stand_for_all_in_the_verification() -> None:
    from iosr_fast.benchmarks.score import Case, only_classes
    from iosr_fast.scoring.reference import score_reference

    plan, embeddings = Case(3, 40, 16, 9).build()
    chosen = np.array([0, 4, 8])
    few = score_reference(only_classes(plan.with_key_precision("int8"), chosen), embeddings)
    whole = score_reference(plan.with_key_precision("int8"), embeddings)
    np.testing.assert_allclose(few, whole[:, chosen], rtol=1e-12)


def test_the_papers_formula_is_left_out_where_its_matrices_would_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    from iosr_fast.benchmarks import score, score_rivals

    plan, embeddings = score.Case(2, 30, 8, 3).build()
    assert set(score_rivals.torch_rivals(plan, embeddings)) == {"papers-formula", "eager-best", "torch-fp32"}
    monkeypatch.setattr(score_rivals, "PAPERS_LIMIT_BYTES", 4 * 30 * (3 + 2) - 1)
    assert set(score_rivals.torch_rivals(plan, embeddings)) == {"eager-best", "torch-fp32"}


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from /proc")
def test_extra_memory_is_the_peak_of_a_call() -> None:
    def call() -> None:
        np.ones(8_000_000)

    extra = harness.extra_memory_mb(call)
    assert extra is not None and 60 < extra < 90


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from /proc")
@pytest.mark.parametrize("shape", [(4096, 4096), (20000, 64), (3, 8192)])
def test_scoring_takes_little_memory_beside_inputs_and_logits(shape: tuple[int, int], rng: np.random.Generator) -> None:
    from iosr_fast.encoders.encoder import Embeddings
    from iosr_fast.scoring.plan import ScoringPlan
    from iosr_fast.scoring.score import score
    from tests.conftest import unit_rows

    batch, width = shape
    keys = unit_rows(rng, 40, width)
    transform = np.eye(width)
    plan = ScoringPlan(2, text=keys[:2], keys=keys, class_offsets=[0, 11, 40], query_transform=transform)
    embeddings = Embeddings(np.resize(keys, (batch, width)))
    extra = harness.extra_memory_mb(lambda: score(plan, embeddings, "cpp"))
    assert extra is not None and extra - 8 * batch / 1e6 < 64


def test_all_goes_on_after_a_bench_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    ran: list[list[str]] = []

    def run(command: list[str], check: bool) -> subprocess.CompletedProcess[str]:
        assert command[0] == sys.executable and not check
        ran.append(command[4:])
        return subprocess.CompletedProcess(command, int(command[4] == "score"))

    monkeypatch.setattr(benchmark.subprocess, "run", run)
    out = tmp_path / "new" / "rows"
    done = CliRunner().invoke(benchmark.benchmark, ["all", "--out", str(out)])
    assert done.exit_code == 1 and done.stderr.splitlines()[-1] == "failed: score"
    assert [command[0] for command in ran] == list(benchmark.BENCHES)
    commands = {command.name or command.callback.__name__ for command in benchmark.benchmark.registered_commands}
    assert commands - {"all", "gpu", "gpu_bundle", "machine", "parity"} == set(benchmark.BENCHES)
    assert ran[0][1:] == ["--json", str(out / "cpu-encoder.json"), "--csv", str(out / "cpu-encoder.csv")]
    ran.clear()
    done = CliRunner().invoke(benchmark.benchmark, ["all", "--out", str(out), "--only", "cold-start"])
    assert done.exit_code == 0 and [command[0] for command in ran] == ["cold-start"]
    done = CliRunner().invoke(benchmark.benchmark, ["all", "--out", str(out), "--only", "gpu"])
    assert done.exit_code == 2 and len(ran) == 1


def test_a_smoke_run_gives_options_that_each_bench_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.main import get_command
    from typer.testing import CliRunner

    ran: list[list[str]] = []

    def run(command: list[str], check: bool) -> subprocess.CompletedProcess[str]:
        ran.append(command[4:])
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(benchmark.subprocess, "run", run)
    done = CliRunner().invoke(benchmark.benchmark, ["all", "--out", str(tmp_path), "--quick"])
    assert done.exit_code == 0 and len(ran) == len(benchmark.BENCHES)
    commands = get_command(benchmark.benchmark).commands  # type: ignore[attr-defined]
    for name, *arguments in ran:
        given = commands[name].make_context(name, list(arguments)).params
        assert given["repeats"] == 1 and given["json_path"] == tmp_path / f"cpu-{name}.json"


@pytest.mark.parametrize("name", benchmark.BENCHES)
def test_options_are_parameters_of_the_bench(name: str) -> None:
    for package in ("torch", "onnxruntime", "onnxscript", "open_clip"):
        pytest.importorskip(package)
    modules = [name.replace("-", "_"), *(["encoder_gpu"] if name == "encoder" else [])]
    taken = {
        parameter
        for module in modules
        for parameter in signature(import_module(f"iosr_fast.benchmarks.{module}").run).parameters
    }
    assert {option if option != "models" else "model" for option in benchmark.BENCHES[name].options} <= taken
