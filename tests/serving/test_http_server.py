"""The server as a process: ports, signals, the log of changes, terminals, and hostile connections."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import pty
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from iosr_fast.classifier import Classifier
from iosr_fast.cli import app
from iosr_fast.cli.serve import serve
from iosr_fast.exceptions import IosrFastError
from iosr_fast.serving.batching import BatchingClassifier
from iosr_fast.serving.http import server
from iosr_fast.serving.http.open_site import batch_for
from iosr_fast.serving.http.settings import Settings
from tests import ROOT
from tests.interpreter import printed
from tests.pictures import GREY
from tests.serving.http_client import AUTHORISED, CLASSES, TOKEN, bundle, form, queries
from tests.serving.http_edge import read_all, statuses
from tests.serving.http_process import Process, started
from tests.waiting import wait_until

pytestmark = pytest.mark.slow

POST = b"POST /v1/predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\n"


def test_a_signal_lets_accepted_requests_finish_and_exits_with_0(tmp_path: Path) -> None:
    log = tmp_path / "changes.db"
    with started("--log", str(log), "--drain", "1.5") as process:
        added = process.client.post("/v1/classes", data={"name": "grey"}, files=form(GREY), headers=AUTHORISED)
        assert added.status_code == 201
        environment = Path(f"/proc/{process.pid}/environ")
        assert not environment.exists() or TOKEN.encode() not in environment.read_bytes()
        first = process.client.post("/v1/predict", content=GREY).json()
        held = process.connect()
        held.sendall(POST + f"Content-Length: {len(GREY)}\r\n\r\n".encode() + GREY[:50])
        assert process.client.get("/readyz").status_code == 200
        process.signal(signal.SIGTERM)
        wait_until(lambda: process.client.get("/readyz").status_code != 200, seconds=1)
        assert process.client.get("/readyz").json()["status"] == "shutting down"
        late = process.client.post("/v1/predict", content=GREY)  # accepted while it drains
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


def test_a_killed_server_comes_back_with_its_changes_unless_their_log_is_damaged(tmp_path: Path) -> None:
    log = tmp_path / "changes.db"
    with started("--log", str(log), "--drain", "0") as process:
        for name, image in zip(("one", "two"), queries(), strict=False):
            added = process.client.post("/v1/classes", data={"name": name}, files=form(image), headers=AUTHORISED)
            assert added.status_code == 201
        process.signal(signal.SIGKILL)
        process.exit_code()
    with started("--log", str(log), "--drain", "0") as process:
        assert process.client.get("/v1/classes").json()["total"] == CLASSES + 2
        process.signal(signal.SIGHUP)  # as SIGTERM
        assert process.exit_code() == 0 and process.lines[-1]["event"] == "stopped"
    log.write_bytes(log.read_bytes()[:-20])
    done = CliRunner().invoke(app, ["serve", str(bundle()), "--port", "0", "--log", str(log)])
    assert done.exit_code == 2 and "is damaged: " in done.output and "restore it from a copy" in done.output


def test_a_change_that_goes_on_delays_no_end_beyond_the_grace_time() -> None:
    program = """
