"""The C++ kernels' own tests, under AddressSanitizer and UBSan (make sanitize runs ThreadSanitizer as well)."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from iosr_fast import _C
from tests import ROOT
from tests.scoring.build_cache import CSRC, build_once, cpp_compiler, version_of
from tools import sanitize

SANITIZERS = "address,undefined"


@pytest.mark.slow
@pytest.mark.parametrize(("test", "least"), [("score_test", 1000), ("search_test", 500)])
def test_the_kernels_are_clean_under_address_and_undefined_behaviour_sanitizers(test: str, least: int) -> None:
    sources = [CSRC / "scoring", CSRC / "search", CSRC / "tests", ROOT / "CMakeLists.txt", Path(sanitize.__file__)]
    versions = [version_of(cpp_compiler()), version_of("cmake") if shutil.which("cmake") else ""]
    folder = build_once("sanitized", sources, [SANITIZERS, *versions], lambda path: sanitize.build(SANITIZERS, path))
    done = subprocess.run([folder / test], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.search(r"(\d+) checks, 0 failed; paths:(.*)", done.stdout)
    assert found is not None and int(found[1]) > least
    assert found[2].split() == ["wide", *(name for name, supported in _C.simd_paths() if supported)]
