"""The block programs of the CUDA kernels, run thread by thread on the CPU against the formula in double.

host_test.cpp executes the very code that the GPU runs (block.h, multiply.h and tile.h of csrc/cuda) with emulated
instructions, and reports races, misplaced waits and accesses out of bounds beside wrong results.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.scoring.build_cache import CSRC, build_once, cpp_compiler, version_of

SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
# Key precision (or the linear terms): how many problems host_test solves for it.
PROBLEMS = {"fp32": 26, "fp16": 39, "bf16": 39, "int8": 39, "linear": 104}


@pytest.fixture(scope="module")
def host_test() -> Path:
    """Compiled with sanitizers, or without if the compiler has no libraries for them."""
    compiler = cpp_compiler()
    command = [compiler, "-std=c++17", "-O1"]

    def build(folder: Path) -> None:
        source = [str(CSRC / "cuda" / "host_test.cpp"), "-o", str(folder / "host_test")]
        sanitized = subprocess.run([*command, *SANITIZERS, *source], capture_output=True, text=True)
        if sanitized.returncode != 0:
            plain = subprocess.run([*command, *source], capture_output=True, text=True)
            assert plain.returncode == 0, plain.stderr

    facts = [*command, *SANITIZERS, version_of(compiler)]
    return build_once("cuda-host-test", [CSRC / "cuda", Path(__file__)], facts, build) / "host_test"


@pytest.mark.slow
@pytest.mark.parametrize("part", PROBLEMS)
def test_the_kernels_code_equals_the_formula(part: str, host_test: Path) -> None:
    done = subprocess.run([str(host_test), part], capture_output=True, text=True)
    lines = done.stdout.splitlines()
    wrong = [line for line in lines if not line.startswith("ok ")]
    assert not wrong and done.returncode == 0, "\n".join([*wrong, done.stderr[-2000:]])
    assert len(lines) == PROBLEMS[part]


@pytest.mark.slow
def test_an_unknown_part_is_refused(host_test: Path) -> None:
    done = subprocess.run([str(host_test), "fp8"], capture_output=True, text=True)
    assert done.returncode == 1 and "expected fp32, fp16, bf16, int8 or linear" in done.stdout
