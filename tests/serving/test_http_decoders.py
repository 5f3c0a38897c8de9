"""Hostile images sent to a server whose decoders are processes: others are answered, memory comes back."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms, features

from iosr_fast.images.geometry import Geometry
from iosr_fast.images.preprocess import decode_pixels
from iosr_fast.serving.batching import decoder as processes
from iosr_fast.serving.batching.decoder import Decoder
from iosr_fast.serving.http.settings import Settings
from tests.pictures import GREY, encode
from tests.serving.batching_fakes import to_decode
from tests.serving.decoder_attacks import attacks
from tests.serving.http_client import (
    AUTHORISED,
    Client,
    error_of,
    form,
    load,
    probe_soon,
    serving,
)
from tests.waiting import wait_until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="processes are watched by /proc"),
]

LIMITS = Settings(decode_timeout_s=2.0).decode_limits
SLOW = encode(Image.new("RGB", (7000, 7000)))  # fair, and far longer than a tenth of a second


@pytest.fixture(scope="module")
def client() -> Any:
    with serving(batching={"isolated": True, "decode_threads": 2, "limits": LIMITS}) as made:
        yield made


def pids(client: Client) -> list[int]:
    return [decoder._process.pid for decoder in client.served.batching._workers._decoders]


def resident_mb(process: int) -> float:
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def test_images_of_changes_are_decoded_by_processes_too() -> None:
    limits = Settings(decode_timeout_s=0.2).decode_limits
    photos = [encode(Image.effect_noise((90, 70), 50 + i).convert("RGB"), "JPEG") for i in range(2)]
    with serving(batching={"isolated": True, "decode_threads": 1, "limits": limits}) as client:
        bad = form(photos[0], SLOW)
        added = client.ask("POST", "/v1/classes", data={"name": "x"}, files=bad, headers=AUTHORISED)
        assert error_of(added, 422) == "bad_image" and "number 1" in added.json()["error"]["message"]
        assert client.served.classifier.version == 1
        added = client.ask("POST", "/v1/classes", data={"name": "x"}, files=form(*photos), headers=AUTHORISED)
        assert added.status_code == 201, added.text
        class_id = added.json()["class_id"]
        more = client.ask("POST", f"/v1/classes/{class_id}/examples", files=form(photos[1]), headers=AUTHORISED)
        assert more.status_code == 200
        library = load()
        library.add_class("x", photos)
        library.add_examples(class_id, photos[1:])
        made, wanted = (c.predict_proba(photos) for c in (client.served.classifier, library))
        np.testing.assert_allclose(made, wanted, atol=1e-6)
        assert client.served.classifier.picture(added.json()["example_ids"][0]) == library.picture("e24")


def test_health_goes_through_a_decoder_and_a_busy_one_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    probe_soon(monkeypatch)
    limits = Settings(decode_timeout_s=1.5).decode_limits
    with serving(batching={"isolated": True, "decode_threads": 1, "limits": limits}) as client:
        assert client.predict(GREY, query="?deadline_ms=30000").status_code == 200
        (pid,) = pids(client)
        os.kill(pid, signal.SIGSTOP)  # it never answers
        held = client.start("POST", "/v1/predict?deadline_ms=30000", content=GREY)
        wait_until(lambda: client.served.batching.decoders_are_busy)
        time.sleep(0.02)
        assert client.get("/healthz").status_code == 200  # it takes long, within its limits
        client.served.engine_metrics.last_answer -= 61
        assert "no image was classified for" in client.get("/healthz").json()["detail"]
        assert held.result(20).status_code == 422
        assert client.predict(GREY, query="?deadline_ms=30000").status_code == 200 and pids(client) != [pid]
        assert client.get("/healthz").status_code == 200  # it was killed, another one works


def test_memory_is_back_after_a_burst_of_large_pngs(client: Client) -> None:
    assert client.predict(GREY).status_code == 200
    burst = encode(Image.new("RGB", (5000, 5000)), compress_level=9)  # of which the allocator may keep memory
    before = sum(map(resident_mb, [os.getpid(), *pids(client)]))
    held = [client.start("POST", "/v1/predict?deadline_ms=60000", files=form(*[burst] * 2)) for _ in range(2)]
    assert client.predict(GREY, query="?deadline_ms=30000").status_code == 200  # in its turn
    assert all(one.result(60).status_code == 200 for one in held)
    everybody = [os.getpid(), *pids(client)]
    until = time.monotonic() + 30  # 10 where nothing else runs
    while sum(map(resident_mb, everybody)) > before + 60:
        assert time.monotonic() < until
        time.sleep(0.1)


def run_in_decoders(monkeypatch: pytest.MonkeyPatch, lacks: str, main: str) -> None:
    """New decoders run `main`, on a kernel that lacks these parts."""
    parts = "".join(f"sandbox._{part.lower()} = lambda: False; " for part in lacks.split(" and ") if part)
    start = "import sys; sys.path[:] = sys.argv[2:]; from iosr_fast.images.decoder_process import child, sandbox; "
    monkeypatch.setattr(processes, "_MAIN", start + parts + main)


ALL = {*attacks(Path(), 0, 0)}
BY_LANDLOCK = {"truncate a file", "remove a file", "create a file", "list a folder", "read a token", "start a program"}
BY_LANDLOCK |= {"trace a process", "read a process's memory"}


@pytest.mark.parametrize(("lacks", "refused"), [("", ALL), ("seccomp", BY_LANDLOCK)], ids=["both", "Landlock"])
def test_a_decoder_that_was_taken_over_can_do_nothing(
    lacks: str, refused: set[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As root, too."""
    program = tmp_path / "program"
    for path in (tmp_path / "a", tmp_path / "b", program):
        path.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    run_in_decoders(monkeypatch, lacks, "from tests.serving.decoder_attacks import main; main()")
    decoder = Decoder(LIMITS, isolated=True)
    decoder.start()
    if decoder.warning and not decoder.warning.endswith(f"lacks {lacks}"):
        pytest.skip(decoder.warning)
    opened = os.listdir(f"/proc/{decoder._process.pid}/fd")  # type: ignore[union-attr]
    assert len(opened) == 4, "its socket, /dev/null, its standard error, and its own statm"
    with (
        subprocess.Popen(["sleep", "60"]) as victim,
        socket.create_server(("127.0.0.1", 0)) as listener,
    ):
        try:
            given = json.dumps([str(tmp_path), victim.pid, listener.getsockname()[1]])
            (made,) = decoder.decode(to_decode(given.encode(), Geometry(4)))
        finally:
            decoder.close()
            victim.kill()
    assert refused.isdisjoint(json.loads(made.reason))


