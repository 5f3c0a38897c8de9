"""The name of the processor, as results and the choice of an engine record it."""

from __future__ import annotations

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
