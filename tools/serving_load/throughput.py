"""Batches of pictures over HTTP against the engine alone, in turns: each runs while the other is idle."""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from iosr_fast.classifier import Classifier
from tools.demo.bundle import held_out_queries
from tools.serving_load.client import Client, Queries
from tools.serving_load.server import ServerProcess, Usage

_CONCURRENT = 4  # requests: one is encoded, one decoded, one in transfer, one being answered
_WARMUP_S = 1.0
_PAUSE_S = 0.1  # after each run, because threads of an engine spin for a while
_MIN_ANSWERS = 8  # for a rate, whatever the time they take


class BareEngine:
    """The engine alone in its own process: pixels are ready, and nothing is decoded, queued, scored or sent.

    This is the upper bound of a server. An async context manager.
    """

    def __init__(self, bundle: Path, batch: int, threads: int) -> None:
        module = "tools.serving_load.throughput"
        self._command = (sys.executable, "-m", module, str(bundle), str(batch), str(threads))

    async def __aenter__(self) -> BareEngine:
        pipe = asyncio.subprocess.PIPE
        self._process = await asyncio.create_subprocess_exec(*self._command, stdin=pipe, stdout=pipe)
        await self._line()
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._process.returncode is None:
            self._process.kill()
            await self._process.wait()

    async def run(self, seconds: float) -> float:
        """Images a second of whole batches over about `seconds`."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{seconds}\n".encode())
        return float(await self._line())

    async def _line(self) -> Any:
        assert self._process.stdout is not None
        line = await self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process of the bare engine ended with code {await self._process.wait()}")
        return json.loads(line)


def run_bare_engine(bundle: str, batch: int, threads: int) -> None:
    """For each line of standard input, a time in seconds, print a line with images a second; first print "ready"."""
    encoder = Classifier.load(bundle, threads=threads).encoder
    pictures = held_out_queries()[0]
    side = encoder.image_size
    if pictures.shape[1] != side:
        pictures = np.random.default_rng(0).integers(0, 256, (batch, side, side, 3), np.uint8)
    pixels = np.ascontiguousarray(np.resize(pictures, (batch, side, side, 3)))
    for _ in range(3):
        encoder.encode(pixels)
    print('"ready"', flush=True)
    for line in sys.stdin:
        start, batches = time.perf_counter(), 0
        while (elapsed := time.perf_counter() - start) < float(line) or not batches:
            encoder.encode(pixels)
            batches += 1
        print(batches * batch / elapsed, flush=True)


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
        while time.perf_counter() < until or len(done) < _MIN_ANSWERS:
            status, answer = await client.post_form(None, images)
            if status != 200:
                raise RuntimeError(f"expected 200 for {len(expected)} pictures, got {status}: {answer}")
            done.append(time.perf_counter())
            labels = [prediction.get("label") for prediction in answer["predictions"]]
            wrong += sum(a != b for a, b in zip(labels, expected, strict=True))

    await asyncio.gather(*(use() for _ in range(_CONCURRENT)))
    steady = sorted(at for at in done if start + _WARMUP_S <= at <= until)
    if len(steady) < _MIN_ANSWERS:
        steady = sorted(done)[-_MIN_ANSWERS:]
    slope = np.polyfit(np.array(steady) - start, np.arange(len(steady)) * len(expected), 1)[0]
    return float(slope), wrong


if __name__ == "__main__":
    run_bare_engine(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
