"""The test program of the CPU kernels under AddressSanitizer and UBSan, or under what SANITIZERS names."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from iosr_fast import _C
from tests import ROOT
from tests.demo_cache import build_once
from tests.scoring.compilers import CSRC, cpp_compiler, version_of

pytestmark = pytest.mark.slow
SANITIZERS = os.environ.get("SANITIZERS", "address,undefined")  # as for -fsanitize
CMAKE = ["cmake"] if shutil.which("cmake") else [sys.executable, "-m", "cmake"]


def build(folder: Path) -> None:
    """The test program, without the Python module."""
    flags = f"-Og -g1 -fsanitize={SANITIZERS} -fno-sanitize-recover=all -fno-omit-frame-pointer"
    options = ["-DCMAKE_BUILD_TYPE=None", "-DIOSR_FAST_MODULE=OFF", "-DIOSR_FAST_TESTS=ON"]
    configure = [*CMAKE, f"-S{ROOT}", f"-B{folder}", *options, f"-DCMAKE_CXX_FLAGS={flags}"]
    for command in (configure, [*CMAKE, "--build", str(folder), "--parallel", "2"]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


def test_the_kernels_are_clean_under_sanitizers() -> None:
    sources = [CSRC / "scoring", CSRC / "tests", ROOT / "CMakeLists.txt", Path(__file__)]
    facts = [SANITIZERS, version_of(cpp_compiler()), version_of("cmake") if shutil.which("cmake") else ""]
    facts += [os.environ.get(name, "") for name in ("CXX", "CXXFLAGS", "LDFLAGS")]
    folder = build_once("sanitized", sources, facts, build)
    done = subprocess.run([folder / "scoring_test"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = re.search(r"(\d+) checks, 0 failed; paths:(.*)", done.stdout)
    assert summary is not None and int(summary[1]) > 1000
    assert summary[2].split() == ["wide", *(name for name, supported in _C.simd_paths() if supported)]
