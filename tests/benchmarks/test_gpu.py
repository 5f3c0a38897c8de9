"""make gpu-check without a GPU: its parts as processes, and what a machine says."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import typer

torch = pytest.importorskip("torch")

from iosr_fast.benchmarks import gpu, gpu_parts, score  # noqa: E402
from iosr_fast.benchmarks.devices import Device  # noqa: E402
from iosr_fast.benchmarks.gpu_parts import Part  # noqa: E402

REHEARSAL = Device("rehearsal")


# Parts in processes of their own, some of which go wrong.


def part(name: str, code: str, limit_s: float = 30, **more: Any) -> Part:
    """A part that runs `code` with sys.argv[2] as its result file."""
    return Part(name, limit_s, ("-c", code), **more)


def writes(content: Any) -> str:
    return f"import sys; open(sys.argv[2], 'w').write({json.dumps(content)!r})"


MACHINE = part("machine", writes({"facts": {"device": "NVIDIA Fake 9000", "missing": ["tensorrt"], "commit": "abc"}}))
# A process below it would outlive it, and keeps its output open.
HANG = """
import json, subprocess, sys, time
below = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])
json.dump({"facts": {"below": below.pid}}, open(sys.argv[2], 'w'))
time.sleep(60)
"""


@pytest.mark.slow
def test_what_goes_wrong_in_one_part_costs_only_that_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"bench": "score", "case": "one", "impl": "triton", "runtime_ms": float("nan")}
    parts = [
        MACHINE,
        part("crash", "import os; print('about to crash', flush=True); os.abort()"),
        part("hang", HANG, 2.5),
        part("wrong", "print('left out: a rival'); print('WRONG: a result is off by 0.5'); " + writes([row])),
        part("good", writes({"facts": {}, "tables": {"errors": [{"error": float("inf")}]}})),
    ]
    snapshots: list[list[str]] = []
    write_whole = gpu.write_whole

    def watched(path: Path, value: Any) -> None:
        write_whole(path, value)
        content = json.loads(path.read_text(), parse_constant=pytest.fail)
        snapshots.append([*content["parts"]] + ["complete"] * content["complete"])

    monkeypatch.setattr(gpu, "write_whole", watched)
    with pytest.raises(RuntimeError, match=r"failed: crash, hang, wrong; .* has what was wrong"):
        gpu.run(tmp_path, chosen=parts)
    names = [one.name for one in parts]
    assert snapshots == [*(names[: i + 1] for i in range(len(names))), [*names, "complete"]], "whole after every part"
    content = json.loads((tmp_path / "gpu-check-parity-nvidia-fake-9000.json").read_text())
    assert content["kind"] == "gpu-check" and content["device"] == "NVIDIA Fake 9000" and not content["trial"]
    assert content["rows"] == [row | {"runtime_ms": "nan"}] and content["skipped"] == ["wrong: a rival"]
    results = content["parts"]
    statuses = {"machine": "done", "crash": "failed", "hang": "stopped", "wrong": "failed", "good": "done"}
    assert {name: result["status"] for name, result in results.items()} == statuses
    assert results["crash"]["exit_code"] == -6 and "about to crash" in results["crash"]["last_lines"]
    assert results["wrong"]["failed"] == ["a result is off by 0.5"]
    assert results["good"]["tables"] == {"errors": [{"error": "inf"}]}
    assert 2 <= results["hang"]["seconds"] < 12
    assert not alive(results["hang"]["facts"]["below"]), "the processes of a killed part are killed, too"
    assert "a result is off by 0.5" in capsys.readouterr().out


def alive(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_parts_without_time_and_parts_that_do_not_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "BUDGET_S", gpu.LEAST_S + 0.01)
    path = gpu.run(tmp_path, chosen=[MACHINE, part("late", "raise SystemExit(1)")], rehearsal=True, call="tuning")
    content = json.loads(path.read_text())
    assert path.name == "trial-tuning-nvidia-fake-9000.json" and content["complete"] and content["trial"]
    assert content["parts"]["late"]["status"] == "skipped" and "s of 5 are left" in content["skipped"][0]
    with pytest.raises(ValueError, match="expected parts out of machine, late, got floor"):
        gpu.run(tmp_path, only=("floor",), chosen=[MACHINE, part("late", "")])


def test_without_a_gpu_nothing_is_written(tmp_path: Path) -> None:
    message = "raise SystemExit('gpu-check needs an NVIDIA GPU')"
    with pytest.raises(RuntimeError, match="needs an NVIDIA GPU"):
        gpu.run(tmp_path / "out", chosen=[part("machine", message)])
    assert not (tmp_path / "out").exists()
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="sees none; `make test` is for other machines"):
            gpu.machine("cuda")


def test_the_parts_are_commands_that_exist_and_the_first_cases_come_first() -> None:
    from typer.main import get_command

    from iosr_fast.cli import benchmark

    commands = get_command(benchmark.benchmark).commands  # type: ignore[attr-defined]
    for rehearsal, call in itertools.product((False, True), gpu_parts.CALLS):
        parts = gpu_parts.parts(rehearsal, call)
        assert len({one.name for one in parts}) == len(parts) and parts[0].name == "machine"
        for one in parts:
            if one.command[0] == "tools/benchmark.py":
                _, name, *arguments = one.command
                assert commands[name].make_context(name, arguments).params["device"] in ("cuda", "rehearsal")
    names = {call: [one.name for one in gpu_parts.parts(False, call)] for call in gpu_parts.CALLS}
    scores = [f"score-{case}" for case in score.GPU_CASES]
    checks = ["sanitizer-memcheck", "sanitizer-racecheck", "parity-encoder"]
    assert names["parity"] == ["machine", "build", "parity", "tests", *checks]
    assert names["tables"][:7] == ["machine", "build", *scores[:4], "encoder-vit-b-16-256"]
    assert names["tuning"][1:3] == ["compile", "tune-aligned-tma-fp16-many"]
    assert scores[0] == "score-q256-k16000-d512-c1000" and scores[1] == "score-q4096-k160000-d768-c10000"
    with pytest.raises(ValueError, match="expected a call out of parity, tuning, tables, got 'all'"):
        gpu_parts.parts(False, "all")


def test_the_counted_kernels_are_those_that_triton_launches() -> None:
    pytest.importorskip("triton", reason="triton comes with the gpu extra, or by its own wheel")
    from iosr_fast.kernels import cache_kernels

    defined = {name for name in dir(cache_kernels) if name.endswith("_kernel")}
    assert defined and defined <= set(gpu_parts.kernel_names())
    (counters, _) = (one for one in gpu_parts.parts(False, "tables") if one.name.startswith("counters-"))
    assert f"regex:^({'|'.join(gpu_parts.kernel_names())})$" in counters.wrapper


def test_what_is_tuned_exists_and_has_at_most_six_candidates() -> None:
    pytest.importorskip("triton", reason="triton comes with the gpu extra, or by its own wheel")
    from iosr_fast.kernels import aot, launch
    from tools import rank_kernels, tune_kernels

    for path, precision, load in gpu_parts.TUNED:
        assert load in launch.loads(path) and rank_kernels.kernel_of(path, load) in aot.kernel_names()
        first, *others = tune_kernels.ranked(path, precision, load, "default")
        assert first == launch.config_for("default", path, precision, load) and len(others) <= rank_kernels.MOST
    ranks = json.loads(rank_kernels.CANDIDATES_FILE.read_text(encoding="utf-8"))
    cases = {(path, precision, load) for path in ranks for precision in ranks[path] for load in ranks[path][precision]}
    assert cases == set(gpu_parts.TUNED)


def test_candidates_are_ranked_by_their_machine_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that spill, don't compile or don't fit are left out; of the others, fewer instructions come first."""
    pytest.importorskip("triton", reason="triton comes with the gpu extra, or by its own wheel")
    from iosr_fast.kernels import aot
    from tools import rank_kernels

    def compiled(arch: int, kernel: str, precision: str, config: Any) -> dict[str, Any]:
        assert (arch, kernel, precision) == (90, "aligned/tma", "fp16")
        if config.block_b == 64:
            raise RuntimeError("ptxas: too many registers")
        tile = [config.block_b, config.block_n, 512, config.num_warps]
        instructions = {"all": 9000 if config.block_d == 64 else 20000}
        spills = 8 if config.num_warps == 4 else 0
        return {
            "tile": tile,
            "instructions": instructions,
            "spills": spills,
            "shared_bytes": config.num_stages * 60_000,
        }

    monkeypatch.setattr(aot, "compile_config", compiled)
    best = rank_kernels.rank("aligned-tma", "fp16", "many")
    assert len(best) == rank_kernels.MOST and len(set(best)) == len(best)
    assert {config.block_b for config in best} == {128} and {config.num_warps for config in best} == {8}
    assert {config.num_stages for config in best} == {3}, "four stages of 60 kB don't fit"
    assert best[0].block_d == 64 and best[0].block_n == 256
    row = {"tile": [128, 256, 512, 8], "instructions": {"all": 9000}}
    assert rank_kernels.cycles(row, "fp16", "many") < rank_kernels.cycles(
        {**row, "tile": [64, 256, 512, 8]}, "fp16", "many"
    )


