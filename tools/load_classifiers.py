"""Load one server of many classifiers on one encoder, and as many servers of one classifier in turns with it.

python tools/load_classifiers.py --json build/classifiers.json
python tools/load_classifiers.py --rival-path ../checkout-of-before --json build/classifiers.json

The classifiers are of 10 classes with 4 of the demo's pictures each; their CLIP has random weights, which change no
speed. Requests ask each classifier in turn; every label is compared with that of Classifier.predict. Cases:

lone      requests one at a time; `memory_mb` is that of all processes after them, shared pages counted once
all       requests for all classifiers at once, in turns with requests for one; `of_one` is over the latter's median
capacity  a closed loop of 32 connections
"""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from benchmarks.show import lines_of, origin
from iosr_fast.backbones.demo.pictures import load_pictures
from iosr_fast.classifier import Classifier
from iosr_fast.cli.command import new_file, run
from iosr_fast.evaluation.provenance import commit, write_rows
from iosr_fast.evaluation.table import facts
from tools.load_test import CONNECTIONS, LONE, PACKAGES
from tools.serving_load.client import Client, Queries, closed_loop, make_queries, run_alone
from tools.serving_load.rows import Facts, Round, percentile_ms, problems_of, row_of
from tools.serving_load.server import ServerProcess

CLASSES, SHOTS, QUERIES = 10, 4, 64
_LONGEST_MS, _WARMUP_S = 60_000, 4.0


def main(
    json_path: Annotated[Path, typer.Option("--json", callback=new_file, help="Write the rows here.")],
    counts: Annotated[list[int] | None, typer.Option("--count", help="Classifiers [default: 1, 4, 16].")] = None,
    model: Annotated[str, typer.Option(help="A model of open_clip, or demo.")] = "ViT-B-32",
    precision: Annotated[str, typer.Option(help="Of the encoder, as of iosr-fast fit.")] = "fp32",
    seconds: Annotated[float, typer.Option(min=0.5, help="Of each closed loop.")] = 20.0,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds, in which the servers take turns.")] = 3,
    rival_path: Annotated[
        Path | None, typer.Option(exists=True, file_okay=False, help="A checkout for the servers of one classifier.")
    ] = None,
) -> None:
    """Exit code 1 for a wrong answer, an error or a refusal."""
    counts = counts or [1, 4, 16]
    with tempfile.TemporaryDirectory() as name:
        queries = write_classifiers(Path(name), max(counts), model, precision)
        rows = []
        for count in counts:
            bundles = [Path(name, str(number)) for number in range(count)]
            cases: dict[tuple[str, str], list[Round]] = defaultdict(list)
            for number in range(rounds):
                for server in ("one", "each")[:: 1 if number % 2 == 0 else -1]:
                    package = rival_path.resolve() if rival_path and server == "each" else None
                    measured = measure(bundles, queries[:count], seconds, server == "one", package)
                    for case, made in measured.items():
                        cases[server, case].append(made)
            rows += [
                {"bench": "classifiers", "case": case, "classifiers": count, "server": server}
                | row_of(made, _LONGEST_MS / 1e3)
                | {"commit": commit(rival_path) if rival_path and server == "each" else commit()}
                for (server, case), made in cases.items()
            ]
    shared = facts(PACKAGES) | {"model": model, "precision": precision, "seconds": seconds}
    rows = [shared | row for row in rows]
    write_rows(json_path, rows)
    typer.echo("\n".join([*lines_of(rows), "", origin("classifiers", rows)]))
    if problems := [problem for problem in map(problems_of, rows) if problem]:
        typer.echo("\n".join(problems), err=True)
        raise typer.Exit(1)


def write_classifiers(folder: Path, count: int, model: str, precision: str) -> list[Queries]:
    """Classifiers "0", "1", ... of different classes in `folder`; the queries, with the labels of each."""
    pictures, made = load_pictures("held-out", min_styles=SHOTS), []
    for number in range(count):
        chosen = np.random.default_rng(number).permutation(len(pictures.names))[:CLASSES]
        rows = np.concatenate([np.flatnonzero(pictures.concepts == c)[:SHOTS] for c in chosen])
        labels = [pictures.names[c] for c in pictures.concepts[rows]]
        classifier = Classifier(model, None if model == "demo" else "none", precision=precision)
        classifier.fit(pictures.images[rows], labels).save(folder / str(number))
        made.append(make_queries(classifier, QUERIES))
    return made


def measure(
    bundles: Sequence[Path], queries: Sequence[Queries], seconds: float, together: bool, package: Path | None
) -> dict[str, Round]:
    """A round of each case: one server of all bundles, or one of each."""
    with ExitStack() as stack:
        served = [bundles] if together else [[bundle] for bundle in bundles]
        servers = [
            stack.enter_context(ServerProcess.of_bundle(first, *map(str, more), package=package))
            for first, *more in served
        ]
        urls = [f"{server.url}/v1" for server in servers]
        if together and len(bundles) > 1:
            urls = [f"{urls[0]}/classifiers/{bundle.name}" for bundle in bundles]

        def is_wrong(number: int, answer: Any) -> bool:
            return queries[number % len(queries)].is_wrong(number, answer)

        asked = Queries(queries[0].bodies, is_wrong, queries[0].content_type, "/predict")
        rounds = run_alone(load(urls, asked, seconds, servers))
        if together and len(bundles) > 1:
            names = [bundle.name for bundle in bundles]
            rounds["all"] = run_alone(ask_all(servers[0].url, names, queries, asked))
        for server in servers:
            server.stop()
    return rounds


async def load(
    urls: Sequence[str], queries: Queries, seconds: float, servers: Sequence[ServerProcess]
) -> dict[str, Round]:
    async with Client(urls, queries, _LONGEST_MS) as client:
        await closed_loop(client, CONNECTIONS, _WARMUP_S)
        lone = [await client.predict(number) for number in range(LONE)]
        memory: Facts = {"memory_mb": sum(server.pss_mb() for server in servers)}
        made = await closed_loop(client, CONNECTIONS, _WARMUP_S + seconds)
    start = made[0].sent + _WARMUP_S
    return {"lone": (lone, memory), "capacity": ([answer for answer in made if answer.done >= start], {})}


async def ask_all(url: str, names: Sequence[str], queries: Sequence[Queries], asked: Queries) -> Round:
    """Requests for all classifiers and for one, in turns."""
    every, of_one = [], []
    query = "".join(f"&classifier={name}" for name in names)
    async with (
        Client(f"{url}/v1", asked, _LONGEST_MS) as of_all,
        Client([f"{url}/v1/classifiers/{name}" for name in names], asked, _LONGEST_MS) as client,
    ):
        for number in range(LONE):
            answer = await of_all.predict(number, None, query, lambda content: content["classifiers"])
            if answer.content:
                judged = (
                    one.is_wrong(number % QUERIES, answer.content[name])
                    for name, one in zip(names, queries, strict=True)
                )
                answer.wrong = any(judged)
            every.append(answer)
            of_one.append((await client.predict(number)).latency_s)
    median = percentile_ms([answer.latency_s for answer in every], 50) or 0.0
    return every, {"of_one": round(median / (percentile_ms(of_one, 50) or 1.0), 3)}


if __name__ == "__main__":
    run(main)
