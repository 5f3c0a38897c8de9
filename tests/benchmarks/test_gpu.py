"""make gpu-check and the benches on a GPU, without one: tiny shapes on the CPU, and stand-ins for CUDA."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import typer

torch = pytest.importorskip("torch")

from iosr_fast.benchmarks import encoder_gpu, gpu, gpu_bundle, gpu_parts, harness, parity, score  # noqa: E402
from iosr_fast.benchmarks.ceilings import Ceilings, exact_products  # noqa: E402
from iosr_fast.benchmarks.devices import Device  # noqa: E402
from iosr_fast.benchmarks.gpu_parts import Part  # noqa: E402
from iosr_fast.encoders.runtimes import cuda_graphs  # noqa: E402
from iosr_fast.scoring.reference import score_reference  # noqa: E402
from iosr_fast.scoring.scorer import Scorer  # noqa: E402

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


# The bundle.

THIS = f"{sys.version_info[0]}.{sys.version_info[1]}"


class Commands:
    """In place of subprocess.run: pip and the build leave files in the folders that their options name."""

    def __init__(self, module_bytes: int = 10) -> None:
        self.lines: list[list[str]] = []
        self.environments: list[dict[str, str]] = []
        self.module_bytes = module_bytes

    def __call__(self, command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        self.lines.append([str(word) for word in command])
        self.environments.append(options.get("env") or {})
        if "--target" in command:
            (Path(command[command.index("--target") + 1]) / "ftfy-6.3.1.dist-info").mkdir(parents=True)
        if "--build-lib" in command:
            folder = Path(command[command.index("--build-lib") + 1]) / "iosr_fast"
            folder.mkdir(parents=True)
            for name in ("_C", "_C_cuda"):
                (folder / f"{name}.cpython-312-x86_64-linux-gnu.so").write_bytes(bytes(self.module_bytes))
        return subprocess.CompletedProcess(command, 0, stdout="3.12\n")


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A source tree, and a machine with nvcc and without Python 3.12."""
    (tmp_path / "pyproject.toml").write_text('[project]\nversion = "1.2.3"\n')
    (tmp_path / "iosr_fast").mkdir()
    there = {"nvcc": "/usr/bin/nvcc"}
    monkeypatch.setattr(gpu_bundle.shutil, "which", there.get)
    monkeypatch.setattr(gpu_bundle, "commit", lambda: "abc")
    return tmp_path


def test_a_bundle_is_for_another_python_than_this_one(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = Commands()
    monkeypatch.setattr(gpu_bundle.subprocess, "run", commands)
    folder = gpu_bundle.make(tree, "3.12", "/opt/python3.12")
    _version, install, _venv, _needs, build = commands.lines
    assert {"--python-version", "3.12", "cp312", "manylinux_2_28_x86_64", *gpu_bundle.PACKAGES} <= set(install)
    assert "CMAKE_CUDA_ARCHITECTURES='80-real;90'" in commands.environments[-1]["CMAKE_ARGS"]
    assert build[1] == "setup.py" and commands.environments[-1]["IOSR_FAST_CUDA"] == "1"
    facts = json.loads((folder / "bundle.json").read_text())
    assert facts["python"] == "3.12" and facts["packages"] == ["ftfy-6.3.1", "iosr_fast-1.2.3"]
    assert [name.split(".")[0] for name in facts["modules"]] == ["_C", "_C_cuda"] and facts["left_out"] == []


def test_a_bundle_without_its_python_says_what_is_missing(
    tree: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_bundle.subprocess, "run", Commands())
    monkeypatch.setattr(gpu_bundle.Path, "home", lambda: tree)
    facts = json.loads((gpu_bundle.make(tree) / "bundle.json").read_text())
    assert facts["modules"] == [] and "left out: extension modules: no python3.12 is found" in capsys.readouterr().out
    with pytest.raises(
        ValueError, match=r"expected a Python 3.13 to build modules with, got /opt/python, which is 3.12"
    ):
        gpu_bundle.make(tree, "3.13", "/opt/python")
    monkeypatch.setattr(gpu_bundle.subprocess, "run", Commands(module_bytes=11_000_000))
    with pytest.raises(ValueError, match=r"at most 20 MB, got 22.0; the largest file is modules/_C"):
        gpu_bundle.make(tree, "3.12", "/opt/python3.12")


def test_a_shim_that_does_not_run_is_passed_over(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pyenv puts a python3.12 on PATH that fails unless that version is selected."""
    shim, real = tree / "shim", tree / ".pyenv" / "versions" / "3.12.1" / "bin" / "python3.12"
    real.parent.mkdir(parents=True)
    for path, line in ((shim, "exit 127"), (real, "echo 3.12")):
        path.write_text(f"#!/bin/sh\n{line}\n")
        path.chmod(0o755)
    monkeypatch.setattr(gpu_bundle.Path, "home", lambda: tree)
    monkeypatch.setattr(gpu_bundle.shutil, "which", lambda name: str(shim))
    assert gpu_bundle._find("3.12") == str(real) and gpu_bundle._find("3.13") is None


def test_a_bundle_is_used_by_its_own_python_alone(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_bundle.use(tree) == {"used": False} and gpu_bundle.import_path(tree) == []
    folder = tree / gpu_bundle.FOLDER
    (folder / "modules").mkdir(parents=True)
    module, there = folder / "modules" / "_C.so", tree / "iosr_fast" / "_C.so"
    module.write_text("new")
    for version, used in (("2.7", False), (THIS, True)):
        (folder / "bundle.json").write_text(json.dumps({"python": version}))
        assert gpu_bundle.use(tree) == {"python": version, "used": used} and there.exists() == used
        assert gpu_bundle.import_path(tree) == [str(folder / "site")] * used
    assert f"it is for Python 2.7, and this is {THIS}" in capsys.readouterr().out
    there.write_text("built here since")
    gpu_bundle.use(tree)
    assert there.read_text() == "built here since"


def test_the_build_takes_nvcc_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_parts.shutil, "which", lambda name: sys.executable)
    monkeypatch.setenv("CMAKE_ARGS", "-DMINE=1")
    environment = gpu_parts.build_environment()
    assert environment["CMAKE_ARGS"].split() == ["-DMINE=1", "-DCMAKE_CUDA_ARCHITECTURES=native"]
    assert environment["IOSR_FAST_CUDA"] == "1" and environment["CUDACXX"] == sys.executable
    monkeypatch.setattr(gpu_parts.shutil, "which", lambda name: "/nowhere/nvcc")
    assert gpu_parts.build_environment() == {"IOSR_FAST_CUDA": "0"}


def test_modules_that_can_not_be_loaded_are_built_again(monkeypatch: pytest.MonkeyPatch) -> None:
    modules = {"iosr_fast._C": None, "iosr_fast._C_cuda": None}

    def load(name: str) -> None:
        if modules[name] is not None:
            raise ImportError("version `GLIBC_2.41' not found")

    monkeypatch.setattr(gpu_parts.importlib, "import_module", load)
    build = gpu_parts.parts(False, "tables")[1]
    assert gpu._left_out(build, False) == "both extension modules for this Python are there"
    modules["iosr_fast._C_cuda"] = "too new"  # type: ignore[assignment]
    assert gpu._left_out(build, False) is None


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
