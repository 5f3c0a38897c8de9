"""State that the routes of one application share: classifier, settings, metrics, bodies in memory, queue of changes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

from iosr_fast.encoders.rows import Rows
from iosr_fast.serving.http.embeddings import EmbeddingUploads
from iosr_fast.serving.http.errors import busy
from iosr_fast.serving.http.metrics import Metrics
from iosr_fast.serving.http.recent import Recent
from iosr_fast.serving.http.settings import Settings
from iosr_fast.serving.http.uploads import Uploads
from iosr_fast.serving.shares import Shares

if TYPE_CHECKING:
    from iosr_fast.classifier import Classifier
    from iosr_fast.head.head import Head
    from iosr_fast.serving.batching import BatchingClassifier
    from iosr_fast.serving.collector import Collector

Answer = TypeVar("Answer")
_MAX_CHANGES = 8  # that may wait
_BODIES = 8  # of the largest size that memory holds together; of these a client alone has half (Shares)


class Service:
    """The shared state, for one event loop. /readyz fails while the server sets `loading` or `draining`.

    `metrics` should be the observer of `batching`, and `collector` what it collects with. The caller closes both.
    """

    def __init__(
        self, batching: BatchingClassifier, settings: Settings, metrics: Metrics, collector: Collector | None = None
    ) -> None:
        self.batching, self.settings, self.metrics = batching, settings, metrics
        self.collector, self.recent = collector, Recent(batching.classifier)
        encoder = batching.classifier.encoder
        self.takes_changes = not isinstance(encoder, Rows)
        self.uploads = (
            EmbeddingUploads(settings, encoder) if isinstance(encoder, Rows) else Uploads(settings, encoder.geometry)
        )
        self.bodies = Shares(_BODIES * settings.max_body_bytes)  # bytes of request bodies in memory
        self.loading = self.draining = False
        # A single thread, so that no other change comes between the checks of a change and the change itself.
        self._changes = ThreadPoolExecutor(1, "iosr-fast-changes")
        self._waiting = 0
        metrics.watch(self)

    @property
    def classifier(self) -> Classifier:
        """What answers, and what changes act on."""
        return self.batching.classifier

    @property
    def head(self) -> Head:
        """The newest one."""
        return self.classifier.snapshot().require_single_label("the HTTP API")

    @property
    def read_only(self) -> str:
        """Why classes can't be changed: the last change could not be logged. Empty if they can."""
        failure = self.classifier.log_failure
        return (
            f"read-only: the last change could not be logged ({failure}); the next one tries again" if failure else ""
        )

    async def change(self, act: Callable[[Classifier], Answer]) -> Answer:
        """Run `act` in the thread of changes, one at a time; 503 if too many changes wait."""
        if self._waiting >= _MAX_CHANGES:
            raise busy("busy", f"{self._waiting} changes are waiting already; try again", 5)
        self._waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._changes, self._act, act)
        finally:
            self._waiting -= 1

    def _act(self, act: Callable[[Classifier], Answer]) -> Answer:
        answer = act(self.classifier)
        head = self.head
        self.metrics.drop_removed(head.name_of, head.node_names[len(head.uids) :])
        return answer

    def close(self) -> None:
        """Wait for the running change and drop the waiting ones."""
        self._changes.shutdown(cancel_futures=True)
