"""Load the HTTP server of a classifier: lone requests, capacity, open loops at shares of it, changes under load.

python tools/load_test.py --churn --json build/serving.json
python tools/load_test.py --rival-path ../checkout-of-before --json build/before.json
python tools/load_test.py --classifiers 16 --json build/classifiers.json
python tools/load_test.py --peer infinity --json build/serving-peer.json

It starts the servers itself, one contender at a time and in turns. Latency counts from when a request was due, not from
when it could be sent; every label is compared with that of Classifier.predict for the same bytes. Cases of the rows:

lone      requests one at a time; `memory_mb` is that of all processes after them, shared pages counted once
all       the same for all of several classifiers at once; `of_one` is over requests for one
capacity  a closed loop of 32 connections
load      an open loop at this share of the smallest capacity
churn     the same at half of it, while classes are added and removed
"""

from __future__ import annotations

import asyncio
import gc
import importlib
import secrets
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Annotated, Literal

import typer

from benchmarks.show import lines_of, origin
from iosr_fast.classifier import Classifier
from iosr_fast.cli.command import new_file, run
from iosr_fast.evaluation.provenance import write_rows
from iosr_fast.evaluation.table import facts
from iosr_fast.utils.machine import usable_threads
from tools.demo.bundle import make_demo_bundle
from tools.serving_load.churn import churn
from tools.serving_load.client import Client, Queries, closed_loop, make_queries, new_session, open_loop
from tools.serving_load.contenders import Contender, Facts, Round, one_and_each
from tools.serving_load.rows import make_rows, problems_of, rps

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "build/demo-bundle"
PACKAGES = ("onnxruntime", "openvino", "fastapi", "uvicorn", "uvloop", "httptools", "aiohttp")
QUERIES = 128
LONE = 100  # requests one at a time, in each round
CONNECTIONS = 32  # of the closed loop
CHURN_LOAD = 0.5
LOADS = [0.5, 0.8, 1.2]
_LONGEST_MS = 60_000  # deadline where none is measured
_WARMUP_S = 4.0  # more than two batches of a slow server
_PAUSE_S = 1.0  # between measurements, for what is queued to be answered and threads to stop spinning


@dataclass(frozen=True)
class Load:
    """Each measurement takes `seconds` in each of `rounds`; `loads` are shares of the smallest capacity."""

    seconds: float
    rounds: int
    loads: Sequence[float]
    deadline_ms: int
    changes: bool


def main(
    json_path: Annotated[Path, typer.Option("--json", callback=new_file, help="Write the rows here.")],
    bundle: Annotated[Path | None, typer.Option(help="A saved classifier [default: build/demo-bundle].")] = None,
    classifiers: Annotated[
        int | None, typer.Option(min=2, help="In its place one server of as many classifiers, and a server for each.")
    ] = None,
    peer: Annotated[Literal["infinity"] | None, typer.Option(help="In its place ViT-B/32 beside infinity-emb.")] = None,
    seconds: Annotated[float, typer.Option(min=0.5, help="Of each measurement in each round.")] = 20.0,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds, in which the contenders take turns.")] = 3,
    loads: Annotated[
        list[float] | None,
        typer.Option("--load", min=0.01, help="Shares of the capacity [default: of a --bundle 0.5, 0.8 and 1.2]."),
    ] = None,
    deadline_ms: Annotated[int, typer.Option(min=1, help="Of every request of an open loop.")] = 1000,
    changes: Annotated[bool, typer.Option("--churn", help="Also add and remove classes at 0.5 x capacity.")] = False,
    serve: Annotated[str, typer.Option(help="What to run: 'serve --decode-threads 2 --max-batch 8'.")] = "serve",
    rival_path: Annotated[
        Path | None, typer.Option(exists=True, file_okay=False, help="A checkout whose server is the rival.")
    ] = None,
    rival: Annotated[str | None, typer.Option(help="What the rival runs, as --serve; serve-ray for replicas.")] = None,
    model: Annotated[str, typer.Option(help="Of --classifiers: a model of open_clip, or demo.")] = "ViT-B-32",
    precision: Annotated[str, typer.Option(help="Of --classifiers, as of iosr-fast fit.")] = "fp32",
) -> None:
    """Load servers and print the rows. Exit code 1 for a wrong answer, an error, a refusal below capacity, a torn
    answer, or a server that dies, which leaves a partial report."""
    if changes and (classifiers or peer):
        raise typer.BadParameter("expected --churn with one classifier, got --classifiers or --peer")
    with tempfile.TemporaryDirectory() as name:
        shared: Facts
        if peer:
            from tools.serving_load.infinity import MODEL, beside_infinity, check_installed

            check_installed(ROOT / "build/peer")
            contenders = beside_infinity(Path(name), ROOT / "build/peer")
            shared = {"bench": "serving-peer", "model": MODEL}
        elif classifiers:
            contenders = one_and_each(Path(name), classifiers, model, precision, serve, rival_path)
            shared = {"bench": "classifiers", "model": model, "precision": precision, "classifiers": classifiers}
        else:
            folder, classifier = _open_bundle(bundle)
            queries, loads = make_queries(classifier, QUERIES), loads or LOADS
            contenders = [Contender.of_bundles("this", queries, [[folder]], None, serve)]
            if rival_path is not None or rival is not None:
                contenders.append(Contender.of_bundles("rival", queries, [[folder]], rival_path, rival or serve))
            served = {"classes": len(classifier.classes_), "method": classifier.method_, "queries": QUERIES}
            shared = {"bench": "serving", "bundle": served}
        shared |= facts(PACKAGES) | {"seconds": seconds, "deadline_ms": deadline_ms}
        died = ""
        try:
            run_alone(contenders, Load(seconds, rounds, loads or [], deadline_ms, changes))
        except RuntimeError as error:
            died = str(error)
        finally:  # what was measured is not lost
            rows = [shared | row for row in make_rows(contenders)]
            write_rows(json_path, rows)
    if rows:
        typer.echo("\n".join([*lines_of(rows), "", origin(shared["bench"], rows)]))
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


