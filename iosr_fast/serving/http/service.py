"""State that the routes of one application share: classifier, settings, metrics, authorisation, queue of changes."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from starlette.datastructures import Headers

from iosr_fast.exceptions import ClosedError, DeadlineExceededError
from iosr_fast.serving.http.body import Budget
from iosr_fast.serving.http.errors import ApiError, busy, shutting_down
from iosr_fast.serving.http.lists import ClassifierLists
from iosr_fast.serving.http.metrics import Metrics
from iosr_fast.serving.http.settings import Settings
from iosr_fast.serving.http.uploads import Refusal, check_image

if TYPE_CHECKING:
    from iosr_fast.classifier import Classifier
    from iosr_fast.serving.batching import BatchingClassifier

Answer = TypeVar("Answer")
_MAX_CHANGES = 8  # that may wait
_DECODE_S = 60.0  # how long an image of a change may wait for a decoder


class UndecodedImage:
    """An uploaded image that decoder processes turn into an array on demand. This process never decodes uploaded bytes.

    It is decoded at each use and not stored, because 64 large images would take gigabytes. Decoding raises
    BadImageError.
    """

    def __init__(self, batching: BatchingClassifier, data: bytes, position: int) -> None:
        self._batching, self._data, self._position = batching, data, position

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self._batching.decode_whole(self._data, self._position, deadline_s=_DECODE_S).result()


class Service(ClassifierLists):
    """The shared state, for one event loop. /readyz fails while the server sets `loading` or `draining`."""

    def __init__(self, batching: BatchingClassifier, settings: Settings, metrics: Metrics) -> None:
        self.batching, self.settings, self.metrics = batching, settings, metrics
        self.budget = Budget(settings.max_buffered_bytes)
        self.loading = self.draining = False
        # A single thread, so that no other change comes between the checks of a change and the change itself.
        self._changes = ThreadPoolExecutor(1, "iosr-fast-changes")
        self._waiting = 0

    @property
    def classifier(self) -> Classifier:
        """The current classifier; BatchingClassifier.replace exchanges it."""
        return self.batching.classifier

    @property
    def read_only(self) -> str:
        """Why classes can't be changed: the last change could not be logged. Empty if they can."""
        failure = self.classifier.log_failure
        return (
            f"read-only: the last change could not be logged ({failure}); the next one tries again" if failure else ""
        )

    async def readiness(self) -> tuple[bool, str, str]:
        """Whether the server is ready for requests, the status if not, and a detail."""
        if self.draining or self.batching.closed:
            return False, "shutting down", ""
        ready = not self.loading and self.batching.healthy
        return ready, "loading" if self.loading else "failed", self.read_only if ready else ""

    def check(self, images: list[bytes | Refusal]) -> list[bytes | Refusal]:
        """The same list, with a Refusal for each image that must not reach a decoder."""
        settings, geometry = self.settings, self.classifier.encoder.geometry
        return [
            image if isinstance(image, Refusal) else check_image(image, settings, geometry) or image for image in images
        ]

    def admit(self) -> None:
        """Raise 503 if no image can be queued. Called before the body is read, which makes refusals cheap."""
        if self.batching.closed:
            raise shutting_down()
        if self.batching.pending >= self.settings.max_queue:
            self.metrics.on_refused("full_before_body")
            raise busy("queue_full", f"{self.settings.max_queue} images are waiting already; try again")

    def authorise(self, headers: Headers) -> None:
        """Raise 403 if the server has no token, 401 for no token, a wrong one or two. Compares in constant time."""
        token = self.settings.token
        if token is None:
            raise ApiError(
                403,
                "changes_disabled",
                "no token is set, so classes can't be changed: start the server with "
                "--token-file FILE or IOSR_FAST_TOKEN and send it as `Authorization: Bearer TOKEN`",
            )
        values = headers.getlist("authorization")
        scheme, _, credentials = values[0].partition(" ") if len(values) == 1 else ("", "", "")
        if scheme.lower() != "bearer" or not hmac.compare_digest(credentials.strip().encode(), token.encode()):
            raise ApiError(
                401,
                "unauthorized",
                "expected `Authorization: Bearer TOKEN` with the server's token",
                {"WWW-Authenticate": "Bearer"},
            )

    async def change(self, act: Callable[[Classifier], Answer]) -> Answer:
        """Run `act` in the thread of changes, one at a time; 503 if too many changes, or images to decode, wait."""
        if self._waiting >= _MAX_CHANGES:
            raise busy("busy", f"{self._waiting} changes are waiting already; try again", 5)
        self._waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._changes, self._act, act, self.classifier)
        except (ClosedError, DeadlineExceededError) as error:
            raise busy("busy", f"an image could not be decoded: {error}; try again", 5) from error
        finally:
            self._waiting -= 1

    def _act(self, act: Callable[[Classifier], Answer], classifier: Classifier) -> Answer:
        answer = act(classifier)
        self.metrics.drop_removed(classifier.snapshot().name_of)
        return answer

    def close(self) -> None:
        """Wait for the running change and drop the waiting ones."""
        self._changes.shutdown(cancel_futures=True)
