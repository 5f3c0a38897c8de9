"""The server as a process: ports, signals, the log of changes, and connections that mean no good."""

from __future__ import annotations

import contextlib
import json
import platform
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from iosr_fast.classifier import Classifier
from iosr_fast.cli import app
from iosr_fast.serving.batching import BatchingClassifier
from iosr_fast.serving.http.settings import Settings
from tests import ROOT
from tests.pictures import GREY
from tests.serving.hostile import hostile_bytes
from tests.serving.http_client import AUTHORISED, CLASSES, TOKEN, bundle, form, httpx
from tests.serving.http_process import Process, started

pytestmark = pytest.mark.slow

POST = b"POST /v1/predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\n"


def read_all(connection: socket.socket) -> bytes:
    """What comes until the other side closes."""
    parts = []
    try:
        while part := connection.recv(65536):
            parts.append(part)
    except ConnectionResetError:
        pass
    return b"".join(parts)


def error_from(connection: socket.socket) -> bytes:
    """One answer that is an error, whole; the connection may stay open."""
    answer = b""
    while not answer.endswith(b"}}"):
        part = connection.recv(65536)
        assert part, answer
        answer += part
    return answer


def test_a_signal_lets_accepted_requests_finish_and_exits_with_0(tmp_path: Path) -> None:
    log = tmp_path / "changes.db"
    with started("--log", str(log), "--drain", "1.5") as process:
        added = process.client.post("/v1/classes", data={"name": "grey"}, files=form(GREY), headers=AUTHORISED)
        assert added.status_code == 201
        first = process.client.post("/v1/predict", content=GREY).json()
        held = process.connect()
        held.sendall(POST + f"Content-Length: {len(GREY)}\r\n\r\n".encode() + GREY[:50])
        assert process.client.get("/readyz").status_code == 200
        process.signal(signal.SIGTERM)
        until = time.monotonic() + 1
        while (ready := process.client.get("/readyz")).status_code == 200:
            assert time.monotonic() < until
        assert ready.json()["status"] == "shutting down"
        late = process.client.post("/v1/predict", content=GREY)  # taken until nobody sends any more
        assert late.status_code == 200 and late.headers["Connection"] == "close"
        process.wait_for("stopping")
        held.sendall(GREY[50:])
        answer = read_all(held)
        held.close()  # else the server waits for it
        assert answer.startswith(b"HTTP/1.1 200") and b'"predictions"' in answer
        assert process.exit_code() == 0
        assert process.lines[-1]["event"] == "stopped"
        assert TOKEN not in json.dumps(process.lines)
        with pytest.raises(ConnectionRefusedError):
            process.connect()
    # The log restores the change (a server that replays a log: the next test).
    classifier = Classifier.load(bundle())
    classifier.open_log(log)
    (again,) = classifier.explain([GREY])
    classifier.close_log()
    assert again.version == first["version"] == 2 and len(classifier.classes_) == CLASSES + 1
    assert again.logit == pytest.approx(first["predictions"][0]["logit"], abs=1e-4)


def test_a_full_disk_stops_changes_and_nothing_else(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource", reason="limits of file sizes are POSIX's")
    log = tmp_path / "changes.db"
    with started("--log", str(log), "--drain", "0") as process:

        def add(name: str) -> Any:
            return process.client.post("/v1/classes", data={"name": name}, files=form(GREY), headers=AUTHORISED)

        version = 1
        while not log.exists() or log.stat().st_size < 2 * 64 * 64 * 3:  # the limit holds for shared memory, too
            version += 1
            assert add(f"class {version}").json()["version"] == version
        pid = process._process.pid
        _, most = resource.prlimit(pid, resource.RLIMIT_FSIZE)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (log.stat().st_size, most))
        while (answer := add(f"class {version + 1}")).status_code == 201:  # into the room that the last page has
            version += 1
        for refused in (answer, add("another")):
            assert refused.status_code == 507 and refused.json()["error"]["code"] == "storage_full"
        assert process.client.post("/v1/predict", content=GREY).json()["version"] == version
        ready = process.client.get("/readyz")
        assert ready.status_code == 200 and ready.json()["detail"].startswith("read-only: ")
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (most, most))
        assert add("another").json()["version"] == version + 1
        process.signal(signal.SIGKILL)
        process.exit_code()
    with started("--log", str(log), "--drain", "0") as process:
        assert process.client.get("/v1/classes").json()["total"] == CLASSES + version
        process.signal(signal.SIGINT)
        assert process.exit_code() == 0
    log.write_bytes(log.read_bytes()[:-20])
    done = CliRunner().invoke(app, ["serve", str(bundle()), "--port", "0", "--log", str(log)])
    assert done.exit_code == 2 and "is damaged: " in done.output and "restore it from a copy" in done.output


