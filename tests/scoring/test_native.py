"""The test program of the CPU kernels: under AddressSanitizer and UBSan (or what SANITIZERS names), and for ARM."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from iosr_fast import _C
from tests import ROOT
from tests.demo_cache import build_once
from tests.scoring.compilers import CSRC, cpp_compiler, version_of

pytestmark = pytest.mark.slow
SANITIZERS = os.environ.get("SANITIZERS", "address,undefined")  # as for -fsanitize
CMAKE = ["cmake"] if shutil.which("cmake") else [sys.executable, "-m", "cmake"]


def paths_checked(name: str, compiler: str, options: list[str], emulator: Sequence[str] = ()) -> list[str]:
    """The paths whose checks have all passed, in the test program that CMake builds with these options, without the
    Python module; `name` is of the cached build."""

    def build(folder: Path) -> None:
        program = ["-DCMAKE_BUILD_TYPE=None", "-DIOSR_FAST_MODULE=OFF", "-DIOSR_FAST_TESTS=ON"]
        configure = [*CMAKE, f"-S{ROOT}", f"-B{folder}", *program, *options]
        for command in (configure, [*CMAKE, "--build", str(folder), "--parallel", "2"]):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stdout + done.stderr

    sources = [CSRC / "scoring", CSRC / "tests", ROOT / "CMakeLists.txt", Path(__file__)]
    facts = [*options, version_of(compiler), version_of("cmake") if shutil.which("cmake") else ""]
    facts += [os.environ.get(name, "") for name in ("CXX", "CXXFLAGS", "LDFLAGS")]
    program = build_once(name, sources, facts, build) / "scoring_test"
    done = subprocess.run([*emulator, program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = re.search(r"(\d+) checks, 0 failed; paths:(.*)", done.stdout)
    assert summary is not None and int(summary[1]) > 1000
    return summary[2].split()


def test_the_kernels_are_clean_under_sanitizers() -> None:
    flags = f"-Og -g1 -fsanitize={SANITIZERS} -fno-sanitize-recover=all -fno-omit-frame-pointer"
    found = paths_checked("sanitized", cpp_compiler(), [f"-DCMAKE_CXX_FLAGS={flags}"])
    assert found == ["wide", *(name for name, supported in _C.simd_paths() if supported)]


def test_the_kernels_for_arm_in_an_emulator() -> None:
    compiler, emulator = "aarch64-linux-gnu-g++", "qemu-aarch64"
    for tool, package in ((compiler, "g++-aarch64-linux-gnu"), (emulator, "qemu-user")):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not on PATH: apt-get install {package}")
    options = ["-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64", f"-DCMAKE_CXX_COMPILER={compiler}"]
    options += ["-DCMAKE_CXX_FLAGS=-O2", "-DCMAKE_EXE_LINKER_FLAGS=-static"]
    assert paths_checked("arm", compiler, options, [emulator]) == ["wide", "neon", "scalar"]
