"""Several processes or machines, by Ray: replicas of a server (Ray Serve), and workers of a run over files (actors).

    from ray import serve
    from iosr_fast.ray import build_app
    serve.run(build_app("bundle", num_replicas=4))    # with another bundle: a rolling update

`iosr-fast serve-ray` does this from the command line, `from_config` in a config file of `serve deploy`; `--ray` of
`iosr-fast classify` and `iosr-fast embed` makes a `Pool`.

Each replica is the application of `iosr-fast serve` on a bundle of one digest, without token: classes can't be changed
(403), because a change would reach one replica only. A request that a replica was working on when it died ends with 500
and can be sent again; Ray Serve repeats one that no replica has accepted.
"""

from __future__ import annotations

import logging
import math
import os
import socket
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import iosr_fast
from iosr_fast.exceptions import BadImageError, IosrFastError
from iosr_fast.files.chunks import Done, run_chunks
from iosr_fast.files.parts import differences
from iosr_fast.files.source import Chunk
from iosr_fast.files.stream import ReadOptions
from iosr_fast.files.work import Work
from iosr_fast.sealed.verified_folder import open_verified
from iosr_fast.serving.http.settings import Settings
from iosr_fast.store.bundle import kind_of
from iosr_fast.utils.machine import usable_threads
from iosr_fast.utils.require import require

if TYPE_CHECKING:
    from fastapi import FastAPI

# Ray Serve kills an HTTP proxy that takes three times this to import, 15 seconds by default: too few on busy cores.
_PROXY_READY = "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S"
SURGE_PERCENT = 25  # replicas of an update beside the old ones, rounded up; old ones stop when these run
_RETRIES = 4  # of a chunk at which workers die, before it is assumed to kill them
_CLUSTER_THREADS = 4


@contextmanager
def joined(address: str | None, cores: int) -> Iterator[Any]:
    """The module ray, connected for the block to the cluster at `address` ("auto": the one on this machine) or, with
    None, to one started here with `cores` cores. All machines need iosr_fast at the same path. Raises ImportError
    without Ray, ConnectionError without such a cluster."""
    ray = require("ray", "ray")
    root, ready = Path(iosr_fast.__file__).resolve().parents[1], os.environ.get(_PROXY_READY, "60")
    options: dict[str, Any] = {"runtime_env": {"env_vars": {"PYTHONPATH": str(root), _PROXY_READY: ready}}}
    if address is None:
        options |= {"num_cpus": cores, "include_dashboard": False}
    try:
        ray.init(address=address or "local", log_to_driver=False, logging_level=logging.ERROR, **options)
    except ConnectionError as error:
        raise ConnectionError(
            f"expected a Ray cluster at {address}: {error}; if it exists and requires tokens ('ray start' says so), "
            "set RAY_AUTH_MODE=token here"
        ) from error
    try:
        yield ray
    finally:
        ray.shutdown()


class Replica:
    """One process with a classifier, its batches and the application, on the cores that Ray gave it. Raises ValueError
    for a folder of another digest than `settings.expected_digest`."""

    def __init__(self, bundle: str, settings: Settings) -> None:
        from iosr_fast.serving.http.app import create_app, warm
        from iosr_fast.serving.http.open_site import open_site

        given = require("ray", "ray").get_runtime_context().get_assigned_resources()
        cores = math.ceil(given.get("CPU", 0)) or 1
        decoders = settings.decode_threads or max(2, cores)  # a client leaves one to others
        self._closing = ExitStack()
        opened = open_site({"": Path(bundle)}, replace(settings, decode_threads=decoders), cores)
        self._site = self._closing.enter_context(opened)
        self._app = create_app(self._site)
        warm(self._app, self._site)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return self._app

    def check_health(self) -> None:
        """Ray Serve replaces a replica on which this raises several times."""
        if failure := self._site.served[""].failure:
            raise RuntimeError(f"the engine failed: {failure}")

    def __del__(self) -> None:
        """Ray Serve calls this after the last request, or after its timeout for that."""
        self._closing.close()


def build_app(bundle: str | Path, settings: Settings | None = None, **options: Any) -> Any:
    """The ray.serve.Application of the bundle in this folder, the same on every machine, with its current digest unless
    `settings` have another. Limits of `settings` hold for each replica; Ray Serve has its own host, port, connections
    and signals. `options` are those of ray.serve.deployment: num_replicas, autoscaling_config, ray_actor_options.
    Raises ValueError or OSError for what can't be served here."""
    serve = require("ray.serve", "ray")
    for module in ("fastapi", "prometheus_client"):
        require(module, "serve")
    from iosr_fast.serving.http.open_site import open_classifiers
    from iosr_fast.serving.http.site import Site

    settings = settings or Settings()
    if settings.token is not None or settings.log is not None or settings.collect is not None:
        raise IosrFastError(
            "expected settings without token, log and collect, because classes can't be changed on replicas; change "
            "them on one classifier, save it and deploy it, and collect by `iosr-fast serve`"
        )
    settings = replace(settings, expected_digest=settings.expected_digest or digest_of(bundle))
    open_classifiers(Site(settings, {"": Path(bundle)}))  # what no replica can serve is refused before one starts
    deployment = serve.deployment(
        name="Classifier",
        max_ongoing_requests=2 * settings.max_queue,  # a replica itself refuses more than `max_queue` images
        max_queued_requests=2 * settings.max_queue,
        max_constructor_retry_count=3,  # failed starts of replicas before the deployment fails
        max_surge_percent=SURGE_PERCENT,
        health_check_period_s=5.0,
        graceful_shutdown_timeout_s=float(settings.grace_s),
        graceful_shutdown_wait_loop_s=1.0,
        **options,
    )
    return deployment(serve.ingress()(Replica)).bind(str(Path(bundle).absolute()), settings)


