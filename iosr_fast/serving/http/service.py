"""State that routes share: classifiers, settings, metrics, bodies in memory, queues of changes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Any, TypeVar

from iosr_fast.encoders.rows import Rows
from iosr_fast.serving.fairness import Shares
from iosr_fast.serving.http.embeddings import EmbeddingUploads
from iosr_fast.serving.http.errors import ApiError, busy
from iosr_fast.serving.http.logs import log
from iosr_fast.serving.http.metrics import Metrics
from iosr_fast.serving.http.recent import Recent
from iosr_fast.serving.http.settings import Settings
from iosr_fast.serving.http.uploads import Uploads
from iosr_fast.utils.text import did_you_mean

if TYPE_CHECKING:
    from iosr_fast.classifier import Classifier
    from iosr_fast.head.head import Head
    from iosr_fast.serving.batching import BatchingClassifier
    from iosr_fast.serving.collector import Collector

Answer = TypeVar("Answer")
_MAX_CHANGES = 8  # that may wait
_BODIES = 8  # of the largest size that memory holds together; of these a client alone has half (Shares)


class Served:
    """What one classifier (Service) or several (Front) are served by, for one event loop. /readyz fails while the
    server sets `loading` or `draining`."""

    server: Served  # whose bodies and state count
    name = ""
    takes_changes = True
    uploads: Uploads | type[Uploads] = Uploads  # which knows what requests have
    max_body: int  # bytes of a request
    note: str  # what /readyz says of a server that is ready

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self.settings, self.metrics = settings, metrics
        self.bodies = Shares(_BODIES * settings.max_body_bytes)  # bytes of request bodies in memory
        self.loading = self.draining = False
        self.services: dict[str, Service] = {}  # by the names of the classifiers
        self.server = self

    @property
    def engines(self) -> list[Service]:
        """Of each BatchingClassifier the first service, whose metrics are its observer."""
        first: dict[BatchingClassifier, Service] = {}
        for service in self.services.values():
            first.setdefault(service.batching, service)
        return [*first.values()]


class Service(Served):
    """One classifier, with the name "", or one of several, which adds itself to `front`.

    `metrics` should be the observer of `batching`, if it is the first one there, and `collector` what it collects with.
    The caller closes both; `close` closes the log of the classifier.
    """

    uploads: Uploads

    def __init__(
        self,
        batching: BatchingClassifier,
        settings: Settings,
        metrics: Metrics,
        collector: Collector | None = None,
        name: str = "",
        front: Served | None = None,
    ) -> None:
        super().__init__(settings, metrics)
        self.batching, self.name = batching, name
        self.collector, self.recent = collector, Recent(self.classifier)
        self.server = front or self
        self.server.services[name] = self
        encoder = self.classifier.encoder
        self.takes_changes = not isinstance(encoder, Rows)
        self.uploads = (
            EmbeddingUploads(settings, encoder) if isinstance(encoder, Rows) else Uploads(settings, encoder.geometry)
        )
        self.max_body = self.uploads.max_body
        # A single thread, so that no other change comes between the checks of a change and the change itself.
        self._changes = ThreadPoolExecutor(1, "iosr-fast-changes")
        self.unfinished: set[Future[Any]] = set()  # the running change, and those that wait
        self._asking = asyncio.Lock()  # of `serve_unknown`
        metrics.watch(self)

    @property
    def classifier(self) -> Classifier:
        """What answers, and what changes act on."""
        return self.batching.classifiers[self.name]

    @property
    def head(self) -> Head:
        """The newest one."""
        return self.classifier.snapshot()

    @property
    def note(self) -> str:  # type: ignore[override]
        """Why classes can't be changed: the last change could not be logged. Empty if they can."""
        failure = self.classifier.log_failure
        return (
            f"read-only: the last change could not be logged ({failure}); the next one tries again" if failure else ""
        )

    @property
    def failure(self) -> str:
        """Why no image can be classified; "" if it can."""
        error = self.batching.failures.get(self.name) if self.batching.healthy else self.batching.last_error
        return "" if error is None else str(error) or repr(error)

    async def serve_unknown(self) -> None:
        """Compute what `keep` rests on, for whoever asks for it first; from then on changes do."""
        async with self._asking:
            if self.head.computed("unknown") is None:
                await self.change(lambda classifier: classifier.snapshot().with_unknown())

    async def change(self, act: Callable[[Classifier], Answer]) -> Answer:
        """Run `act` in the thread of changes, one at a time; 503 if too many changes wait."""
        if (waiting := len(self.unfinished)) >= _MAX_CHANGES:
            raise busy("busy", f"{waiting} changes are waiting already; try again", 5)
        change = self._changes.submit(self._act, act)
        self.unfinished.add(change)
        change.add_done_callback(self.unfinished.discard)
        return await asyncio.wrap_future(change)

    def _act(self, act: Callable[[Classifier], Answer]) -> Answer:
        answer = act(self.classifier)
        head = self.head
        self.metrics.drop_removed(head.name_of, head.node_names[len(head.uids) :])
        return answer

    def close(self, timeout: float | None = None) -> bool:
        """Drop the waiting changes, wait for the running one, at most `timeout` seconds (None: no limit), and close the
        log. Returns whether it has ended; if not, the log stays open. The process may end then: a change is logged
        whole or not at all."""
        self._changes.shutdown(wait=False, cancel_futures=True)
        ended = not wait(self.unfinished, timeout).not_done
        if ended:
            self.classifier.close_log()
        else:
            log("change_abandoned", level=logging.WARNING, classifier=self.name)
        return ended


class Front(Served):
    """Several classifiers, by their names; `refused` says why others are not served."""

    def __init__(self, settings: Settings, metrics: Metrics, refused: Mapping[str, str]) -> None:
        super().__init__(settings, metrics)
        self.refused, self.max_body = refused, settings.max_body_bytes
        metrics.watch_bodies(self.bodies)

    def find(self, name: str) -> Service | ApiError:
        """The service of a classifier, or the answer where there is none."""
        if name in self.refused:
            return ApiError(503, "not_served", f"the classifier {name!r} can't be served: {self.refused[name]}")
        if name in self.services:
            return self.services[name]
        close = did_you_mean(name[:80], [*self.services, *self.refused])
        message = f"no classifier is named {name[:80]!r}; {close}/v1/classifiers lists all classifiers"
        return ApiError(404, "no_classifier", message)

    @property
    def note(self) -> str:  # type: ignore[override]
        """What is wrong with classifiers."""
        wrong = dict(self.refused)
        for name, one in self.services.items():
            wrong[name] = one.failure or one.note
        return "; ".join(f"{name}: {why}" for name, why in wrong.items() if why)
