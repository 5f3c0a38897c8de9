"""Load the HTTP server of a classifier: latency, capacity, refusals, memory, changes under load.

python tools/load_test.py --seconds 60 --json build/load-test.json
python tools/load_test.py --peer infinity --seconds 15 --json build/peers.json

It starts `iosr-fast serve` itself. Latency counts from when a request was due, not from when it could be sent; every
label is compared with that of Classifier.predict for the same bytes.
"""

from __future__ import annotations

import secrets
import shlex
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from iosr_fast.classifier import Classifier
from iosr_fast.serving.http.settings import Settings
from iosr_fast.utils.command import new_file, run
from iosr_fast.utils.machine import usable_threads
from tools.demo.bundle import make_demo_bundle
from tools.serving_load.churn import is_rebuilt, measure_churn
from tools.serving_load.client import Arrivals, Queries, make_queries, run_alone
from tools.serving_load.compare import Peer, compare
from tools.serving_load.measure import Load, measure_capacity, measure_load, measure_lone, measure_memory
from tools.serving_load.report import goals, print_report, provenance, write
from tools.serving_load.server import ServerProcess
from tools.serving_load.throughput import measure_throughput

_SETTINGS = Settings()
_DEMO = Path(__file__).resolve().parent.parent / "build" / "demo-bundle"
_QUERIES = 128
_LOADS = (0.5, 0.8, 1.2)
_THROUGHPUT_S, _ROUNDS = 4.0, 7

Arriving = Annotated[Arrivals, typer.Option(help="At a constant rate, or as a Poisson process.")]
Serve = Annotated[
    list[str] | None,
    typer.Option(help="More options of `iosr-fast serve`, such as '--decode-threads 1'. Repeatable."),
]


def main(
    json_path: Annotated[Path, typer.Option("--json", callback=new_file, help="Write the report here.")],
    bundle: Annotated[Path | None, typer.Option(help="A saved classifier [default: build/demo-bundle].")] = None,
    seconds: Annotated[float, typer.Option(min=0.5, help="Of each load.")] = 60.0,
    arrivals: Arriving = Arrivals.EVEN,
    loads: Annotated[list[float] | None, typer.Option("--load", help="Shares of the capacity. Repeatable.")] = None,
    deadline_ms: Annotated[int, typer.Option(min=1, help="Of every request.")] = 1000,
    lone: Annotated[int, typer.Option(min=1, help="Requests one at a time.")] = 300,
    capacity_seconds: Annotated[float, typer.Option(min=0.5, help="Of the closed loop.")] = 10.0,
    memory_minutes: Annotated[float, typer.Option(min=0, help="Minutes at 0.8 x capacity after the runs.")] = 0.0,
    throughput: Annotated[bool, typer.Option("--throughput", help="Batches over HTTP, and the engine alone.")] = False,
    batch: Annotated[int, typer.Option(min=1, help="Pictures a request of --throughput, and a batch.")] = 64,
    churn: Annotated[bool, typer.Option("--churn", help="Add and remove classes at 0.5 x capacity.")] = False,
    max_batch: Annotated[int | None, typer.Option(help="Of the server [default: chosen by it].")] = None,
    max_wait_ms: Annotated[float, typer.Option(help="Of the server.")] = _SETTINGS.max_wait_ms,
    max_queue: Annotated[int, typer.Option(help="Of the server.")] = _SETTINGS.max_queue,
    engine_threads: Annotated[
        int | None, typer.Option(min=1, help="Of the server, and of the engine alone [default: chosen; all cores].")
    ] = None,
    serve: Serve = None,
    peer: Annotated[
        Peer | None,
        typer.Option(help="Compare with another server, loaded in turns with ours; ViT-B/32 of random weights."),
    ] = None,
) -> None:
    """Start a server on a bundle and load it. Exit code 1, and a partial report, if the server dies."""
    if peer is not None:
        at = tuple(loads or (0.5, 0.8))
        compare(json_path, Load(seconds, 60_000, arrivals, at, min(lone, 30), capacity_seconds), serve or ())
        return
    try:
        folder, classifier = _open_bundle(bundle)
    except (ValueError, OSError) as error:
        raise typer.BadParameter(f"expected a saved classifier: {error}") from error
    given = {"--engine-threads": engine_threads, "--max-batch": max_batch}
    words = [word for option, value in given.items() if value is not None for word in (option, str(value))]
    words += ["--max-wait-ms", str(max_wait_ms), "--max-queue", str(max_queue)]
    words += [word for text in serve or () for word in shlex.split(text)]
    threads = engine_threads or usable_threads()
    queries = make_queries(classifier, _QUERIES)
    load = Load(seconds, deadline_ms, arrivals, tuple(loads or _LOADS), lone, capacity_seconds)
    report: dict[str, Any] = {
        **provenance(),
        "bundle": {"classes": len(classifier.classes_), "method": classifier.method_, "queries": len(queries)},
        "server_options": words,
        "max_wait_ms": max_wait_ms,
        "max_batch": max_batch,
        "max_queue": max_queue,
        "engine_threads": engine_threads,
        "deadline_ms": deadline_ms,
        "arrivals": arrivals.value,
        "seconds": seconds,
        "client_cpu_share": None,
        "runs": [],
    }
    del classifier
    try:
        batches = batch if throughput else None
        run_alone(_measure(report, folder, queries, load, words, threads, memory_minutes, churn, batches))
    except RuntimeError as error:
        report["error"] = str(error)
    except BaseException as error:
        write({**report, "error": repr(error)}, json_path)  # what was measured is not lost
        raise
    report["client_cpu_share"] = max((run["client_cpu_share"] for run in report["runs"]), default=None)
    if "error" not in report:
        report["goals"] = goals(report)
    write(report, json_path)
    print_report(report)
    if "error" in report:
        typer.echo(f"load_test: {report['error']}", err=True)
        raise typer.Exit(1)


