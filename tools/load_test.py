"""Load the HTTP server of a classifier: lone requests, capacity, open loops at shares of it, changes under load.

python tools/load_test.py --churn --json build/serving.json
python tools/load_test.py --rival-path ../checkout-of-before --json build/before.json

It starts `iosr-fast serve` itself, and with --rival-path or --rival-serve a second one, which is loaded in turns with
the first. Latency counts from when a request was due, not from when it could be sent; every label is compared with that
of Classifier.predict for the same bytes. The rows of --json are those of benchmarks/results/serving.json.
"""

from __future__ import annotations

import asyncio
import secrets
import shlex
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.show import lines_of, origin
from iosr_fast.classifier import Classifier
from iosr_fast.cli.command import new_file, run
from iosr_fast.evaluation.provenance import commit, write_rows
from iosr_fast.evaluation.table import facts
from iosr_fast.utils.machine import usable_threads
from tools.demo.bundle import make_demo_bundle
from tools.serving_load.churn import churn
from tools.serving_load.client import (
    Answer,
    Client,
    Queries,
    arrival_times,
    closed_loop,
    make_queries,
    open_loop,
    run_alone,
)
from tools.serving_load.rows import Facts, Round, percentile_ms, problems_of, ratios, row_of, rps
from tools.serving_load.server import ServerProcess

DEMO = Path(__file__).resolve().parent.parent / "build" / "demo-bundle"
PACKAGES = ("onnxruntime", "openvino", "fastapi", "uvicorn", "uvloop", "httptools", "aiohttp")
QUERIES = 128
LONE = 100  # requests one at a time, in each round
CONNECTIONS = 32  # of the closed loop
CHURN_LOAD = 0.5
LOADS = (0.5, 0.8, 1.2)
_LONGEST_MS = 60_000  # deadline where none is measured
_WARMUP_S = 4.0  # more than two batches of a slow server
_PAUSE_S = 1.0  # between measurements, for what is queued to be answered and threads to stop spinning


@dataclass(frozen=True)
class Load:
    """Each measurement takes `seconds` in each of `rounds`; `loads` are shares of the smallest capacity."""

    seconds: float
    rounds: int
    loads: tuple[float, ...]
    deadline_ms: int


@dataclass
class Contender:
    """A server that is measured; `rounds` has those of each measurement, by case and load."""

    name: str
    options: Sequence[str] = ()
    commit: str = field(default_factory=commit)
    package: Path | None = None  # the folder of its iosr_fast; None: the one that runs here
    command: str = "serve"  # of iosr-fast
    rounds: dict[tuple[str, float | None], list[Round]] = field(default_factory=dict)

    def start(self, bundle: Path, *options: str, token: str = "") -> ServerProcess:
        environment = {"IOSR_FAST_TOKEN": token}
        chosen: dict[str, Any] = {"command": self.command, "package": self.package, "environment": environment}
        return ServerProcess.of_bundle(bundle, *self.options, *options, **chosen)

    @property
    def capacity_rps(self) -> float:
        """The median of the rounds."""
        rates = [rps(answers) for answers, _ in self.rounds["capacity", None]]
        if None in rates:
            raise RuntimeError(f"expected answers of {CONNECTIONS} connections, got none")
        return statistics.median(rate for rate in rates if rate is not None)


