"""Hostile uploads, the same ones each time: none may bring the server to fail, to hang or to grow."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from iosr_fast.serving.batching import DecodeLimits
from tests.serving.hostile_images import FAIR, IMAGES, Rng, any_image
from tests.serving.http_client import queries, serving
from tests.serving.test_http_uploads import part

pytestmark = pytest.mark.slow

UPLOADS = int(os.environ.get("FUZZ_UPLOADS", "100"))
GROWTH_MB = 200  # decoders, their threads and the allocator's arenas, however many uploads there are


def form_of(*images: bytes, header: str = 'form-data; name="images"') -> bytes:
    return b"".join(part(image, header) for image in images) + b"--x--\r\n"


FORMS: dict[str, Callable[[Rng], bytes]] = {
    "form of good and bad": lambda rng: form_of(any_image(rng), *(IMAGES[k](rng) for k in rng.choice([*IMAGES], 4))),
    "form truncated": lambda rng: (data := form_of(any_image(rng)))[: int(rng.integers(1, len(data) - 5))],
    "form of a strange name": lambda rng: form_of(b"", header=f'form-data; name="{rng.bytes(40).decode("latin-1")}"'),
    "form of too many": lambda rng: form_of(*[b"x"] * 1_000),
    "form within a form": lambda rng: form_of(form_of(any_image(rng))),
}
# Each with a valid image: a query, and headers.
REQUESTS: dict[str, tuple[str, dict[str, str]]] = {
    "strange type": ("", {"Content-Type": ";;;=,\x7f"}),
    "parts": (f"?boxes=[{','.join(['[0,0,1,60000],[-1e9,0,1e9,1],[0,0,1e-300,1e-300]'] * 20)}]", {}),
    "huge parts": ("?boxes=[[0,0,1e308,1e308]]", {}),
    "no time": ("?deadline_ms=1", {}),
    "long query": ("?" + "a" * 20_000, {}),
    "strange id": ("", {"X-Request-ID": '"}\x1b[31m{"'}),
}
KINDS = [*IMAGES, *FAIR, *FORMS, *REQUESTS]


def hostile_uploads() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """What any client could send, all kinds in turn: kind, query, and options of the request."""
    types = ("image/png", "image/jpeg", "application/octet-stream", "image/svg+xml")
    for i in range(UPLOADS):
        rng, kind, query = np.random.default_rng([20260, i]), KINDS[i % len(KINDS)], ""
        headers = {"Content-Type": str(rng.choice(types))}
        if kind in FORMS:
            headers = {"Content-Type": "multipart/form-data; boundary=x"}
        elif kind in REQUESTS:
            query, special = REQUESTS[kind]
            headers |= special
        make = {**IMAGES, **FAIR, **FORMS}.get(kind, any_image)
        yield kind, query, {"content": make(rng), "headers": headers}


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
        answers = Counter[int]()
        for kind, query, options in hostile_uploads():
            response = client.ask("POST", f"/v1/predict{query}", **options)
            answers[response.status_code] += 1
            given_up = response.status_code == 504 and kind == "no time"
            assert response.status_code < 500 or response.status_code == 503 or given_up, kind
            assert response.headers["Content-Type"] == "application/json"
            assert set(response.json()) in ({"error"}, {"version", "latency_ms", "predictions"})
            assert response.status_code == 200 or kind not in FAIR, (kind, response.text)
        assert sum(answers.values()) == UPLOADS >= len(KINDS) and {200, 400, 413, 422} <= set(answers)
        service = client.served
        assert service.batching.pending == 0 and client.site.bodies.used == 0 and service.batching.healthy
        assert rss_mb() - before < GROWTH_MB
        assert client.predict(queries()[0]).status_code == 200
