"""Latency of a single request, capacity, open loops at shares of it, memory over minutes."""

from __future__ import annotations

import asyncio
import os
import statistics
from dataclasses import dataclass
from typing import Any

import numpy as np

from tools.serving_load.client import (
    Arrivals,
    Client,
    Queries,
    arrival_times,
    closed_loop,
    open_loop,
    windows_rps,
)
from tools.serving_load.report import percentile_ms, row_of
from tools.serving_load.server import ServerProcess, Usage

CONNECTIONS = 32
_WARMUP_S = 2.0
PAUSE_S = 1.0  # between runs, for what is queued to be answered
_MEMORY_LOAD = 0.8


@dataclass(frozen=True)
class Load:
    """`loads` are shares of the capacity, for `seconds` each; `lone` requests are sent one at a time; the capacity is
    the median second of `capacity_seconds`, after a warm-up."""

    seconds: float
    deadline_ms: int
    arrivals: Arrivals = Arrivals.EVEN
    loads: tuple[float, ...] = (0.5, 0.8, 1.2)
    lone: int = 300
    capacity_seconds: float = 10.0


async def measure_lone(server: ServerProcess, queries: Queries, load: Load) -> dict[str, Any]:
    """{"lone_ms", "lone_p99_ms", "lone_requests"}, after a warm-up. RuntimeError for a wrong answer."""
    async with Client(server.url, queries, load.deadline_ms) as client:
        warmup = max(20, load.lone // 4)
        answers = [await client.predict(number) for number in range(warmup + load.lone)]
    if failed := [answer for answer in answers if not answer.ok or answer.wrong]:
        raise RuntimeError(f"expected the right answer of an idle server, got {failed[0]}")
    lone = [answer.latency_s for answer in answers[warmup:]]
    return {"lone_ms": percentile_ms(lone, 50), "lone_p99_ms": percentile_ms(lone, 99), "lone_requests": load.lone}


async def measure_capacity(server: ServerProcess, queries: Queries, load: Load) -> dict[str, Any]:
    """{"capacity_rps", "capacity_windows_rps", ...}: a closed loop."""
    async with Client(server.url, queries, deadline_ms=60_000) as client:
        usage = Usage(server)
        warmup_s = min(_WARMUP_S, load.capacity_seconds / 2)
        answers = await closed_loop(client, CONNECTIONS, warmup_s + load.capacity_seconds)
        shares = usage.shares()
    windows = windows_rps(answers, warmup_s, min(1.0, load.capacity_seconds))
    wrong, failed = sum(answer.wrong for answer in answers), [answer for answer in answers if not answer.ok]
    if failed or not statistics.median(windows):
        answer = failed[0] if failed else "no answer"
        raise RuntimeError(f"expected 200 of {CONNECTIONS} connections, got {answer}, {len(failed)} times")
    return {
        "capacity_rps": round(statistics.median(windows), 2),
        "capacity_windows_rps": windows,
        "capacity_connections": CONNECTIONS,
        "capacity_p50_ms": percentile_ms([answer.latency_s for answer in answers], 50),
        "capacity_wrong": wrong,
        **{f"capacity_{name}": share for name, share in shares.items()},
    }


async def measure_load(
    server: ServerProcess, queries: Queries, load: Load, share: float, capacity_rps: float
) -> dict[str, Any]:
    """A row of "runs": an open loop at `share` of the capacity."""
    await asyncio.sleep(PAUSE_S)
    async with Client(server.url, queries, load.deadline_ms) as client:
        rss_mb, usage, load_average = server.rss_mb(), Usage(server), os.getloadavg()[0]
        times = arrival_times(share * capacity_rps, load.seconds, load.arrivals)
        answers = await open_loop(client.predict, times)
        shares = usage.shares()
        return {
            "load": share,
            **row_of(answers, client.deadline_s),
            "rss_mb_start": rss_mb,
            "rss_mb_end": server.rss_mb(),
            "connections": client.connections,
            "load_average": round(load_average, 2),
            **shares,
        }


async def measure_memory(
    server: ServerProcess,
    queries: Queries,
    load: Load,
    minutes: float,
    capacity_rps: float,
    every_s: float = 5.0,
) -> dict[str, Any]:
    """{"minutes", "rss_mb", "slope_mb_per_min", ...}: the server's memory under load. The slope is that of a
    least-squares line over the second half, when caches are full."""
    samples: list[float] = []

    async def sample() -> None:
        while True:
            samples.append(server.rss_mb() or float("nan"))
            await asyncio.sleep(every_s)

    async with Client(server.url, queries, load.deadline_ms) as client:
        sampler = asyncio.ensure_future(sample())
        try:
            counts = {"sent": 0, "errors": 0, "refused": 0, "wrong": 0}
            left_s = minutes * 60.0
            while left_s > 0:  # in pieces, so that answers are not kept for hours
                piece_s = min(left_s, 60.0)
                times = arrival_times(_MEMORY_LOAD * capacity_rps, piece_s, load.arrivals)
                row = row_of(await open_loop(client.predict, times), client.deadline_s)
                counts = {name: count + row[name] for name, count in counts.items()}
                left_s -= piece_s
        finally:
            sampler.cancel()
    half = samples[len(samples) // 2 :]
    slope = np.polyfit(np.arange(len(half)) * every_s / 60.0, half, 1)[0] if len(half) > 1 else float("nan")
    return {
        "minutes": minutes,
        "load": _MEMORY_LOAD,
        "rss_mb": samples,
        "slope_mb_per_min": round(float(slope), 4) if np.isfinite(slope) else None,
        **counts,
    }
