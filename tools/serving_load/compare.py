"""Our server against another one in the same run: `load_test.py --peer`."""

from __future__ import annotations

import json
import shlex
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from enum import Enum
from pathlib import Path
from typing import Any

import typer

from iosr_fast.classifier import Classifier
from iosr_fast.serving.http.settings import Settings
from iosr_fast.utils.machine import package_version
from tools.serving_load import peer as infinity
from tools.serving_load.bundles import BOTTLENECK, FIRST_ADAPTED_BLOCK, MODEL, make_bundles
from tools.serving_load.client import make_queries, run_alone
from tools.serving_load.measure import CONNECTIONS, Load
from tools.serving_load.report import peer_goals, print_peers, provenance, write
from tools.serving_load.server import ServerProcess
from tools.serving_load.versus import Contender, measure_versus, ratios

_BUILD = Path(__file__).resolve().parents[2] / "build" / "peers"
_QUERIES = 128
# Our pictures a second over the peer's.
GOALS = {"iosr_fast, fp32": 1.15, "iosr_fast, optimized": 3.3}


class Peer(Enum):
    INFINITY = "infinity"


def compare(json_path: Path, load: Load, serve: Sequence[str] = ()) -> None:
    """Measure, write the report and print it. Exit code 1 for a wrong answer, or a server that dies."""
    bundles = make_bundles(_BUILD)
    report: dict[str, Any] = {
        "kind": "serving-peers",
        **provenance(),
        "model": MODEL,
        "first_adapted_block": FIRST_ADAPTED_BLOCK,
        "bottleneck": BOTTLENECK,
        "pictures": f"{_QUERIES} JPEGs of 500 x 375",
        "clients": CONNECTIONS,
        "seconds": load.seconds,
        "closed_loop_seconds": load.capacity_seconds,
        "max_wait_ms": Settings().max_wait_ms,
        "server_options": list(serve),
        "servers": [],
    }
    try:
        with ExitStack() as stack:
            contenders = [*_ours(bundles, serve, stack), _theirs(stack, bundles["fp32"])]
            report["servers"] = rows = run_alone(measure_versus(contenders, load))
        report["ratios"] = ratios(rows, infinity.NAME)
        report["goals"] = peer_goals(report, GOALS)
    except RuntimeError as error:
        write({**report, "error": str(error)}, json_path)
        typer.echo(f"load_test: {error}", err=True)
        raise typer.Exit(1) from None
    write(report, json_path)
    print_peers(report)


def _ours(bundles: dict[str, Path], serve: Sequence[str], stack: ExitStack) -> Iterator[Contender]:
    words = [word for text in serve for word in shlex.split(text)]
    for form, bundle in bundles.items():
        classifier = Classifier.load(bundle)
        queries = make_queries(classifier, _QUERIES)
        facts = {
            "version": package_version("iosr_fast"),
            "engine": classifier.encoder.runtime,
            "precision": json.loads((bundle / "engine" / "manifest.json").read_text("utf-8"))["precision"],
            "answers": "label, from plain and adapted embedding",
        }
        del classifier
        yield Contender(f"iosr_fast, {form}", stack.enter_context(ServerProcess(bundle, *words)), queries, facts)


def _theirs(stack: ExitStack, bundle: Path) -> Contender:
    python = infinity.make_environment(_BUILD / "infinity")
    images = make_queries(Classifier.load(bundle), _QUERIES).images
    with tempfile.TemporaryDirectory() as name:
        paths = [Path(name) / f"{number:03d}.jpg" for number in range(len(images))]
        for path, image in zip(paths, images, strict=True):
            path.write_bytes(image)
        embeddings = infinity.make_model(python, _BUILD / "clip", paths)
    versions = infinity.versions(python)
    facts = {
        "version": versions.pop(infinity.NAME),
        "engine": f"{infinity.ENGINE} {versions['torch']}",
        "precision": "fp32",
        "answers": "plain embedding",
        "versions": versions,
    }
    server = stack.enter_context(infinity.PeerProcess(python, _BUILD / "clip"))
    return Contender(infinity.NAME, server, infinity.make_peer_queries(images, embeddings), facts)
