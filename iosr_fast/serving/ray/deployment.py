"""The application of Ray Serve: an ingress, and the replicas behind it."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from iosr_fast import __version__
from iosr_fast.exceptions import IosrFastError
from iosr_fast.serving.http.settings import Count, NonNegative, Positive, Settings, check_fields
from iosr_fast.serving.ray.messages import Source
from iosr_fast.utils.require import require

CLASSIFIER, INGRESS = "Classifier", "Ingress"  # names of the two deployments
# A replica itself refuses more than `max_queue` images; Ray Serve's limit only has to be higher.
_SPARE = 2
_STARTS = 3  # failed starts of replicas before deployment fails


@dataclass(frozen=True)
class Scale:
    """The number of replicas and their resources. Raises ValueError that names the field and the expected value.

    There are `replicas` classifiers; or, with `max_replicas`, between `min_replicas` and `max_replicas`, so that each
    has about `target_ongoing_requests` requests (one batch keeps a replica busy under load). Each gets `cpus` cores,
    `gpus` GPUs (fractions are allowed) and `threads` threads for decoding and, on a CPU, for encoding (None: its cores,
    rounded up).

    `ingresses` processes with `ingress_cpus` cores each receive the HTTP requests, check them and forward the images.

    The engine of each replica is checked every `health_period_s` seconds; a replica that fails or dies is replaced.
    """

    replicas: Count = 1
    min_replicas: Count = 1
    max_replicas: Count | None = None
    target_ongoing_requests: Positive = 32.0
    cpus: NonNegative = 1.0
    gpus: NonNegative = 0.0
    threads: Count | None = None
    ingresses: Count = 1
    ingress_cpus: NonNegative = 0.5
    health_period_s: Positive = 5.0

    def __post_init__(self) -> None:
        check_fields(self)
        if self.max_replicas is not None and self.max_replicas < self.min_replicas:
            raise IosrFastError(
                f"expected max_replicas of at least min_replicas, got {self.max_replicas} and {self.min_replicas}"
            )

    @property
    def threads_each(self) -> int:
        return math.ceil(self.cpus) or 1 if self.threads is None else self.threads

    def replica_options(self) -> dict[str, Any]:
        """The options of Ray Serve for the number of replicas."""
        if self.max_replicas is None:
            return {"num_replicas": self.replicas}
        return {
            "autoscaling_config": {
                "min_replicas": self.min_replicas,
                "max_replicas": self.max_replicas,
                "target_ongoing_requests": self.target_ongoing_requests,
            }
        }


def build_app(bundle: str | Path, settings: Settings | None = None, scale: Scale | None = None) -> Any:
    """The ray.serve.Application that serves the classifier in the folder `bundle`, the same on every machine.

    Limits, batches and deadlines of `settings` hold for each replica and each ingress; Ray Serve has its own host,
    port, connections and signals. Raises ValueError for an invalid bundle, and for a token or a log, because replicas
    can't change classes (iosr_fast.serving.ray).
    """
    return application(Source.of(str(Path(bundle).absolute())), settings or Settings(), scale or Scale())


def from_config(args: Mapping[str, Any]) -> Any:
    """`build_app` for a config file of `serve deploy`, with import_path iosr_fast.serving.ray:from_config and

        args: {bundle: /share/bundle, settings: {max_batch: 64}, scale: {max_replicas: 8}}

    with the fields of Settings and Scale. Ray Serve restarts replicas, some at a time, if `args` change. A new bundle
    needs no restart if it is the user_config of the deployment, which has precedence over `args`:

        deployments: [{name: Classifier, user_config: {bundle: /share/another}}]
    """
    if "bundle" not in args or set(args) - {"bundle", "settings", "scale"}:
        raise IosrFastError(f"expected args with bundle and optionally settings and scale, got {sorted(args)}")
    return build_app(args["bundle"], Settings(**args.get("settings", {})), Scale(**args.get("scale", {})))


def application(source: Source, settings: Settings, scale: Scale) -> Any:
    """`build_app` for a bundle that was checked."""
    serve = require("ray.serve", "ray")
    for module in ("fastapi", "python_multipart", "prometheus_client"):
        require(module, "serve")
    if settings.token is not None or settings.log is not None:
        raise IosrFastError(
            "expected settings without token and log, because classes can't be changed on replicas; "
            "change them on one classifier, save it and deploy it"
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
        user_config=asdict(source),
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
    """A hash of everything that requires new replicas or ingresses, except the bundle and what Ray Serve compares."""
    relevant = {name: value for name, value in asdict(settings).items() if name not in ("host", "port")}
    text = json.dumps([__version__, relevant, scale.threads_each], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _versioned(deployment: Any, version: str) -> Any:
    # Without a version serve.run assumes new code and restarts all replicas, although only user_config may have
    # changed. `serve deploy` computes the version itself.
    return deployment.options(version=version, _internal=True)
