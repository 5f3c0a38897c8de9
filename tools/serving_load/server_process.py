"""`iosr-fast serve` in a process of its own, with what the system says of it: memory, CPU time, whether it lives."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar
from urllib.error import URLError
from urllib.request import urlopen

ROOT = Path(__file__).resolve().parents[2]
Result = TypeVar("Result")

_POLL_S = 0.05
_START_S = 120.0
_STOP_S = 60.0
_TOLD = 2000  # the last characters of its log that an error shows


class ServerDied(RuntimeError):
    """The server's process ended, or never came to listen; the message has its exit code and the end of its log."""


class ServerProcess:
    """Starts a server on a free port and waits until it is ready; a context manager, which stops it.

    `options` are those of `iosr-fast serve`, `environment` is added to this process's own. Its log goes to a file:
    read from a pipe, it would cost this process time that is to be the load's. Raises ServerDied.
    """

    def __init__(self, bundle: Path, *options: str, environment: dict[str, str] | None = None) -> None:
        self._log = tempfile.TemporaryFile("w+b")  # noqa: SIM115 (kill() closes it)
        command = [sys.executable, "-m", "iosr_fast", "serve", str(bundle), "--port", "0", *options]
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self._log,
            env={**os.environ, "PYTHONPATH": path, **(environment or {})},
        )
        self.pid = self._process.pid
        try:
            self.url = f"http://127.0.0.1:{self._wait_for_port()}"
            self._wait_until_ready()
        except BaseException:
            self.kill()
            raise

    def log_text(self) -> str:
        descriptor = self._log.fileno()
        return os.pread(descriptor, os.fstat(descriptor).st_size, 0).decode("utf-8", "replace")

    def check(self) -> None:
        """Raises ServerDied where the process has ended."""
        code = self._process.poll()
        if code is not None:
            raise ServerDied(f"the server ended with code {code}; the end of its log:\n{self.log_text()[-_TOLD:]}")

    async def alongside(self, work: Coroutine[Any, Any, Result]) -> Result:
        """What `work` returns; it is cancelled, and ServerDied raised, where the server dies meanwhile."""
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
        """Resident memory in MB (10^6 bytes); None off Linux."""
        try:
            status = Path(f"/proc/{self.pid}/status").read_text()
        except OSError:
            return None
        kilobytes = [int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS")]
        return round(kilobytes[0] * 1024 / 1e6, 2) if kilobytes else None

    def cpu_s(self) -> float | None:
        """Seconds of CPU time that it has used, of all its threads; None off Linux."""
        try:
            fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return None
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def stop(self) -> None:
        """SIGTERM: it answers what it accepted and ends. Raises ServerDied where its exit code is not 0."""
        self.check()
        self._process.send_signal(signal.SIGTERM)
        try:
            code = self._process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            raise ServerDied(f"the server did not stop within {_STOP_S:g} s of SIGTERM") from None
        if code != 0:
            raise ServerDied(f"the server ended with code {code} on SIGTERM:\n{self.log_text()[-_TOLD:]}")

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

    def _wait_for_port(self) -> int:
        for _ in self._ticks("listen"):
            for line in self.log_text().splitlines():
                if '"listening"' in line:
                    return int(json.loads(line)["port"])
        raise AssertionError

    def _wait_until_ready(self) -> None:
        for _ in self._ticks("be ready"):
            try:
                with urlopen(f"{self.url}/readyz", timeout=5):
                    return
            except (URLError, OSError):  # 503 while it loads
                continue

    def _ticks(self, what: str) -> Any:
        until = time.monotonic() + _START_S
        while time.monotonic() < until:
            self.check()
            yield
            time.sleep(_POLL_S)
        raise ServerDied(f"the server did not come to {what} within {_START_S:g} s:\n{self.log_text()[-_TOLD:]}")
