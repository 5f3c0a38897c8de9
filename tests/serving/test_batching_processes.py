"""Decoders in processes: they decode as threads do, are killed where an image goes too far, and none is left."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from iosr_fast.exceptions import BadImageError, ClosedError, DeadlineExceededError
from iosr_fast.images.crop import Box, Crop
from iosr_fast.images.decoder_process import wire
from iosr_fast.images.geometry import Geometry
from iosr_fast.images.preprocess import open_image
from iosr_fast.serving.batching import BatchingClassifier, DecodeLimits
from iosr_fast.serving.batching import decoder as processes
from iosr_fast.serving.batching.decoder import Decoder
from tests import ROOT
from tests.images.jpegs import COMMENT, END, jpeg, scan, segment
from tests.pictures import encode
from tests.serving.batching_fakes import PATIENCE_S, SIZE, FakeClassifier, labels, picture, to_decode, until
from tests.serving.hostile_images import FAIR, IMAGES

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="processes are watched by /proc"),
]

LIMITS = DecodeLimits(8 << 20, 50_000_000)
GREY = encode(np.full((9, 9, 3), 7, np.uint8))
SLOW = encode(Image.new("RGB", (7000, 7000)))  # far longer than a tenth of a second
DC, AC = scan(1, 2, 3, band=(0, 0, 0)), scan(1, band=(1, 63, 0))
HIDDEN = segment(COMMENT, END)  # no end for a decoder


@pytest.fixture
def decoder() -> Iterator[Decoder]:
    made = Decoder(LIMITS, True)
    made.start()
    yield made
    made.close()


def slow_decoder(timeout_s: float) -> Decoder:
    made = Decoder(DecodeLimits(max_pixels=50_000_000, timeout_s=timeout_s), True)
    made.start()
    return made


def pid_of(decoder: Decoder) -> int:
    assert decoder._process is not None
    return decoder._process.pid


def decoders_of(batching: BatchingClassifier) -> Any:
    return batching._workers._decoders


def works(decoder: Decoder) -> bool:
    decoder.start()
    return decoder.decode(to_decode(GREY, Geometry(4)))[0].tolist() == picture(7).tolist()


def status(pid: int, name: str) -> str:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(line.split(None, 1)[1] for line in lines if line.startswith(f"{name}:"))


def is_gone(pid: int) -> bool:
    """Ended, and no zombie of this process."""
    try:
        return status(pid, "State").startswith("Z") and status(pid, "PPid") != str(os.getpid())
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_pixels_are_those_of_a_thread_to_the_last_bit(decoder: Decoder, tmp_path: Path) -> None:
    pid, thread = pid_of(decoder), Decoder(LIMITS, False)
    for number, (name, made) in enumerate(FAIR.items()):
        data = made(np.random.default_rng(number))
        for kind, size, whole in ((bytes, 32, False), (bytearray, 224, False), (memoryview, 32, True)):
            found, expected = (
                one.decode(to_decode(kind(data), Geometry(size), whole=whole))[0] for one in (decoder, thread)
            )
            np.testing.assert_array_equal(found, expected, name)
    assert pid_of(decoder) == pid
    (tmp_path / "a.png").write_bytes(GREY)
    for trusted in (tmp_path / "a.png", Image.new("RGB", (9, 9), (7, 7, 7)), picture(7, 9), picture(7)):
        assert decoder.decode(to_decode(trusted, Geometry(SIZE)))[0].tolist() == picture(7).tolist()


def test_parts_are_decoded_together_and_hostile_boxes_fail_alone(decoder: Decoder) -> None:
    pid, data = pid_of(decoder), encode(Image.effect_noise((1, 9000), 60).resize((3000, 9000)).convert("RGB"), "JPEG")
    boxes = [Box(0, 0, 3000, 9000), Box(7, 0, 1, 9000), Box(-1e9, 0, 1e9, 1e9), Box(9, 9, 40, 30)]
    crops = [Crop(data, box) for box in boxes] + [Crop(data, Box(-40, 0, 40, 90), margin=0.5)]
    made, expected = (
        one.decode(*(to_decode(part, Geometry(224), i) for i, part in enumerate(crops)))
        for one in (decoder, Decoder(LIMITS, False))
    )
    for found, wanted in zip(made, expected, strict=True):
        assert str(found) == str(wanted) if isinstance(wanted, Exception) else np.array_equal(found, wanted)
    reasons = [one.reason[:12] if isinstance(one, BadImageError) else "" for one in made]
    assert reasons == ["", "aspect ratio", "expected a b", "", "expected a b"], reasons
    assert pid_of(decoder) == pid and works(decoder)


def test_bad_images_are_named_and_cost_no_process(decoder: Decoder) -> None:
    pid = pid_of(decoder)
    for name, made in IMAGES.items():
        data = made(np.random.default_rng(1))
        for whole in (False, True):
            try:
                (made,) = decoder.decode(to_decode(data, Geometry(64), 5, whole=whole))
            except BadImageError as error:
                made = error
            assert not isinstance(made, BadImageError) or (made.position == 5 and made.reason), name
    assert pid_of(decoder) == pid and works(decoder)


def test_a_process_has_few_rights(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IOSR_FAST_TOKEN", "secret")
    decoder.close()
    decoder.start()
    pid = pid_of(decoder)
    assert b"secret" not in Path(f"/proc/{pid}/environ").read_bytes()
    limits = Path(f"/proc/{pid}/limits").read_text()
    for name in ("Max core file size", "Max file size"):
        assert f"{name:<25} 0                    0" in limits, limits
    assert "Max address space         unlimited" not in limits
    cpu_s = next(line.split()[3] for line in limits.splitlines() if "cpu" in line)
    assert int(cpu_s) <= 6, "ends it even without a parent"
    assert status(pid, "NoNewPrivs") == "1" and status(pid, "Threads") == "1"
    loaded = Path(f"/proc/{pid}/maps").read_text()
    assert "onnxruntime" not in loaded and "torch" not in loaded
    for number in (signal.SIGINT, signal.SIGTERM):  # of a terminal or a service manager, for all of the group
        os.kill(pid, number)
    assert works(decoder) and pid_of(decoder) == pid


@pytest.mark.parametrize(
    "data",
    [SLOW, jpeg(0xC2, 7000, 7000, DC, HIDDEN, *[AC] * 8000), jpeg(0xC0, 7000, 7000, *[scan(1)] * 8000)],
    ids=["large", "progressive scans", "baseline scans"],
)
def test_an_image_that_takes_too_long_is_stopped_alone(data: bytes) -> None:
    with closing(slow_decoder(0.05)) as decoder:
        for whole in (False, True):
            decoder.start()
            pid = pid_of(decoder)
            with pytest.raises(BadImageError, match=r"number 3: it takes more than 0.05 s"):
                decoder.decode(to_decode(data, Geometry(64), 3, whole=whole))
        assert is_gone(pid) and works(decoder)


def test_a_decoder_that_never_answers_is_killed() -> None:
    with closing(slow_decoder(0.1)) as decoder:
        os.kill(pid_of(decoder), signal.SIGSTOP)
        with pytest.raises(BadImageError, match="takes more than"):
            decoder.decode(to_decode(GREY, Geometry(4)))
        assert works(decoder)


def test_an_image_may_not_take_more_memory_than_its_header_claims(decoder: Decoder) -> None:
    pid = pid_of(decoder)
    item = to_decode(SLOW, Geometry(4))
    item.cost = 0  # as if its header claimed nothing
    for _ in range(2):
        assert "more memory" in str(decoder.decode(item)[0])
    assert pid_of(decoder) == pid and works(decoder)


@pytest.mark.parametrize(("number", "message"), [(signal.SIGSEGV, "crashed"), (signal.SIGXCPU, "takes more than 4 s")])
def test_an_image_that_crashes_its_decoder_fails_alone(decoder: Decoder, number: int, message: str) -> None:
    pid = pid_of(decoder)
    threading.Timer(0.1, os.kill, (pid, number)).start()
    with pytest.raises(BadImageError, match=message):
        decoder.decode(to_decode(SLOW, Geometry(4)))
    assert works(decoder) and is_gone(pid)


def test_a_decoder_that_dies_idle_or_while_it_starts_fails_at_most_one_image(monkeypatch: pytest.MonkeyPatch) -> None:
    start = processes._interpreter
    with BatchingClassifier(FakeClassifier(), decode_threads=1, isolated=True) as batching:
        killed: list[int] = []

        def killed_once(*given: Any) -> Any:
            process = start(*given)
            if not killed:
                killed.append(process.pid)
                process.kill()
            return process

        monkeypatch.setattr(processes, "_interpreter", killed_once)
        os.kill(pid_of(decoders_of(batching)[0]), signal.SIGKILL)
        errors = [future.exception(PATIENCE_S) for future in batching.submit_many([GREY] * 4)]
        assert killed and errors[1:] == [None] * 3 and isinstance(errors[0], BadImageError | None)
        assert batching.healthy


@pytest.mark.parametrize(
    "answer",
    [
        wire.ANSWER.pack(0, 60_000, 60_000, 0),
        wire.ANSWER.pack(0, 4, 2, 0),
        wire.ANSWER.pack(9, 4, 4, 0),
        wire.ANSWER.pack(1, 0, 0, 1 << 31),
        wire.ANSWER.pack(0, 4, 4, 0) + b"too few pixels",
        wire.ANSWER.pack(0, 4, 4, 0) + bytes(48) + wire.ANSWER.pack(0, 4, 5, 0) + bytes(60),
        b"abc",
    ],
)
def test_invalid_answers_are_no_pixels(decoder: Decoder, answer: bytes) -> None:
    assert decoder._channel is not None
    pid = pid_of(decoder)
    decoder._channel.close()
    decoder._channel, other = socket.socketpair()
    other.sendall(answer)
    other.shutdown(socket.SHUT_WR)
    with pytest.raises(BadImageError, match="crashed"):
        decoder.decode(*[to_decode(Crop(GREY, Box(0, 0, 9, 9)), Geometry(4))] * 2)
    other.close()
    assert is_gone(pid) and works(decoder)


def test_decoders_that_do_not_restart_are_unhealthy_and_retried(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[float] = []
    start = processes._interpreter
    with BatchingClassifier(FakeClassifier(), decode_threads=1, isolated=True) as batching:
        assert labels([batching.submit(GREY)]) == [7] and batching.healthy
        with monkeypatch.context() as patch:  # ends before the close, which waits for a decoder
            patch.setattr(processes, "_MAIN", "raise ImportError('gone')")
            patch.setattr(processes, "_interpreter", lambda *a: (started.append(time.monotonic()), start(*a))[1])
            os.kill(pid_of(decoders_of(batching)[0]), signal.SIGKILL)
            first = batching.submit(GREY)  # fails, or waits where the decoder has seen before that its process is gone
            until(lambda: not batching.healthy)
            assert "gone" in str(batching.last_error)
            waits = batching.submit(GREY)
            time.sleep(0.5)
            assert len(started) <= 5 and not waits.done(), "after pauses"
        assert labels([waits]) == [7] and batching.healthy
        assert isinstance(first.exception(PATIENCE_S), BadImageError | None)


def test_whole_images_come_from_the_decoders() -> None:
    photo = encode(Image.effect_noise((400, 300), 60).convert("RGB"), "JPEG")
    batching = BatchingClassifier(FakeClassifier(), decode_threads=1, isolated=True)
    expected = np.asarray(open_image(photo, geometry=batching.classifier.encoder.geometry))
    assert expected.shape == (38, 50, 3), "as a fit decodes it"
    np.testing.assert_array_equal(batching.decode_whole(photo, client="a").result(PATIENCE_S), expected)
    assert isinstance(batching.decode_whole(b"abc", 4).exception(PATIENCE_S), BadImageError)
    assert isinstance(batching.decode_whole(photo, deadline_s=-1).exception(PATIENCE_S), DeadlineExceededError)
    batching.close()
    with pytest.raises(ClosedError):
        batching.decode_whole(photo)


def test_close_ends_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_CLOCK_PER_CPU", 100.0)  # the others may take longer than four seconds
    batching = BatchingClassifier(FakeClassifier(), decode_threads=2, isolated=True)
    pids = [pid_of(decoder) for decoder in decoders_of(batching)]
    assert labels(batching.submit_many([GREY] * 4)) == [7] * 4
    os.kill(pids[0], signal.SIGSTOP)
    late = batching.submit_many([GREY] * 9)
    until(lambda: sum(future.done() for future in late) == 8)
    batching.close(0.1)  # does not wait for as long as an image may take
    assert sum(isinstance(future.exception(PATIENCE_S), ClosedError) for future in late) == 1
    until(lambda: all(is_gone(pid) for pid in pids))


def test_nothing_is_left_of_a_server_that_is_killed() -> None:
    program = f"""
import time
from iosr_fast.serving.batching import BatchingClassifier, engine
from tests.serving.batching_fakes import FakeClassifier, answer
engine.predict = answer
batching = BatchingClassifier(FakeClassifier(), decode_threads=2, isolated=True)
batching.submit({GREY!r}).result()
print(*[decoder._process.pid for decoder in batching._workers._decoders], flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, cwd=ROOT) as server:
        assert server.stdout is not None
        pids = [int(pid) for pid in server.stdout.readline().split()]
        assert len(pids) == 2 and not any(is_gone(pid) for pid in pids)
        server.kill()
        server.wait()
        until(lambda: all(is_gone(pid) for pid in pids))
