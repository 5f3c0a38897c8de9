"""One image in BatchingClassifier: what is asked about it, where it stands, and its result or error."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from iosr_fast.exceptions import BadImageError, ClosedError, DeadlineExceededError, IosrFastError
from iosr_fast.head.verdict import Abstention
from iosr_fast.images.crop import Crop
from iosr_fast.images.limits import DecodeLimits, Size, claimed_size, scans_factor, work_pixels
from iosr_fast.images.preprocess import ENCODED
from iosr_fast.utils.numbers import check_integer, check_share

if TYPE_CHECKING:
    import numpy as np

    from iosr_fast.head.head import Head

LARGE_PIXELS = 16_000_000  # more than most phones send
PIXELS_PER_S = 100_000_000  # that a decoder decodes: an estimate
_MOST_WORK = int(DecodeLimits.timeout_s * PIXELS_PER_S)  # by default no decoding goes on for longer
log = logging.getLogger(__name__)


class Observer(Protocol):
    """Callbacks for metrics, called on several threads and never under a lock. They must be quick: batches wait.

    Exceptions are logged and otherwise ignored.
    """

    def on_batch(self, size: int, encode_s: float, score_s: float) -> None:
        """A batch has run."""

    def on_done(self, latency_s: float, outcome: str, label: str | None) -> None:
        """An accepted image is about to be answered, `latency_s` after submit. `outcome` is "ok" (with the `label`
        of the only classifier asked, or the first of its labels, None if there is none, or of several), "bad_image",
        "error" (of several: by all of them), "deadline", "closed" or "cancelled"."""

    def on_refused(self, reason: str) -> None:
        """An image was refused at submit: "full" (the queue, or the client's share), "deadline" or "closed"."""


def notify(observer: Observer | None, event: str, *values: Any) -> None:
    """Call a method of the observer, if there is one."""
    if observer is not None:
        try:
            getattr(observer, event)(*values)
        except Exception:
            log.exception("the observer's %s raised", event)


@dataclass(frozen=True)
class Query:
    """The options of one request. Raises ValueError for values out of range.

    `top` classes and `nearest` support images in each Prediction; `deadline_s`, seconds from now until the image must
    be encoded (None: no deadline); `client`, the name of who asks: clients take turns, and each has a share of the
    queue; "" is the program itself, which may fill it. `keep` rejects pictures that belong to none of the classes,
    `max_error` says whose label is accepted (Abstention). `probe` is an image of the program's own, to see whether the
    engine works: it is not collected. `classifier` names the one that is asked, or several by a tuple, which answer
    from the same embeddings; "" is the only one. An empty tuple asks for the Embeddings (1, D) alone.
    """

    top: int = 5
    nearest: int = 0
    deadline_s: float | None = None
    client: str = ""
    keep: float | None = None
    max_error: float | None = None
    probe: bool = False
    classifier: str | tuple[str, ...] = ""

    def __post_init__(self) -> None:
        check_integer("top", self.top, 1)
        check_integer("nearest", self.nearest, 0)
        if self.deadline_s is not None and not 0 < self.deadline_s < math.inf:
            raise IosrFastError(f"expected deadline_s > 0 or None, got {self.deadline_s!r}")
        if self.keep is not None:
            check_share("keep", self.keep)
        if self.max_error is not None:
            check_share("max_error", self.max_error, like=0.01)
        if not isinstance(self.classifier, str | tuple):
            raise IosrFastError(f"expected classifier to be a name, or a tuple of names, got {self.classifier!r}")

    @property
    def abstention(self) -> Abstention:
        return Abstention(self.keep, max_error=self.max_error)


class Text(str):
    """A text in the place of an image, for the text encoder; its answer is an embedding."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """An encoded image whose header was read before: `claimed` is its claimed_size."""

    data: bytes
    claimed: Size


@dataclass(slots=True, eq=False, weakref_slot=True)
class Item:
    """`deadline` and `submitted` are on time.monotonic's clock, in seconds. The future is resolved with a Prediction,
    a tuple of them or their errors, Embeddings, or of a `whole` image with its pixels (height, width, 3). The header of
    encoded bytes is read here alone, unless the image comes as Encoded. Of a `crop` by Sharing the image is its
    source."""

    image: Any
    position: int  # in its request, for BadImageError
    query: Query
    submitted: float
    request: int = 0  # number of its request; requests of a client take turns
    heads: Mapping[str, Head] = field(default_factory=dict)  # those of its submission, which answer, by classifier
    encoder: Any = None  # that of its submission: its geometry decodes, these heads compare its embeddings
    upright: bool = True  # whether EXIF orientation is applied, as in the fit of its submission
    whole: bool = False  # decoded only, all of it
    deadline: float = math.inf
    work: int = 0  # its share of decoding its picture, in pixels that take as long
    large: bool = False  # whether its picture takes as long as one of more than LARGE_PIXELS
    future: Future[Any] = field(default_factory=Future)
    pixels: np.ndarray | None = None  # (S, S, 3) uint8, when they are decoded
    outcome: Any = None
    claimed: Size | None = None  # of encoded bytes, by their header
    cost: int = 0  # pixels of the largest picture that decoding makes; 0 if unknown
    crop: Crop | None = None  # None: the image is classified whole
    picture: object = field(default_factory=object)  # the same of parts that are decoded together

    def __post_init__(self) -> None:
        if isinstance(self.image, Crop):
            self.crop, self.picture, self.image = self.image, self.image.whole, self.image.source
        if isinstance(self.image, Encoded):
            self.image, self.claimed = self.image.data, self.image.claimed
        elif isinstance(self.image, ENCODED):
            self.claimed = claimed_size(self.image)
        if self.claimed is not None:
            self.cost = work_pixels(self.claimed, self.encoder.geometry)

    @property
    def client(self) -> str:
        return self.query.client

    def late(self, now: float) -> DeadlineExceededError:
        return DeadlineExceededError(
            f"the deadline of {self.deadline - self.submitted:.3g} s passed {now - self.deadline:.3g} s before the "
            "image could be encoded; allow more time, or submit fewer images at a time"
        )

    def answer(self, outcome: Any, observer: Observer | None) -> None:
        """Resolve the future. Called after the item has left the queue, so that its callbacks can submit again."""
        latency_s = time.monotonic() - self.submitted
        answers = outcome if isinstance(outcome, tuple) else (outcome,)
        failed = all(isinstance(one, Exception) for one in answers)
        try:
            if failed or not self.whole:
                label = getattr(answers[0], "label", None) if len(answers) == 1 else None
                notify(observer, "on_done", latency_s, _outcome_name(answers[0]) if failed else "ok", label)
            if isinstance(outcome, Exception):
                self.future.set_exception(outcome)
            else:
                self.future.set_result(outcome)
        except InvalidStateError:
            log.debug("an image was answered after close() had abandoned it")


def set_work(parts: Sequence[Item]) -> None:
    """Set what it takes to decode a picture once and to resize its parts; 0 if its size is unknown."""
    first = parts[0]
    if first.claimed is None:
        return
    work, longest = int(first.cost * scans_factor(first.image)), max(first.claimed)
    for crop in (part.crop for part in parts[1:] if part.crop is not None):  # the first one is in its picture's cost
        box = crop.box.grown(crop.margin)
        scale = longest if box.relative else 1  # EXIF may turn the picture
        width, height = (min(longest, math.ceil(side * scale)) for side in (box.width, box.height))
        work += work_pixels((width, height), first.encoder.geometry)
    for part in parts:
        part.work, part.large = min(work, _MOST_WORK) // len(parts), work > LARGE_PIXELS


def ordinary(error: BaseException) -> Exception:
    """SystemExit and the like as RuntimeError: they would stop a thread or an event loop, but concern one image."""
    return error if isinstance(error, Exception) else RuntimeError(f"expected a result, got {error!r}")


def _outcome_name(error: Exception) -> str:
    kinds = {BadImageError: "bad_image", DeadlineExceededError: "deadline", ClosedError: "closed"}
    return next((name for kind, name in kinds.items() if isinstance(error, kind)), "error")
