"""gpu-check without a GPU: what runs its parts, and whatever may go wrong in one."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")

from tests.tools import gpu_report  # noqa: E402
from tests.tools.gpu_report import kept  # noqa: E402
from tools import gpu_check  # noqa: E402
from tools.gpu import build, ceiling, machine  # noqa: E402
from tools.gpu.parts import BUDGET_S, PARTS, Part, allowance  # noqa: E402
from tools.gpu.report import Report, Setting  # noqa: E402

report, setting = gpu_report.report, gpu_report.setting  # pytest finds fixtures by these names
FAKES = "tests.tools.gpu_check_parts"


# The whole of it, with parts that go wrong.


def part(name: str, limit_s: float = 20, needs: tuple[str, ...] = ()) -> Part:
    return Part(name, f"{FAKES}:{name}", limit_s, 0.5, needs)


def test_what_goes_wrong_in_one_part_loses_nothing_of_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = [part("machine"), part("crash"), part("hang", 2), part("wrong")]
    parts += [Part("lacking", f"{FAKES}:good", 20, 0, ("torch", "no_such_module", "nor_this")), part("good")]
    seen: list[list[str]] = []
    write = gpu_check.Results.write

    def watched(results: gpu_check.Results) -> None:
        write(results)
        found = json.loads((tmp_path / "trial-nvidia-fake-9000.json").read_text())
        seen.append([*found["parts"]] + ["complete"] * found["complete"])

    monkeypatch.setattr(gpu_check.Results, "write", watched)
    with pytest.raises(SystemExit, match="failed: crash, hang, wrong; the JSON file has") as ended:
        gpu_check.main(["--device", "cpu", "--out", str(tmp_path)], parts)
    assert ended.value.code != 0
    names = [one.name for one in parts]
    assert seen == [*(names[: i + 1] for i in range(len(names))), [*names, "complete"]], "whole after every part"
    found = json.loads((tmp_path / "trial-nvidia-fake-9000.json").read_text())
    assert found["device"] == "NVIDIA Fake 9000" and found["missing"] == ["tensorrt"] and found["trial"]
    assert [row["impl"] for row in found["rows"]] == ["before the crash", "before the hang", "right", "good"]
    made = found["parts"]
    assert {name: made[name]["status"] for name in names} == {
        "machine": "done",
        "crash": "failed",
        "hang": "stopped",
        "wrong": "failed",
        "lacking": "skipped",
        "good": "done",
    }
    assert made["crash"]["exit_code"] == -6 and "about to crash" in made["crash"]["last_lines"]
    assert made["good"]["facts"] == {"device": "cpu", "tiny": True}
    assert made["wrong"]["failed"] == ["a result is off by 0.5"]
    assert found["skipped"] == [
        "crash: the second row: the part ended before",
        "hang: what never comes: the part was stopped after 2 s",
        "wrong: something for want of a package",
        "lacking: no_such_module and nor_this are not installed",
    ]
    assert 2 <= made["hang"]["seconds"] < 12
    assert not alive(made["hang"]["facts"]["below"]), "what a killed part started is killed, too"
    assert "skipped, no_such_module and nor_this are not installed" in capsys.readouterr().out


def alive(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_what_no_longer_fits_into_the_budget_is_named(tmp_path: Path) -> None:
    parts = [part("machine"), part("hang", 60), Part("good", f"{FAKES}:good", 20, 30)]
    with pytest.raises(SystemExit, match="failed: hang"):
        gpu_check.main(["--device", "cpu", "--out", str(tmp_path), "--budget", "3"], parts)
    found = json.loads((tmp_path / "trial-nvidia-fake-9000.json").read_text())
    assert found["parts"]["hang"]["limit_s"] <= 3 and found["seconds"] < 13
    (skipped,) = [why for why in found["skipped"] if why.startswith("good")]
    assert skipped.endswith("s are left, and it needs 30")


def test_a_part_that_may_be_stopped_does_not_fail(tmp_path: Path) -> None:
    parts = [part("machine"), Part("slow", f"{FAKES}:slow_compiler", 1, 0.5, may_stop=True)]
    gpu_check.main(["--device", "cpu", "--out", str(tmp_path)], parts)
    found = json.loads((tmp_path / "trial-nvidia-fake-9000.json").read_text())
    assert found["parts"]["slow"]["status"] == "stopped" and not found["failed"] and found["complete"]
    assert found["skipped"] == ["slow: the last case: the part was stopped after 1 s"]


def test_what_there_is_no_time_for_is_named(report: Report, tmp_path: Path) -> None:
    setting = Setting("cpu", True, tmp_path, time.monotonic() + 10.5)
    report.plan("this", "that")
    assert report.reaches("this", setting, 5) and not report.reaches("that", setting, 50)
    assert report.planned == ["this"]
    assert report.skipped == ["that: 10 s are left of the part's time, and it takes about 50"]


def test_the_file_is_strict_json(report: Report) -> None:
    report.add_table("errors", [{"error": float("nan"), "largest": [float("inf"), 1.5], "name": "nan"}])
    found = json.loads(report._path.read_text(), parse_constant=pytest.fail)
    assert found["tables"]["errors"] == [{"error": "nan", "largest": ["inf", 1.5], "name": "nan"}]


def test_later_parts_keep_what_they_need_at_least(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = Part("a", "m:f", 100, 10), Part("b", "m:f", 50, 20)
    lacking = Part("c", "m:f", 50, 40, ("no_such_module",))
    assert allowance(first, [second, lacking], 200) == 100, "never more than its limit"
    assert allowance(first, [second, lacking], 60) == 40, "nothing is kept for what can't run"
    assert allowance(first, [second, lacking], 25) == 10, "its own least comes first"
    assert allowance(first, [second, lacking], 9) is None
    assert Part("d", "m:f", 1, 1, (), ("no_such_module", "torch")).unavailable_reason() is None
    assert (
        Part("d", "m:f", 1, 1, (), ("no_such", "nor_this")).unavailable_reason()
        == "no_such or nor_this is not installed"
    )


def test_all_parts_fit_into_eight_minutes_and_are_there() -> None:
    assert sum(one.least_s for one in PARTS) <= BUDGET_S and BUDGET_S + 2 * 5 < 8 * 60
    assert PARTS[0].name == "machine" and all(one.least_s <= one.limit_s for one in PARTS)
    for one in PARTS:
        module, function = one.target.split(":")
        assert callable(getattr(__import__(module, fromlist=[function]), function))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_refuses_and_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"sees no NVIDIA GPU here\n.*`make test` is for other machines"):
        gpu_check.main(["--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_parts_that_are_not_there_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu_check.main(["--only", "ceiling", "floor"])
    assert "expected parts out of machine, build, " in capsys.readouterr().err
    with pytest.raises(SystemExit, match="no_such_module is not installed"):
        gpu_check.main([], [part("machine", needs=("no_such_module",))])


def test_a_trial_of_the_program_itself(tmp_path: Path) -> None:
    gpu_check.main(["--device", "cpu", "--out", str(tmp_path), "--only", "ceiling"])
    (path,) = tmp_path.glob("trial-*.json")
    found = json.loads(path.read_text())
    assert found["complete"] and list(found["parts"]) == ["machine", "ceiling"] and not found["failed"]
    assert {row["impl"] for row in found["rows"]} == {"gemm-fp16", "gemm-bf16", "gemm-tf32", "gemm-fp32", "copy"}
    assert all(row["rate"] > 0 and row["device"] == found["device"] for row in found["rows"])


# What is the same for all of them.


def test_the_machine_in_pytorchs_and_the_drivers_words(
    report: Report, setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A PyTorch whose properties lack the clocks, as new ones do."""
    properties = SimpleNamespace(total_memory=8 * 2**30, multi_processor_count=132, uuid="1-2")
    fake = {"is_available": True, "get_device_name": "NVIDIA Fake 9000", "get_device_capability": (9, 0)}
    fake |= {"get_device_properties": properties, "device_count": 1}
    for name, value in fake.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    asked: list[list[str]] = []

    def output(command: list[str]) -> str:
        asked.append(command)
        if command[0] == "nvidia-smi" and len(asked) > 2:
            raise subprocess.CalledProcessError(2, command)
        return ", ".join("1" for _ in machine.ASKED) if command[0] == "nvidia-smi" else "Build\nCuda 13.0\n"

    monkeypatch.setattr(machine, "output", output)
    monkeypatch.setattr(machine, "nvcc", lambda: "/usr/local/cuda/bin/nvcc")
    on_gpu = Setting("cuda", False, setting.work, setting.deadline)
    machine.run(report, on_gpu)
    facts = kept(report)["facts"]
    assert facts["device"] == "NVIDIA Fake 9000" and facts["gpu"]["compute_capability"] == "9.0"
    assert facts["gpu"]["clock_rate"] is None and facts["driver"]["power.limit"] == "1"
    assert asked[0][-2:] == ["-i", "GPU-1-2"] and facts["nvcc"] == ["Build", "Cuda 13.0"]
    machine.run(report, on_gpu)
    assert "nvidia-smi does not tell" in report.skipped[0]


