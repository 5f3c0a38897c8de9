"""Facts about this machine: installed packages, processor, threads, GPU."""

from __future__ import annotations

import os
import platform
import sys
from dataclasses import dataclass
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


def usable_threads() -> int:
    """Hardware threads that this process may use; a container or an affinity mask can restrict them."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def usable_memory() -> int:
    """Bytes of memory of this machine, or of its container (a cgroup) where that may use less."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else sys.maxsize
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.exists() else "max"
    return memory if text == "max" else min(memory, int(text))


@dataclass(frozen=True)
class Gpu:
    """A GPU: its name in the driver, and its compute capability, (9, 0) on an H100."""

    name: str
    capability: tuple[int, int]

    def __str__(self) -> str:
        return f"{self.name} (compute capability {self.capability[0]}.{self.capability[1]})"


def this_gpu() -> Gpu | None:
    """PyTorch's current GPU; None without one, and without PyTorch."""
    if find_spec("torch") is None:
        return None
    import torch

    return Gpu(torch.cuda.get_device_name(), torch.cuda.get_device_capability()) if torch.cuda.is_available() else None