def main(
    json_path: Annotated[Path, typer.Option("--json", callback=new_file, help="Write the rows here.")],
    bundle: Annotated[Path | None, typer.Option(help="A saved classifier [default: build/demo-bundle].")] = None,
    seconds: Annotated[float, typer.Option(min=0.5, help="Of each measurement in each round.")] = 20.0,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds, in which the servers take turns.")] = 3,
    loads: Annotated[list[float] | None, typer.Option("--load", help="Shares of the capacity. Repeatable.")] = None,
    deadline_ms: Annotated[int, typer.Option(min=1, help="Of every request of an open loop.")] = 1000,
    changes: Annotated[bool, typer.Option("--churn", help="Also add and remove classes at 0.5 x capacity.")] = False,
    serve: Annotated[
        str, typer.Option(help="Options of `iosr-fast serve`, in one word: '--decode-threads 2 --max-batch 8'.")
    ] = "",
    rival_path: Annotated[
        Path | None, typer.Option(exists=True, file_okay=False, help="A checkout whose server is the rival.")
    ] = None,
    rival_serve: Annotated[str | None, typer.Option(help="Options of the rival [default: those of --serve].")] = None,
    rival_command: Annotated[str, typer.Option(help="Its command, as serve-ray for replicas.")] = "serve",
) -> None:
    """Load servers of a classifier and print a table. Exit code 1 for a wrong answer, an error, a refusal below
    capacity, a torn answer, or a server that dies, which leaves a partial report."""
    bundle, classifier = _open_bundle(bundle)
    queries = make_queries(classifier, QUERIES)
    served = {"classes": len(classifier.classes_), "method": classifier.method_, "queries": QUERIES}
    del classifier
    load = Load(seconds, rounds, tuple(loads or LOADS), deadline_ms)
    contenders = [Contender("this", shlex.split(serve))]
    if rival_path is not None or rival_serve is not None or rival_command != "serve":
        options = shlex.split(serve if rival_serve is None else rival_serve)
        theirs = {} if rival_path is None else {"commit": commit(rival_path), "package": rival_path.resolve()}
        name = "rival" if rival_command == "serve" else rival_command
        contenders.append(Contender(name, options, **theirs, command=rival_command))
    shared = facts(PACKAGES) | {"bundle": served, "seconds": seconds, "deadline_ms": deadline_ms}
    died = ""
    try:
        run_alone(_measure(contenders, bundle, queries, load, changes))
    except RuntimeError as error:
        died = str(error)
    finally:  # what was measured is not lost
        rows = [shared | row for row in make_rows(contenders, deadline_ms)]
        write_rows(json_path, rows)
    if rows:
        typer.echo("\n".join([*lines_of(rows), "", origin("serving", rows)]))
    problems = [problem for problem in (*map(problems_of, rows), died) if problem]
    for problem in problems:
        typer.echo(f"load_test: {problem}", err=True)
    if problems:
        raise typer.Exit(1)


def _open_bundle(folder: Path | None) -> tuple[Path, Classifier]:
    """The bundle to serve; by default that of the demo, built if it does not load."""
    try:
        return folder or DEMO, Classifier.load(folder or DEMO)
    except (ValueError, OSError) as error:
        if folder is not None:
            raise typer.BadParameter(f"expected a saved classifier: {error}") from error
        return make_demo_bundle(DEMO), Classifier.load(DEMO)


async def _measure(contenders: Sequence[Contender], bundle: Path, queries: Queries, load: Load, changes: bool) -> None:
    """Add the measurements to the contenders. One server each answers all loads, so that memory kept between them
    shows; each round of changes has servers of its own."""
    with ExitStack() as stack:
        servers = {each.name: stack.enter_context(each.start(bundle)) for each in contenders}
        for each in turns(contenders, load.rounds):
            await lone(each, servers[each.name], queries)
            await capacity(each, servers[each.name], queries, load.seconds)
        rate = min(each.capacity_rps for each in contenders)
        for share in load.loads:
            for each in turns(contenders, load.rounds):
                async with (
                    Client(servers[each.name].url, queries, load.deadline_ms) as client,
                    _measured(each, servers[each.name], "load", share) as (answers, _),
                ):
                    answers += await open_loop(client.predict, arrival_times(share * rate, load.seconds))
        for server in servers.values():
            server.stop()
    for each in turns(contenders, load.rounds if changes else 0):
        await _churn(each, bundle, queries, load, rate)