def _open_bundle(folder: Path | None) -> tuple[Path, Classifier]:
    """The bundle to serve; by default that of the demo, built if it does not load."""
    if folder is not None:
        return folder, Classifier.load(folder)
    try:
        return _DEMO, Classifier.load(_DEMO)
    except (ValueError, OSError):
        make_demo_bundle(_DEMO)
        return _DEMO, Classifier.load(_DEMO)


async def _measure(
    report: dict[str, Any],
    bundle: Path,
    queries: Queries,
    load: Load,
    options: list[str],
    threads: int,
    memory_minutes: float,
    churn: bool,
    batch: int | None,
) -> None:
    """Add the measurements to the report, one by one. All loads share a server, so that memory kept between them shows;
    `churn` and batches of `batch` pictures have servers of their own."""
    with ServerProcess(bundle, *options) as server:
        report |= await server.alongside(measure_lone(server, queries, load))
        report |= await server.alongside(measure_capacity(server, queries, load))
        capacity_rps = report["capacity_rps"]
        for share in load.loads:
            row = await server.alongside(measure_load(server, queries, load, share, capacity_rps))
            report["runs"].append(row)
        if memory_minutes:
            memory = measure_memory(server, queries, load, memory_minutes, capacity_rps)
            report["memory"] = await server.alongside(memory)
        server.stop()
    if churn:
        token = secrets.token_urlsafe(24)
        with tempfile.TemporaryDirectory() as folder:
            log = Path(folder) / "changes.jsonl"
            with ServerProcess(bundle, *options, "--log", str(log), environment={"IOSR_FAST_TOKEN": token}) as server:
                changes = measure_churn(server, queries, load, capacity_rps, token)
                row, last = await server.alongside(changes)
                server.stop()
            report["churn"] = row
            layout = Settings(engine_threads=threads).engine_layout
            row["rebuilt"] = is_rebuilt(bundle, log, row["last_version"], queries, last, layout)
    if batch is not None:
        seconds = min(load.seconds, _THROUGHPUT_S)
        with ServerProcess(bundle, *options, "--max-batch", str(batch)) as server:
            batches = measure_throughput(server, queries, bundle, batch, threads, seconds, _ROUNDS)
            report["throughput"] = await server.alongside(batches)
            server.stop()


if __name__ == "__main__":
    run(main)