def test_a_configuration_that_fails_costs_itself_alone_and_the_best_is_kept_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A stand-in for a GPU, where the first configuration doesn't compile and the second is slower than the third."""
    pytest.importorskip("triton", reason="triton comes with the gpu extra, or by its own wheel")
    from iosr_fast.kernels import launch
    from tools import tune_kernels

    configs = [launch.Config(16, 16, 32, warps, 1) for warps in (1, 2, 4)]
    milliseconds = iter([2.0, 1.0])
    device: Any = SimpleNamespace(
        name="cuda",
        description="GPU X",
        record=lambda call: (call, "graph"),
        measure=lambda calls, repeats: {"": [next(milliseconds)] * repeats},
    )

    def run(config: launch.Config) -> torch.Tensor:
        if config == configs[0]:
            raise TypeError("PassManager::run failed\nat length")
        return torch.ones(2)

    monkeypatch.setattr(launch, "CONFIGS_FILE", tmp_path / "launch_configs.json")
    monkeypatch.setattr(launch, "read_configs", lambda: {"default": {}})
    monkeypatch.setattr(tune_kernels, "ranked", lambda *_: configs)
    monkeypatch.setattr(tune_kernels, "case", lambda *_: (run, lambda: np.ones(2)))
    monkeypatch.setattr(launch, "write_configs", lambda configs: launch.CONFIGS_FILE.write_text(json.dumps(configs)))
    scale, kept = tune_kernels.Scale(device, 16, 3, {"many": (2,)}, {"ragged": [[1]]}), []
    for line in tune_kernels.tune("ragged", "fp16", "many", scale):
        kept.append((line.get("excluded"), launch.CONFIGS_FILE.is_file() and launch.CONFIGS_FILE.read_text()))
    assert kept[0] == ("wrong: TypeError: PassManager::run failed", False)
    for (excluded, text), config in zip(kept[1:], configs[1:], strict=True):
        entry = json.loads(text)["GPU X"]["ragged"]["fp16"]["many"]
        assert excluded is None and entry["num_warps"] == config.num_warps
    out = capsys.readouterr().out
    assert out.startswith("WRONG: Config(") and "GPU X ragged fp16 many: 1.0000 ms" in out
    assert tune_kernels.parse("ragged/int8/many") == ("ragged", "int8", "many")
    for wrong in ("ragged/int8/few", "ragged-int8", "affine/fp16/many"):
        with pytest.raises(typer.BadParameter, match="expected a case like aligned-tma/fp16/many"):
            tune_kernels.parse(wrong)