def run_alone(contenders: Sequence[Contender], load: Load) -> None:
    """Measure without the garbage collector's pauses, which would count as the servers', on uvloop where it is
    installed: a lighter client leaves more to the server."""
    factory = importlib.import_module("uvloop" if find_spec("uvloop") else "asyncio").new_event_loop
    gc.collect()
    gc.freeze()
    try:
        with asyncio.Runner(loop_factory=factory) as runner:
            runner.run(measure(contenders, load))
    finally:
        gc.unfreeze()


async def measure(contenders: Sequence[Contender], load: Load) -> None:
    """Add the measurements to the contenders, whose servers run in turns."""
    async with new_session() as session:

        def client(each: Contender, deadline_ms: int = _LONGEST_MS, queries: Queries | None = None) -> Client:
            return Client(session, [server.url for server in each.servers], queries or each.queries, deadline_ms)

        for each in turns(contenders, load.rounds):
            with each.running():
                await alone(each, client(each), "lone")
                if each.of_all is not None:
                    await alone(each, client(each, queries=each.of_all), "all")
                await capacity(each, client(each), load.seconds)
        rate = min(capacity_rps(each) for each in contenders)
        for each in turns(contenders, load.rounds if load.loads else 0):
            with each.running():
                await closed_loop(client(each), CONNECTIONS, min(_WARMUP_S, load.seconds / 2))
                for share in load.loads:
                    async with measured(each, "load", share, load.deadline_ms) as (answers, _):
                        ask = client(each, load.deadline_ms).predict
                        answers += await open_loop(ask, share * rate, load.seconds)
        for each in turns(contenders, load.rounds if load.changes else 0):
            await changing(each, client, rate, load)


async def changing(each: Contender, client: Callable[..., Client], rate: float, load: Load) -> None:
    """An open loop while classes are added and removed, on a server of its own."""
    token = secrets.token_urlsafe(24)
    with tempfile.TemporaryDirectory() as name, each.running("--log", str(Path(name) / "changes"), token=token):
        async with measured(each, "churn", CHURN_LOAD, load.deadline_ms) as (answers, facts):
            made, found = await churn(client(each, load.deadline_ms), token, CHURN_LOAD * rate, load.seconds)
            answers += made
            facts |= found


def turns(contenders: Sequence[Contender], rounds: int) -> Iterator[Contender]:
    """Each contender once a round, in an order that alternates, so that a drift of the machine meets all alike."""
    for number in range(rounds):
        yield from contenders if number % 2 == 0 else reversed(contenders)


@asynccontextmanager
async def measured(
    contender: Contender, case: str, share: float | None = None, deadline_ms: int = _LONGEST_MS
) -> AsyncIterator[Round]:
    """A round of a measurement: the block adds answers and facts, then come what was answered after its deadline, the
    servers' memory and the share of all cores that this process used. Raises RuntimeError if a server has ended."""
    await asyncio.sleep(_PAUSE_S)
    made: Round = [], {}
    start, client_s = time.perf_counter(), time.process_time()
    yield made
    answers, facts = made
    cores = (time.process_time() - client_s) / (time.perf_counter() - start) / usable_threads()
    memory = [server.memory_mb() for server in contender.servers]
    facts["memory_mb"] = None if None in memory else sum(one for one in memory if one is not None)
    facts["late"] = sum(answer.outcome == "ok" and answer.latency_s > deadline_ms / 1e3 for answer in answers)
    facts["client_cpu_share"] = round(cores, 3)
    for server in contender.servers:
        server.check()
    contender.rounds.setdefault((case, share), []).append(made)


async def alone(contender: Contender, client: Client, case: str) -> None:
    """Requests one at a time, after a warm-up. RuntimeError for an answer that is not right."""
    for number in range(LONE // 5):
        await client.predict(number)
    async with measured(contender, case) as (answers, _):
        answers += [await client.predict(number) for number in range(LONE)]
    if bad := [answer for answer in answers if answer.outcome != "ok" or answer.wrong]:
        raise RuntimeError(f"expected right answers of {contender.name}, got {len(bad)} others of {LONE}: {bad[0]}")


async def capacity(contender: Contender, client: Client, seconds: float) -> None:
    """A closed loop, after a warm-up."""
    async with measured(contender, "capacity") as (answers, _):
        warm = min(_WARMUP_S, seconds / 2)
        made = await closed_loop(client, CONNECTIONS, warm + seconds)
        start = made[0].sent + warm
        answers += [answer for answer in made if answer.done >= start]


def capacity_rps(contender: Contender) -> float:
    """The median of the rounds."""
    rates = [rate for answers, _ in contender.rounds["capacity", None] if (rate := rps(answers))]
    if not rates:
        raise RuntimeError(f"expected answers of {CONNECTIONS} connections, got none of {contender.name}")
    return median(rates)


if __name__ == "__main__":
    run(main)
