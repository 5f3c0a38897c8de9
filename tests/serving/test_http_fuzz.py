"""Hostile uploads, the same ones each time: none may bring the server to fail, to hang or to grow."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest

from iosr_fast.serving.batching import DecodeLimits
from tests.serving.hostile import hostile_uploads
from tests.serving.hostile_images import FAIR
from tests.serving.http_client import queries, serving

pytestmark = pytest.mark.slow

UPLOADS = int(os.environ.get("FUZZ_UPLOADS", "140"))
GROWTH_MB = 200  # decoders, their threads and the allocator's arenas, however many uploads there are


def rss_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
def test_hostile_uploads_are_answered_and_leave_nothing() -> None:
    limits = DecodeLimits(max_pixels=50_000_000)
    with serving(batching={"limits": limits, "decode_threads": 2, "isolated": True}) as client:
        for image in queries()[:3]:
            assert client.predict(image).status_code == 200
        before = rss_mb()
        answers, fair = Counter[int](), 0
        for upload in hostile_uploads(UPLOADS, seed=20260):
            response = client.ask("POST", upload.path, content=upload.body, headers=upload.headers)
            answers[response.status_code] += 1
            given_up = response.status_code == 504 and upload.kind == "no time"
            assert response.status_code < 500 or response.status_code == 503 or given_up, upload
            assert response.headers["Content-Type"] == "application/json"
            body = response.json()
            assert set(body) in ({"error"}, {"version", "latency_ms", "predictions"})
            if upload.fair:
                fair += 1
                assert response.status_code == 200, (upload, response.text)
        assert sum(answers.values()) == UPLOADS and fair >= UPLOADS // 70 * len(FAIR)
        assert {200, 400, 413, 415, 422} <= set(answers)
        service = client.service
        assert service.batching.pending == 0 and service.bodies.used == 0 and service.batching.healthy
        assert rss_mb() - before < GROWTH_MB
        assert client.predict(queries()[0]).status_code == 200
