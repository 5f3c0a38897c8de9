"""An image on its way through BatchingClassifier: what was asked, how far it has come, and how it may end."""

from __future__ import annotations

import logging
import math
import time
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any, Protocol

from iosr_fast.images.preprocess import BadImageError

if TYPE_CHECKING:
    import numpy as np

    from iosr_fast.state.predictions import Prediction

log = logging.getLogger(__name__)


class QueueFullError(RuntimeError):
    """Refused at submit: there is no place, or the deadline can't be kept. `retry_after_s`: when to try again."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s

    def __reduce__(self) -> tuple[type[QueueFullError], tuple[str, float]]:
        return QueueFullError, (str(self), self.retry_after_s)


class DeadlineExceededError(TimeoutError):
    """Accepted, but its time was up before it was encoded."""


class ClosedError(RuntimeError):
    """Refused at submit, or given up by a close() whose timeout ran out."""


class Observer(Protocol):
    """What is told of every batch and every image, for metrics. Called on many threads, never under a lock; has to be
    quick, for batches wait meanwhile. What it raises is logged once and changes nothing."""

    def on_batch(self, size: int, queue_depth: int, encode_s: float, score_s: float) -> None:
        """A batch was run. `queue_depth`: images that were accepted and not in it as it left."""

    def on_done(self, latency_s: float, outcome: str, label: str | None) -> None:
        """An accepted image is about to be answered, `latency_s` after submit. `outcome` is "ok" (only then there is a
        `label`), "bad_image", "error", "deadline", "closed" or "cancelled"."""

    def on_refused(self, reason: str) -> None:
        """An image was refused at submit: "full", "deadline" or "closed"."""


class Hooks:
    """An observer, or none, that can't do harm."""

    def __init__(self, observer: Observer | None) -> None:
        self._observer = observer
        self._told = False

    def batch(self, size: int, queue_depth: int, encode_s: float, score_s: float) -> None:
        self._call("on_batch", size, queue_depth, encode_s, score_s)

    def done(self, latency_s: float, outcome: str, label: str | None) -> None:
        self._call("on_done", latency_s, outcome, label)

    def refused(self, reason: str, count: int) -> None:
        for _ in range(count):
            self._call("on_refused", reason)

    def _call(self, name: str, *values: Any) -> None:
        if self._observer is None:
            return
        try:
            getattr(self._observer, name)(*values)
        except Exception:
            if not self._told:
                self._told = True
                log.exception("the observer's %s raised; later errors of this observer are not logged", name)


class Stage(Enum):
    DECODING = 1  # waits for a decoder, or is being decoded
    READY = 2  # has its pixels, waits for a batch
    TAKEN = 3  # can't be cancelled any more: in a batch, or about to be answered
    CANCELLED = 4


@dataclass(slots=True, eq=False, weakref_slot=True)
class Item:
    """`deadline`, `submitted` and `ready_at` are on time.monotonic's clock, in seconds."""

    image: Any
    position: int  # in its request: what BadImageError calls it
    top: int
    nearest: int
    submitted: float
    deadline: float = math.inf
    turn: int = 0  # of which request it is: they take turns at decoding
    client: str = ""  # and so do those who send them
    cost: int = 0  # of decoding, in pixels; 0 if unknown
    future: Future[Prediction] = field(default_factory=Future)
    stage: Stage = Stage.DECODING
    pixels: np.ndarray | None = None  # (S, S, 3) uint8, from READY on
    ready_at: float = 0.0
    outcome: Prediction | BaseException | None = None

    def late(self, now: float) -> DeadlineExceededError:
        return DeadlineExceededError(
            f"the deadline of {self.deadline - self.submitted:.3g} s was over {now - self.deadline:.3g} s before the "
            "image could be encoded; allow more time, or submit less at a time"
        )

    def answer(self, outcome: Prediction | BaseException, hooks: Hooks) -> None:
        """Set the future, once the item holds no place any more: who hears of it may submit at once."""
        latency_s = time.monotonic() - self.submitted
        try:
            if isinstance(outcome, BaseException):
                hooks.done(latency_s, _outcome_name(outcome), None)
                self.future.set_exception(_ordinary(outcome))
            else:
                hooks.done(latency_s, "ok", outcome.label)
                self.future.set_result(outcome)
        except InvalidStateError:
            log.debug("an image's answer came after close() had given it up")


@dataclass(slots=True, eq=False)
class WholeImage:
    """An image that is decoded and not classified: all of its pixels, (height, width, 3) uint8."""

    image: Any
    position: int
    deadline: float
    turn: int
    cost: int
    client: str = ""
    future: Future[np.ndarray] = field(default_factory=Future)

    def is_wanted(self, now: float) -> bool:
        """Whether it is still to be decoded; its future says why not."""
        if not self.future.set_running_or_notify_cancel():
            return False
        if self.deadline < now:
            self.future.set_exception(DeadlineExceededError("the deadline was over before the image was decoded"))
        return self.deadline >= now


@dataclass
class QueuedBatch:
    """What take() gives: `items` to encode with `classifier`, `expired` ones to refuse, `waiting`, how many remain."""

    classifier: Any
    items: list[Item] = field(default_factory=list)
    expired: list[Item] = field(default_factory=list)
    waiting: int = 0

    @property
    def all_items(self) -> list[Item]:
        return [*self.expired, *self.items]


def without_frames(error: BaseException) -> BaseException:
    """The error without the tracebacks of it and its causes, for one that was logged: their frames know the batch, so
    whoever keeps the error would keep all of its images."""
    chain = [error]
    while chain:
        one = chain.pop()
        one.__traceback__ = None
        chain += [e for e in (one.__cause__, one.__context__) if e is not None and e.__traceback__ is not None]
    return error


def _ordinary(error: BaseException) -> Exception:
    """An event loop that meets SystemExit or KeyboardInterrupt stops; here it was one image's matter."""
    if isinstance(error, Exception):
        return error
    made = RuntimeError(f"{type(error).__name__} was raised while an image was classified: {error}")
    made.__cause__ = error
    return made


def _outcome_name(error: object) -> str:
    if isinstance(error, BadImageError):
        return "bad_image"
    if isinstance(error, DeadlineExceededError):
        return "deadline"
    return "closed" if isinstance(error, ClosedError) else "error"
