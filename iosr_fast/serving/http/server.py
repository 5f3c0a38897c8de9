"""One process that serves classifiers: it loads, listens, and on a signal answers accepted requests and exits."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import logging
import os
import resource
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from threadpoolctl import threadpool_limits

from iosr_fast import __version__
from iosr_fast.exceptions import IosrFastError
from iosr_fast.serving.http.app import create_app, warm
from iosr_fast.serving.http.connection import Connection
from iosr_fast.serving.http.listener import Listener
from iosr_fast.serving.http.logs import CLASSIFIER, log, logger, logs_to_stderr
from iosr_fast.serving.http.metrics import ClassifierMetrics
from iosr_fast.serving.http.open_site import named_folders, open_site
from iosr_fast.serving.http.settings import Settings
from iosr_fast.serving.http.site import Site
from iosr_fast.serving.http.turns import Peers
from iosr_fast.serving.limits import Limits

_GC_THRESHOLDS = (5_000, 20, 100)
_FILES = 100  # open files besides connections: of the bundle, of libraries, pipes
_LOCAL = {"0.0.0.0": "127.0.0.1", "::": "[::1]", "::1": "[::1]"}  # how a browser here names an address
# Parameters of mallopt in glibc's malloc.h, with values.
_MALLOC = {
    -1: 128 << 20,  # M_TRIM_THRESHOLD: free bytes at the top of the heap before any return to the kernel
    -3: 32 << 20,  # M_MMAP_THRESHOLD: the largest that glibc allows
    -8: 2,  # M_ARENA_MAX
}


def run(bundles: str | Path | Sequence[str | Path], settings: Settings) -> None:
    """Serve the classifier in the folder `bundles`, or several (open_site.named_folders), until SIGTERM, SIGINT or
    SIGHUP; return when all requests are answered.

    Raises ValueError or OSError, before a request is answered, for an unusable bundle, log or address, where there are
    several bundles if none is usable; RuntimeError if the engine fails during its warm-up.
    """
    start = time.perf_counter()
    keep_freed_memory()
    # NumPy's BLAS keeps a thread spinning on another core for tens of milliseconds after a small product.
    threadpool_limits(1, "blas")
    _allow_files(settings)
    folders = named_folders([bundles] if isinstance(bundles, str | Path) else bundles)
    with logs_to_stderr():
        with contextlib.ExitStack() as closing:
            listener = closing.enter_context(_bound(settings))
            site = closing.enter_context(open_site(folders, settings))
            closing.callback(gc.unfreeze)  # else extension modules report frozen objects as leaks at exit
            site.loading = True
            listener.listen(Limits.backlog)
            host, port = listener.getsockname()[:2]
            for served in site.served.values():
                CLASSIFIER.set(served.name)
                log(
                    "loaded",
                    version=__version__,
                    bundle=str(folders[served.name]),
                    **served.facts,
                    seconds=round(time.perf_counter() - start, 3),
                )
                for sentence in served.doubts:
                    log("doubt", level=logging.WARNING, sentence=sentence)
            CLASSIFIER.set("")
            for name, why in site.refused.items():
                log("refused", level=logging.ERROR, classifier=name, bundle=str(folders[name]), error=why)
            may_change = any(token.may_change for token in settings.tokens)
            changes = may_change and site.described.takes_changes
            log("listening", host=host, port=port, pid=os.getpid(), changes=changes)
            if sys.stderr.isatty():
                print(f"The page is at http://{_LOCAL.get(host, host)}:{port}/ (Ctrl-C stops it)", file=sys.stderr)
            server = _Server(site)
            if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:  # of a terminal that closes; nohup ignores it
                signal.signal(signal.SIGHUP, server.handle_exit)
                closing.callback(signal.signal, signal.SIGHUP, signal.SIG_DFL)
            threading.Thread(target=server.warm, name="iosr-fast-warm-up", daemon=True).start()
            server.run([listener])
        log("stopped", seconds=round(time.perf_counter() - start, 3))
    if any(served.unfinished for served in site.classifiers):
        os._exit(0)  # the interpreter would wait for the thread of an abandoned change
    if server.failure is not None:
        raise RuntimeError(f"the engine failed during its warm-up: {server.failure}") from server.failure


def keep_freed_memory() -> bool:
    """Make glibc keep freed memory for the next request; False with another C library.

    By default glibc returns the buffers of each batch to the kernel and gets them back page by page, which can block
    the event loop for tens of milliseconds in a virtual machine.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return all([mallopt(name, value) == 1 for name, value in _MALLOC.items()])


