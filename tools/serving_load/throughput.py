"""Batches of pictures over HTTP against the engine alone, in turns: each runs while the other is idle."""

from __future__ import annotations

import asyncio
import multiprocessing
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from iosr_fast.classifier import Classifier
from iosr_fast.encoders.encoder import Encoder
from tools.demo.bundle import held_out_queries
from tools.serving_load.client import MIN_ANSWERS, Client, Queries, steady_rps
from tools.serving_load.server import ServerProcess, Usage

_CONCURRENT = 4  # requests: one is encoded, one decoded, one in transfer, one being answered
_WARMUP_S = 1.0
_PAUSE_S = 0.1  # after each run, because threads of an engine spin for a while


@cache
def _engine(bundle: Path, batch: int, threads: int) -> tuple[Encoder, np.ndarray]:
    """A warm encoder and a batch of pixels for it."""
    encoder = Classifier.load(bundle, threads=threads).encoder
    pictures = held_out_queries()[0]
    side = encoder.image_size
    if pictures.shape[1] != side:
        pictures = np.random.default_rng(0).integers(0, 256, (batch, side, side, 3), np.uint8)
    pixels = np.ascontiguousarray(np.resize(pictures, (batch, side, side, 3)))
    for _ in range(3):
        encoder.encode(pixels)
    return encoder, pixels


def engine_rate(bundle: Path, batch: int, threads: int, seconds: float) -> float:
    """Images a second of the engine alone, in whole batches over about `seconds`: the upper bound of a server. Pixels
    are ready, and nothing is decoded, queued, scored or sent."""
    encoder, pixels = _engine(bundle, batch, threads)
    start, batches = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - start) < seconds or not batches:
        encoder.encode(pixels)
        batches += 1
    return batches * batch / elapsed


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
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        alone = partial(asyncio.get_running_loop().run_in_executor, pool, engine_rate, bundle, batch, threads)
        async with Client(server.url, queries, deadline_ms=60_000) as client:
            await alone(0)  # starts the process
            for _ in range(rounds):
                engine.append(await alone(seconds))
                await asyncio.sleep(_PAUSE_S)
                usage = Usage(server)
                rate, wrong_labels = await _over_http(client, images, expected, seconds)
                shares.append(usage.shares())
                http.append(rate)
                wrong += wrong_labels
                await asyncio.sleep(_PAUSE_S)
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
    """(images a second, wrong labels) of _CONCURRENT requests at a time. The rate is the slope of answered images over
    time, so neither the wait for the first answer nor the end of the last ones counts."""
    start = time.perf_counter()
    until = start + _WARMUP_S + seconds
    done: list[float] = []
    wrong = 0

    async def use() -> None:
        nonlocal wrong
        while time.perf_counter() < until or len(done) < MIN_ANSWERS:
            status, answer = await client.post_form(None, images)
            if status != 200:
                raise RuntimeError(f"expected 200 for {len(expected)} pictures, got {status}: {answer}")
            done.append(time.perf_counter())
            labels = [prediction.get("label") for prediction in answer["predictions"]]
            wrong += sum(a != b for a, b in zip(labels, expected, strict=True))

    await asyncio.gather(*(use() for _ in range(_CONCURRENT)))
    return steady_rps(done, start + _WARMUP_S, until) * len(expected), wrong