import sys, time
from iosr_fast.classifier import Classifier
from iosr_fast.cli import app
from iosr_fast.cli.serve import serve
from iosr_fast.exceptions import IosrFastError
Classifier.retune = lambda self: print('{"event": "begun"}', file=sys.stderr, flush=True) or time.sleep(300)
app()
"""
    options = ["serve", str(bundle()), "--port", "0", "--drain", "0", "--grace", "1"]
    process = Process(command=[sys.executable, "-c", program, *options])
    try:
        with process.connect() as connection:
            head = f"POST /v1/retune HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {TOKEN}\r\n\r\n"
            connection.sendall(head.encode())
            process.wait_for("begun")
            process.signal(signal.SIGTERM)
            assert process.exit_code() == 0
        assert [line["event"] for line in process.lines][-2:] == ["change_abandoned", "stopped"]
    finally:
        process.kill()


@pytest.fixture(scope="module")
def process() -> Any:
    with started("--max-body-mb", "1", "--max-image-mb", "1", "--body-timeout", "2") as running:
        yield running


def test_hostile_connections_are_closed_and_the_next_is_served(process: Process) -> None:
    """Bytes that no HTTP library would send, and a name that another site rebinds."""
    rubbish, get = np.random.default_rng(1).bytes(2_000), b"GET %s HTTP/1.1\r\nHost: localhost\r\n\r\n"
    for data in (
        rubbish,
        POST + b"Content-Length: 1000\r\n\r\n" + rubbish[:500],
        POST + b"Content-Length: 10000000000\r\n\r\n" + rubbish,
        POST + b"Transfer-Encoding: chunked\r\n\r\nfffffffff\r\n" + rubbish,
        get % b"/healthz" * 1_000,
        get % b"/static/../../../etc/passwd",
        get % b"/%ff%fe%00",
        b"PATCH /v1/classes/c0 HTTP/1.1\r\nHost: localhost\r\nContent-Length: 31000000\r\n\r\n" + b"[" * (4 << 20),
        get.replace(b"localhost", b"evil.example") % b"/healthz",
    ):
        with process.connect() as connection:
            with contextlib.suppress(OSError):  # closed on us, as it should be
                connection.sendall(data)
                connection.shutdown(socket.SHUT_WR)
            answer = read_all(connection)
        assert not answer.startswith(b"HTTP/1.1 5"), (data[:80], answer[:200])
        assert process.client.get("/healthz").status_code == 200, data[:80]
    assert answer.startswith(b"HTTP/1.1 400") and b"wrong_host" in answer
    assert not [line for line in process.lines if line["level"] == "error"]


def test_a_slow_body_is_a_408(process: Process) -> None:
    with process.connect() as connection:
        connection.sendall(POST + b"Content-Length: 1000\r\n\r\n")
        connection.settimeout(0.1)
        for _ in range(50):  # bytes extend nothing
            with contextlib.suppress(TimeoutError):
                assert statuses(connection.recv(65536)) == [408]
                return
            connection.sendall(b"a")
    raise AssertionError("still open after 5 s")


def test_a_terminal_gets_the_address_of_the_page_and_plain_lines() -> None:
    leader, terminal = pty.openpty()
    command = [sys.executable, "-m", "iosr_fast", "serve", str(bundle()), "--port", "0", "--drain", "0"]
    with subprocess.Popen(command, stderr=terminal, env={**os.environ, "PYTHONPATH": str(ROOT)}) as running:
        os.close(terminal)
        text = b""
        while b"ready" not in text:
            text += os.read(leader, 4096)
        running.send_signal(signal.SIGINT)
        with contextlib.suppress(OSError):  # the terminal closes with its last process
            while part := os.read(leader, 4096):
                text += part
    os.close(leader)
    lines = text.decode().splitlines()
    assert any(line.startswith("The page is at http://127.0.0.1:") for line in lines)
    assert " stopped seconds=" in lines[-1] and not any("{" in line for line in lines)


def test_an_engine_that_fails_at_once_ends_the_process(monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    def fail(_: Any) -> None:
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(BatchingClassifier, "warm", fail)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
    with pytest.raises(RuntimeError, match="the engine failed during its warm-up: no kernel image"):
        server.run(bundle(), Settings(port=0, drain_s=0))
    events = [json.loads(line)["event"] for line in capfd.readouterr().err.splitlines()]
    assert events[0] == "loaded" and events[-1] == "stopped" and "warm_up_failed" in events


def test_options_that_cannot_work_are_refused_at_once(tmp_path: Path, process: Process) -> None:
    short = tmp_path / "token"
    short.write_text("hunter-2\n")
    for options, told in (
        ([str(tmp_path / "nothing")], "nothing"),
        ([str(bundle()), "--port", str(process.port)], "choose another --port"),
        ([str(bundle()), "--host", "not a host"], "can't listen on"),
        ([str(bundle()), "--token-file", str(short)], "at least 16"),
        ([str(bundle()), "--token-file", str(tmp_path / "missing")], "missing"),
        ([str(bundle()), "--public-host", "shop.example:443"], "a name without a port"),
        ([str(tmp_path / "nothing"), "--max-connections", "1000000000"], "lower --max-connections"),
        ([str(bundle()), "--log", str(tmp_path)], "regular file"),
    ):
        done = CliRunner().invoke(app, ["serve", *options])
        assert done.exit_code == 2 and told in done.output, (options, done.output)
        assert "hunter" not in done.output


def test_the_command_says_that_the_server_needs_posix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(IosrFastError, match="Linux or macOS"):
        serve([bundle()])


def test_freed_memory_is_kept_where_the_c_library_is_glibc() -> None:
    program = "from iosr_fast.serving.http.server import keep_freed_memory as keep; print(keep())"
    assert printed(program) == str(platform.libc_ver()[0] == "glibc")


def test_batches_suit_the_engine() -> None:
    encoder = Classifier.load(bundle(), threads=1).encoder
    assert batch_for(encoder, Settings()) == 8 and batch_for(encoder, Settings(max_batch=5)) == 5
    encoder.buckets = (1, 32)  # as an engine on a GPU has them
    assert batch_for(encoder, Settings()) == encoder.max_batch == 32
