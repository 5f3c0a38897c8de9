"""Batches of pictures over HTTP against the engine alone, in turns: each runs while the other is idle."""

from __future__ import annotations

import asyncio
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np

from tools.serving_load.bare_engine import BareEngine
from tools.serving_load.client import Client
from tools.serving_load.queries import Queries
from tools.serving_load.server_process import ServerProcess
from tools.serving_load.usage import Usage

_CONCURRENT = 4  # requests: one is encoded, one is decoded, one is on its way, one is being answered
_WARMUP_S = 1.0
_LEAST = 8  # answers that a rate is made from, however long they take


async def measure_throughput(
    server: ServerProcess, queries: Queries, bundle: Path, batch: int, threads: int, seconds: float, rounds: int
) -> dict[str, Any]:
    """{"batch", "http_images_per_s", "engine_images_per_s", "ratio", ...}: medians over `rounds` of `seconds` each.
    Both engines have `threads`."""
    numbers = [number % len(queries) for number in range(batch)]
    images = [queries.images[number] for number in numbers]
    expected = [queries.labels[number] for number in numbers]
    http: list[float] = []
    engine: list[float] = []
    wrong, shares = 0, []
    async with BareEngine(bundle, batch, threads) as bare, Client(server.url, queries, deadline_ms=60_000) as client:
        for _ in range(rounds):
            engine.append(await bare.run(seconds))
            await asyncio.sleep(0.1)  # its threads go on spinning for a while
            usage = Usage(server)
            rate, wrong_here = await _over_http(client, images, expected, seconds)
            shares.append(usage.shares())
            http.append(rate)
            wrong += wrong_here
            await asyncio.sleep(0.1)
    ratios = [a / b for a, b in zip(http, engine, strict=True)]
    return {
        "batch": batch,
        "engine_threads": threads,
        "http_images_per_s": round(statistics.median(http), 1),
        "engine_images_per_s": round(statistics.median(engine), 1),
        "ratio": round(statistics.median(ratios), 4),
        "ratios": [round(ratio, 4) for ratio in ratios],
        "concurrent_requests": _CONCURRENT,
        "seconds": seconds,
        "wrong": wrong,
        **{name: shares[len(shares) // 2][name] for name in shares[0]},
    }


async def _over_http(client: Client, images: list[bytes], expected: list[str], seconds: float) -> tuple[float, int]:
    """(images a second, wrong labels): _CONCURRENT requests at a time; the rate is the slope of images answered over
    time, so neither the first answer's wait nor the last ones' running out counts."""
    start = time.perf_counter()
    until = start + _WARMUP_S + seconds
    done: list[float] = []
    wrong = 0

    async def use() -> None:
        nonlocal wrong
        while time.perf_counter() < until or len(done) < _LEAST:
            status, answer = await client.post_form(None, images)
            if status != 200:
                raise RuntimeError(f"expected 200 for {len(expected)} pictures, got {status}: {answer}")
            done.append(time.perf_counter())
            labels = [prediction.get("label") for prediction in answer["predictions"]]
            wrong += sum(a != b for a, b in zip(labels, expected, strict=True))

    await asyncio.gather(*(use() for _ in range(_CONCURRENT)))
    steady = sorted(at for at in done if start + _WARMUP_S <= at <= until)
    if len(steady) < _LEAST:
        steady = sorted(done)[-_LEAST:]
    slope = np.polyfit(np.array(steady) - start, np.arange(len(steady)) * len(expected), 1)[0]
    return float(slope), wrong
