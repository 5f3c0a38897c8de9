"""Compile the CUDA kernels for every architecture, without a GPU, and report the cost of each.

    python tools/cuda_aot.py                         a table
    python tools/cuda_aot.py --json build/cuda.json  the same as JSON, one object a kernel and architecture

The Triton kernels' table is `python -m iosr_fast.kernels.aot`; both have the same columns. Needs nvcc on PATH, and
cuobjdump beside it, on PATH or in the triton wheel.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import typer

from iosr_fast.kernels.aot import ARCHITECTURES, format_rows
from iosr_fast.utils.command import new_file, run

SOURCE = Path(__file__).resolve().parent.parent / "csrc" / "cuda" / "score.cu"
_JOBS = 2  # nvcc takes about 1 GB each
_TENSOR_CORE = re.compile(r"\b(HMMA|IMMA)\b")


def missing() -> str | None:
    """Why the kernels can't be compiled here, or None."""
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


def compile_all(architectures: Sequence[int] = ARCHITECTURES) -> list[dict[str, Any]]:
    """A row for every kernel of csrc/cuda/score.cu and architecture: {kernel, precision, arch, registers (a thread),
    spills (bytes of stores, loads and stack), shared_bytes (static, all there is), tensor_core_instruction}.

    Raises RuntimeError, with the compiler's message, where compiling fails.
    """
    if (reason := missing()) is not None:
        raise RuntimeError(reason)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(_JOBS) as pool:
        per_arch = pool.map(lambda arch: compile_one(arch, Path(folder) / f"sm_{arch}.cubin"), architectures)
        return [row for rows in per_arch for row in rows]


def compile_one(arch: int, cubin: Path) -> list[dict[str, Any]]:
    """The rows of one architecture."""
    options = ("-std=c++17", "-O3", f"-arch=sm_{arch}", "-cubin", "-Xptxas", "-v", "-o", str(cubin))
    report = _output(["nvcc", *options, str(SOURCE)])
    instructions = tensor_core_instructions(_output([str(find_cuobjdump()), "-sass", str(cubin)]))
    spills = ("spill stores", "spill loads", "stack frame")
    return [
        {
            "kernel": name,
            "precision": next((kind for kind in ("fp16", "bf16", "int8") if kind in name), "fp32"),
            "arch": arch,
            "registers": _number(r"Used (\d+) registers", text),
            "spills": sum(_number(rf"(\d+) bytes {kind}", text) for kind in spills),
            "shared_bytes": _number(r"(\d+) bytes smem", text),
            "tensor_core_instruction": instructions[name],
        }
        for name, text in sorted(split_report(report).items())
    ]


def split_report(report: str) -> dict[str, str]:
    """ptxas's lines on each kernel."""
    pieces = re.split(r"Compiling entry function '(\w+)' for '\w+'", report)
    return dict(zip(pieces[1::2], pieces[2::2], strict=True))


def tensor_core_instructions(sass: str) -> dict[str, str]:
    """Of HMMA and IMMA those in the code of each kernel."""
    pieces = re.split(r"Function : (\w+)", sass)
    return {
        name: ", ".join(sorted(set(_TENSOR_CORE.findall(text))))
        for name, text in zip(pieces[1::2], pieces[2::2], strict=True)
    }


def _output(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{Path(command[0]).name} failed:\n{done.stderr[-3000:]}")
    return done.stdout + done.stderr


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    return int(match[1]) if match else 0


def main(
    arch: list[int] = typer.Option(list(ARCHITECTURES), help="Compute capability times 10; repeat for several."),
    json_file: Path | None = typer.Option(None, "--json", callback=new_file, help="Write the rows to this file too."),
) -> None:
    """Compile every CUDA kernel for each architecture and print registers, spills, shared memory, tensor-core use."""
    rows = compile_all(arch)
    print(format_rows(rows))
    if json_file is not None:
        json_file.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run(main)