def from_config(args: Mapping[str, Any]) -> Any:
    """`build_app` for a config file of `serve deploy`, with import_path iosr_fast.ray:from_config and

        args: {bundle: /share/bundle, settings: {max_batch: 64}}
        deployments: [{name: Classifier, num_replicas: 4, ray_actor_options: {num_cpus: 2}}]

    with the fields of Settings, and Ray's own options of a deployment.
    """
    if "bundle" not in args or set(args) - {"bundle", "settings"}:
        raise IosrFastError(f"expected args with bundle and perhaps settings, got {sorted(args)}; Ray has the others")
    return build_app(args["bundle"], Settings(**args.get("settings", {})))


def digest_of(bundle: str | Path) -> str:
    """The digest that `iosr-fast info` prints. Raises ValueError or OSError."""
    return open_verified(bundle, kind_of(bundle)).digest


class Worker:
    """An actor that opens the engine once."""

    def __init__(self, work: Work, plan: dict[str, Any], options: ReadOptions) -> None:
        self.work, self.images = work, plan["images"]
        if different := differences({name: plan[name] for name in work.facts}, work.facts):
            host = socket.gethostname()
            raise RuntimeError(f"expected one engine and classifier on all machines, but on {host} {different}")
        self.reader = work.open(options)

    def compute(self, chunk: Chunk) -> tuple[str, tuple[Done | str, bytes | str]]:
        """The runtime, and what run_chunks yields, or the name of an unreadable image and why it is that: Ray would put
        a traceback around an error."""
        try:
            (result,) = run_chunks(self.work, self.reader, [chunk], self.images)
        except BadImageError as error:
            return self.reader.encoder.runtime, (str(error.where), error.reason)
        return self.reader.encoder.runtime, result


@dataclass(frozen=True)
class Pool:
    """`workers` actors with `gpus` GPUs (or a share of one) each, in the cluster at `address`, as `joined`."""

    workers: int = 2
    gpus: float = 0
    address: str | None = None

    def __call__(
        self, work: Work, plan: dict[str, Any], chunks: Sequence[Chunk], options: ReadOptions
    ) -> Generator[tuple[Done, bytes], None, None]:
        """As run_chunks, in order. Ray restarts a killed actor and computes its chunk again: the bytes are the same.

        Raises BadImageError for an unreadable image unless `skip_bad`; RuntimeError if no worker has room, an actor
        can't open the engine or has another one or runtime, or a chunk keeps killing its workers.
        """
        threads = options.threads or (_CLUSTER_THREADS if self.address else max(1, usable_threads() // self.workers))
        options = replace(options, batch=plan["batch"], threads=threads)
        opened = replace(work, folder=str(Path(work.folder).resolve()))
        absolute = [replace(chunk, paths=[os.path.abspath(path) for path in chunk.paths]) for chunk in chunks]
        with joined(self.address, self.workers * threads) as ray:
            workers = min(self.workers, self.room(ray.cluster_resources(), threads), len(chunks))
            restarted = {"max_restarts": -1, "max_task_retries": _RETRIES}
            actor = ray.remote(num_cpus=threads, num_gpus=self.gpus, **restarted)(Worker)
            actors = [actor.remote(opened, plan, options) for _ in range(workers)]
            pool = require("ray.util.actor_pool", "ray").ActorPool(actors)
            first = ""
            try:
                for runtime, (done, content) in pool.map(lambda one, chunk: one.compute.remote(chunk), absolute):
                    if not isinstance(done, Done):
                        raise BadImageError(Path(done), 0, content)
                    if runtime != (first := first or runtime):
                        raise RuntimeError(f"got parts by {first} and by {runtime}; name one runtime by --runtime")
                    yield done, content
            except ray.exceptions.RayError as error:
                reason = (str(error).strip() or type(error).__name__).splitlines()[-1].strip()
                raise RuntimeError(
                    f"the workers failed: {reason}; if they die at the same images, run without --ray to see at which"
                ) from error

    def room(self, resources: dict[str, float], threads: int) -> int:
        """How many workers fit into a cluster. Raises RuntimeError if none does."""
        cores, cards = resources.get("CPU", 0), resources.get("GPU", 0)
        workers = int(min(cores / threads, cards / self.gpus if self.gpus else cores))
        if workers < 1:
            raise RuntimeError(
                f"expected room for a worker of {threads} cores and {self.gpus:g} GPUs, got a cluster of {cores:.0f} "
                f"cores and {cards:.0f} GPUs; lower --threads or --gpus"
            )
        return workers
