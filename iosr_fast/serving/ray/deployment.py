"""The application of Ray Serve: an ingress, and the replicas that it passes images on to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from iosr_fast import __version__
from iosr_fast.serving.http.settings import Settings
from iosr_fast.serving.ray.scale import Scale
from iosr_fast.serving.ray.source import Source
from iosr_fast.utils.require import require

EXTRA = "ray"
CLASSIFIER, INGRESS = "Classifier", "Ingress"  # names of the two deployments
# A replica refuses by itself what is more than `max_queue` images; Ray Serve's own limit only has to lie above that.
_SPARE = 2
_STARTS = 3  # times that replicas may fail to start before that is an error


def build_app(bundle: str | Path, settings: Settings | None = None, scale: Scale | None = None) -> Any:
    """The ray.serve.Application that serves the classifier in the folder `bundle`, the same on every machine.

    Of `settings` the limits, batches and deadlines hold for each replica and each ingress; host, port, connections and
    signals are Ray Serve's own matter. Raises ValueError for a bundle that is none, and for a token or a log: classes
    are not changed here (iosr_fast.serving.ray).
    """
    settings, scale = settings or Settings(), scale or Scale()
    source = Source.of(str(Path(bundle).absolute()))
    return application(source, settings, scale)


def from_config(args: Mapping[str, Any]) -> Any:
    """`build_app` for a file of `serve deploy`, with import_path iosr_fast.serving.ray:from_config and

        args: {bundle: /share/bundle, settings: {max_batch: 64}, scale: {max_replicas: 8}}

    as Settings and Scale have them. Changing `args` restarts replicas, some at a time. Another bundle needs no restart
    where it is named as the deployment's user_config, which comes before that of `args`:

        deployments: [{name: Classifier, user_config: {bundle: /share/another}}]
    """
    if "bundle" not in args or set(args) - {"bundle", "settings", "scale"}:
        raise ValueError(f"expected args with bundle and, if you like, settings and scale, got {sorted(args)}")
    return build_app(args["bundle"], Settings(**args.get("settings", {})), Scale(**args.get("scale", {})))


def application(source: Source, settings: Settings, scale: Scale) -> Any:
    """`build_app` of a bundle that was looked at."""
    serve = require("ray.serve", EXTRA)
    require("fastapi", "serve")
    require("python_multipart", "serve")
    require("prometheus_client", "serve")
    if settings.token is not None or settings.log is not None:
        raise ValueError(
            "expected settings without token and log, for classes are not changed on replicas; "
            "change them on one classifier, save it and roll it out"
        )
    from iosr_fast.serving.ray.ingress import Ingress
    from iosr_fast.serving.ray.replica import ClassifierReplica

    common: dict[str, Any] = {
        "graceful_shutdown_timeout_s": float(settings.grace_s),
        "graceful_shutdown_wait_loop_s": 1.0,
        "health_check_period_s": scale.health_period_s,
    }
    replicas = serve.deployment(
        name=CLASSIFIER,
        max_ongoing_requests=_SPARE * settings.max_queue,
        max_constructor_retry_count=_STARTS,
        user_config=source.to_config(),
        ray_actor_options={"num_cpus": scale.cpus, "num_gpus": scale.gpus},
        **scale.replica_options(),
        **common,
    )(ClassifierReplica)
    ingress = serve.deployment(
        name=INGRESS,
        num_replicas=scale.ingresses,
        max_ongoing_requests=settings.max_connections,
        ray_actor_options={"num_cpus": scale.ingress_cpus},
        **common,
    )(serve.ingress()(Ingress))
    version = code_version(settings, scale)
    bound = _versioned(replicas, version).bind(settings, scale.threads_each)
    return _versioned(ingress, version).bind(bound, settings)


def code_version(settings: Settings, scale: Scale) -> str:
    """Changes with all that replicas and ingresses are made of, but for the bundle and what Ray Serve compares."""
    own = {name: value for name, value in asdict(settings).items() if name not in ("host", "port")}
    made = json.dumps([__version__, own, scale.threads_each], sort_keys=True, default=str)
    return hashlib.sha256(made.encode()).hexdigest()[:16]


def _versioned(deployment: Any, version: str) -> Any:
    # Without a version serve.run takes what it gets for new code and restarts every replica, where only user_config
    # may have changed. Of a file of `serve deploy` Ray Serve makes the version itself.
    return deployment.options(version=version, _internal=True)