def test_the_build_takes_this_gpu_and_falls_back_to_the_cpu(
    report: Report, setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[tuple[tuple[str, ...], dict[str, str]]] = []

    def say(*arguments: str, **environment: str) -> bool:
        said.append((arguments, environment))
        return "CUDACXX" not in environment or works

    monkeypatch.setattr(build, "say", say)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(build, "nvcc", lambda: "/opt/nvcc")
    monkeypatch.setenv("CMAKE_ARGS", "-DMINE=1")
    on_gpu, works = Setting("cuda", False, setting.work, setting.deadline), True
    build.run(report, on_gpu)
    assert said[1][1]["CMAKE_ARGS"].split() == ["-DMINE=1", "-DCMAKE_CUDA_ARCHITECTURES=90"] and not report.failed
    assert [arguments[-1].count("_C_cuda") for arguments, _ in said[2:]] == [0, 2]
    said.clear()
    build.run(Report(setting.work / "trial.json"), setting)
    assert not said, "a trial leaves the source tree as it is"
    works = False
    build.run(report, on_gpu)
    assert said[2][1] == {"IOSR_FAST_CUDA": "0"} and len(said) == 4 and "with CUDA failed" in report.failed[0]
    monkeypatch.setattr(build, "nvcc", lambda: None)
    said.clear()
    build.run(report, on_gpu)
    assert said[1][1] == {"IOSR_FAST_CUDA": "0"} and "the CUDA module: nvcc is neither" in report.skipped[0]


def test_products_leave_the_precision_as_it_was(report: Report, setting: Setting) -> None:
    before = torch.get_float32_matmul_precision()
    assert ceiling.gemm_flops("tf32", "cpu", repeats=1) > 0
    assert torch.get_float32_matmul_precision() == before


def test_gpu_tests_are_counted_as_they_end(tmp_path: Path) -> None:
    from tools.gpu import tests
    from tools.gpu.parts import run_part

    (tmp_path / "test_given.py").write_text(
        "import pytest\n"
        "pytestmark = pytest.mark.gpu\n"
        "def test_good(): pass\n"
        "def test_bad(): assert 1 == 2, 'one is not two'\n"
        "def test_lacking(): pytest.importorskip('no_such_module')\n"
        "@pytest.fixture\n"
        "def broken(): raise RuntimeError('no fixture')\n"
        "def test_broken(broken): pass\n"
    )
    found = run_part(Part("tests", f"{FAKES}:run_given_tests", 60, 1), "cpu", True, tmp_path, 60)
    late = run_part(Part("tests", f"{FAKES}:run_given_tests", 60, 1), "cpu", True, tmp_path, tests.LAST_S)
    assert late["facts"]["passed"] == 1 and late["status"] == "done", (
        "stopped after the first test, before it is killed"
    )
    assert late["skipped"] == ["the rest of the tests: the part's time is over"]
    counts = {name: found["facts"][name] for name in ("passed", "failed", "skipped", "errors", "exit_code")}
    assert counts == {"passed": 1, "failed": 1, "skipped": 1, "errors": 1, "exit_code": 1}
    assert found["status"] == "failed" and len(found["failed"]) == 2 and "test_bad: " in found["failed"][0]
    assert "1 test: could not import 'no_such_module'" in found["skipped"][0]
    names = {Path(path).name for path in tests.files()}
    assert {"test_cuda.py", "test_triton.py", "test_cuda_graphs.py"} <= names and "test_http_predict.py" not in names
    assert os.environ.get("IOSR_FAST_CACHE") != str(tmp_path / "cache"), "the cache is the part's alone"
