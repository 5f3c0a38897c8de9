"""Parts for the tests of gpu-check, run in processes of their own: they must import nothing slow."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tools.gpu.report import Report, Setting


def row(impl: str) -> dict[str, Any]:
    return {"bench": "fake", "case": "one", "impl": impl, "runtime_ms": 1.0, "share_of_ceiling": 0.5}


def machine(report: Report, setting: Setting) -> None:
    report.fact(device="NVIDIA Fake 9000", commit="abc", missing=["tensorrt"])


def good(report: Report, setting: Setting) -> None:
    assert Path(os.environ["IOSR_FAST_CACHE"]).parent == setting.work and 0 < setting.left() <= 20
    report.add_rows([row("good")])
    report.fact(device=setting.device, tiny=setting.tiny)


def crash(report: Report, setting: Setting) -> None:
    report.plan("the second row")
    report.add_rows([row("before the crash")])
    print("about to crash")
    os.abort()


def wrong(report: Report, setting: Setting) -> None:
    report.skip("something for want of a package")
    report.fail("a result is off by 0.5")
    report.add_rows([row("right")])


def hang(report: Report, setting: Setting) -> None:
    """With a process below it that would outlive it, and holds its output open."""
    below = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    report.fact(below=below.pid)
    report.plan("what never comes")
    report.add_rows([row("before the hang")])
    time.sleep(60)


def slow_compiler(report: Report, setting: Setting) -> None:
    report.plan("the last case")
    time.sleep(60)


def run_given_tests(report: Report, setting: Setting) -> None:
    """tools.gpu.tests over a file of the working folder."""
    from tools.gpu import tests

    tests.files = lambda: [str(setting.work / "test_given.py")]
    tests.run(report, setting)
