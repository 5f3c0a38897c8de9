"""What the routes of one application share: the classifier behind its batches, settings, metrics, who may change."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from starlette.datastructures import Headers

from iosr_fast.serving.batching import ClosedError, DeadlineExceededError
from iosr_fast.serving.http.body import Budget
from iosr_fast.serving.http.errors import ApiError, busy
from iosr_fast.serving.http.images import ImageLimits, Refusal, check_image
from iosr_fast.serving.http.metrics import Metrics
from iosr_fast.serving.http.settings import Settings

if TYPE_CHECKING:
    from iosr_fast.classifier import Classifier
    from iosr_fast.serving.batching import BatchingClassifier

Answer = TypeVar("Answer")
_DECODE_S = 60.0  # that an image of a change waits for a decoder


class UndecodedImage:
    """An image of a change, as an array: whoever makes one of it has it decoded by the decoders of predictions, which
    are killed where it takes too long. Not kept, as 64 large ones would be gigabytes. Raises BadImageError then."""

    def __init__(self, batching: BatchingClassifier, data: bytes, position: int) -> None:
        self._batching, self._data, self._position = batching, data, position

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self._batching.decode_whole(self._data, self._position, deadline_s=_DECODE_S).result()


class Service:
    """Lives on one event loop. `loading` and `draining` say why it is not ready; setting them is up to the server."""

    def __init__(self, batching: BatchingClassifier, settings: Settings, metrics: Metrics) -> None:
        self.batching, self.settings, self.metrics = batching, settings, metrics
        self.budget = Budget(settings.max_buffered_bytes)
        self.loading = self.draining = False
        # One thread: what a change looks up and what it then does are not torn apart by another change.
        self._changes = ThreadPoolExecutor(1, "iosr-fast-changes")
        self._waiting = 0

    @property
    def classifier(self) -> Classifier:
        """The one that answers now; another after BatchingClassifier.replace."""
        return self.batching.classifier

    @property
    def read_only(self) -> str:
        """Why classes can't be changed for now: the last change could not be logged. "" where they can."""
        failure = self.classifier.log_failure
        return (
            f"read-only: the last change could not be logged ({failure}); the next one tries again" if failure else ""
        )

    @property
    def image_limits(self) -> ImageLimits:
        settings = self.settings
        return ImageLimits(settings.max_image_bytes, settings.max_pixels, self.classifier.encoder.image_size)

    def check(self, images: list[bytes | Refusal]) -> list[bytes | Refusal]:
        """The same list, with a Refusal for each image that no decoder should see."""
        limits = self.image_limits
        return [image if isinstance(image, Refusal) else check_image(image, limits) or image for image in images]

    def admit(self) -> None:
        """Refuse (503) where an image could not be queued: before its body is read, so that refusing costs little."""
        if self.batching.closed:
            raise busy("closed", "the server is shutting down; ask another one")
        if self.batching.pending >= self.settings.max_queue:
            self.metrics.on_refused("full_before_body")
            raise busy("queue_full", f"{self.settings.max_queue} images are waiting already; try again")

    def authorise(self, headers: Headers) -> None:
        """Raise 403 where the server has no token, 401 for no token, a wrong one or two. Compared in constant time."""
        token = self.settings.token
        if token is None:
            raise ApiError(
                403,
                "changes_disabled",
                "no token is set, so classes can't be changed: start the server with "
                "--token-file FILE or IOSR_FAST_TOKEN and send it as `Authorization: Bearer TOKEN`",
            )
        sent = headers.getlist("authorization")
        scheme, _, given = sent[0].partition(" ") if len(sent) == 1 else ("", "", "")
        if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), token.encode()):
            raise ApiError(
                401,
                "unauthorized",
                "expected `Authorization: Bearer TOKEN` with the server's token",
                {"WWW-Authenticate": "Bearer"},
            )

    def to_decode(self, image: bytes, position: int) -> UndecodedImage:
        """What a change takes in place of `image`: a stranger's bytes, which this process does not decode itself."""
        return UndecodedImage(self.batching, image, position)

    async def change(self, act: Callable[[Classifier], Answer]) -> Answer:
        """Run `act` in the thread of changes, one after another; 503 where too many wait, or images for a decoder."""
        if self._waiting >= self.settings.max_changes:
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
        """Wait for the change that runs, drop those that wait."""
        self._changes.shutdown(cancel_futures=True)
