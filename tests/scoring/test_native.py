"""The test program of the CPU kernels, under AddressSanitizer and UBSan (`make sanitize` runs ThreadSanitizer, too)."""

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
