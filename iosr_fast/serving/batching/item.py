"""One image in BatchingClassifier: its query, its head, its result or error."""

from __future__ import annotations

import logging
import math
import time
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any, Protocol, TypedDict

from iosr_fast.exceptions import BadImageError, ClosedError, DeadlineExceededError, IosrFastError
from iosr_fast.methods.conformal import check_share
from iosr_fast.utils.numbers import check_integer

if TYPE_CHECKING:
    import numpy as np

    from iosr_fast.head.predictions import Prediction
    from iosr_fast.serving.batching.rejection import FittedState

log = logging.getLogger(__name__)


class Observer(Protocol):
    """Callbacks for metrics, called on several threads and never under a lock. They must be quick: batches wait.

    Exceptions are logged once and otherwise ignored.
    """

    def on_batch(self, size: int, queue_depth: int, encode_s: float, score_s: float) -> None:
        """A batch has run. `queue_depth`: accepted images that were not in it."""

    def on_done(self, latency_s: float, outcome: str, label: str | None) -> None:
        """An accepted image is about to be answered, `latency_s` after submit. `outcome` is "ok" (with a `label`,
        None if it was rejected), "bad_image", "error", "deadline", "closed" or "cancelled"."""

    def on_refused(self, reason: str) -> None:
        """An image was refused at submit: "full", "deadline" or "closed"."""


class Hooks:
    """Calls an observer, if there is one, and contains its exceptions."""

    def __init__(self, observer: Observer | None) -> None:
        self._observer = observer
        self._logged = False

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
            if not self._logged:
                self._logged = True
                log.exception("the observer's %s raised; later errors of this observer are not logged", name)


class Stage(Enum):
    DECODING = 1  # waits for a decoder, or is being decoded
    READY = 2  # has pixels and waits for a batch
    TAKEN = 3  # in a batch or about to be answered; can't be cancelled
    CANCELLED = 4


class QueryOptions(TypedDict, total=False):
    """Keyword arguments of submit, submit_many, classify and classify_many: the fields of Query."""

    top: int
    nearest: int
    deadline_s: float | None
    client: str
    keep: float | None


@dataclass(frozen=True)
class Query:
    """The options of one request. Raises ValueError for values out of range.

    `top` classes and `nearest` support images in each Prediction; `deadline_s`, seconds from now until the image must
    be encoded (None: no deadline); `client`, a name: decoders serve clients in turn. With `keep`, pictures that belong
    to none of the classes are rejected, and this share of the others is not (predictions.predict).
    """

    top: int = 5
    nearest: int = 0
    deadline_s: float | None = None
    client: str = ""
    keep: float | None = None

    def __post_init__(self) -> None:
        check_integer("top", self.top, 1)
        check_integer("nearest", self.nearest, 0)
        if self.deadline_s is not None and not 0 < self.deadline_s < math.inf:
            raise IosrFastError(f"expected deadline_s > 0 or None, got {self.deadline_s!r}")
        if self.keep is not None:
            check_share("keep", self.keep)


@dataclass(slots=True, eq=False, weakref_slot=True)
class Item:
    """`deadline`, `submitted` and `ready_at` are on time.monotonic's clock, in seconds."""

    image: Any
    position: int  # in its request, for BadImageError
    query: Query
    submitted: float
    turn: int = 0  # number of its request; requests take turns at decoding
    cost: int = 0  # of decoding, in pixels; 0 if unknown
    fitted: FittedState | None = None  # with `query.keep`: what answers it
    deadline: float = field(init=False)
    client: str = field(init=False)
    future: Future[Prediction] = field(default_factory=Future)
    stage: Stage = Stage.DECODING
    pixels: np.ndarray | None = None  # (S, S, 3) uint8, from READY on
    ready_at: float = 0.0
    outcome: Prediction | BaseException | None = None

    def __post_init__(self) -> None:
        self.client = self.query.client
        self.deadline = math.inf if self.query.deadline_s is None else self.submitted + self.query.deadline_s

    def late(self, now: float) -> DeadlineExceededError:
        return DeadlineExceededError(
            f"the deadline of {self.deadline - self.submitted:.3g} s passed {now - self.deadline:.3g} s before the "
            "image could be encoded; allow more time, or submit fewer images at a time"
        )

    def answer(self, outcome: Prediction | BaseException, hooks: Hooks) -> None:
        """Resolve the future. Called after the item has left the queue, so that its callbacks can submit again."""
        latency_s = time.monotonic() - self.submitted
        try:
            if isinstance(outcome, BaseException):
                hooks.done(latency_s, _outcome_name(outcome), None)
                self.future.set_exception(_ordinary(outcome))
            else:
                hooks.done(latency_s, "ok", outcome.label)
                self.future.set_result(outcome)
        except InvalidStateError:
            log.debug("an image was answered after close() had abandoned it")


@dataclass(slots=True, eq=False)
class WholeImage:
    """An image that is decoded and not classified: all pixels, (height, width, 3) uint8."""

    image: Any
    position: int
    deadline: float
    turn: int
    cost: int
    client: str = ""
    future: Future[np.ndarray] = field(default_factory=Future)

    def is_wanted(self, now: float) -> bool:
        """Whether it still has to be decoded; if not, its future has the reason."""
        if not self.future.set_running_or_notify_cancel():
            return False
        if self.deadline < now:
            self.future.set_exception(DeadlineExceededError("the deadline passed before the image was decoded"))
        return self.deadline >= now


@dataclass
class QueuedBatch:
    """`items` to encode with `classifier`, `expired` ones to refuse, and how many are still `waiting`."""

    classifier: Any = None
    items: list[Item] = field(default_factory=list)
    expired: list[Item] = field(default_factory=list)
    waiting: int = 0


def without_frames(error: BaseException) -> BaseException:
    """Remove the tracebacks of a logged error and its causes, whose frames would keep all images of the batch alive."""
    pending = [error]
    while pending:
        link = pending.pop()
        link.__traceback__ = None
        pending += [e for e in (link.__cause__, link.__context__) if e is not None and e.__traceback__ is not None]
    return error


def _ordinary(error: BaseException) -> Exception:
    """SystemExit and KeyboardInterrupt as RuntimeError: they would stop an event loop, but affect one image only."""
    if isinstance(error, Exception):
        return error
    ordinary = RuntimeError(f"{type(error).__name__} was raised while an image was classified: {error}")
    ordinary.__cause__ = error
    return ordinary


def _outcome_name(error: object) -> str:
    if isinstance(error, BadImageError):
        return "bad_image"
    if isinstance(error, DeadlineExceededError):
        return "deadline"
    return "closed" if isinstance(error, ClosedError) else "error"
