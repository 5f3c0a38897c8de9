"""A server in a process of its own."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_POLL_S = 0.05
_START_S = 300.0
_STOP_S = 60.0
_LOG_TAIL = 2000  # characters of the log in an error


@dataclass(frozen=True)
class Server:
    url: str
    process: subprocess.Popen[bytes]
    log: Path

    def check(self) -> None:
        """Raise RuntimeError, with the exit code and the end of the log, if the process has ended."""
        if (code := self.process.poll()) is not None:
            raise self.error(f"ended with code {code}")

    def error(self, what: str) -> RuntimeError:
        log = self.log.read_text("utf-8", "replace")[-_LOG_TAIL:]
        return RuntimeError(f"the server {what}; the end of its log:\n{log}")

    def memory_mb(self) -> float | None:
        """Memory of it and all processes below it in MB (10^6 bytes), each shared page once (proportional set size);
        None without /proc."""
        pids, kilobytes = [self.process.pid], 0
        try:
            for pid in pids:
                lines = Path("/proc", str(pid), "smaps_rollup").read_text().splitlines()
                kilobytes += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
                for children in Path("/proc", str(pid), "task").glob("*/children"):
                    pids += map(int, children.read_text().split())
        except OSError:
            return None
        return round(kilobytes * 1.024 / 1e3, 1)


@contextmanager
def serving(command: Sequence[str], ready: str, environment: Mapping[str, str]) -> Iterator[Server]:
    """Starts a server on a free port, waits until GET `ready` answers 200, and stops it by SIGTERM after the block.

    `command` gets `--port`; `environment` is added to that of this process. The log goes to a file, because reading it
    from a pipe would cost CPU time that the load needs. Raises RuntimeError if the server ends by itself or doesn't
    start or stop.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words, env = [*command, "--port", str(port)], {**os.environ, **environment}
    with tempfile.NamedTemporaryFile() as log:
        process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=log, env=env)
        server = Server(f"http://127.0.0.1:{port}", process, Path(log.name))
        try:
            _wait_until(server, ready)
            yield server
            server.check()
            process.terminate()
            if (code := process.wait(_STOP_S)) not in (0, -signal.SIGTERM):  # the latter is uvicorn's own
                raise server.error(f"ended with code {code} on SIGTERM")
        except subprocess.TimeoutExpired:
            raise server.error(f"did not stop within {_STOP_S:g} s of SIGTERM") from None
        finally:
            process.kill()
            process.wait()


def _wait_until(server: Server, ready: str) -> None:
    until = time.monotonic() + _START_S
    while time.monotonic() < until:
        server.check()
        try:
            with urllib.request.urlopen(server.url + ready, timeout=5):
                return
        except OSError:  # refused, or a status other than 200
            time.sleep(_POLL_S)
    raise server.error(f"was not ready within {_START_S:g} s")
