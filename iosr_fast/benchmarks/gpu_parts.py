"""The parts of make gpu-check: three calls of at most 8 minutes, each a list of processes with time limits.

parity   whether results are right: builds, parity, memory checks, the tests that need a GPU
tuning   launch configurations of the Triton kernels, at most six a case
tables   the times that are published: scoring, encoders, counters of two kernels
"""

from __future__ import annotations

import importlib
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from iosr_fast.benchmarks import score
from iosr_fast.exceptions import IosrFastError
from iosr_fast.utils.machine import usable_threads

ROOT = Path(__file__).resolve().parents[2]
CALLS = ("parity", "tuning", "tables")
BENCHMARK = ("tools/benchmark.py",)
CUDA_BIN = Path("/usr/local/cuda/bin")  # where NVIDIA's installer puts what may not be on PATH
# On an H100, what is worth most first: path, precision of the keys, few or many queries.
TUNED = (
    ("aligned-tma", "fp16", "many"),
    ("few", "int8", "few"),
    ("few", "fp16", "few"),
    ("affine", "fp32", "many"),
    ("ragged-tma", "fp16", "many"),
    ("ragged", "fp16", "many"),
    ("aligned-tma", "int8", "many"),
    ("ragged-tma", "int8", "many"),
    ("ragged", "int8", "many"),
    ("aligned-tma", "bf16", "many"),
    ("few", "fp32", "few"),
    ("dense", "fp16", "many"),
)
# Names of GH100 and GB100. A wgmma instruction keeps the tensor cores busy for many cycles: cycles count, not issues.
COUNTERS = (
    "gpu__time_duration.sum",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "lts__throughput.avg.pct_of_peak_sustained_elapsed",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
)
PROFILED = (("q4096-k160000-d768-c10000", "fp16"), ("q1-k1000000-d512-c1000", "int8"))


@dataclass(frozen=True)
class Part:
    """`command` follows the interpreter; a bench writes its result to --json, a test run prints it. `wrapper`: the
    program and options that run the interpreter; without that program the part is left out."""

    name: str
    limit_s: float
    command: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)
    writes_json: bool = True
    wrapper: tuple[str, ...] = ()


def parts(rehearsal: bool, call: str = "parity") -> list[Part]:
    """In order: what later parts need, what says whether results are right, what is worth most. Raises IosrFastError
    for another call than parity, tuning or tables."""
    if call not in CALLS:
        raise IosrFastError(f"expected a call out of {', '.join(CALLS)}, got {call!r}")
    device = ("--device", "rehearsal" if rehearsal else "cuda")
    first = [Part("machine", 40, (*BENCHMARK, "machine", *device)), *([] if call == "tuning" else [_build()])]
    return first + {"parity": _parity, "tuning": _tuning, "tables": _tables}[call](rehearsal, device)


def _build() -> Part:
    command = ("setup.py", "-q", "egg_info", "build_ext", "--inplace")
    return Part("build", 120, command, build_environment(), writes_json=False)


def _parity(_rehearsal: bool, device: tuple[str, ...]) -> list[Part]:
    check = (*BENCHMARK, "parity", *device)
    small = (*check, *(option for shape in score.SMALL_CASES for option in ("--shapes", shape)))
    return [
        Part("parity", 90, (*check, "--part", "scoring")),
        Part("tests", 150, ("-m", "pytest", *test_options(), *test_files()), writes_json=False),
        *(
            Part(f"sanitizer-{tool}", 80, small, _ALLOCATIONS, wrapper=(*program("compute-sanitizer"), *options))
            for tool, options in _SANITIZERS.items()
        ),
        Part("parity-encoder", 90, (*check, "--part", "encoder")),
    ]


def _tuning(rehearsal: bool, device: tuple[str, ...]) -> list[Part]:
    environment = {"TRITON_INTERPRET": "1"} if rehearsal else {}
    cases = TUNED[3:4] if rehearsal else TUNED
    tune = ("tools/tune_kernels.py", *device)
    compiled = (option for path, precision, load in cases for option in ("--case", f"{path}/{precision}/{load}"))
    return [
        Part("compile", 120, (*tune, "--compile", *compiled), environment, writes_json=False),
        *(
            Part(f"tune-{path}-{precision}-{load}", 60, (*tune, "--case", f"{path}/{precision}/{load}"), environment)
            for path, precision, load in cases
        ),
    ]


