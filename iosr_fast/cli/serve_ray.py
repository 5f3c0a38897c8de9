"""The command `iosr-fast serve-ray`: replicas of a classifier behind one HTTP API, by Ray Serve."""

from __future__ import annotations

import math
import signal
import threading
from typing import Annotated, Any

import typer

from iosr_fast.cli.command import note
from iosr_fast.cli.options import Address, Deadline, MaxBatch, ReplicaOption, Runtime, SavedClassifier
from iosr_fast.exceptions import IosrFastError
from iosr_fast.ray import SURGE_PERCENT, build_app, digest_of, joined
from iosr_fast.serving.http.settings import Settings
from iosr_fast.utils.require import require

_SETTINGS = Settings()


def serve_ray(
    classifier: SavedClassifier,
    replicas: Annotated[int, ReplicaOption(help="Number of replicas.")] = 1,
    min_replicas: Annotated[int, ReplicaOption(help="With --max-replicas: the smallest number.")] = 1,
    max_replicas: Annotated[int | None, ReplicaOption(help="As many as the load needs, up to this number.")] = None,
    target_ongoing_requests: Annotated[float, ReplicaOption(help="Of a replica, with --max-replicas.")] = 32.0,
    cpus: Annotated[float, ReplicaOption(help="CPU cores of a replica.")] = 1.0,
    gpus: Annotated[float, ReplicaOption(help="GPUs of a replica, or its share of one.")] = 0.0,
    address: Address = None,
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
    scale: dict[str, Any] = {"ray_actor_options": {"num_cpus": cpus, "num_gpus": gpus}, "num_replicas": replicas}
    if max_replicas is not None:
        bounds = {"min_replicas": min_replicas, "max_replicas": max_replicas}
        load = {"target_ongoing_requests": target_ongoing_requests}
        scale |= {"num_replicas": None, "autoscaling_config": {**bounds, **load}}
    application = build_app(classifier, settings, **scale)  # raises, before Ray starts, for what can't be served
    most = max_replicas or replicas
    with joined(address, math.ceil((most + math.ceil(most * SURGE_PERCENT / 100)) * cpus)) as ray:
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
        serve.run(application, name="iosr_fast", route_prefix="/")
        where = f"at http://{host}:{port}/" if address is None else f"by the cluster at {address}"
        note(f"{classifier} ({digest_of(classifier)}) is served {where}", err=False)
        if address is None:
            note(f"join with --address {ray.get_runtime_context().gcs_address}; stop with Ctrl-C", err=False)
            stopped.wait()
            serve.shutdown()
