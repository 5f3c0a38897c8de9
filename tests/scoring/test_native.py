"""The test programs of csrc, under AddressSanitizer and UBSan (make sanitize runs ThreadSanitizer as well).

score_test calls the CPU kernels. host_test runs the block programs of the CUDA kernels (block.h,
multiply.h and tile.h of csrc/cuda) thread by thread on the CPU, with emulated instructions, against the formula in
double; it reports races, misplaced waits and accesses out of bounds beside wrong results.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from iosr_fast import _C
from tests import ROOT
from tests.scoring.build_cache import CSRC, build_once, cpp_compiler, version_of
from tools import sanitize

pytestmark = pytest.mark.slow
SANITIZERS = "address,undefined"
HOST_SANITIZERS = (f"-fsanitize={SANITIZERS}", "-fno-sanitize-recover=all")
# Key precision (or the linear terms): the number of problems that host_test solves for it.
PROBLEMS = {"fp32": 26, "fp16": 39, "bf16": 39, "int8": 39, "linear": 104}


def test_the_kernels_are_clean_under_address_and_undefined_behaviour_sanitizers() -> None:
    sources = [CSRC / "scoring", CSRC / "tests", ROOT / "CMakeLists.txt", Path(sanitize.__file__)]
    facts = [SANITIZERS, version_of(cpp_compiler()), version_of("cmake") if shutil.which("cmake") else ""]
    facts += [os.environ.get(name, "") for name in ("CXX", "CXXFLAGS", "LDFLAGS")]
    folder = build_once("sanitized", sources, facts, lambda path: sanitize.build(SANITIZERS, path))
    done = subprocess.run([folder / sanitize.TEST], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = re.search(r"(\d+) checks, 0 failed; paths:(.*)", done.stdout)
    assert summary is not None and int(summary[1]) > 1000
    assert summary[2].split() == ["wide", *(name for name, supported in _C.simd_paths() if supported)]


@pytest.fixture(scope="module")
def host_test() -> Path:
    """Compiled with sanitizers, or without if the compiler has no libraries for them."""
    compiler = cpp_compiler()
    command = [compiler, "-std=c++17", "-O1"]

    def build(folder: Path) -> None:
        source = [str(CSRC / "cuda" / "host_test.cpp"), "-o", str(folder / "host_test")]
        sanitized = subprocess.run([*command, *HOST_SANITIZERS, *source], capture_output=True, text=True)
        if sanitized.returncode != 0:
            plain = subprocess.run([*command, *source], capture_output=True, text=True)
            assert plain.returncode == 0, plain.stderr

    facts = [*command, *HOST_SANITIZERS, version_of(compiler)]
    return build_once("cuda-host-test", [CSRC / "cuda", Path(__file__)], facts, build) / "host_test"


@pytest.mark.parametrize("part", PROBLEMS)
def test_the_kernels_code_equals_the_formula(part: str, host_test: Path) -> None:
    done = subprocess.run([str(host_test), part], capture_output=True, text=True)
    lines = done.stdout.splitlines()
    wrong = [line for line in lines if not line.startswith("ok ")]
    assert not wrong and done.returncode == 0, "\n".join([*wrong, done.stderr[-2000:]])
    assert len(lines) == PROBLEMS[part]


def test_an_unknown_part_is_refused(host_test: Path) -> None:
    done = subprocess.run([str(host_test), "fp8"], capture_output=True, text=True)
    assert done.returncode == 1 and "expected fp32, fp16, bf16, int8 or linear" in done.stdout
