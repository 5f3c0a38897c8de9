"""`make gpu-check` names every file with tests for a GPU, and tests that are skipped there don't pass for tests."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import ROOT

MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8").replace("\\\n", "")
SKIPPED = 5  # two tests for each TensorRT, and one for a second GPU


def named() -> list[str]:
    found = re.search(r"^GPU_TESTS := (.*)$", MAKEFILE, re.MULTILINE)
    assert found is not None
    return found[1].split()


def test_every_file_with_tests_for_a_gpu_is_named() -> None:
    marked = [path for path in (ROOT / "tests").rglob("test_*.py") if "@pytest.mark.gpu\n" in path.read_text()]
    assert named() == sorted(str(path.relative_to(ROOT)) for path in marked)


@pytest.mark.slow
def test_the_floor_is_what_passes_on_one_gpu_without_tensorrt() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--collect-only", "-m", "gpu", *named()]
    collected = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    floor = re.search(r"^GPU_FLOOR := (\d+)$", MAKEFILE, re.MULTILINE)
    assert floor is not None and int(floor[1]) == collected.count("::test_") - SKIPPED


@pytest.mark.parametrize(
    ("status", "printed", "passes", "message"),
    [
        (0, "900 passed, 3 skipped in 9s", True, ""),
        (0, "3 passed, 51 skipped in 9s", False, "tests to pass, 3 did"),
        (0, "54 skipped in 9s", False, "tests to pass, 0 did"),
        (1, "1 failed, 900 passed in 9s", False, ""),
    ],
)
def test_too_few_passed_tests_are_a_failure(
    status: int, printed: str, passes: bool, message: str, tmp_path: Path
) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\necho '{printed}'\nexit {status}\n")
    python.chmod(0o755)
    options = ["--old-file=build/gpu-site/.installed", f"PYTHON={python}", f"OUT={tmp_path}"]
    done = subprocess.run(["make", "gpu-tests", *options], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode == 0) == passes and printed in done.stdout and message in done.stdout
