"""`iosr-fast serve` as a process, with its log, for tests of the server."""

from __future__ import annotations

import json
import os
import queue
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests import ROOT
from tests.serving.http_client import TOKEN, bundle, httpx


class Process:
    """`iosr-fast serve` with its log; `command` is another way to start it."""

    def __init__(self, *options: str, folder: Path | None = None, command: Sequence[str] = ()) -> None:
        environment = {**os.environ, "IOSR_FAST_TOKEN": TOKEN, "PYTHONPATH": str(ROOT)}
        if not command:
            command = [sys.executable, "-m", "iosr_fast", "serve", str(folder or bundle()), "--port", "0", *options]
        self._process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
        self.pid = self._process.pid
        self.lines: list[dict[str, Any]] = []
        self._fresh: queue.Queue[dict[str, Any]] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.port = int(self.wait_for("listening")["port"])
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=20)
        self.wait_for("ready")

    def _read(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            made = json.loads(line)  # every line is JSON, warnings of libraries included
            self.lines.append(made)
            self._fresh.put(made)

    def wait_for(self, event: str) -> dict[str, Any]:
        until = time.monotonic() + 120
        while True:
            line = self._fresh.get(timeout=max(0.01, until - time.monotonic()))
            if line["event"] == event:
                return line

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=20)

    def signal(self, number: int) -> None:
        self._process.send_signal(number)

    def exit_code(self) -> int:
        code = self._process.wait(40)
        self._reader.join(10)
        return code

    def kill(self) -> None:
        self.client.close()
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait(10)


@contextmanager
def started(*options: str, folder: Path | None = None) -> Iterator[Process]:
    process = Process(*options, folder=folder)
    try:
        yield process
    finally:
        process.kill()
