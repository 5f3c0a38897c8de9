"""`iosr-fast serve` in its own process, with its memory and CPU time."""

from __future__ import annotations

import asyncio
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

from iosr_fast.utils.machine import usable_threads

Result = TypeVar("Result")
_POLL_S = 0.05
_START_S = 120.0
_STOP_S = 60.0
_LOG_TAIL = 2000  # characters of the log in an error


class ServerDied(RuntimeError):
    """The server ended or did not start; the message has its exit code and the end of its log."""


class ServerProcess:
    """Starts a server on a free port and waits until it is ready. A context manager that stops it.

    `options` are those of `iosr-fast serve`; `environment` is added to that of this process. The log goes to a file,
    because reading it from a pipe would cost CPU time that the load needs. Raises ServerDied.
    """

    def __init__(self, bundle: Path, *options: str, environment: dict[str, str] | None = None) -> None:
        self._start([sys.executable, "-m", "iosr_fast", "serve", str(bundle), "--port", "0", *options], environment)

    def _start(self, command: list[str], environment: dict[str, str] | None) -> None:
        self._log = tempfile.TemporaryFile("w+b")  # noqa: SIM115 (kill() closes it)
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self._log,
            env={**os.environ, **(environment or {})},
        )
        self.pid = self._process.pid
        try:
            self.port = self._wait_until_ready()
            self.url = f"http://127.0.0.1:{self.port}"
        except BaseException:
            self.kill()
            raise

    def log_text(self) -> str:
        descriptor = self._log.fileno()
        return os.pread(descriptor, os.fstat(descriptor).st_size, 0).decode("utf-8", "replace")

    def log_lines(self, **facts: Any) -> list[dict[str, Any]]:
        """The lines of the log that have these facts."""
        lines = [json.loads(line) for line in self.log_text().splitlines() if line.startswith("{")]
        return [line for line in lines if facts.items() <= line.items()]

    def check(self) -> None:
        """Raise ServerDied if the process has ended."""
        code = self._process.poll()
        if code is not None:
            raise ServerDied(f"the server ended with code {code}; the end of its log:\n{self.log_text()[-_LOG_TAIL:]}")

    async def alongside(self, work: Coroutine[Any, Any, Result]) -> Result:
        """The result of `work`, which is cancelled if the server dies; then raises ServerDied."""
        task = asyncio.ensure_future(work)
        try:
            while not task.done():
                self.check()
                await asyncio.wait({task}, timeout=_POLL_S)
            self.check()
            return task.result()
        finally:
            task.cancel()

    def rss_mb(self) -> float | None:
        """Resident memory in MB (10^6 bytes); None without /proc."""
        fields = _proc(f"{self.pid}/statm").split()
        return round(int(fields[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6, 2) if fields else None

    def cpu_s(self) -> float:
        """Seconds of CPU time of all its threads and of its child processes; NaN without /proc."""
        return _cpu_s(self.pid)

    def stop(self) -> None:
        """SIGTERM; waits for the server to answer what it accepted. Raises ServerDied for an exit code other than 0."""
        self.check()
        self._process.send_signal(signal.SIGTERM)
        try:
            code = self._process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            raise ServerDied(f"the server did not stop within {_STOP_S:g} s of SIGTERM") from None
        if code != 0:
            raise ServerDied(f"the server ended with code {code} on SIGTERM:\n{self.log_text()[-_LOG_TAIL:]}")

    def kill(self) -> None:
        """End it at once, if it still runs."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def _wait_until_ready(self) -> int:
        until = time.monotonic() + _START_S
        while time.monotonic() < until:
            self.check()
            if self.log_lines(event="ready"):
                return int(self.log_lines(event="listening")[0]["port"])
            time.sleep(_POLL_S)
        raise ServerDied(f"the server was not ready within {_START_S:g} s:\n{self.log_text()[-_LOG_TAIL:]}")


class Usage:
    """Who uses the CPU cores from now on. Shares are of all usable cores: 1.0 is the whole machine."""

    def __init__(self, server: ServerProcess) -> None:
        self._server = server
        self._start = time.perf_counter()
        self._client_s, self._server_s, self._busy_s = time.process_time(), server.cpu_s(), _busy_s()

    def cores_s(self) -> float:
        """Seconds since the start, times the number of cores."""
        return (time.perf_counter() - self._start) * usable_threads()

    def shares(self) -> dict[str, float | None]:
        """client_cpu_share, server_cpu_share, others_cpu_share; None if unknown."""
        cores_s = self.cores_s()
        client = time.process_time() - self._client_s
        server, busy = self._server.cpu_s() - self._server_s, _busy_s() - self._busy_s
        used = {"client_cpu_share": client, "server_cpu_share": server, "others_cpu_share": busy - client - server}
        shares = {name: max(seconds, 0.0) / cores_s for name, seconds in used.items() if math.isfinite(seconds)}
        return {name: round(shares[name], 3) if name in shares else None for name in used}


def _cpu_s(pid: int) -> float:
    """User and system time of a process, of those children that have ended, and of those that run."""
    fields = _proc(f"{pid}/stat").rpartition(")")[2].split()
    if not fields:
        return math.nan
    children = [child for task in Path("/proc", str(pid), "task").glob("*/children") for child in _read(task).split()]
    running = [seconds for child in children if math.isfinite(seconds := _cpu_s(int(child)))]
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK") + sum(running)


def _busy_s() -> float:
    """Busy seconds of all cores together; NaN off Linux."""
    fields = _proc("stat").split("\n", 1)[0].split()[1:]
    if not fields:
        return math.nan
    user, nice, system, _idle, _iowait, irq, softirq, *_ = map(int, fields)
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def _proc(name: str) -> str:
    """The content of /proc/NAME; empty off Linux, or if the process has ended."""
    return _read(Path("/proc", name))


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