def test_a_tool_that_may_not_count_is_left_out_in_words(tmp_path: Path) -> None:
    ncu = tmp_path / "ncu"
    ncu.write_text("#!/bin/sh\necho '==ERROR== ERR_NVGPUCTRPERM - The user does not have permission'\nexec \"$@\"\n")
    ncu.chmod(0o755)
    denied = part("counters-one", writes({"facts": {}}), wrapper=(str(ncu),))
    result = gpu.run_part(denied, tmp_path, 30, rehearsal=False)
    assert result["status"] == "skipped" and result["failed"] == []
    assert "ncu may not read the GPU's counters (ERR_NVGPUCTRPERM): run as root" in result["skipped"][0]
    ncu.write_text('#!/bin/sh\nexec "$@"\n')
    result = gpu.run_part(denied, tmp_path, 30, rehearsal=False)
    assert result["status"] == "failed" and result["failed"] == ["ncu counted no kernel"]


def test_a_wrapped_part_runs_in_its_program_or_is_left_out(tmp_path: Path) -> None:
    """A stand-in for ncu, which prints a table and then runs what follows its options."""
    ncu = tmp_path / "ncu"
    table = (
        '"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"\\n"0","aligned_kernel","time","ns","5,120"\\n'
    )
    ncu.write_text(f"#!/bin/sh\nshift\nprintf '==PROF== Connected\\n{table}'\nexec \"$@\"\n")
    ncu.chmod(0o755)
    wrapped = part("counters-one", writes({"facts": {}}), wrapper=(str(ncu), "--csv"))
    result = gpu.run_part(wrapped, tmp_path, 30)
    line = {"Kernel Name": "aligned_kernel", "Metric Name": "time", "Metric Unit": "ns", "Metric Value": "5,120"}
    assert result["status"] == "done" and result["tables"] == {"counters": [line]}
    missing = part("counters-two", "raise SystemExit(1)", wrapper=("ncu-is-not-here",))
    path = gpu.run(tmp_path / "out", chosen=[MACHINE, missing], rehearsal=True)
    content = json.loads(path.read_text())
    assert content["parts"]["counters-two"]["status"] == "skipped" and content["failed"] == []
    assert content["skipped"][0].startswith("counters-two: ncu-is-not-here is not found on PATH")


