"""The HTTP API of a saved classifier on several processes or machines, by Ray Serve.

    from iosr_fast.serving.ray import Scale, build_app, deploy
    deploy(build_app("bundle", scale=Scale(replicas=4)))    # with another bundle: an update

`iosr-fast serve-ray` does this from the command line, `from_config` in a config file of `serve deploy`. Needs the
extras `ray` and `serve`.

Each replica is the application of `iosr-fast serve` on a bundle of one digest, with batches of its own, without token:
classes can't be changed (403), because a change would reach one replica only. A new classifier is a new deployment.

Ray Serve sends a request to the less busy of two random replicas. It repeats a request that a replica has not accepted.
One that a replica was working on when it died ends with 500 and can be sent again, because predictions change nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from iosr_fast.exceptions import IosrFastError
from iosr_fast.sealed.verified_folder import open_verified
from iosr_fast.serving.http.settings import Count, NonNegative, Positive, Settings, check_fields
from iosr_fast.store.bundle import kind_of
from iosr_fast.utils.require import require

if TYPE_CHECKING:
    from fastapi import FastAPI

NAME = "iosr_fast"  # of the application
_SURGE_PERCENT = 25  # replicas of an update beside the old ones, rounded up; old ones stop when these run
_STARTS = 3  # failed starts of replicas before a deployment fails
_HEALTH_S = 5.0  # between health checks of a replica


@dataclass(frozen=True)
class Scale:
    """The number of replicas and their resources. Raises ValueError that names the field and the expected value.

    There are `replicas`; or, with `max_replicas`, between `min_replicas` and `max_replicas`, so that each has about
    `target_ongoing_requests` requests, waiting ones included. Each gets `cpus` cores and `gpus` GPUs (fractions are
    allowed).
    """

    replicas: Count = 1
    min_replicas: Count = 1
    max_replicas: Count | None = None
    target_ongoing_requests: Positive = 32.0
    cpus: NonNegative = 1.0
    gpus: NonNegative = 0.0

    def __post_init__(self) -> None:
        check_fields(self)
        if self.max_replicas is not None and self.max_replicas < self.min_replicas:
            raise IosrFastError(
                f"expected max_replicas of at least min_replicas, got {self.max_replicas} and {self.min_replicas}"
            )

    @property
    def most_cpus(self) -> int:
        """Cores of all replicas during an update."""
        most = self.max_replicas or self.replicas
        return math.ceil((most + math.ceil(most * _SURGE_PERCENT / 100)) * self.cpus)

    def options(self) -> dict[str, Any]:
        """Options of a deployment of Ray Serve."""
        resources = {"ray_actor_options": {"num_cpus": self.cpus, "num_gpus": self.gpus}}
        if self.max_replicas is None:
            return {"num_replicas": self.replicas, **resources}
        names = ("min_replicas", "max_replicas", "target_ongoing_requests")
        return {"autoscaling_config": {name: getattr(self, name) for name in names}, **resources}


class Replica:
    """One process with a classifier, its batches and the application. Raises ValueError for a folder of another digest
    than `settings.expected_digest`."""

    def __init__(self, bundle: str, settings: Settings, cores: int) -> None:
        from iosr_fast.serving.http.app import create_app, make_batching, open_served, warm
        from iosr_fast.serving.http.metrics import Metrics

        self._settings, metrics = settings, Metrics()
        self._batching = make_batching(open_served(bundle, settings, cores), settings, observer=metrics)
        self._app = create_app(self._batching, settings, metrics)
        warm(self._app)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return self._app

    def check_health(self) -> None:
        """Ray Serve replaces a replica on which this raises several times."""
        if not self._batching.healthy:
            raise RuntimeError(f"the engine failed: {self._batching.last_error}")

    def __del__(self) -> None:
        """Ray Serve calls this after the last request, or after its timeout for that."""
        if hasattr(self, "_app"):
            self._app.state.service.close()
            self._batching.close(self._settings.grace_s)


def deploy(application: Any, name: str = NAME) -> None:
    """Run what `build_app` made on the Ray cluster that this process is connected to.

    If the application `name` runs already, this is a rolling update: a quarter of the replicas, rounded up, start
    beside the old ones, which stop when these run and have answered what they accepted. Meanwhile either answers.

    Raises RuntimeError if the replicas do not start; old replicas keep serving.
    """
    require("ray.serve", "ray").run(application, name=name, route_prefix="/")


def build_app(bundle: str | Path, settings: Settings | None = None, scale: Scale | None = None) -> Any:
    """The ray.serve.Application of the bundle in this folder, the same on every machine, with its current digest unless
    `settings` have another. Limits of `settings` hold for each replica; Ray Serve has its own host, port, connections
    and signals. Raises ValueError or OSError for what can't be served here."""
    serve = require("ray.serve", "ray")
    for module in ("fastapi", "python_multipart", "prometheus_client"):
        require(module, "serve")
    from iosr_fast.serving.http.app import open_served

    settings, scale = settings or Settings(), scale or Scale()
    if settings.token is not None or settings.log is not None or settings.collect is not None:
        raise IosrFastError(
            "expected settings without token, log and collect, because classes can't be changed on replicas; change "
            "them on one classifier, save it and deploy it, and collect by `iosr-fast serve`"
        )
    cores = math.ceil(scale.cpus) or 1
    settings = replace(
        settings,
        expected_digest=settings.expected_digest or digest_of(bundle),
        decode_threads=settings.decode_threads or max(2, cores),  # a client leaves one to others
    )
    open_served(bundle, settings, cores)  # what no replica can serve is refused before one starts
    deployment = serve.deployment(
        name="Classifier",
        max_ongoing_requests=2 * settings.max_queue,  # a replica itself refuses more than `max_queue` images
        max_queued_requests=2 * settings.max_queue,
        max_constructor_retry_count=_STARTS,
        max_surge_percent=_SURGE_PERCENT,
        health_check_period_s=_HEALTH_S,
        graceful_shutdown_timeout_s=float(settings.grace_s),
        graceful_shutdown_wait_loop_s=1.0,
        **scale.options(),
    )
    return deployment(serve.ingress()(Replica)).bind(str(Path(bundle).absolute()), settings, cores)


def from_config(args: Mapping[str, Any]) -> Any:
    """`build_app` for a config file of `serve deploy`, with import_path iosr_fast.serving.ray:from_config and

        args: {bundle: /share/bundle, settings: {max_batch: 64}, scale: {max_replicas: 8}}

    with the fields of Settings and Scale.
    """
    if "bundle" not in args or set(args) - {"bundle", "settings", "scale"}:
        raise IosrFastError(f"expected args with bundle and optionally settings and scale, got {sorted(args)}")
    return build_app(args["bundle"], Settings(**args.get("settings", {})), Scale(**args.get("scale", {})))


def digest_of(bundle: str | Path) -> str:
    """The digest that `iosr-fast info` prints. Raises ValueError or OSError."""
    return open_verified(bundle, kind_of(bundle)).digest
