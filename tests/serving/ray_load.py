"""Shared by the tests of iosr_fast.serving.ray: bundles to roll out, `iosr-fast serve-ray` as a process, and load."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.serving.http_client import bundle, httpx, load, queries

COMMAND = (sys.executable, "-m", "iosr_fast", "serve-ray")


def error_of(response: Any, status: int) -> str:
    assert response.status_code == status, response.text
    return str(response.json()["error"]["code"])


def save_renamed(folder: Path, prefix: str) -> Path:
    """The bundle with every class called something else: who answered can be told by the label."""
    classifier = load()
    for info in classifier.classes():
        classifier.rename_class(info.class_id, prefix + info.name, keep_text=True)
    classifier.save(folder)
    return folder


def save_broken(folder: Path, damage: str = "support.safetensors") -> Path:
    shutil.copytree(bundle(), folder)
    with (folder / damage).open("r+b") as file:
        file.write(b"damaged")
    return folder


def descendants(pid: int) -> set[int]:
    """The processes that a process has started, and theirs."""
    parents: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, _, rest = stat.read_text().rpartition(")")
        except OSError:
            continue
        parents[int(name.split()[0])] = int(rest.split()[1])
    found, new = set[int](), {pid}
    while new:
        new = {child for child, parent in parents.items() if parent in new} - found
        found |= new
    return found


def alive(pids: set[int]) -> set[int]:
    return {pid for pid in pids if Path(f"/proc/{pid}/exe").exists()}


def wait_for(condition: Callable[[], Any], seconds: float, what: str) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, f"expected {what} within {seconds} s"
        time.sleep(0.05)


@contextmanager
def served(said: Path, *options: str) -> Iterator[tuple[str, str]]:
    """`iosr-fast serve-ray`: the URL of its API and the address of its Ray. It ends by SIGTERM, and nothing of it is
    left, whatever happens here; `said` is the file with its output."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [*COMMAND, "--port", str(port), *options]
    with said.open("w") as file:
        # Ray's workers are niced: beside other tests they would hardly get a core.
        environment = {**os.environ, "RAY_worker_niceness": "0"}
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
    started: set[int] = set()
    try:
        wait_for(lambda: process.poll() is not None or "join with" in said.read_text(), 300, "replicas")
        assert process.poll() is None, said.read_text()
        started = descendants(process.pid)
        assert len(started) > 5
        yield f"http://127.0.0.1:{port}", said.read_text().split("join with --address ")[1].split(";")[0]
        started |= descendants(process.pid)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0, said.read_text()
        wait_for(lambda: not alive(started), 60, "no process of Ray's to be left")
    finally:
        if process.poll() is None:
            started |= {process.pid, *descendants(process.pid)}
        for pid in alive(started):
            os.kill(pid, signal.SIGKILL)
        process.wait()


class Load:
    """Threads that ask for one image after another, as long as the block runs. `answers`: (image, status, body or
    error, seconds it took)."""

    def __init__(self, url: str, threads: int = 6) -> None:
        self.images = queries()
        self.answers: list[tuple[int, int, Any, float]] = []
        self._url, self._stopped = url, threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(i,), daemon=True) for i in range(threads)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        for thread in self._threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in self._threads)

    def _ask(self, i: int) -> None:
        with httpx.Client(timeout=90) as client:
            while not self._stopped.is_set():
                image = i % len(self.images)
                asked = time.monotonic()
                try:
                    response = client.post(
                        f"{self._url}/v1/predict?top=1&deadline_ms=60000",
                        content=self.images[image],
                        headers={"Content-Type": "image/png"},
                    )
                    status, body = response.status_code, response.json()
                except Exception as error:
                    status, body = 0, repr(error)
                self.answers.append((image, status, body, time.monotonic() - asked))
                i += len(self._threads)

    def wait_for_more(self, count: int) -> None:
        goal = len(self.answers) + count
        wait_for(lambda: len(self.answers) >= goal, 60, f"{count} more answers")

    def labels(self) -> list[tuple[int, str]]:
        """What every image was taken for. Fails where one was not answered: refusals would be 503."""
        wrong = [(status, body) for _, status, body, _ in self.answers if status not in (200, 503)]
        assert not wrong, wrong[:3]
        assert sum(status == 200 for _, status, _, _ in self.answers) > 0
        return [(image, body["predictions"][0]["label"]) for image, status, body, _ in self.answers if status == 200]
