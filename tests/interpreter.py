"""Code in an interpreter of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests import ROOT


def printed(code: str, *arguments: str, cwd: Path = ROOT) -> str:
    """What `code` prints; an error of it fails the test."""
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()
