"""Decoders in processes: as those in threads where all is well, killed where an image goes too far, and none left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from iosr_fast.exceptions import BadImageError, ClosedError, DeadlineExceededError
from iosr_fast.images.geometry import Geometry
from iosr_fast.serving.batching import BatchingClassifier, DecodeLimits, processes
from iosr_fast.serving.batching.decode import decode
from iosr_fast.serving.batching.processes import DecoderProcess
from tests import ROOT
from tests.images.jpegs import jpeg, scan
from tests.pictures import encode
from tests.serving.batching_fakes import PATIENCE_S, SIZE, FakeClassifier, Gated, labels, picture, threads, until
from tests.serving.hostile_images import FAIR, IMAGES

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="processes are watched by /proc"),
]

LIMITS = DecodeLimits(8 << 20, 50_000_000)
FOREVER = float("inf")
GREY = encode(np.full((9, 9, 3), 7, np.uint8))
SLOW = encode(Image.new("RGB", (7000, 7000)))  # far longer than a tenth of a second


@pytest.fixture
def decoder() -> Iterator[DecoderProcess]:
    made = DecoderProcess(LIMITS)
    made.start()
    yield made
    made.close()


def pid_of(decoder: DecoderProcess) -> int:
    assert decoder._process is not None
    return decoder._process.pid


def decoders_of(batching: BatchingClassifier) -> Any:
    return batching._workers._decoders


def status(pid: int, name: str) -> str:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(line.split(None, 1)[1] for line in lines if line.startswith(f"{name}:"))


def is_gone(pid: int) -> bool:
    """Ended, and no zombie of this process."""
    try:
        return status(pid, "State").startswith("Z") and status(pid, "PPid") != str(os.getpid())
    except (FileNotFoundError, ProcessLookupError):
        return True


def slow_decoder(timeout_s: float) -> DecoderProcess:
    made = DecoderProcess(DecodeLimits(max_pixels=50_000_000, timeout_s=timeout_s))
    made.start()
    return made


# --- where all is well ---


def test_pixels_are_those_of_the_thread_to_the_last_bit(decoder: DecoderProcess) -> None:
    pid = pid_of(decoder)
    for number, (name, made) in enumerate(FAIR.items()):
        data = made(np.random.default_rng(number))
        for side in (32, 224, 64):
            np.testing.assert_array_equal(
                decoder.decode(data, 0, Geometry(side), FOREVER), decode(data, 0, Geometry(side), LIMITS), name
            )
        for kind in (bytes, bytearray, memoryview):
            np.testing.assert_array_equal(
                decoder.decode(kind(data), 0, None, FOREVER), decode(data, 0, None, LIMITS), name
            )
    assert pid_of(decoder) == pid


def test_bad_images_are_named_and_cost_no_process(decoder: DecoderProcess) -> None:
    pid = pid_of(decoder)
    for name, made in IMAGES.items():
        data = made(np.random.default_rng(1))
        for ask in (
            lambda data=data: decoder.decode(data, 5, Geometry(64), FOREVER),
            lambda data=data: decoder.decode(data, 5, None, FOREVER),
        ):
            try:
                ask()
            except BadImageError as error:
                assert error.position == 5 and error.reason, name
    assert pid_of(decoder) == pid and decoder.decode(GREY, 0, Geometry(4), FOREVER)[0, 0].tolist() == [7, 7, 7]


def test_what_is_the_programs_own_needs_no_process(decoder: DecoderProcess, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(GREY)
    for own in (tmp_path / "a.png", Image.new("RGB", (9, 9), (7, 7, 7)), picture(7, 9), picture(7)):
        assert decoder.decode(own, 0, Geometry(SIZE), FOREVER).tolist() == picture(7).tolist()


def test_a_process_may_do_little(decoder: DecoderProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IOSR_FAST_TOKEN", "secret")
    decoder.close()
    decoder.start()
    pid = pid_of(decoder)
    assert b"secret" not in Path(f"/proc/{pid}/environ").read_bytes()
    limits = Path(f"/proc/{pid}/limits").read_text()
    for name in ("Max core file size", "Max file size"):
        assert f"{name:<25} 0                    0" in limits, limits
    assert "Max address space         unlimited" not in limits
    assert status(pid, "NoNewPrivs") == "1" and status(pid, "Threads") == "1"
    loaded = Path(f"/proc/{pid}/maps").read_text()
    assert "onnxruntime" not in loaded and "torch" not in loaded
    for number in (signal.SIGINT, signal.SIGTERM):  # of a terminal or a service manager, for all of the group
        os.kill(pid, number)
    assert len(decoder.decode(GREY, 0, Geometry(4), FOREVER)) == 4 and pid_of(decoder) == pid


# --- where an image goes too far ---


def test_an_image_that_takes_too_long_is_stopped_alone() -> None:
    decoder = slow_decoder(0.05)
    try:
        pid = pid_of(decoder)
        for ask in (
            lambda: decoder.decode(SLOW, 3, Geometry(64), FOREVER),
            lambda: decoder.decode(SLOW, 3, None, FOREVER),
        ):
            with pytest.raises(BadImageError, match=r"number 3: it takes more than 0.05 s"):
                ask()
        assert is_gone(pid) and len(decoder.decode(GREY, 0, Geometry(4), FOREVER)) == 4
    finally:
        decoder.close()


def test_a_decoder_that_never_answers_is_killed() -> None:
    decoder = slow_decoder(0.1)
    try:
        os.kill(pid_of(decoder), signal.SIGSTOP)
        with pytest.raises(BadImageError, match="takes more than"):
            decoder.decode(GREY, 0, Geometry(4), FOREVER)
        assert len(decoder.decode(GREY, 0, Geometry(4), FOREVER)) == 4
    finally:
        decoder.close()


def test_a_processor_that_is_used_up_ends_it_without_a_parent(decoder: DecoderProcess) -> None:
    os.kill(pid_of(decoder), signal.SIGSTOP)
    os.kill(pid_of(decoder), signal.SIGXCPU)  # what the system sends at the limit
    os.kill(pid_of(decoder), signal.SIGCONT)
    with pytest.raises(BadImageError, match="takes more than 4 s"):
        decoder._ask(processes.Task.CROP, GREY, 0, Geometry(4), 48, FOREVER, True)
    soft = [line.split()[3] for line in Path(f"/proc/{os.getpid()}/limits").read_text().splitlines() if "cpu" in line]
    decoder.start()
    decoder.decode(GREY, 0, Geometry(4), FOREVER)
    child = [
        line.split()[3] for line in Path(f"/proc/{pid_of(decoder)}/limits").read_text().splitlines() if "cpu" in line
    ]
    assert soft == ["unlimited"] and int(child[0]) <= 6


def test_a_deadline_does_not_kill_what_works(decoder: DecoderProcess) -> None:
    pid, now = pid_of(decoder), time.monotonic()
    assert len(decoder.decode(GREY, 0, Geometry(4), now)) == 4 and pid_of(decoder) == pid  # there are 0.5 s for each
    os.kill(pid, signal.SIGSTOP)
    with pytest.raises(DeadlineExceededError):
        decoder.decode(GREY, 0, Geometry(4), now)
    assert is_gone(pid)


def test_an_image_may_not_take_more_memory_than_its_header_claims(
    decoder: DecoderProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    pid = pid_of(decoder)
    monkeypatch.setattr(processes, "work_pixels", lambda size, geometry: 0)  # as if its header claimed nothing
    for data in (SLOW, jpeg(0xC2, 7000, 7000, scan(1, 2, 3, band=(0, 0, 0)))):
        with pytest.raises(BadImageError):
            decoder.decode(data, 0, Geometry(4), FOREVER)
    with pytest.raises(BadImageError, match="more memory"):
        decoder.decode(SLOW, 0, Geometry(4), FOREVER)
    assert pid_of(decoder) == pid and len(decoder.decode(GREY, 0, Geometry(4), FOREVER)) == 4


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_an_image_that_crashes_its_decoder_fails_alone(decoder: DecoderProcess, number: int) -> None:
    pid = pid_of(decoder)
    os.kill(pid, signal.SIGSTOP)
    os.kill(pid, number)
    if number == signal.SIGKILL:  # while it had nothing to do: no image is to blame
        until(lambda: decoder._process.poll() is not None)  # type: ignore[union-attr]
        assert len(decoder.decode(GREY, 0, Geometry(4), FOREVER)) == 4
        return
    os.kill(pid, signal.SIGCONT)
    with pytest.raises(BadImageError, match="crashed"):
        decoder._ask(processes.Task.CROP, GREY, 0, Geometry(4), 48, FOREVER, True)
    assert len(decoder.decode(GREY, 0, Geometry(4), FOREVER)) == 4 and is_gone(pid)


@pytest.mark.parametrize(
    "answer",
    [
        processes.ANSWER.pack(0, 60_000, 60_000, 0),
        processes.ANSWER.pack(0, 4, 2, 0),
        processes.ANSWER.pack(9, 4, 4, 0),
        processes.ANSWER.pack(1, 0, 0, 1 << 31),
        b"abc",
    ],
)
def test_answers_that_cannot_be_are_no_pixels(decoder: DecoderProcess, answer: bytes) -> None:
    import socket

    assert decoder._channel is not None
    pid = pid_of(decoder)
    decoder._channel.close()
    decoder._channel, other = socket.socketpair()
    other.sendall(answer)
    other.shutdown(socket.SHUT_WR)
    with pytest.raises(BadImageError, match="crashed"):
        decoder.decode(GREY, 0, Geometry(4), FOREVER)
    other.close()
    assert is_gone(pid) and len(decoder.decode(GREY, 0, Geometry(4), FOREVER)) == 4


# --- many of them ---


def test_decoders_that_cannot_start_are_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    before = threads()
    monkeypatch.setattr(processes, "_MAIN", "raise ImportError('no such library')")
    with pytest.raises(RuntimeError, match=r"does not start: (?s:.)*no such library"):
        BatchingClassifier(FakeClassifier(), decode_threads=2, isolated=True)
    until(lambda: threads() <= before)


def test_decoders_that_cannot_start_again_show_and_do_not_spin(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[float] = []
    start = processes._interpreter
    with BatchingClassifier(FakeClassifier(), decode_threads=1, isolated=True) as batching:
        assert labels([batching.submit(GREY)]) == [7] and batching.healthy
        with monkeypatch.context() as patch:  # ends before the close, which waits for a decoder
            patch.setattr(processes, "_MAIN", "raise ImportError('gone')")
            patch.setattr(processes, "_interpreter", lambda *a: (started.append(time.monotonic()), start(*a))[1])
            os.kill(pid_of(decoders_of(batching)[0]), signal.SIGKILL)
            first = batching.submit(GREY)
            assert isinstance(first.exception(PATIENCE_S), RuntimeError | BadImageError)
            until(lambda: not batching.healthy)
            assert "gone" in str(batching.last_error)
            waits = batching.submit(GREY)
            time.sleep(0.5)
            assert len(started) <= 5 and not waits.done()
        assert labels([waits]) == [7] and batching.healthy


def test_a_decoder_that_fails_leaves_the_others_working() -> None:
    limits = DecodeLimits(max_pixels=50_000_000, timeout_s=0.25)
    with BatchingClassifier(FakeClassifier(), decode_threads=2, isolated=True, limits=limits) as batching:
        slow = [batching.submit(SLOW) for _ in range(3)]
        assert labels(batching.submit_many([GREY] * 20)) == [7] * 20
        assert all("takes more than" in str(one.exception(PATIENCE_S)) for one in slow)
        assert batching.healthy and labels([batching.submit(GREY)]) == [7]


def test_whole_images_come_from_the_decoders() -> None:
    photo = encode(Image.effect_noise((40, 30), 60).convert("RGB"), "JPEG")
    batching = BatchingClassifier(FakeClassifier(), decode_threads=1, isolated=True)
    np.testing.assert_array_equal(batching.decode_whole(photo).result(PATIENCE_S), decode(photo, 0, None, LIMITS))
    assert isinstance(batching.decode_whole(b"abc", 4).exception(PATIENCE_S), BadImageError)
    assert isinstance(batching.decode_whole(photo, deadline_s=-1).exception(PATIENCE_S), DeadlineExceededError)
    batching.close()
    with pytest.raises(ClosedError):
        batching.decode_whole(photo)


def test_close_ends_all_processes() -> None:
    batching = BatchingClassifier(FakeClassifier(), decode_threads=2, isolated=True)
    pids = [pid_of(decoder) for decoder in decoders_of(batching)]
    assert labels(batching.submit_many([GREY] * 4)) == [7] * 4
    batching.close()
    assert all(is_gone(pid) for pid in pids)
    batching = BatchingClassifier(FakeClassifier(), decode_threads=1, isolated=True)
    os.kill(pid := pid_of(decoders_of(batching)[0]), signal.SIGSTOP)
    late = batching.submit(GREY)
    until(lambda: batching.decoders_are_busy)
    batching.close(0.1)  # does not wait for the four seconds that an image may take
    assert isinstance(late.exception(PATIENCE_S), ClosedError)
    until(lambda: is_gone(pid))


def test_nothing_is_left_of_a_server_that_is_killed() -> None:
    program = f"""
