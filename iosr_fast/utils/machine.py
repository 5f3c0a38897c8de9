"""Facts about this machine: installed packages, processor, threads, GPU."""

from __future__ import annotations

import math
import os
import platform
import sys
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path


def package_version(name: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def cpu_model() -> str:
    """The processor's name, as far as the system reports it, and "with AMX" if it has the matrix instructions.

    Virtual machines give several generations one name, and the fastest precision depends on AMX.
    """
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = (line.partition(":") for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines())
        facts = {name.strip(): value.strip() for name, _, value in lines}  # of the last core
        if name := facts.get("model name"):
            return f"{name} with AMX" if "amx_tile" in facts.get("flags", "").split() else name
    return platform.processor() or platform.machine()


def processors() -> str:
    """The processor's name, and the GPU's if PyTorch, which it imports, sees one."""
    gpu = this_gpu()
    return cpu_model() if gpu is None else f"{cpu_model()} and {gpu.name}"


def usable_threads() -> int:
    """Hardware threads that this process may use: those of its affinity mask, at most its `cpu_quota`, rounded up."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota()
    return count if quota >= count else math.ceil(quota)


def split_cores(cores: int, wanted: int, most: int) -> tuple[int, int]:
    """How many runs of an engine at once, and with how many threads each, leave fewest of `cores` idle: about `wanted`
    runs, more than half as many and at most `most`."""
    runs = min(range(most, wanted // 2, -1), key=lambda runs: (cores % runs, abs(runs - wanted)))
    return runs, cores // runs


@cache
def cpu_quota(memberships: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> float:
    """How many processors' time this process may take by its control groups, as `docker --cpus 4` limits it: the least
    of its group and of those around it. Infinite without a limit.

    `memberships` has the groups of the process, relative to their tree below `root`; a container may see its own group
    as the top of the tree. Version 2 has one tree and `cpu.max`; version 1 has a tree for each set of controllers.
    """
    least = math.inf
    for line in memberships.read_text().splitlines() if memberships.exists() else ():
        _, controllers, name = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        files = ("cpu.cfs_quota_us", "cpu.cfs_period_us") if controllers else ("cpu.max",)
        top = root / controllers
        group = top / name.lstrip("/")
        for folder in (group, *group.parents):
            if folder.is_relative_to(top) and all((folder / file).exists() for file in files):
                quota, period = " ".join((folder / file).read_text() for file in files).split()
                if quota not in ("max", "-1"):
                    least = min(least, int(quota) / int(period))
    return least


def usable_memory() -> int:
    """Bytes of memory of this machine, or of its container (a cgroup) where that may use less."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else sys.maxsize
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.exists() else "max"
    return memory if text == "max" else min(memory, int(text))


@dataclass(frozen=True)
class Gpu:
    """A GPU: its name in the driver, its compute capability, (9, 0) on an H100, and its memory in bytes."""

    name: str
    capability: tuple[int, int]
    memory: int = 16 << 30

    def __str__(self) -> str:
        return f"{self.name} (compute capability {self.capability[0]}.{self.capability[1]})"


def this_gpu() -> Gpu | None:
    """PyTorch's current GPU; None without one, and without PyTorch."""
    if find_spec("torch") is None:
        return None
    import torch

    if not torch.cuda.is_available():
        return None
    facts = torch.cuda.get_device_properties(torch.cuda.current_device())
    return Gpu(facts.name, (facts.major, facts.minor), facts.total_memory)
