"""Servers of one machine against each other, in turns: each is loaded while the others are idle, which is checked."""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tools.serving_load.client import Client, Queries, closed_loop, steady_rps
from tools.serving_load.measure import CONNECTIONS, PAUSE_S, Load, measure_load, measure_lone
from tools.serving_load.report import percentile_ms
from tools.serving_load.server import ServerProcess, Usage

ROUNDS = 3
_WARMUP_S = 4.0  # more than two batches of the slowest server
_MAX_IDLE = 0.02  # of the machine, for all servers that are not loaded


@dataclass
class Contender:
    """A server with the requests for it; `facts` are fields of its row."""

    name: str
    server: ServerProcess
    queries: Queries
    facts: dict[str, Any] = field(default_factory=dict)
    rounds: list[dict[str, Any]] = field(default_factory=list, init=False)


async def measure_versus(contenders: Sequence[Contender], load: Load, rounds: int = ROUNDS) -> list[dict[str, Any]]:
    """A row a contender: pictures a second with 32 clients in each round, then lone requests, and open loops at shares
    of its own median. Raises RuntimeError for a wrong answer, an error, or a server that works while it should idle."""
    for _ in range(rounds):
        for contender in contenders:
            await _run_round(contender, [other.server for other in contenders if other is not contender], load)
    return [await contender.server.alongside(_row(contender, load)) for contender in contenders]


async def _run_round(contender: Contender, idle: Sequence[ServerProcess], load: Load) -> None:
    await asyncio.sleep(PAUSE_S)
    server = contender.server
    before_s = [other.cpu_s() for other in idle]
    async with Client(server.url, contender.queries, deadline_ms=60_000) as client:
        usage = Usage(server)
        answers = await server.alongside(closed_loop(client, CONNECTIONS, _WARMUP_S + load.capacity_seconds))
        shares = usage.shares()
    busy_s = sum(other.cpu_s() - before for other, before in zip(idle, before_s, strict=True))
    idle_share = round(busy_s / usage.cores_s(), 4)
    failed = [answer for answer in answers if not answer.ok]
    if failed or any(answer.wrong for answer in answers) or not answers:
        wrong = sum(answer.wrong for answer in answers)
        first = failed[0].error or failed[0].status if failed else "none"
        raise RuntimeError(
            f"{contender.name}: expected {len(answers)} right answers, got {wrong} wrong ones and {len(failed)} errors "
            f"(the first: {first})"
        )
    if idle_share > _MAX_IDLE:
        raise RuntimeError(f"expected idle servers beside {contender.name}, they use {idle_share:.1%} of the machine")
    start = min(answer.sent for answer in answers) + _WARMUP_S
    steady = [answer.latency_s for answer in answers if answer.sent >= start] or [a.latency_s for a in answers]
    contender.rounds.append(
        {
            "pictures_per_s": round(steady_rps([a.done for a in answers], start, start + load.capacity_seconds), 2),
            "p50_ms": percentile_ms(steady, 50),
            "p99_ms": percentile_ms(steady, 99),
            **shares,
            "idle_cpu_share": idle_share,
        }
    )


async def _row(contender: Contender, load: Load) -> dict[str, Any]:
    rounds = contender.rounds
    rates = [each["pictures_per_s"] for each in rounds]
    median = statistics.median(rates)
    lone = await measure_lone(contender.server, contender.queries, load)
    runs = [await measure_load(contender.server, contender.queries, load, share, median) for share in load.loads]
    return {
        "server": contender.name,
        **contender.facts,
        "pictures_per_s": median,
        "pictures_per_s_spread": [min(rates), max(rates)],
        "p50_ms": statistics.median(each["p50_ms"] for each in rounds),
        "p99_ms": statistics.median(each["p99_ms"] for each in rounds),
        **lone,
        "wrong": sum(run["wrong"] for run in runs),
        "rounds": rounds,
        "runs": runs,
        "client_cpu_share": max(each["client_cpu_share"] for each in [*rounds, *runs]),
    }


def ratios(rows: Sequence[dict[str, Any]], peer: str) -> dict[str, float]:
    """Of each other server's pictures a second to those of `peer`: the median of the rounds' ratios."""
    (theirs,) = (row["rounds"] for row in rows if row["server"] == peer)
    return {
        row["server"]: round(
            statistics.median(
                a["pictures_per_s"] / b["pictures_per_s"] for a, b in zip(row["rounds"], theirs, strict=True)
            ),
            3,
        )
        for row in rows
        if row["server"] != peer
    }
