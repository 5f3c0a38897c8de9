"""A server in a process of its own, with its memory and CPU time."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path

from iosr_fast.utils.machine import usable_threads

_POLL_S = 0.05
_START_S = 300.0
_STOP_S = 60.0
_LOG_TAIL = 2000  # characters of the log in an error


class ServerDied(RuntimeError):
    """The server ended or did not start; the message has its exit code and the end of its log."""


class ServerProcess:
    """Starts a server on a free port and waits until GET `ready` answers 200. A context manager that stops it.

    `command` gets `--port`; `environment` is added to that of this process. The log goes to a file, because reading it
    from a pipe would cost CPU time that the load needs. Raises ServerDied.
    """

    def __init__(self, command: Sequence[str], ready: str, environment: Mapping[str, str] | None = None) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = int(free.getsockname()[1])
        self.url = f"http://127.0.0.1:{self.port}"
        self._log = tempfile.TemporaryFile("w+b")  # noqa: SIM115 (__exit__ closes it)
        self._process = subprocess.Popen(
            [*command, "--port", str(self.port)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self._log,
            env={**os.environ, **(environment or {})},
        )
        self.pid = self._process.pid
        try:
            self._wait_until(ready)
        except BaseException:
            self.__exit__()
            raise

    @classmethod
    def of_bundle(
        cls, bundle: Path, *options: str, package: Path | None = None, environment: Mapping[str, str] | None = None
    ) -> ServerProcess:
        """`iosr-fast serve`; `package` is the folder that has the package to run, such as another checkout."""
        command = [sys.executable, "-m", "iosr_fast", "serve", str(bundle), *options]
        path = {} if package is None else {"PYTHONPATH": str(package), "PYTHONSAFEPATH": "1"}
        return cls(command, "/readyz", {**path, **(environment or {})})

    def check(self) -> None:
        """Raise ServerDied if the process has ended."""
        code = self._process.poll()
        if code is not None:
            raise ServerDied(f"the server ended with code {code}; the end of its log:\n{self._tail()}")

    def rss_mb(self) -> float | None:
        """Resident memory in MB (10^6 bytes); None without /proc."""
        fields = _read(Path("/proc", str(self.pid), "statm")).split()
        return round(int(fields[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6, 2) if fields else None

    def stop(self) -> None:
        """SIGTERM; waits for the server to answer what it accepted. Raises ServerDied for an exit code other than 0."""
        self.check()
        self._process.send_signal(signal.SIGTERM)
        try:
            code = self._process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            raise ServerDied(f"the server did not stop within {_STOP_S:g} s of SIGTERM") from None
        if code != 0:
            raise ServerDied(f"the server ended with code {code} on SIGTERM:\n{self._tail()}")

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def _tail(self) -> str:
        descriptor = self._log.fileno()
        return os.pread(descriptor, os.fstat(descriptor).st_size, 0).decode("utf-8", "replace")[-_LOG_TAIL:]

    def _wait_until(self, ready: str) -> None:
        until = time.monotonic() + _START_S
        while time.monotonic() < until:
            self.check()
            try:
                with urllib.request.urlopen(self.url + ready, timeout=5):
                    return
            except OSError:  # refused, or a status other than 200
                time.sleep(_POLL_S)
        raise ServerDied(f"the server was not ready within {_START_S:g} s:\n{self._tail()}")


class Usage:
    """Who uses the CPU cores from now on. Shares are of all usable cores: 1.0 is the whole machine."""

    def __init__(self) -> None:
        self._start = self._seconds()

    def shares(self) -> dict[str, float]:
        """client_cpu_share, of this process, and busy_cpu_share, of all (0 without /proc)."""
        elapsed, client, busy = (after - before for after, before in zip(self._seconds(), self._start, strict=True))
        cores_s = elapsed * usable_threads()
        return {"client_cpu_share": round(client / cores_s, 3), "busy_cpu_share": round(busy / cores_s, 3)}

    @staticmethod
    def _seconds() -> tuple[float, float, float]:
        """Elapsed, of CPU time of this process, and of all cores together; the last is 0 without /proc."""
        user, nice, system, _idle, _iowait, irq, softirq, *_ = (
            int(field) for field in _read(Path("/proc/stat")).partition("\n")[0].split()[1:] or [0] * 7
        )
        busy = (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")
        return time.perf_counter(), time.process_time(), busy


def _read(path: Path) -> str:
    """Empty off Linux, or if the process has ended."""
    try:
        return path.read_text()
    except OSError:
        return ""