def _tables(rehearsal: bool, device: tuple[str, ...]) -> list[Part]:
    repeats = ("--repeats", "1" if rehearsal else "50")
    cases = ("q2-k64-d32-c4", "q1-k64-d32-c4") if rehearsal else score.GPU_CASES
    models = (("demo", "2"),) if rehearsal else (("ViT-B-16", "256"), ("ViT-B-16", "64"), ("ViT-B-32", "256"))
    encoders = [
        Part(
            f"{kind}-{model}-{batch}".lower(),
            limit_s,
            (*BENCHMARK, "encoder", "--model", model, "--batch", batch, *device, *repeats, *options),
        )
        for model, batch in models
        for kind, limit_s, options in (("encoder", 60, ()), ("compiled", 150, ("--compiled",)))
    ]
    counted = PROFILED if not rehearsal else (("q2-k64-d32-c4", "fp16"),)
    kernels = "|".join(kernel_names())
    ncu = (*program("ncu"), "--csv", "--target-processes", "all", "--clock-control", "none")
    ncu += ("--metrics", ",".join(COUNTERS), "--kernel-name", f"regex:^({kernels})$")
    scores = [Part(f"score-{case}", 100, (*BENCHMARK, "score", "--cases", case, *device, *repeats)) for case in cases]
    return [
        *scores[:4],
        *encoders[:1],
        *(
            Part(
                f"counters-{shape}-{precision}",
                60,
                (*BENCHMARK, "parity", *device, "--shapes", shape, "--precision", precision),
                wrapper=ncu,
            )
            for shape, precision in counted
        ),
        *encoders[1:2],
        *scores[4:],
        *encoders[2:],
    ]


# Its errors are those of memory: PyTorch asks CUDA for functions that may be missing, and copes.
_SANITIZERS = {
    tool: ("--tool", tool, *options, "--error-exitcode", "9", "--target-processes", "all")
    for tool, options in {"memcheck": ("--report-api-errors", "no"), "racecheck": ()}.items()
}
# PyTorch's blocks of cached memory would hide an access beyond a tensor.
_ALLOCATIONS = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}


def program(name: str) -> tuple[str, ...]:
    """The program where it is: on PATH, or in NVIDIA's folders; its name alone if it isn't."""
    folders = [CUDA_BIN, *sorted(Path("/opt/nvidia/nsight-compute").glob("*"), reverse=True)]
    places = (str(folder / name) for folder in folders if (folder / name).is_file())
    return (shutil.which(name) or next(places, name),)


def kernel_names() -> list[str]:
    """The Triton kernels that a launch runs, read from their source, so that Triton need not be there."""
    lines = (line for path in sorted((ROOT / "kernels").glob("*.py")) for line in path.read_text("utf-8").splitlines())
    return sorted({line.split("(")[0].removeprefix("def ") for line in lines if _is_kernel(line)})


def _is_kernel(line: str) -> bool:
    return line.startswith("def ") and line.split("(")[0].endswith("_kernel")


def build_environment() -> dict[str, str]:
    """The CUDA module for the GPU that is here, if there is nvcc."""
    (nvcc,) = program("nvcc")
    if not Path(nvcc).is_file():
        return {"IOSR_FAST_CUDA": "0"}
    arguments = f"{os.environ.get('CMAKE_ARGS', '')} -DCMAKE_CUDA_ARCHITECTURES=native"
    return {"IOSR_FAST_CUDA": "1", "CUDACXX": nvcc, "CMAKE_ARGS": arguments.strip()}


def built() -> bool:
    """Whether both extension modules are there and this machine can load them."""
    try:
        for name in ("_C", "_C_cuda"):
            importlib.import_module(f"iosr_fast.{name}")
    except ImportError:  # also for a C library that is older than the one they were built with
        return False
    return True


def test_options() -> list[str]:
    options = ["-v", "-rfEs", "-m", "gpu", "--continue-on-collection-errors", "-p", "no:cacheprovider"]
    options += ["-n", str(min(16, usable_threads()))] if find_spec("xdist") else []
    return options + (["--timeout", "100"] if find_spec("pytest_timeout") else [])


def test_files() -> Sequence[str]:
    """Only files with GPU tests are imported: the others need packages that no GPU test needs."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    marked = [path.relative_to(ROOT) for path in files if "pytest.mark.gpu" in path.read_text(encoding="utf-8")]
    return [str(path) for path in marked if "benchmarks" not in path.parts]
