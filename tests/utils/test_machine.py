"""The name of the processor, as results and the choice of an engine record it, and the threads that it gives."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from iosr_fast.utils import machine

CORE = "processor\t: {}\nmodel name\t: Intel(R) Xeon(R) Processor\nflags\t\t: fpu avx512_vnni{}\n\n"


@pytest.mark.parametrize(("flags", "suffix"), [("", ""), (" amx_tile amx_int8", " with AMX"), (" amx_tilex", "")])
def test_processors_of_one_name_differ_by_amx(
    flags: str, suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("".join(CORE.format(core, flags) for core in range(2)))
    monkeypatch.setattr(machine, "Path", {"/proc/cpuinfo": cpuinfo}.__getitem__)
    assert machine.cpu_model() == f"Intel(R) Xeon(R) Processor{suffix}"


def test_without_a_name_the_system_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cpuinfo").write_text("processor : 0\nBogoMIPS : 50.00\n")
    monkeypatch.setattr(machine, "Path", lambda _: tmp_path / "cpuinfo")
    assert machine.cpu_model() == (machine.platform.processor() or machine.platform.machine())


QUOTA, PERIOD = "cpu,cpuacct/{}cpu.cfs_quota_us", "cpu,cpuacct/{}cpu.cfs_period_us"


@pytest.mark.parametrize(
    ("group", "files", "processors"),
    [
        ("0::/", {"cpu.max": "400000 100000\n"}, 4),
        ("0::/a/b", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "150000 100000\n", "cpu.max": "9 1\n"}, 1.5),
        ("0::/a", {"a/cpu.max": "max 100000\n"}, math.inf),
        ("0::/../else", {"cpu.max": "2 1\n"}, 2),
        ("4:cpuset:/\n3:cpu,cpuacct:/a", {QUOTA.format("a/"): "50000\n", PERIOD.format("a/"): "100000\n"}, 0.5),
        ("3:cpu,cpuacct:/docker/f00", {QUOTA.format(""): "300000\n", PERIOD.format(""): "100000\n"}, 3),
        ("3:cpu,cpuacct:/\n0::/", {QUOTA.format(""): "-1\n", PERIOD.format(""): "100000\n"}, math.inf),
        ("7:pids:/", {"pids/cpu.max": "1 1\n"}, math.inf),
        (None, {}, math.inf),
    ],
)
def test_threads_are_limited_by_the_quota_of_each_group(
    group: str | None, files: dict[str, str], processors: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    memberships = tmp_path / "memberships"
    if group is not None:
        memberships.write_text(f"{group}\n")
    quota = machine.cpu_quota(memberships, tmp_path)
    assert quota == processors
    monkeypatch.setattr(machine, "cpu_quota", lambda: quota)
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _: range(64))
    assert machine.usable_threads() == (64 if quota == math.inf else math.ceil(quota))
