"""The command `iosr-fast serve-ray`: replicas of a classifier behind one HTTP API, by Ray Serve."""

from __future__ import annotations

import signal
import threading
from typing import Annotated

import typer

from iosr_fast.cli.command import note
from iosr_fast.cli.options import Address, Deadline, MaxBatch, RayOption, ReplicaOption, Runtime, SavedClassifier
from iosr_fast.exceptions import IosrFastError
from iosr_fast.serving.http.settings import Settings
from iosr_fast.serving.ray import NAME, Scale, build_app, deploy, digest_of
from iosr_fast.utils.require import require

_SETTINGS, _SCALE = Settings(), Scale()


def serve_ray(
    classifier: SavedClassifier,
    replicas: Annotated[int, ReplicaOption(help="Number of replicas.")] = _SCALE.replicas,
    min_replicas: Annotated[int, ReplicaOption(help="With --max-replicas: the smallest number.")] = _SCALE.min_replicas,
    max_replicas: Annotated[
        int | None, ReplicaOption(help="Instead of --replicas: as many as the load needs, up to this number.")
    ] = None,
    target_ongoing_requests: Annotated[
        float, ReplicaOption(help="With --max-replicas: concurrent requests of a replica.")
    ] = _SCALE.target_ongoing_requests,
    cpus: Annotated[float, ReplicaOption(help="CPU cores of a replica.")] = _SCALE.cpus,
    gpus: Annotated[float, ReplicaOption(help="GPUs of a replica, or its share of one.")] = _SCALE.gpus,
    address: Address = None,
    name: Annotated[str, RayOption(help="Name of the application in Ray Serve.")] = NAME,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0: all.")] = _SETTINGS.host,
    port: Annotated[int, typer.Option(help="Port.")] = _SETTINGS.port,
    runtime: Runtime = _SETTINGS.runtime,
    max_batch: MaxBatch = None,
    deadline_ms: Deadline = _SETTINGS.deadline_ms,
) -> None:
    """Serve replicas of a saved classifier by Ray Serve.

    Without --address the command starts Ray on this machine, prints the address that other machines join, and serves
    until Ctrl-C or SIGTERM. With --address it deploys to that cluster and ends; `serve shutdown` of Ray stops it.

    The same command with another classifier, or with new content in the folder, is a rolling update in which no request
    fails. A folder that can't be served is refused (exit code 2), and the old classifier stays.

    The machines of a cluster need this package and CLASSIFIER at the same paths (a shared folder), and one version of
    Ray. Each machine receives requests on --port. Class changes are off.
    """
    serve = require("ray.serve", "ray")
    settings = Settings(host=host, port=port, runtime=runtime, max_batch=max_batch, deadline_ms=deadline_ms)
    scale = Scale(replicas, min_replicas, max_replicas, target_ongoing_requests, cpus, gpus)
    application = build_app(classifier, settings, scale)  # raises, before Ray is started, for what can't be served
    from iosr_fast.utils.ray_cluster import joined

    with joined(address, scale.most_cpus) as ray:
        stopped = threading.Event()
        if address is None:
            for number in (signal.SIGTERM, signal.SIGINT):  # instead of Ray's handlers, which end the process at once
                signal.signal(number, lambda *_: stopped.set())
        try:  # an HTTP proxy on every machine; no effect if Ray Serve runs already
            serve.start(proxy_location="EveryNode", http_options={"host": host, "port": port})
        except (ray.exceptions.RayError, TimeoutError) as error:
            reason = str(getattr(error, "cause", error)).rstrip(".")
            raise IosrFastError(
                f"expected Ray's HTTP proxy to start at {host}:{port}, got: {reason}; choose a free --port; if the "
                "machine is busy, set RAY_worker_niceness=0"
            ) from error
        deploy(application, name)
        where = f"at http://{host}:{port}/" if address is None else f"by the cluster at {address}"
        note(f"{classifier} ({digest_of(classifier)}) is served {where}", err=False)
        if address is None:
            note(f"join with --address {ray.get_runtime_context().gcs_address}; stop with Ctrl-C", err=False)
            stopped.wait()
            serve.shutdown()
