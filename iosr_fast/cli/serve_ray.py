"""The command `iosr-fast serve-ray`: replicas of a classifier behind one HTTP API, by Ray Serve."""

from __future__ import annotations

import math
import signal
import threading
from pathlib import Path
from typing import Any, TypeVar

import typer

from iosr_fast.exceptions import IosrFastError
from iosr_fast.serving.http.settings import Settings
from iosr_fast.serving.ray.deployment import Scale
from iosr_fast.utils.require import require

_SETTINGS, _SCALE = Settings(), Scale()
_T = TypeVar("_T")


def serve_ray(
    bundle: Path | None = typer.Argument(None, help="a folder that `iosr-fast fit` or Classifier.save wrote"),
    replicas: int | None = typer.Option(None, help=f"classifiers [default: {_SCALE.replicas}]"),
    min_replicas: int = typer.Option(_SCALE.min_replicas, help="with --max-replicas"),
    max_replicas: int | None = typer.Option(None, help="as many as the load needs, up to this, instead of --replicas"),
    target_ongoing_requests: float = typer.Option(
        _SCALE.target_ongoing_requests, help="with --max-replicas: concurrent requests of each"
    ),
    cpus: float = typer.Option(_SCALE.cpus, help="cores of each replica"),
    gpus: float = typer.Option(_SCALE.gpus, help="GPUs of each replica, or its share of one"),
    threads: int = typer.Option(None, help="threads of each replica [default: its cores]"),
    ingresses: int = typer.Option(_SCALE.ingresses, help="processes that take requests and forward them"),
    ingress_cpus: float = typer.Option(_SCALE.ingress_cpus, help="cores of each of them"),
    health_period_s: float = typer.Option(
        _SCALE.health_period_s, "--health-period", help="seconds between health checks of a replica"
    ),
    address: str | None = typer.Option(None, help="join this cluster ('auto': the one on this machine)"),
    name: str = typer.Option("iosr_fast", help="of the application"),
    stop: bool = typer.Option(False, "--stop", help="with --address: stop the application there"),
    host: str = typer.Option(_SETTINGS.host, help="address to listen on; 0.0.0.0 for all"),
    port: int = typer.Option(_SETTINGS.port),
    runtime: str = typer.Option(_SETTINGS.runtime),
    max_batch: int = typer.Option(None, help="images a batch [default: 8 on a CPU, the engine's own on a GPU]"),
    max_wait_ms: float = typer.Option(_SETTINGS.max_wait_ms, help="longest wait of a batch for more images"),
    max_queue: int = typer.Option(_SETTINGS.max_queue, help="images that a replica has accepted and not answered"),
    max_images: int = typer.Option(_SETTINGS.max_images, help="images a request"),
    deadline_ms: int = typer.Option(_SETTINGS.deadline_ms, help="for requests without a deadline"),
    max_deadline_ms: int = typer.Option(_SETTINGS.max_deadline_ms, help="longest deadline of a request"),
    grace_s: int = typer.Option(_SETTINGS.grace_s, "--grace", help="seconds that a replica has for its last requests"),
) -> None:
    """Serve a classifier by Ray Serve, on this machine or on a cluster; with another bundle: a rolling update.

    Without --address it starts Ray here, prints an address that other machines can join, and serves until Ctrl-C or
    SIGTERM. With --address it deploys to that cluster and ends. Repeated with another bundle, or with new content in
    the same folder, it is a rolling update: replicas load the new bundle beside the old one and swap, and no request
    fails. A bundle that can't be loaded is refused (exit code 2), and the old one stays. Changed options restart
    replicas, some at a time.

    Machines of a cluster need iosr_fast and the bundle at the same paths (a shared folder), and one version of Ray.
    Each takes requests on --port. Classes can't be changed over this API (iosr_fast.serving.ray).
    """
    options: dict[str, Any] = {**locals(), "replicas": _SCALE.replicas if replicas is None else replicas}
    serve = require("ray.serve", "ray")
    from iosr_fast.serving.ray.messages import Source
    from iosr_fast.utils.ray_cluster import joined

    if stop:
        if address is None:
            raise IosrFastError("expected --address with --stop; without it an application ends with its process")
        with joined(address, 0):
            serve.delete(name)
        return
    if bundle is None:
        raise IosrFastError("expected a bundle, got none")
    if replicas is not None and max_replicas is not None:
        raise IosrFastError("expected --replicas or --max-replicas, got both")
    settings, scale = _choose(Settings, options), _choose(Scale, options)
    Source.of(str(bundle), settings.verify)  # an invalid bundle is refused before Ray is started
    total = (max_replicas or scale.replicas) * cpus + ingresses * ingress_cpus
    cores = math.ceil(total) if address is None else 0
    with joined(address, cores) as ray:
        stopped = threading.Event()
        if address is None:
            for number in (signal.SIGTERM, signal.SIGINT):  # instead of Ray's handlers, which end the process at once
                signal.signal(number, lambda *_: stopped.set())
        _deploy(serve, bundle, settings, scale, name)
        if address is None:
            typer.echo(f"join with --address {ray.get_runtime_context().gcs_address}; stop with Ctrl-C")
            stopped.wait()
            serve.shutdown()


def _choose(kind: type[_T], options: dict[str, Any]) -> _T:
    """A dataclass of those options that are its fields."""
    return kind(**{name: options[name] for name in kind.__annotations__ if name in options})


def _deploy(serve: Any, bundle: Path, settings: Settings, scale: Scale, name: str) -> None:
    from iosr_fast.serving.ray import deploy

    # An HTTP proxy on every machine; no effect if Ray Serve runs already.
    serve.start(proxy_location="EveryNode", http_options={"host": settings.host, "port": settings.port})
    facts = deploy(bundle, settings, scale, name)
    first = facts[0]
    typer.echo(
        f"{len(facts)} replicas serve {first.source.bundle} ({first.classes} classes, version {first.version}) at "
        f"http://{settings.host}:{settings.port}/"
    )
