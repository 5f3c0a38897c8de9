"""Compile the CUDA kernels for every architecture, without a GPU, and say what each costs.

    python tools/cuda_aot.py                         a table
    python tools/cuda_aot.py --json build/cuda.json  the same as JSON, one object a kernel and architecture

Needs nvcc on PATH, and cuobjdump beside it, on PATH or in the triton wheel.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from importlib.util import find_spec
from pathlib import Path

SOURCE = Path(__file__).resolve().parent.parent / "csrc" / "cuda" / "score.cu"
ARCHITECTURES = (80, 86, 89, 90, 100, 120)
_JOBS = 2  # nvcc takes about 1 GB each
_TENSOR_CORE = re.compile(r"\b(?:HMMA|IMMA)\b")


@dataclass(frozen=True)
class KernelCost:
    """What ptxas and cuobjdump say of one kernel. spills are bytes stored and loaded; shared memory is all static."""

    kernel: str
    arch: int
    registers: int
    spills: int
    shared_bytes: int
    stack_bytes: int
    tensor_core_instructions: int


def missing() -> str | None:
    """Which tool is not here, or None."""
    if shutil.which("nvcc") is None:
        return "nvcc is not on PATH; the CUDA toolkit brings it"
    if find_cuobjdump() is None:
        return "cuobjdump is neither beside nvcc nor on PATH, and the triton wheel, which has one, is not installed"
    return None


def find_cuobjdump() -> Path | None:
    """cuobjdump of the toolkit, of PATH, or of the triton wheel."""
    candidates = [Path(shutil.which(name) or "").resolve().parent / "cuobjdump" for name in ("nvcc", "cuobjdump")]
    triton = find_spec("triton")
    if triton is not None and triton.origin is not None:
        candidates.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
    return next((path for path in candidates if path.is_file()), None)


def compile_all(architectures: tuple[int, ...] = ARCHITECTURES) -> list[KernelCost]:
    """The costs of every kernel of csrc/cuda/score.cu. Raises RuntimeError with the compiler's words where it fails."""
    refused = missing()
    if refused is not None:
        raise RuntimeError(refused)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(_JOBS) as pool:
        per_arch = pool.map(lambda arch: compile_one(arch, Path(folder) / f"sm_{arch}.cubin"), architectures)
        return [cost for costs in per_arch for cost in costs]


def compile_one(arch: int, cubin: Path) -> list[KernelCost]:
    """The costs of every kernel on one architecture."""
    command = [
        "nvcc",
        "-std=c++17",
        "-O3",
        f"-arch=sm_{arch}",
        "-cubin",
        "-Xptxas",
        "-v",
        "-o",
        str(cubin),
        str(SOURCE),
    ]
    report = _said(command)
    counts = count_tensor_core_instructions(_said([str(find_cuobjdump()), "-sass", str(cubin)]))
    return [
        KernelCost(
            kernel=name,
            arch=arch,
            registers=_number(r"Used (\d+) registers", text),
            spills=_number(r"(\d+) bytes spill stores", text) + _number(r"(\d+) bytes spill loads", text),
            shared_bytes=_number(r"(\d+) bytes smem", text),
            stack_bytes=_number(r"(\d+) bytes stack frame", text),
            tensor_core_instructions=counts[name],
        )
        for name, text in sorted(split_report(report).items())
    ]


def split_report(report: str) -> dict[str, str]:
    """ptxas's words on each kernel."""
    pieces = re.split(r"Compiling entry function '(\w+)' for '\w+'", report)
    return dict(zip(pieces[1::2], pieces[2::2], strict=True))


def count_tensor_core_instructions(sass: str) -> dict[str, int]:
    """HMMA and IMMA instructions in the code of each kernel."""
    pieces = re.split(r"Function : (\w+)", sass)
    return {name: len(_TENSOR_CORE.findall(text)) for name, text in zip(pieces[1::2], pieces[2::2], strict=True)}


def format_table(costs: list[KernelCost]) -> str:
    """Rows to read, a column a field."""
    rows = [[field.name for field in fields(KernelCost)], *([str(x) for x in asdict(cost).values()] for cost in costs)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def _said(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{Path(command[0]).name} failed:\n{done.stderr[-3000:]}")
    return done.stdout + done.stderr


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    return int(found[1]) if found else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", default=list(ARCHITECTURES))
    parser.add_argument("--json", type=Path, help="write the rows there, too")
    given = parser.parse_args()
    refused = missing()
    if refused is not None:
        raise SystemExit(refused)
    costs = compile_all(tuple(given.arch))
    print(format_table(costs))
    if given.json is not None:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps([asdict(cost) for cost in costs], indent=2) + "\n", encoding="utf-8")
        print(f"wrote {given.json}")


if __name__ == "__main__":
    main()
