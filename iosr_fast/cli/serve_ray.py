"""The command `iosr-fast serve-ray`: replicas of a classifier behind one HTTP API, by Ray Serve."""

from __future__ import annotations

import math
import signal
import threading
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from iosr_fast.cli.options import (
    Address,
    BatchOption,
    Deadline,
    MaxBatch,
    MaxDeadline,
    MaxImages,
    MaxWait,
    RayOption,
    ReplicaOption,
    Runtime,
    TimeOption,
)
from iosr_fast.exceptions import IosrFastError
from iosr_fast.serving.http.settings import Settings
from iosr_fast.serving.ray.deployment import Scale
from iosr_fast.utils.command import note
from iosr_fast.utils.require import require

_SETTINGS, _SCALE = Settings(), Scale()
_T = TypeVar("_T")


def serve_ray(
    classifier: Annotated[
        Path | None, typer.Argument(metavar="CLASSIFIER", help="Folder that `iosr-fast fit` or Classifier.save wrote.")
    ] = None,
    replicas: Annotated[int | None, ReplicaOption(help=f"Number of replicas [default: {_SCALE.replicas}].")] = None,
    min_replicas: Annotated[int, ReplicaOption(help="With --max-replicas: the smallest number.")] = _SCALE.min_replicas,
    max_replicas: Annotated[
        int | None, ReplicaOption(help="Instead of --replicas: as many as the load needs, up to this number.")
    ] = None,
    target_ongoing_requests: Annotated[
        float, ReplicaOption(help="With --max-replicas: concurrent requests of a replica.")
    ] = _SCALE.target_ongoing_requests,
    cpus: Annotated[float, ReplicaOption(help="CPU cores of a replica.")] = _SCALE.cpus,
    gpus: Annotated[float, ReplicaOption(help="GPUs of a replica, or its share of one.")] = _SCALE.gpus,
    threads: Annotated[int | None, ReplicaOption(help="CPU threads of a replica [default: its cores].")] = None,
    ingresses: Annotated[
        int, ReplicaOption(help="Processes that receive requests and pass them to the replicas.")
    ] = _SCALE.ingresses,
    ingress_cpus: Annotated[float, ReplicaOption(help="CPU cores of such a process.")] = _SCALE.ingress_cpus,
    health_period_s: Annotated[
        float, ReplicaOption("--health-period", help="Seconds between health checks of a replica.")
    ] = _SCALE.health_period_s,
    address: Address = None,
    name: Annotated[str, RayOption(help="Name of the application in Ray Serve.")] = "iosr_fast",
    stop: Annotated[bool, RayOption("--stop", help="With --address: stop the application there.")] = False,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0: all.")] = _SETTINGS.host,
    port: Annotated[int, typer.Option(help="Port.")] = _SETTINGS.port,
    runtime: Runtime = _SETTINGS.runtime,
    max_batch: MaxBatch = None,
    max_wait_ms: MaxWait = _SETTINGS.max_wait_ms,
    max_queue: Annotated[
        int, BatchOption(help="Most images that a replica has accepted and not yet answered.")
    ] = _SETTINGS.max_queue,
    max_images: MaxImages = _SETTINGS.max_images,
    deadline_ms: Deadline = _SETTINGS.deadline_ms,
    max_deadline_ms: MaxDeadline = _SETTINGS.max_deadline_ms,
    grace_s: Annotated[
        int, TimeOption("--grace", help="Seconds in which a stopping replica answers its last requests.")
    ] = _SETTINGS.grace_s,
) -> None:
    """Serve replicas of a saved classifier by Ray Serve.

    Without --address the command starts Ray on this machine, prints the address that other machines join, and serves
    until Ctrl-C or SIGTERM. With --address it deploys to that cluster and ends.

    The same command with another classifier, or with new content in the folder, is a rolling update: replicas load the
    new classifier beside the old one and swap, and no request fails. A folder that can't be loaded is refused (exit
    code 2), and the old classifier stays. Changed options restart replicas a few at a time.

    The machines of a cluster need this package and CLASSIFIER at the same paths (a shared folder), and one version of
    Ray. Each machine receives requests on --port. Class changes are off.
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
    if classifier is None:
        raise IosrFastError("expected CLASSIFIER, the folder of a saved classifier, got none")
    if replicas is not None and max_replicas is not None:
        raise IosrFastError("expected --replicas or --max-replicas, got both")
    settings, scale = _choose(Settings, options), _choose(Scale, options)
    Source.of(str(classifier), verify=True)  # an invalid folder is refused before Ray is started
    total = (max_replicas or scale.replicas) * cpus + ingresses * ingress_cpus
    cores = math.ceil(total) if address is None else 0
    with joined(address, cores) as ray:
        stopped = threading.Event()
        if address is None:
            for number in (signal.SIGTERM, signal.SIGINT):  # instead of Ray's handlers, which end the process at once
                signal.signal(number, lambda *_: stopped.set())
        _deploy(serve, classifier, settings, scale, name)
        if address is None:
            note(f"join with --address {ray.get_runtime_context().gcs_address}; stop with Ctrl-C", err=False)
            stopped.wait()
            serve.shutdown()


def _choose(kind: type[_T], options: dict[str, Any]) -> _T:
    """A dataclass of those options that are its fields."""
    return kind(**{name: options[name] for name in kind.__annotations__ if name in options})


def _deploy(serve: Any, bundle: Path, settings: Settings, scale: Scale, name: str) -> None:
    from ray.exceptions import RayError

    from iosr_fast.serving.ray import deploy

    try:  # an HTTP proxy on every machine; no effect if Ray Serve runs already
        serve.start(proxy_location="EveryNode", http_options={"host": settings.host, "port": settings.port})
    except (RayError, TimeoutError) as error:
        reason = str(getattr(error, "cause", error)).rstrip(".")
        raise IosrFastError(
            f"expected Ray's HTTP proxy to start at {settings.host}:{settings.port}, got: {reason}; choose a free "
            "--port; if the machine is busy, set RAY_worker_niceness=0"
        ) from error
    facts = deploy(bundle, settings, scale, name)
    first = facts[0]
    note(
        f"{len(facts)} replicas serve {first.source.bundle} ({first.classes} classes, version {first.version}) at "
        f"http://{settings.host}:{settings.port}/",
        err=False,
    )
