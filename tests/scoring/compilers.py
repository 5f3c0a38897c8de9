"""The C++ compiler of this machine, and versions."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from tests import ROOT

CSRC = ROOT / "csrc"


def cpp_compiler() -> str:
    """g++ or clang++ of PATH; skips the test without one."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler (g++ or clang++) on PATH")
    return compiler


def version_of(command: str) -> str:
    return subprocess.run([command, "--version"], capture_output=True, text=True, check=True).stdout