@pytest.fixture(scope="module")
def process() -> Any:
    with started("--max-body-mb", "1", "--max-image-mb", "1", "--body-timeout", "2") as running:
        yield running


def test_hostile_connections_are_closed_and_the_next_is_served(process: Process) -> None:
    for i, data in enumerate(hostile_bytes(27, seed=1)):
        with process.connect() as connection:
            try:
                connection.sendall(data)
                connection.shutdown(socket.SHUT_WR)
            except OSError:
                pass  # closed on us, as it should be
            answer = read_all(connection)
        assert not answer.startswith(b"HTTP/1.1 5"), (i, answer[:200])
        assert process.client.get("/healthz").status_code == 200, i
    assert not [line for line in process.lines if line["event"] == "unexpected"]


def test_headers_are_bounded(process: Process) -> None:
    with process.connect() as connection:
        connection.sendall(POST + b"X-Long: " + b"a" * 60_000 + b"\r\nContent-Length: 0\r\n\r\n")
        assert error_from(connection).startswith(b"HTTP/1.1 400")  # no image: read and understood
    with process.connect() as connection:
        connection.sendall(POST + b"X-Long: " + b"a" * 100_000)
        assert b"headers of at most" in read_all(connection)


def test_an_early_refusal_reaches_a_client_that_still_sends(process: Process) -> None:
    with process.connect() as connection:
        connection.sendall(POST + b"Content-Length: 3000000\r\n\r\n" + bytes(500_000))
        answer = error_from(connection)
        assert answer.startswith(b"HTTP/1.1 413") and b"connection: close" not in answer.lower()
        try:
            for _ in range(5):  # the rest is read and dropped, but not for ever
                connection.sendall(bytes(500_000))
                time.sleep(0.02)
        except OSError:
            pass
        assert read_all(connection) == b""
    with process.connect() as connection:  # a body that is refused and short leaves the connection good
        connection.sendall(b"POST /v1/classes HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n" + bytes(1000))
        assert error_from(connection).startswith(b"HTTP/1.1 401")
        connection.sendall(b"GET /readyz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert read_all(connection).startswith(b"HTTP/1.1 200")


def test_a_slow_body_is_a_408(process: Process) -> None:
    with process.connect() as connection, process.connect() as trickle:
        connection.sendall(POST + b"Content-Length: 1000\r\n\r\n" + bytes(10))
        trickle.sendall(POST + b"Content-Length: 1000\r\n\r\n")
        for _ in range(25):  # bytes prolong nothing
            trickle.sendall(b"a")
            time.sleep(0.1)
        assert error_from(trickle).startswith(b"HTTP/1.1 408")
        assert error_from(connection).startswith(b"HTTP/1.1 408")


def test_more_connections_than_may_be_keep_nobody_out(process: Process) -> None:
    with contextlib.ExitStack() as opened:
        for i in range(1100):
            connection = opened.enter_context(process.connect())
            with contextlib.suppress(ConnectionError):
                connection.sendall((b"", b"GET", POST, b"GET /readyz HTTP/1.1\r\nHost: x\r\n\r\n\r\n")[i % 4])
        for _ in range(3):
            assert httpx.get(f"http://127.0.0.1:{process.port}/readyz", timeout=20).status_code == 200
    assert not [line for line in process.lines if line["level"] == "error"]


def test_who_takes_no_answers_is_cut_off(process: Process) -> None:
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)  # so that the kernel holds little of them
        connection.settimeout(20)
        connection.connect(("127.0.0.1", process.port))
        request = b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n"
        answered = True
        while answered:  # until the server can't get rid of an answer
            before, until = len(process.lines), time.monotonic() + 3
            connection.sendall(request)
            while not (answered := len(process.lines) > before) and time.monotonic() < until:
                time.sleep(0.001)
        with pytest.raises(ConnectionError):  # it has waited for --body-timeout by now
            for _ in range(2):
                connection.sendall(request)
                time.sleep(0.1)
    assert process.client.get("/healthz").status_code == 200


