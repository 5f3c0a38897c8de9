"""Who used the machine's cores over a stretch of time: the client, the server, everybody else."""

from __future__ import annotations

import os
import time
from pathlib import Path

from iosr_fast.utils.machine import usable_threads
from tools.serving_load.server_process import ServerProcess


class Usage:
    """Begins when made. Shares are of all cores that may be used: 1.0 is the whole machine."""

    def __init__(self, server: ServerProcess) -> None:
        self._server = server
        self._start = time.perf_counter()
        self._client_s, self._server_s, self._busy_s = time.process_time(), server.cpu_s(), _busy_s()

    def shares(self) -> dict[str, float | None]:
        """client_cpu_share, server_cpu_share, others_cpu_share; None where the system does not tell."""
        cores_s = (time.perf_counter() - self._start) * usable_threads()
        client = time.process_time() - self._client_s
        server = _difference(self._server.cpu_s(), self._server_s)
        busy = _difference(_busy_s(), self._busy_s)
        others = None if server is None or busy is None else max(0.0, busy - client - server)
        used = {"client_cpu_share": client, "server_cpu_share": server, "others_cpu_share": others}
        return {name: None if seconds is None else round(seconds / cores_s, 3) for name, seconds in used.items()}


def _difference(now: float | None, before: float | None) -> float | None:
    return None if now is None or before is None else now - before


def _busy_s() -> float | None:
    """Seconds that the machine's cores were not idle, all of them together; None off Linux."""
    try:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    except OSError:
        return None
    user, nice, system, _idle, _iowait, irq, softirq, *_ = map(int, fields)
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")