def turns(contenders: Sequence[Contender], rounds: int) -> Iterator[Contender]:
    """Each contender once a round, in an order that alternates, so that a drift of the machine meets all alike."""
    for number in range(rounds):
        yield from contenders if number % 2 == 0 else reversed(contenders)


@asynccontextmanager
async def _measured(
    contender: Contender, server: ServerProcess, case: str, load: float | None = None
) -> AsyncIterator[Round]:
    """A round of a measurement: the block adds answers and facts, then come the server's memory and the share of all
    cores that this process used. Raises ServerDied if the server has ended meanwhile."""
    await asyncio.sleep(_PAUSE_S)
    answers: list[Answer] = []
    facts: Facts = {"rss_mb_start": server.rss_mb()}
    start, client_s = time.perf_counter(), time.process_time()
    yield answers, facts
    share = (time.process_time() - client_s) / (time.perf_counter() - start) / usable_threads()
    facts |= {"rss_mb_end": server.rss_mb(), "client_cpu_share": round(share, 3)}
    server.check()
    contender.rounds.setdefault((case, load), []).append((answers, facts))


async def lone(contender: Contender, server: ServerProcess, queries: Queries, count: int = LONE) -> None:
    """Requests one at a time, after a warm-up. RuntimeError for an answer that is not right."""
    async with Client(server.url, queries, _LONGEST_MS) as client:
        for number in range(count // 5):
            await client.predict(number)
        async with _measured(contender, server, "lone") as (answers, _):
            answers += [await client.predict(number) for number in range(count)]
    if bad := [answer for answer in answers if not answer.ok or answer.wrong]:
        raise RuntimeError(f"expected right answers of {contender.name}, got {len(bad)} others of {count}: {bad[0]}")


async def capacity(contender: Contender, server: ServerProcess, queries: Queries, seconds: float) -> None:
    """A closed loop, after a warm-up."""
    async with (
        Client(server.url, queries, _LONGEST_MS) as client,
        _measured(contender, server, "capacity") as (answers, _),
    ):
        warm = min(_WARMUP_S, seconds / 2)
        made = await closed_loop(client, CONNECTIONS, warm + seconds)
        start = made[0].sent + warm
        answers += [answer for answer in made if answer.done >= start]


async def _churn(contender: Contender, bundle: Path, queries: Queries, load: Load, rate: float) -> None:
    token = secrets.token_urlsafe(24)
    times = arrival_times(CHURN_LOAD * rate, load.seconds)
    with (
        tempfile.TemporaryDirectory() as folder,
        contender.start(bundle, "--log", str(Path(folder) / "changes"), token=token) as server,
    ):
        async with (
            Client(server.url, queries, load.deadline_ms) as client,
            _measured(contender, server, "churn", CHURN_LOAD) as (answers, facts),
        ):
            await churn(client, token, times, load.seconds, answers, facts)
        server.stop()


def make_rows(contenders: Sequence[Contender], deadline_ms: int) -> list[Facts]:
    """A row for each measurement and server; those of the first server have ratios to the rival."""
    rows = []
    for case, share in contenders[0].rounds:
        for each in contenders:
            if not (rounds := each.rounds.get((case, share))):
                continue
            row: Facts = {"bench": "serving", "case": case, "load": share, "server": each.name}
            row |= row_of(rounds, (_LONGEST_MS if share is None else deadline_ms) / 1e3)
            row |= {"server_options": list(each.options), "commit": each.commit}
            lone = [answer.latency_s for made, _ in each.rounds.get(("lone", None), ()) for answer in made]
            if share is not None and row["p99_ms"] and (lone_ms := percentile_ms(lone, 50)):
                row["p99_of_lone"] = round(row["p99_ms"] / lone_ms, 2)
            if each is not contenders[-1]:
                row |= ratios(rounds, contenders[-1].rounds.get((case, share), ()))
            rows.append({name: value for name, value in row.items() if value is not None})
    return rows


if __name__ == "__main__":
    run(main)