def _allow_files(settings: Settings) -> None:
    """Raise the limit of open files to the maximum: the kernel hands over all pending connections at once, before the
    surplus can be closed. Raises ValueError if `max_connections` exceeds the limit."""
    _, limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    if limit != resource.RLIM_INFINITY and settings.max_connections + _FILES > limit:
        raise IosrFastError(
            f"expected max_connections of at most {limit - _FILES}, because this process may open {limit} files, got "
            f"{settings.max_connections}; lower --max-connections or raise `ulimit -n`"
        )


def _bound(settings: Settings) -> socket.socket:
    """A socket with the server's address, which does not listen. An address in use is an error before anything else
    starts."""
    host, port = settings.host, settings.port
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        bound = socket.socket(family)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        return bound
    except OSError as error:
        raise OSError(f"can't listen on {host!r} port {port}: {error}; choose another --port or --host") from error


class Edge(uvicorn.Server):
    """An application behind connections of connection.py, which listener.py accepts."""

    def __init__(self, app: ASGIApp, settings: Settings, metrics: ClassifierMetrics) -> None:
        self._peers, self._settings, self._metrics = Peers(), settings, metrics
        super().__init__(
            uvicorn.Config(
                app,
                interface="asgi3",
                http=partial(Connection, settings, metrics, self._peers),  # type: ignore[arg-type]
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=bool(settings.trusted_proxy),
                forwarded_allow_ips=list(settings.trusted_proxy),
                timeout_graceful_shutdown=settings.grace_s,
            )
        )

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup([])
        shared: dict[str, Any] = {"config": self.config, "server_state": self.server_state, "app_state": {}}
        make, limit = partial(self.config.http_protocol_class, **shared), self._settings.max_connections
        listeners: Any = [Listener(one, make, self._peers, limit, self._metrics) for one in sockets or ()]
        self.servers = listeners


class _Server(Edge):
    """uvicorn's server, which drains before it stops; the exit code is 0."""

    def __init__(self, site: Site) -> None:
        self._app, self._site = create_app(site), site
        super().__init__(self._app, site.settings, site.server_metrics)
        self.failure: Exception | None = None  # of the engine, during its warm-up

    def warm(self) -> None:
        """Do what is slow at first. A failure stops the server."""
        try:
            warm(self._app, self._site)
        except Exception as error:
            self.failure, self.should_exit = error, True
            logger.exception("warm_up_failed", extra={"facts": {}})
            return
        # Objects that exist now are permanent: a full collection would scan them all and delay requests. Later
        # collections are rarer than by default for the same reason.
        gc.collect()
        gc.freeze()
        gc.set_threshold(*_GC_THRESHOLDS)
        self._site.loading = False
        log("ready")

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal starts draining, a second one ends the server at once."""
        # Sets fields only: the main thread may be anywhere, even inside the lock of a log handler.
        self.force_exit = self.should_exit
        self.should_exit = self._site.draining = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept requests for another `drain_s`; then answer those that were accepted."""
        until = time.monotonic() + self._site.settings.drain_s
        while time.monotonic() < until and not self.force_exit and self.failure is None:
            await asyncio.sleep(0.05)
        log("stopping", waiting=sum(served.batching.pending for served in self._site.engines))
        await super().shutdown(sockets)
