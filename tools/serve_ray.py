"""Serve a saved classifier by Ray Serve: replicas behind one HTTP API, on this machine or on a cluster.

    python tools/serve_ray.py --bundle build/demo-bundle --replicas 2                      # until Ctrl-C or SIGTERM
    python tools/serve_ray.py --bundle /share/bundle --replicas 8 --gpus 0.5 --address auto
    python tools/serve_ray.py --bundle /share/bundle-2 --replicas 8 --gpus 0.5 --address auto       # an update
    python tools/serve_ray.py --stop --address auto

Without --address it starts Ray here, and names where others can join it. With --address it brings the bundle to that
cluster and ends; the cluster goes on serving. The same again with another bundle, or with other content in the same
folder, is a rolling update: replicas load it beside the old one and swap, and no request fails. A bundle that can't be
loaded is refused (exit code 2), and the old one goes on. Other options than before restart replicas, some at a time.

Machines of a cluster need this tree and the bundle at the same paths (a shared folder), and one version of Ray. Each
takes requests on --port; iosr_fast.serving.ray says what is answered, and why classes are not changed there.
"""

from __future__ import annotations

import math
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import typer

from iosr_fast.serving.http import Settings
from iosr_fast.serving.ray import Scale, deploy
from iosr_fast.serving.ray.messages import Source
from iosr_fast.utils.command import run
from iosr_fast.utils.ray_cluster import joined
from iosr_fast.utils.require import require

_SETTINGS, _SCALE = Settings(), Scale()


def serve_here(bundle: Path, settings: Settings, scale: Scale, name: str) -> None:
    """Serve on a Ray of this process's own until a signal."""
    serve = require("ray.serve", "ray")
    most = scale.replicas if scale.max_replicas is None else scale.max_replicas
    cores = math.ceil(most * scale.cpus + scale.ingresses * scale.ingress_cpus)
    with joined(None, cores) as ray:
        stopped = threading.Event()
        for number in (signal.SIGTERM, signal.SIGINT):  # Ray has its own, which ends the process at once
            signal.signal(number, lambda *_: stopped.set())
        start(serve, settings)
        tell(deploy(bundle, settings, scale, name), settings)
        print(f"join with --address {ray.get_runtime_context().gcs_address}; stop with Ctrl-C", flush=True)
        stopped.wait()
        serve.shutdown()


def serve_there(bundle: Path, settings: Settings, scale: Scale, name: str, address: str) -> None:
    """Have a cluster serve it."""
    with joined(address, 0):
        start(require("ray.serve", "ray"), settings)
        tell(deploy(bundle, settings, scale, name), settings)


def start(serve: Any, settings: Settings) -> None:
    """Ray Serve, with a proxy for HTTP on every machine; one that runs already stays as it is."""
    serve.start(proxy_location="EveryNode", http_options={"host": settings.host, "port": settings.port})


def tell(replicas: list[Any], settings: Settings) -> None:
    first = replicas[0]
    print(
        f"{len(replicas)} replicas serve {first.source.bundle} ({first.classes} classes, version {first.version}) at "
        f"http://{settings.host}:{settings.port}/",
        flush=True,
    )


def main(
    bundle: Path = typer.Option(None, help="a folder that `iosr-fast fit` or Classifier.save wrote"),
    replicas: int = typer.Option(None, help=f"classifiers [{_SCALE.replicas}]"),
    min_replicas: int = typer.Option(_SCALE.min_replicas, help="with --max-replicas"),
    max_replicas: int = typer.Option(None, help="as many as requests need, up to this, in place of --replicas"),
    target_ongoing_requests: float = typer.Option(
        _SCALE.target_ongoing_requests, help="with --max-replicas: requests at a time, of each"
    ),
    cpus: float = typer.Option(_SCALE.cpus, help="cores of each replica"),
    gpus: float = typer.Option(_SCALE.gpus, help="GPUs of each replica, or its share of one"),
    threads: int = typer.Option(None, help="threads of each replica [its cores]"),
    ingresses: int = typer.Option(_SCALE.ingresses, help="processes that take requests and pass them on"),
    ingress_cpus: float = typer.Option(_SCALE.ingress_cpus, help="cores of each of them"),
    health_period: float = typer.Option(_SCALE.health_period_s, help="seconds between two looks at a replica"),
    address: str = typer.Option(None, help="join this cluster ('auto': the one on this machine)"),
    name: str = typer.Option("iosr_fast", help="of the application"),
    stop: bool = typer.Option(False, "--stop", help="with --address: end the application there"),
    host: str = typer.Option(_SETTINGS.host, help="the address to listen on; 0.0.0.0 for all"),
    port: int = typer.Option(_SETTINGS.port),
    runtime: str = typer.Option(_SETTINGS.runtime),
    max_batch: int = typer.Option(None, help="images a batch [default: 8 on a CPU, the engine's own on a GPU]"),
    max_wait_ms: float = typer.Option(_SETTINGS.max_wait_ms, help="that a batch waits for more images"),
    max_queue: int = typer.Option(_SETTINGS.max_queue, help="images that a replica accepts and has not answered"),
    max_images: int = typer.Option(_SETTINGS.max_images, help="images a request"),
    deadline_ms: int = typer.Option(_SETTINGS.deadline_ms, help="for requests that name none"),
    max_deadline_ms: int = typer.Option(_SETTINGS.max_deadline_ms, help="the longest that one may name"),
    grace: int = typer.Option(_SETTINGS.grace_s, help="seconds that a replica has for its last requests"),
) -> None:
    try:
        require("ray.serve", "ray")
        if stop:
            if address is None:
                raise ValueError("expected --address with --stop; what was started without ends with its process")
            with joined(address, 0):
                require("ray.serve", "ray").delete(name)
            return
        if bundle is None:
            raise ValueError("expected --bundle")
        if replicas is not None and max_replicas is not None:
            raise ValueError("expected --replicas or --max-replicas, got both")
        settings = Settings(
            host=host,
            port=port,
            runtime=runtime,
            max_batch=max_batch,
            max_wait_ms=max_wait_ms,
            max_queue=max_queue,
            max_images=max_images,
            deadline_ms=deadline_ms,
            max_deadline_ms=max_deadline_ms,
            grace_s=grace,
        )
        scale = Scale(
            replicas=_SCALE.replicas if replicas is None else replicas,
            min_replicas=min_replicas,
            max_replicas=max_replicas,
            target_ongoing_requests=target_ongoing_requests,
            cpus=cpus,
            gpus=gpus,
            threads=threads,
            ingresses=ingresses,
            ingress_cpus=ingress_cpus,
            health_period_s=health_period,
        )
        Source.of(str(bundle), settings.verify)  # a bundle that is none shows before Ray is started
        if address is None:
            serve_here(bundle, settings, scale, name)
        else:
            serve_there(bundle, settings, scale, name, address)
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2) from error


if __name__ == "__main__":
    run(main)
