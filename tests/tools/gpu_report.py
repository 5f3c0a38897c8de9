"""What the parts of gpu-check are given in the tests, and what they have written."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from tools.gpu.report import Report, Setting


@pytest.fixture
def report(tmp_path: Path) -> Report:
    return Report(tmp_path / "report.json")


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    return Setting("cpu", True, tmp_path, time.monotonic() + 100)


def kept(report: Report) -> dict[str, Any]:
    """What is in the report's file."""
    found: dict[str, Any] = json.loads(report._path.read_text())
    assert found["rows"] == json.loads(json.dumps(report.rows)) and not found["planned"]
    return found
