"""One process that serves one classifier: load, listen, and on a signal answer what was accepted and go."""

from __future__ import annotations

import gc
import os
import signal
import socket
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import uvicorn
from PIL import Image

from iosr_fast import __version__
from iosr_fast.classifier import Classifier
from iosr_fast.serving.batching import BatchingClassifier
from iosr_fast.serving.http.app import create_app
from iosr_fast.serving.http.logs import json_logs, log, logger
from iosr_fast.serving.http.memory import keep_freed_memory
from iosr_fast.serving.http.metrics import Metrics
from iosr_fast.serving.http.protocol import Edge
from iosr_fast.serving.http.service import Service
from iosr_fast.serving.http.settings import Settings
from iosr_fast.utils.machine import usable_threads

_COLLECTIONS = (5_000, 20, 100)
_FILES = 100  # open beside connections: the bundle's, libraries', pipes
_BACKLOG = 2048  # connections that the kernel holds until they are taken


def run(bundle: str | Path, settings: Settings) -> None:
    """Serve the classifier in the folder `bundle` until SIGTERM or SIGINT; returns when all accepted is answered.

    Raises, before it listens, ValueError or OSError for a bundle, a log or an address that can't be used; RuntimeError
    where the engine fails as it is warmed up.
    """
    start = time.perf_counter()
    keep_freed_memory()
    _allow_files(settings)
    threads = settings.engine_threads or max(1, usable_threads() - 1)
    classifier = Classifier.load(bundle, settings.runtime, settings.verify, threads, settings.expected_digest)
    if settings.log is not None:
        with json_logs():
            classifier.open_log(settings.log, settings.recover)
    listener = _listen(settings)
    # Pillow refuses twice this: a second look at what decoders, those of changes too, are told by a file's inside.
    Image.MAX_IMAGE_PIXELS = max(1, settings.max_pixels // 2)
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    with json_logs():
        metrics = Metrics()
        batching = BatchingClassifier(
            classifier,
            max_batch=settings.batch_for(classifier.encoder),
            max_wait_ms=settings.max_wait_ms,
            max_queue=settings.max_queue,
            decode_threads=settings.decode_threads,
            observer=metrics,
            limits=settings.decode_limits,
            isolated=True,
        )
        app = create_app(batching, settings, metrics)
        service: Service = app.state.service
        service.loading = True
        try:
            host, port = listener.getsockname()[:2]
            log(
                "loaded",
                version=__version__,
                bundle=str(bundle),
                classes=len(classifier.classes_),
                model_version=classifier.version,
                method=classifier.method_,
                seconds=round(time.perf_counter() - start, 3),
            )
            log("listening", host=host, port=port, pid=os.getpid(), changes=settings.token is not None)
            config = uvicorn.Config(
                app,
                http=Edge(settings, metrics).protocol,  # type: ignore[arg-type]
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_graceful_shutdown=settings.grace_s,
            )
            server = _Server(config, service)
            threading.Thread(target=server.warm, name="iosr-fast-warm-up", daemon=True).start()
            server.run([listener])
            if server.failure is not None:
                raise RuntimeError(f"the engine does not work: {server.failure}") from server.failure
        finally:
            listener.close()
            service.close()
            batching.close(settings.grace_s)
            gc.unfreeze()  # else extension modules report at exit, as leaked, what the collector may not look at
            if settings.log is not None:
                classifier.close_log()
            log("stopped", seconds=round(time.perf_counter() - start, 3))


def _allow_files(settings: Settings) -> None:
    """Let the process open as many files as the system lets it: the kernel hands over all connections that have come at
    once, before those that are too many can be closed. ValueError where `max_connections` can't be."""
    try:
        import resource
    except ImportError:
        return  # not on Windows, which has no such limit
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    if most != resource.RLIM_INFINITY and settings.max_connections + _FILES > most:
        raise ValueError(
            f"expected max_connections of at most {most - _FILES}, for this process may open {most} files, got "
            f"{settings.max_connections}; lower --max-connections or raise `ulimit -n`"
        )


def _listen(settings: Settings) -> socket.socket:
    """A socket that takes connections, which wait: an address in use is an error before anything else starts."""
    try:
        found = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, proto, _, address = found[0]
        listener = socket.socket(family, kind, proto)
    except OSError as error:
        raise OSError(f"can't listen on {settings.host!r}: {error}") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise OSError(
            f"can't listen on {settings.host} port {settings.port}: {error}; choose another --port"
        ) from error
    return listener


class _Server(uvicorn.Server):
    """uvicorn's, but for signals: the first one starts to drain, a second one hurries, and the process exits with 0."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service
        self.failure: Exception | None = None  # of the engine, while it was warmed up
        self._signal = 0
        self._stop_at = float("inf")

    def warm(self) -> None:
        """Have the engine do once what it will do: its first times are slow. Then it is ready; a failure ends it."""
        try:
            self._service.batching.warm()
        except Exception as error:
            self.failure = error
            logger.exception("warm_up_failed", extra={"facts": {}})
            return
        # What there is now stays: a full collection would look at all of it, and hold up requests for that long. Those
        # of what comes later are rarer than by default, for the same reason.
        gc.collect()
        gc.freeze()
        gc.set_threshold(*_COLLECTIONS)
        self._service.loading = False
        log("ready")

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # Only notes: it interrupts whatever the main thread does, the log's lock held included.
        if self.should_exit and sig == signal.SIGINT:
            self.force_exit = True
        self._stop_at = time.monotonic() + (0.0 if self._signal else self._service.settings.drain_s)
        self._signal = sig
        self._service.draining = True

    async def on_tick(self, counter: int) -> bool:
        if time.monotonic() >= self._stop_at and not self.should_exit:
            self.should_exit = True
            log("stopping", signal=signal.Signals(self._signal).name, waiting=self._service.batching.pending)
        self.should_exit = self.should_exit or self.failure is not None
        return await super().on_tick(counter)
