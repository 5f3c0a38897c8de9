"""What compilers make of the kernels, kept under build/test-cache by a hash of sources, flags and versions."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import pytest

from tests import ROOT
from tests.demo_cache import CACHES

CSRC = ROOT / "csrc"


def build_once(name: str, sources: Iterable[Path], facts: Sequence[str], build: Callable[[Path], None]) -> Path:
    """The folder that build(folder) has filled, once for these sources (files or folders) and facts (flags, versions).

    A build that raises leaves nothing; test workers wait for one another.
    """
    digest = hashlib.sha256("\0".join([name, *facts]).encode())
    files = [file for path in sources for file in ([path] if path.is_file() else path.rglob("*"))]
    for file in sorted(file for file in files if file.is_file() and "__pycache__" not in file.parts):
        digest.update(f"{file.relative_to(ROOT)} {hashlib.sha256(file.read_bytes()).hexdigest()}".encode())
    CACHES.mkdir(parents=True, exist_ok=True)
    folder = CACHES / f"{name}-{digest.hexdigest()[:16]}"
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.is_dir():
            with tempfile.TemporaryDirectory(dir=CACHES, ignore_cleanup_errors=True) as unfinished:
                build(Path(unfinished))
                Path(unfinished).rename(folder)
    os.utime(folder)  # demo_cache removes what has not been used for a day
    return folder


def cpp_compiler() -> str:
    """g++ or clang++ of PATH; skips the test without one."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler (g++ or clang++) on PATH")
    return compiler


def version_of(command: str) -> str:
    return subprocess.run([command, "--version"], capture_output=True, text=True, check=True).stdout