import os, signal, time
from iosr_fast.serving.batching import BatchingClassifier
from tests.serving.batching_fakes import FakeClassifier
batching = BatchingClassifier(FakeClassifier(), decode_threads=2, isolated=True)
batching.submit({GREY!r}).result()
print(*[decoder._process.pid for decoder in batching._workers._decoders], flush=True)
time.sleep(60)
"""
    shared = set(os.listdir("/dev/shm"))
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, cwd=ROOT) as server:
        assert server.stdout is not None
        pids = [int(pid) for pid in server.stdout.readline().split()]
        assert len(pids) == 2 and not any(is_gone(pid) for pid in pids)
        server.kill()
        server.wait()
        until(lambda: all(is_gone(pid) for pid in pids))
    assert set(os.listdir("/dev/shm")) <= shared


def test_one_slow_image_does_not_refuse_those_behind_it() -> None:
    """What an image takes is measured, to refuse those whose deadline can't be kept."""
    classifier = FakeClassifier()
    with BatchingClassifier(classifier, decode_threads=1, max_queue=64) as batching:
        assert labels(batching.submit_many([picture(1)] * 8, deadline_s=60)) == [1] * 8
        slow = Gated(2)
        future = batching.submit(slow)
        time.sleep(0.5)
        slow.gate.set()
        assert labels([future]) == [2]
        with classifier.held(batching):
            waiting = batching.submit_many([picture(3)] * 20, deadline_s=1)
        assert labels(waiting) == [3] * 20
