"""A server in a process of its own."""

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
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self._log = tempfile.NamedTemporaryFile()  # noqa: SIM115 (__exit__ closes it)
        self._process = subprocess.Popen(
            [*command, "--port", str(port)],
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
        cls,
        bundle: Path,
        *options: str,
        command: str = "serve",
        package: Path | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> ServerProcess:
        """`iosr-fast serve`; `package` is the folder that has the package to run, such as another checkout."""
        words = [sys.executable, "-m", "iosr_fast", command, str(bundle), *options]
        path = {} if package is None else {"PYTHONPATH": str(package), "PYTHONSAFEPATH": "1"}
        return cls(words, "/readyz", {**path, **(environment or {})})

    def check(self) -> None:
        """Raise ServerDied if the process has ended."""
        code = self._process.poll()
        if code is not None:
            raise ServerDied(f"the server ended with code {code}; the end of its log:\n{self._tail()}")

    def rss_mb(self) -> float | None:
        """Resident memory in MB (10^6 bytes); None without /proc."""
        try:
            pages = int(Path("/proc", str(self.pid), "statm").read_text().split()[1])
        except (OSError, IndexError):
            return None
        return round(pages * os.sysconf("SC_PAGE_SIZE") / 1e6, 2)

    def pss_mb(self) -> float:
        """Memory of it and all processes below it in MB, each shared page once (proportional set size)."""
        pids, kilobytes = [self.pid], 0
        for pid in pids:
            for line in Path("/proc", str(pid), "smaps_rollup").read_text().splitlines():
                kilobytes += int(line.split()[1]) if line.startswith("Pss:") else 0
            for children in Path("/proc", str(pid), "task").glob("*/children"):
                pids += map(int, children.read_text().split())
        return round(kilobytes * 1.024 / 1e3, 1)

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
        return Path(self._log.name).read_text("utf-8", "replace")[-_LOG_TAIL:]

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
