"""The three kinds of load: one request at a time, a closed loop that finds the capacity, an open loop at a rate.

In an open loop requests come when they come, however slow the answers are: as strangers send them, and as no loop
that waits for an answer before the next request can.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from enum import Enum

import numpy as np

from tools.serving_load.client import Answer, Client

Ask = Callable[[int, float], Awaitable[Answer]]

_LEAD_S = 0.05  # before the first request, for the thread of arrivals to start


class Arrivals(Enum):
    EVEN = "even"  # a constant rate, as wrk2 and k6 have it
    POISSON = "poisson"


async def lone_latency_s(client: Client, requests: int, warmup: int) -> np.ndarray:
    """Latency of each of `requests`, one at a time, over one connection, after `warmup` others. Raises RuntimeError
    for an answer that is not 200."""
    answers = [await client.predict(number) for number in range(warmup + requests)]
    if failed := [answer for answer in answers if not answer.ok]:
        raise RuntimeError(f"expected 200 of a server with nothing else to do, got {failed[0]}")
    return np.array([answer.latency_s for answer in answers[warmup:]])


async def closed_loop(client: Client, connections: int, seconds: float) -> list[Answer]:
    """`connections` users who each wait for an answer, then ask again at once; all answers of `seconds`."""
    until = time.perf_counter() + seconds
    answers: list[Answer] = []

    async def use(first: int) -> None:
        number = first
        while time.perf_counter() < until:
            answer = await client.predict(number)
            answers.append(answer)
            number += connections
            if not answer.ok:
                await asyncio.sleep(0.01)  # refused or broken: don't spin

    await asyncio.gather(*map(use, range(connections)))
    return answers


def windows_rps(answers: Sequence[Answer], skip_s: float, width_s: float = 1.0) -> list[float]:
    """Answers of 200 a second in each whole window, from `skip_s` after the first request on."""
    start = min(answer.sent for answer in answers) + skip_s
    done = np.array([answer.done for answer in answers if answer.ok]) - start
    windows = int((max(answer.sent for answer in answers) - start + 1e-3) / width_s)
    counts, _ = np.histogram(done, bins=max(1, windows), range=(0.0, max(1, windows) * width_s))
    return [float(count) / width_s for count in counts]


def arrival_times(rate: float, seconds: float, arrivals: Arrivals, seed: int = 0) -> np.ndarray:
    """Seconds from the start at which requests come, `rate * seconds` of them: evenly, or as a Poisson process."""
    if not rate > 0 or not seconds > 0:
        raise ValueError(f"expected rate > 0 and seconds > 0, got {rate} and {seconds}")
    count = max(1, round(rate * seconds))
    if arrivals is Arrivals.EVEN:
        return np.arange(count) / rate
    return np.random.default_rng(seed).exponential(1 / rate, count).cumsum()


async def open_loop(ask: Ask, times: np.ndarray) -> list[Answer]:
    """Call `ask(number, due)` at each of `times`, never waiting for an answer; all answers, when all have come.

    The times are kept by a thread, whose sleep is exact to some tens of microseconds; an event loop's timers are
    exact to a millisecond, which would count as the server's latency.
    """
    loop = asyncio.get_running_loop()
    tasks: list[asyncio.Future[Answer]] = []
    everything_sent, stopped = asyncio.Event(), threading.Event()

    def send(number: int, due: float) -> None:
        tasks.append(asyncio.ensure_future(ask(number, due)))

    def keep_time() -> None:
        start = time.perf_counter() + _LEAD_S
        for number, due in enumerate((start + times).tolist()):
            if (wait := due - time.perf_counter()) > 0:
                time.sleep(wait)
            if stopped.is_set():
                return
            loop.call_soon_threadsafe(send, number, due)
        loop.call_soon_threadsafe(everything_sent.set)

    thread = threading.Thread(target=keep_time, name="arrivals", daemon=True)
    thread.start()
    try:
        await everything_sent.wait()
        return list(await asyncio.gather(*tasks))
    finally:
        stopped.set()
        for task in tasks:
            task.cancel()
        thread.join()
