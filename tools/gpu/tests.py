"""The tests that are marked gpu, counted as they end."""

from __future__ import annotations

from typing import Any

from tools.gpu.parts import ROOT
from tools.gpu.report import Report, Setting

LAST_S = 8.0  # what one more test may take


class Counter:
    """A plugin of pytest, which also ends the run before the process is killed."""

    def __init__(self, report: Report, setting: Setting) -> None:
        self.report, self.setting = report, setting
        self.session: Any = None
        self.counts = {"passed": 0, "failed": 0, "skipped": 0, "errors": 0}
        self.reasons: dict[str, int] = {}

    def pytest_sessionstart(self, session: Any) -> None:
        self.session = session

    def pytest_runtest_logfinish(self) -> None:
        if self.setting.left() < LAST_S:
            self.session.shouldstop = "the part's time is over"

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed and "cannot import name '_C'" in str(report.longrepr):
            self.report.skip(f"{report.nodeid}: the C++ module is not built")
        elif report.failed:
            self._count("errors")
            self.report.fail(f"{report.nodeid} can't be collected: {_last_line(report)}")

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self._count("failed" if report.when == "call" else "errors")
            self.report.fail(f"{report.nodeid}: {_last_line(report)}")
        elif report.skipped:
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else "expected to fail"
            self.reasons[reason] = self.reasons.get(reason, 0) + 1
            self._count("skipped")
        elif report.when == "call":
            self._count("passed")

    def _count(self, outcome: str) -> None:
        self.counts[outcome] += 1
        self.report.fact(**self.counts)

    def pytest_sessionfinish(self) -> None:
        for reason, times in self.reasons.items():
            self.report.skip(f"{times} {'test' if times == 1 else 'tests'}: {reason.removeprefix('Skipped: ')}")


def _last_line(report: Any) -> str:
    return (str(report.longrepr).strip().splitlines() or [""])[-1][:300]


def files() -> list[str]:
    """Only these are imported: the others need packages that no GPU test needs."""
    found = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(path) for path in found if "@pytest.mark.gpu" in path.read_text(encoding="utf-8")]


def run(report: Report, setting: Setting) -> None:
    import pytest

    report.plan("the rest of the tests")
    counter = Counter(report, setting)
    options = ["-q", "-m", "gpu", "--continue-on-collection-errors", "-p", "no:cacheprovider"]
    code = pytest.main([*options, f"--rootdir={ROOT}", *files()], plugins=[counter])
    report.done("the rest of the tests")
    report.fact(**counter.counts, exit_code=int(code))
    # 1: some failed, which is noted; 5: none was there.
    if counter.session is not None and counter.session.shouldstop:
        report.skip(f"the rest of the tests: {counter.session.shouldstop}")
    elif code not in (0, 1, 5):
        report.fail(f"pytest ended with {code!r}")
    if setting.device == "cuda" and not counter.counts["passed"]:
        report.fail("no GPU test passed; a run of skips tells nothing")
