"""The C++ kernels' own tests, under AddressSanitizer and UBSan (make sanitize runs ThreadSanitizer as well)."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from iosr_fast import _C
from tools.sanitize import build_and_run


def test_the_kernels_are_clean_under_address_and_undefined_behaviour_sanitizers(tmp_path: Path) -> None:
    if shutil.which("c++") is None and shutil.which("g++") is None:
        pytest.skip("no C++ compiler")
    runs = build_and_run("address,undefined", tmp_path)
    assert set(runs) == {"score_test", "search_test"}
    for test, least in (("score_test", 1000), ("search_test", 500)):
        done = runs[test]
        assert done.returncode == 0, done.stdout + done.stderr
        found = re.search(r"(\d+) checks, 0 failed; paths:(.*)", done.stdout)
        assert found is not None and int(found[1]) > least
        assert found[2].split() == ["wide", *(name for name, supported in _C.simd_paths() if supported)]