def test_gpu_tests_are_counted_from_lines_that_a_killed_run_has() -> None:
    lines = [
        "tests/a.py::test_one PASSED                 [ 10%]",
        "[gw3] [ 20%] PASSED tests/a.py::test_two[FAILED] ",
        "[gw0] FAILED tests/b.py::test_three ",
        "tests/b.py::test_four SKIPPED (no GPU)      [ 30%]",
        "FAILED tests/b.py::test_three - assert 1 == 2",
        "SKIPPED [1] tests/b.py:7: no GPU",
        "test_what is PASSED in a log",
    ]
    assert gpu.count_tests(lines) == {"passed": 2, "failed": 1, "skipped": 1}
    log = gpu.read_log(lines)
    assert log == {
        "failed": ["FAILED tests/b.py::test_three - assert 1 == 2"],
        "skipped": ["SKIPPED [1] tests/b.py:7: no GPU"],
    }
    files = {Path(path).name for path in gpu_parts.test_files()}
    assert {"test_triton.py", "test_cuda_graphs.py"} <= files and Path(__file__).name not in files


def test_a_run_of_skips_is_no_success(tmp_path: Path) -> None:
    tests = part("tests", "print('tests/a.py::test_one SKIPPED (no GPU)')", writes_json=False)
    assert gpu.run_part(tests, tmp_path, 30, rehearsal=True)["status"] == "done"
    result = gpu.run_part(tests, tmp_path, 30, rehearsal=False)
    assert result["status"] == "failed" and result["failed"] == ["no GPU test passed; a run of skips proves nothing"]


def test_the_machine_in_pytorchs_and_the_drivers_words(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A PyTorch whose properties lack some fields, as new ones do."""
    properties = SimpleNamespace(total_memory=8 * 2**30, multi_processor_count=132)
    monkeypatch.setattr(gpu, "commit", lambda: "abc")
    for name, value in {
        "is_available": True,
        "get_device_name": "NVIDIA Fake",
        "get_device_properties": properties,
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    answer = subprocess.CompletedProcess([], 0, stdout=", ".join("1" for _ in gpu.DRIVER) + "\n")
    monkeypatch.setattr(gpu.subprocess, "run", lambda *_, **__: answer)
    facts = gpu.machine("cuda")["facts"]
    assert facts["device"] == "NVIDIA Fake" and facts["gpu"]["L2_cache_size"] is None
    assert facts["driver"]["power.limit"] == "1" and facts["commit"] == "abc"
    answer.stdout = "no devices"
    assert "driver" not in gpu.machine("cuda")["facts"] and "nvidia-smi gave none" in capsys.readouterr().out


@pytest.mark.parametrize("tool", ["tune_kernels", "rank_kernels"])
def test_tools_for_kernels_start_where_nothing_is_installed(tool: str) -> None:
    code = "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in repr(f)]; "
    code += f"from tools import {tool}; print({tool}.Config.__module__)"
    environment = {**os.environ, "PYTHONPATH": str(gpu.ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=gpu.ROOT, capture_output=True, text=True)
    assert done.stdout == "iosr_fast.kernels.launch\n", done.stderr


def test_the_package_is_found_in_a_source_tree_alone(tmp_path: Path) -> None:
    """As on a bare machine: PYTHONPATH names a tree, and kernels/ lies beside the package."""
    for name in ("iosr_fast", "kernels"):
        (tmp_path / name).mkdir()
    (tmp_path / "iosr_fast" / "__init__.py").write_text("")
    (tmp_path / "kernels" / "__init__.py").write_text("from iosr_fast.kernels import part\n")
    (tmp_path / "kernels" / "part.py").write_text("there = True\n")
    (tmp_path / "tools").mkdir()
    source = Path(gpu.ROOT / "tools" / "source_tree.py").read_text()
    (tmp_path / "tools" / "source_tree.py").write_text(source)
    code = (
        "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in repr(f)]; "
        "from tools.source_tree import use_source_tree; use_source_tree(); use_source_tree(); "
        "import iosr_fast; from iosr_fast.kernels import part; print(part.there, iosr_fast.kernels.part is part)"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "True True\n", done.stderr
