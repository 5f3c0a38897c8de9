"""Send hostile uploads to a real server and see that it answers each, fails at none and does not grow.

    python tools/fuzz_uploads.py --uploads 2000 --json build/fuzz.json
    python tools/fuzz_uploads.py --bundle my-classifier --seed 7

The server is `iosr-fast serve` in a process of its own, on the demo's classifier unless --bundle names another. The
exit status is 1 where there was a server error (a 5xx other than 503), a hang, or the server died.
"""

from __future__ import annotations

import argparse
import http.client
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tools.serving_load.hostile import HostileUpload, hostile_bytes, hostile_uploads
from tools.source_tree import ROOT

HANG_S = 30.0
WARM_UP = 70  # uploads, one of each kind, after which memory is looked at for the first time


class Server:
    """`iosr-fast serve` on a free port; `errors` are the lines of its log at level error."""

    def __init__(self, bundle: Path) -> None:
        command = [sys.executable, "-m", "iosr_fast", "serve", str(bundle), "--port", "0"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
        self.errors: list[str] = []
        self.port = 0
        self._ready = threading.Event()
        threading.Thread(target=self._read, daemon=True).start()
        if not self._ready.wait(120):
            self.process.kill()
            raise RuntimeError(f"the server did not start: {' '.join(self.errors) or 'it said nothing'}")

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            told = json.loads(line) if line.startswith("{") else {"level": "error", "message": line}
            if told["level"] == "error":
                self.errors.append(line)
            if told.get("event") == "listening":
                self.port = told["port"]
            if told.get("event") == "ready":
                self._ready.set()

    def rss_mb(self) -> float:
        """Resident memory; NaN where there is no /proc."""
        statm = Path(f"/proc/{self.process.pid}/statm")
        if not statm.exists():
            return float("nan")
        return round(int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20, 1)

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()


@contextmanager
def demo_bundle(given: Path | None) -> Iterator[Path]:
    if given is not None:
        yield given
        return
    from tools.demo.bundle import make_demo_bundle

    with tempfile.TemporaryDirectory() as folder:
        yield make_demo_bundle(Path(folder) / "bundle", classes=20)


def post(port: int, upload: HostileUpload) -> tuple[str, float]:
    """The status of the answer, or what came instead ("hang", "closed"), and milliseconds."""
    start = time.perf_counter()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=HANG_S)
    try:
        connection.request("POST", upload.path, upload.body, upload.headers)
        response = connection.getresponse()
        response.read()
        outcome = str(response.status)
    except TimeoutError:
        outcome = "hang"
    except (OSError, http.client.HTTPException):
        outcome = "closed"
    finally:
        connection.close()
    return outcome, (time.perf_counter() - start) * 1e3


def send_bytes(port: int, data: bytes) -> tuple[str, float]:
    """The same for bytes that are no request; the server may close without a word."""
    start = time.perf_counter()
    outcome = "closed"
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=HANG_S) as connection:
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            answer = connection.recv(64)
            if answer.startswith(b"HTTP/1.1 "):
                outcome = answer[9:12].decode("ascii", "replace")
    except TimeoutError:
        outcome = "hang"
    except OSError:
        pass
    return outcome, (time.perf_counter() - start) * 1e3


def fails(outcome: str, kind: str) -> bool:
    """A server error: 5xx but for 503, which says to come again, and 504 where hardly any time was given."""
    return outcome.startswith("5") and outcome != "503" and not (outcome == "504" and kind == "no time")


def fuzz(server: Server, uploads: int, seed: int, connections: int) -> dict[str, Any]:
    by_status: Counter[str] = Counter()
    slowest, errors, sent = (0.0, ""), 0, 0
    rss_start = server.rss_mb()

    def send(made: HostileUpload | bytes) -> tuple[str, float, str]:
        if isinstance(made, bytes):
            return *send_bytes(server.port, made), "bytes"
        return *post(server.port, made), made.kind

    bare = hostile_bytes(uploads, seed)
    # Each eleventh is no HTTP request, or none that any library would send.
    made = (next(bare) if i % 11 == 10 else one for i, one in enumerate(hostile_uploads(uploads, seed)))
    with ThreadPoolExecutor(connections) as pool:
        while batch := list(itertools.islice(made, WARM_UP)):  # a part at a time: what is sent lies in memory
            for outcome, ms, kind in pool.map(send, batch):
                by_status[outcome] += 1
                slowest = max(slowest, (ms, kind))
                if fails(outcome, kind):
                    errors += 1
                    print(f"{outcome}: {kind}", file=sys.stderr)
            rss_start = rss_start if sent else server.rss_mb()
            sent += len(batch)
    return {
        "uploads": sent,
        "by_status": dict(sorted(by_status.items())),
        "server_errors": errors,
        "hangs": by_status["hang"],
        "slowest_ms": round(slowest[0], 1),
        "slowest_kind": slowest[1],
        "rss_mb_start": rss_start,
        "rss_mb_end": server.rss_mb(),
        "connections": connections,
        "seed": seed,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--uploads", type=int, default=2000, metavar="N", help="[2000]")
    parser.add_argument("--seed", type=int, default=0, help="of what is sent [0]")
    parser.add_argument("--connections", type=int, default=4, metavar="N", help="that send at the same time [4]")
    parser.add_argument("--bundle", type=Path, metavar="DIR", help="a saved classifier [the demo's, made for it]")
    parser.add_argument("--json", type=Path, metavar="F", help="write the numbers here")
    options = parser.parse_args()
    if options.uploads < 1 or options.connections < 1:
        parser.error("expected --uploads and --connections of at least 1")
    with demo_bundle(options.bundle) as bundle:
        server = Server(bundle)
        try:
            row = fuzz(server, options.uploads, options.seed, options.connections)
            alive = server.process.poll() is None
        finally:
            code = server.stop()
    print(json.dumps(row, indent=2))
    for line in server.errors[:5]:
        print(line.strip(), file=sys.stderr)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(row, indent=2) + "\n", encoding="utf-8")
    return int(bool(row["server_errors"] or row["hangs"] or not alive or code))


if __name__ == "__main__":
    raise SystemExit(main())
