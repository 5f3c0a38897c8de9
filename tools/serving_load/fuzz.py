"""Hostile uploads to a server: it must answer each, fail at none and not grow."""

from __future__ import annotations

import http.client
import itertools
import socket
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tools.serving_load.hostile import HostileUpload, hostile_bytes, hostile_uploads
from tools.serving_load.server import ServerProcess

_HANG_S = 30.0
_CONNECTIONS = 4
_BATCH = 70  # uploads, about one of each kind; memory is first measured after that many


def fuzz(server: ServerProcess, uploads: int, seed: int) -> dict[str, Any]:
    """{"uploads", "by_status", "server_errors", "hangs", "log_errors", ...}."""
    by_status: Counter[str] = Counter()
    slowest, errors, sent, rss_mb = (0.0, ""), 0, 0, server.rss_mb()
    raw = hostile_bytes(uploads, seed)
    # Each eleventh is no HTTP request, or none that a library would send.
    messages = (next(raw) if i % 11 == 10 else upload for i, upload in enumerate(hostile_uploads(uploads, seed)))
    with ThreadPoolExecutor(_CONNECTIONS) as pool:
        while batch := list(itertools.islice(messages, _BATCH)):
            for outcome, ms, kind in pool.map(lambda message: _send(server.port, message), batch):
                by_status[outcome] += 1
                slowest = max(slowest, (ms, kind))
                if _is_error(outcome, kind):
                    errors += 1
                    print(f"{outcome}: {kind}", file=sys.stderr)
            rss_mb = rss_mb if sent else server.rss_mb()
            sent += len(batch)
            server.check()
    return {
        "uploads": sent,
        "by_status": dict(sorted(by_status.items())),
        "server_errors": errors,
        "hangs": by_status["hang"],
        "log_errors": server.log_lines(level="error")[:5],
        "slowest_ms": round(slowest[0], 1),
        "slowest_kind": slowest[1],
        "rss_mb_start": rss_mb,
        "rss_mb_end": server.rss_mb(),
        "seed": seed,
    }


def _send(port: int, message: HostileUpload | bytes) -> tuple[str, float, str]:
    """Status of the answer, or "hang" or "closed"; milliseconds; kind of the upload."""
    start = time.perf_counter()
    try:
        outcome = _send_bytes(port, message) if isinstance(message, bytes) else _post(port, message)
    except TimeoutError:
        outcome = "hang"
    except (OSError, http.client.HTTPException):
        outcome = "closed"
    return outcome, (time.perf_counter() - start) * 1e3, "bytes" if isinstance(message, bytes) else message.kind


def _post(port: int, upload: HostileUpload) -> str:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_HANG_S)
    try:
        connection.request("POST", upload.path, upload.body, upload.headers)
        response = connection.getresponse()
        response.read()
        return str(response.status)
    finally:
        connection.close()


def _send_bytes(port: int, data: bytes) -> str:
    """For bytes that are no request the server may close without an answer."""
    with socket.create_connection(("127.0.0.1", port), timeout=_HANG_S) as connection:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        answer = connection.recv(64)
    return answer[9:12].decode("ascii", "replace") if answer.startswith(b"HTTP/1.1 ") else "closed"


def _is_error(outcome: str, kind: str) -> bool:
    """5xx except 503, which asks to try again, and 504 for a request that allows hardly any time."""
    return outcome.startswith("5") and outcome != "503" and not (outcome == "504" and kind == "no time")
