"""Decoders in processes, alone and behind a server: they decode as threads do, are confined, are killed where an image
goes too far, which fails alone, and none is left."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms, features

from iosr_fast.exceptions import BadImageError, ClosedError, DeadlineExceededError
from iosr_fast.images.crop import Box, Crop
from iosr_fast.images.decoder_process import wire
from iosr_fast.images.geometry import Geometry
from iosr_fast.serving.batching import BatchingClassifier, DecodeLimits
from iosr_fast.serving.batching import decoder as processes
from iosr_fast.serving.batching.decoder import Decoder
from tests import ROOT
from tests.images.jpegs import COMMENT, END, jpeg, scan, segment
from tests.pictures import encode
from tests.serving.batching_fakes import PATIENCE_S, SIZE, FakeClassifier, labels, picture, to_decode
from tests.serving.decoder_attacks import attacks
from tests.serving.hostile_images import FAIR, IMAGES
from tests.serving.http_client import AUTHORISED, Client, error_of, form, load, probe_soon, serving
from tests.waiting import wait_until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="processes are watched by /proc"),
]

LIMITS = DecodeLimits(8 << 20, 50_000_000)
SEVEN = encode(np.full((9, 9, 3), 7, np.uint8))
SLOW = encode(Image.new("RGB", (7000, 7000)))  # fair, and far longer than a tenth of a second
DC, AC = scan(1, 2, 3, band=(0, 0, 0)), scan(1, band=(1, 63, 0))
HIDDEN = segment(COMMENT, END)  # no end for a decoder
NO_HURRY = "?deadline_ms=30000"


def started(limits: DecodeLimits = LIMITS) -> Decoder:
    made = Decoder(limits, True)
    made.start()
    return made


@pytest.fixture
def decoder() -> Iterator[Decoder]:
    with closing(started()) as made:
        yield made


def pid_of(decoder: Decoder) -> int:
    assert decoder._process is not None
    return decoder._process.pid


def pids_of(batching: BatchingClassifier) -> list[int]:
    return [pid_of(decoder) for decoder in batching._workers._decoders]


def works(decoder: Decoder) -> bool:
    decoder.start()
    return decoder.decode(to_decode(SEVEN, Geometry(SIZE)))[0].tolist() == picture(7).tolist()


def status(pid: int, name: str) -> str:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(line.split(None, 1)[1] for line in lines if line.startswith(f"{name}:"))


def is_gone(pid: int) -> bool:
    """Ended, and no zombie of this process."""
    try:
        return status(pid, "State").startswith("Z") and status(pid, "PPid") != str(os.getpid())
    except (FileNotFoundError, ProcessLookupError):
        return True


def all_formats() -> dict[str, bytes]:
    """What the library reads beyond JPEG, PNG and WebP."""
    noise = Image.effect_noise((90, 70), 50).convert("RGB")
    deep = Image.fromarray(np.arange(6300, dtype=np.uint16).reshape(70, 90) * 10)
    lab = ImageCms.profileToProfile(noise, *map(ImageCms.createProfile, ("sRGB", "LAB")), outputMode="LAB")
    found = {kind: encode(noise, kind) for kind in ("TIFF", "GIF", "BMP", "PPM")}
    found |= {"deep PNG": encode(deep), "deep TIFF": encode(deep, "TIFF"), "LAB": encode(lab, "TIFF")}
    if features.check("avif"):
        found["AVIF"] = encode(noise, "AVIF")
    with suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()
        found["HEIC"] = encode(noise, "HEIF")
    return found


# --- what they answer ---


def answers(decoder: Decoder, *items: Any) -> list[Any]:
    """Pixels, and of BadImageErrors positions with the beginnings of their reasons."""
    try:
        made = decoder.decode(*items)
    except BadImageError as error:
        made = [error]
    return [f"{one.position} {one.reason[:9]}" if isinstance(one, BadImageError) else one.tolist() for one in made]


def test_a_process_answers_what_a_thread_does(decoder: Decoder) -> None:
    """To the last bit, and hostile images end no process."""
    pid, thread = pid_of(decoder), Decoder(LIMITS, False)
    tall = encode(Image.effect_noise((1, 9000), 60).resize((3000, 9000)).convert("RGB"), "JPEG")
    boxes = [Box(0, 0, 3000, 9000), Box(7, 0, 1, 9000), Box(-1e9, 0, 1e9, 1e9), Box(9, 9, 40, 30)]
    crops = [Crop(tall, box) for box in boxes] + [Crop(tall, Box(-40, 0, 40, 90), margin=0.5)]
    parts = [to_decode(part, Geometry(224), i) for i, part in enumerate(crops)]
    found = answers(decoder, *parts)
    assert found == answers(thread, *parts)
    assert [one for one in found if isinstance(one, str)] == ["1 aspect ra", "2 expected ", "4 expected "]
    for number, (name, made) in enumerate({**FAIR, **all_formats(), **IMAGES}.items()):
        data = made if isinstance(made, bytes) else made(np.random.default_rng(number))
        for kind, whole in ((bytes, False), (bytearray, False), (memoryview, True)):
            found, expected = (
                answers(one, to_decode(kind(data), Geometry(64), 5, whole=whole)) for one in (decoder, thread)
            )
            if name in IMAGES or (whole and name not in FAIR):  # one may refuse what the other reads
                assert not isinstance(found[0], str) or re.match("5 .", found[0]), name
            else:
                assert found == expected and not isinstance(found[0], str), name
    for trusted in (Image.new("RGB", (9, 9), (7, 7, 7)), picture(7, 9), picture(7)):
        assert decoder.decode(to_decode(trusted, Geometry(SIZE)))[0].tolist() == picture(7).tolist()
    assert pid_of(decoder) == pid and works(decoder)


def test_images_of_changes_are_decoded_by_processes_too() -> None:
    photos = [encode(Image.effect_noise((90, 70), 50 + i).convert("RGB"), "JPEG") for i in range(2)]
    with serving(batching={"isolated": True, "decode_threads": 1, "limits": DecodeLimits(timeout_s=0.2)}) as client:
        ask = partial(client.ask, "POST", "/v1/classes", data={"name": "x"}, headers=AUTHORISED)
        bad = ask(files=form(photos[0], SLOW))
        assert error_of(bad, 422) == "bad_image" and "number 1" in bad.json()["error"]["message"]
        assert client.served.classifier.version == 1
        added = ask(files=form(*photos))
        assert added.status_code == 201, added.text
        library = load()
        library.add_class("x", photos)
        made, wanted = (c.predict_proba(photos) for c in (client.served.classifier, library))
        np.testing.assert_allclose(made, wanted, atol=1e-6)
        assert client.served.classifier.picture(added.json()["example_ids"][0]) == library.picture("e24")


# --- what they may do ---


def run_in_decoders(monkeypatch: pytest.MonkeyPatch, lacks: str, main: str) -> None:
    """New decoders run `main`, on a kernel that lacks these parts."""
    parts = "".join(f"sandbox._{part.lower()} = lambda: False; " for part in lacks.split(" and ") if part)
    start = "import sys; sys.path[:] = sys.argv[2:]; from iosr_fast.images.decoder_process import child, sandbox; "
    monkeypatch.setattr(processes, "_MAIN", start + parts + main)


ALL = {*attacks(Path(), 0, 0)}
BY_LANDLOCK = {"truncate a file", "remove a file", "create a file", "list a folder", "read a token", "start a program"}
BY_LANDLOCK |= {"trace a process", "read a process's memory"}


@pytest.mark.parametrize(("lacks", "refused"), [("", ALL), ("seccomp", BY_LANDLOCK)], ids=["both", "Landlock"])
def test_a_decoder_that_was_taken_over_can_do_nothing(lacks: str, refused: set[str], monkeypatch, tmp_path) -> None:
    """As root, too."""
    for name in ("a", "b", "program"):
        (tmp_path / name).write_text("#!/bin/sh\n")
    (tmp_path / "program").chmod(0o755)
    run_in_decoders(monkeypatch, lacks, "from tests.serving.decoder_attacks import main; main()")
    with (
        closing(started()) as decoder,
        subprocess.Popen(["sleep", "60"]) as victim,
        socket.create_server(("127.0.0.1", 0)) as listener,
    ):
        try:
            if decoder.warning and not decoder.warning.endswith(f"lacks {lacks}"):
                pytest.skip(decoder.warning)
            opened = os.listdir(f"/proc/{pid_of(decoder)}/fd")
            assert len(opened) == 4, "its socket, /dev/null, its standard error, and its own statm"
            given = json.dumps([str(tmp_path), victim.pid, listener.getsockname()[1]])
            (made,) = decoder.decode(to_decode(given.encode(), Geometry(4)))
        finally:
            victim.kill()
    assert refused.isdisjoint(json.loads(made.reason))


@pytest.mark.parametrize("lacks", ["", "Landlock", "Landlock and seccomp"])
def test_a_kernel_that_can_not_confine_is_told_of(lacks: str, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    run_in_decoders(monkeypatch, lacks, "child.main()")
    with serving(batching={"isolated": True, "decode_threads": 2}) as client:
        ready = client.get("/readyz")
        assert ready.status_code == 200 and ready.json()["detail"].endswith(lacks and f"this system lacks {lacks}")
        assert bool(ready.json()["detail"]) == bool(lacks)
    assert caplog.text.count("are not confined") == bool(lacks)


def test_a_process_has_few_rights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IOSR_FAST_TOKEN", "secret")
    with closing(started()) as decoder:
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


# --- images that go too far ---


@pytest.mark.parametrize(
    "data",
    [SLOW, jpeg(0xC2, 7000, 7000, DC, HIDDEN, *[AC] * 8000), jpeg(0xC0, 7000, 7000, *[scan(1)] * 8000)],
    ids=["large", "progressive scans", "baseline scans"],
)
def test_an_image_that_takes_too_long_is_stopped_alone(data: bytes) -> None:
    with closing(started(DecodeLimits(max_pixels=50_000_000, timeout_s=0.05))) as decoder:
        for whole in (False, True):
            decoder.start()
            pid = pid_of(decoder)
            with pytest.raises(BadImageError, match=r"number 3: it takes more than 0.05 s"):
                decoder.decode(to_decode(data, Geometry(64), 3, whole=whole))
        assert is_gone(pid) and works(decoder)


def test_an_image_takes_no_more_memory_than_its_header_claims(decoder: Decoder) -> None:
    pid, item = pid_of(decoder), to_decode(SLOW, Geometry(4))
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


@pytest.mark.parametrize(
    "answer",
    [
        wire.ANSWER.pack(0, 60_000, 60_000, 0),
        wire.ANSWER.pack(9, 4, 4, 0),
        wire.ANSWER.pack(1, 0, 0, 1 << 31),
        wire.ANSWER.pack(0, 4, 4, 0) + b"too few pixels",
        wire.ANSWER.pack(0, 4, 4, 0) + bytes(48) + wire.ANSWER.pack(0, 4, 5, 0) + bytes(60),
    ],
)
def test_invalid_answers_are_no_pixels(decoder: Decoder, answer: bytes) -> None:
    assert decoder._channel is not None
    pid = pid_of(decoder)
    decoder._channel.close()
    decoder._channel, other = socket.socketpair()
    with other:
        other.sendall(answer)
        other.shutdown(socket.SHUT_WR)
        with pytest.raises(BadImageError, match="crashed"):
            decoder.decode(*[to_decode(Crop(SEVEN, Box(0, 0, 9, 9)), Geometry(4))] * 2)
    assert is_gone(pid) and works(decoder)


def test_health_goes_through_a_decoder_and_a_busy_one_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    probe_soon(monkeypatch)
    with serving(batching={"isolated": True, "decode_threads": 1, "limits": DecodeLimits(timeout_s=1.5)}) as client:
        assert client.predict(SEVEN, query=NO_HURRY).status_code == 200
        (pid,) = pids_of(client.served.batching)
        os.kill(pid, signal.SIGSTOP)  # it never answers
        held = client.start("POST", f"/v1/predict{NO_HURRY}", content=SEVEN)
        wait_until(lambda: client.served.batching.decoders_are_busy)
        assert client.get("/healthz").status_code == 200  # it takes long, within its limits
        client.served.engine_metrics.last_answer -= 61
        assert "no image was classified for" in client.get("/healthz").json()["detail"]
        assert held.result(20).status_code == 422
        assert client.predict(SEVEN, query=NO_HURRY).status_code == 200 and pids_of(client.served.batching) != [pid]
        assert client.get("/healthz").status_code == 200  # it was killed, another one works


def test_memory_is_back_after_a_burst_of_large_pngs() -> None:
    burst = encode(Image.new("RGB", (5000, 5000)), compress_level=9)  # of which the allocator may keep memory
    with serving(batching={"isolated": True, "decode_threads": 2}) as client:
        assert client.predict(SEVEN).status_code == 200
        before = resident_mb(client)
        held = [client.start("POST", "/v1/predict?deadline_ms=60000", files=form(*[burst] * 2)) for _ in range(2)]
        assert client.predict(SEVEN, query=NO_HURRY).status_code == 200  # in its turn
        assert all(one.result(60).status_code == 200 for one in held)
        wait_until(lambda: resident_mb(client) <= before + 60, 30)  # 10 where nothing else runs


def resident_mb(client: Client) -> float:
    """Of the server and its decoders."""
    statms = [Path(f"/proc/{pid}/statm").read_text() for pid in (os.getpid(), *pids_of(client.served.batching))]
    return sum(int(statm.split()[1]) for statm in statms) * os.sysconf("SC_PAGE_SIZE") / 2**20


# --- how they end ---


def test_a_decoder_that_dies_idle_or_while_it_starts_costs_at_most_one_image(monkeypatch: pytest.MonkeyPatch) -> None:
    start, killed = processes._interpreter, list[int]()

    def killed_once(*given: Any) -> Any:
        process = start(*given)
        if not killed:
            killed.append(process.pid)
            process.kill()
        return process

    with BatchingClassifier(FakeClassifier(), decode_threads=1, isolated=True) as batching:
        monkeypatch.setattr(processes, "_interpreter", killed_once)
        os.kill(pids_of(batching)[0], signal.SIGKILL)
        errors = [future.exception(PATIENCE_S) for future in batching.submit_many([SEVEN] * 4)]
        assert killed and errors[1:] == [None] * 3 and isinstance(errors[0], BadImageError | None)
        assert batching.healthy


def test_decoders_that_do_not_restart_are_unhealthy_and_retried(monkeypatch: pytest.MonkeyPatch) -> None:
    start, times = processes._interpreter, list[float]()
    with BatchingClassifier(FakeClassifier(), decode_threads=1, isolated=True) as batching:
        assert labels([batching.submit(SEVEN)]) == [7] and batching.healthy
        with monkeypatch.context() as patch:  # ends before the close, which waits for a decoder
            patch.setattr(processes, "_MAIN", "raise ImportError('gone')")
            patch.setattr(processes, "_interpreter", lambda *a: (times.append(time.monotonic()), start(*a))[1])
            os.kill(pids_of(batching)[0], signal.SIGKILL)
            first = batching.submit(SEVEN)  # fails, or waits where the decoder has seen before that its process is gone
            wait_until(lambda: not batching.healthy)
            assert "gone" in str(batching.last_error)
            waits = batching.submit(SEVEN)
            wait_until(lambda: len(times) >= 3)
            assert times[2] - times[0] >= 0.29 and not waits.done(), "after pauses that grow"
        assert labels([waits]) == [7] and batching.healthy
        assert isinstance(first.exception(PATIENCE_S), BadImageError | None)


def test_close_ends_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_CLOCK_PER_CPU", 100.0)  # the others may take longer than four seconds
    batching = BatchingClassifier(FakeClassifier(), decode_threads=2, isolated=True)
    pids = pids_of(batching)
    assert labels(batching.submit_many([SEVEN] * 4)) == [7] * 4
    assert isinstance(batching.decode_whole(SEVEN, deadline_s=-1).exception(PATIENCE_S), DeadlineExceededError)
    os.kill(pids[0], signal.SIGSTOP)
    late = batching.submit_many([SEVEN] * 9)
    wait_until(lambda: sum(future.done() for future in late) == 8)
    batching.close(0.1)  # does not wait for as long as an image may take
    assert sum(isinstance(future.exception(PATIENCE_S), ClosedError) for future in late) == 1
    wait_until(lambda: all(is_gone(pid) for pid in pids))
    with pytest.raises(ClosedError):
        batching.decode_whole(SEVEN)


def test_nothing_is_left_of_a_server_that_is_killed() -> None:
    program = f"""
import time
from iosr_fast.serving.batching import BatchingClassifier, engine
from tests.serving.batching_fakes import FakeClassifier, answer
engine.predict = answer
batching = BatchingClassifier(FakeClassifier(), decode_threads=2, isolated=True)
batching.submit({SEVEN!r}).result()
print(*[decoder._process.pid for decoder in batching._workers._decoders], flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, cwd=ROOT) as server:
        assert server.stdout is not None
        pids = [int(pid) for pid in server.stdout.readline().split()]
        assert len(pids) == 2 and not any(is_gone(pid) for pid in pids)
        server.kill()
        server.wait()
        wait_until(lambda: all(is_gone(pid) for pid in pids))