def test_requests_ahead_of_their_turn_are_all_answered(process: Process) -> None:
    one = b"GET /readyz HTTP/1.1\r\nHost: x\r\n\r\n"
    with process.connect() as connection:
        connection.sendall(one * 300)
        answers = b""
        while answers.count(b'{"status":"ok"') < 300:
            part = connection.recv(65536)
            assert part, answers.count(b'{"status":"ok"')
            answers += part
    assert process.client.get("/healthz").status_code == 200
    assert not [line for line in process.lines if line["level"] == "error"]


def test_an_engine_that_fails_at_once_ends_the_process(monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    from iosr_fast.serving.http.server import run

    def fail(_: Any) -> None:
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(BatchingClassifier, "warm", fail)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
    with pytest.raises(RuntimeError, match="the engine failed during its warm-up: no kernel image"):
        run(bundle(), Settings(port=0, drain_s=0))
    events = [json.loads(line)["event"] for line in capfd.readouterr().err.splitlines()]
    assert events[0] == "loaded" and events[-1] == "stopped" and "warm_up_failed" in events


def test_what_it_cannot_start_with_is_said_at_once(tmp_path: Path, process: Process) -> None:
    short = tmp_path / "token"
    short.write_text("hunter-2\n")
    for options, told in (
        ([str(tmp_path / "nothing")], "nothing"),
        ([str(bundle()), "--port", str(process.port)], "choose another --port"),
        ([str(bundle()), "--host", "not a host"], "can't listen on"),
        ([str(bundle()), "--token-file", str(short)], "at least 16"),
        ([str(bundle()), "--token-file", str(tmp_path / "missing")], "missing"),
        ([str(bundle()), "--max-images", "1000"], "max_images of at most max_queue"),
        ([str(tmp_path / "nothing"), "--max-connections", "1000000000"], "lower --max-connections"),
        ([str(bundle()), "--log", str(short)], "to be a log of changes or not to exist, got another file"),
        ([str(bundle()), "--log", str(tmp_path)], "to be a regular file"),
    ):
        done = CliRunner().invoke(app, ["serve", *options])
        assert done.exit_code == 2 and told in done.output, (options, done.output)
        assert "hunter" not in done.output


def test_freed_memory_is_kept_where_the_c_library_is_glibc(monkeypatch: pytest.MonkeyPatch) -> None:
    from iosr_fast.serving.http import server

    program = "from iosr_fast.serving.http.server import keep_freed_memory as keep; print(keep())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == str(platform.libc_ver()[0] == "glibc")
    monkeypatch.setattr(server.ctypes, "CDLL", lambda _: object())
    assert server.keep_freed_memory() is False


def test_batches_and_threads_suit_the_engine() -> None:
    classifier = Classifier.load(bundle(), threads=1)
    assert classifier.encoder.threads == 1
    assert Settings().batch_for(classifier.encoder) == 8 and Settings(max_batch=5).batch_for(classifier.encoder) == 5
    classifier.encoder.buckets = (1, 32)  # as an engine on a GPU has them
    assert Settings().batch_for(classifier.encoder) == classifier.encoder.max_batch == 32