def test_confined_decoders_read_what_the_library_reads() -> None:
    picture = Image.effect_noise((90, 70), 50).convert("RGB")
    deep = Image.fromarray(np.arange(6300, dtype=np.uint16).reshape(70, 90) * 10)
    lab = ImageCms.profileToProfile(picture, *map(ImageCms.createProfile, ("sRGB", "LAB")), outputMode="LAB")
    images = {kind: encode(picture, kind) for kind in ("TIFF", "GIF", "BMP", "PPM")}
    images |= {"deep PNG": encode(deep), "deep TIFF": encode(deep, "TIFF"), "LAB": encode(lab, "TIFF")}
    if features.check("avif"):
        images["AVIF"] = encode(picture, "AVIF")
    with suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()
        images["HEIC"] = encode(picture, "HEIF")
    decoder = Decoder(LIMITS, isolated=True)
    decoder.start()
    for name, data in images.items():
        (made,) = decoder.decode(to_decode(data, Geometry(64)))
        np.testing.assert_array_equal(made, decode_pixels(data, Geometry(64)), name)
    decoder.close()


@pytest.mark.parametrize("lacks", ["", "Landlock", "Landlock and seccomp"])
def test_a_kernel_that_can_not_confine_is_told_of(lacks: str, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    run_in_decoders(monkeypatch, lacks, "child.main()")
    with serving(batching={"isolated": True, "decode_threads": 2}) as client:
        ready = client.get("/readyz")
        assert ready.status_code == 200 and ready.json()["detail"].endswith(lacks and f"this system lacks {lacks}")
        assert bool(ready.json()["detail"]) == bool(lacks)
    assert caplog.text.count("are not confined") == bool(lacks)
