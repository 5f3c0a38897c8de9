"""All settings of the server, with defaults and ranges. Each limit bounds something that a client sends."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import msgspec
from msgspec import Meta

from iosr_fast.encoders.encoder import Encoder
from iosr_fast.exceptions import IosrFastError
from iosr_fast.serving.batching import BatchingClassifier, DecodeLimits
from iosr_fast.utils.machine import usable_threads

if TYPE_CHECKING:
    from iosr_fast.classifier import Classifier

MIB = 1 << 20
CPU_BATCH = 8
_MIN_TOKEN = 16
_MAX = 1e12  # msgspec compares with finite numbers only; this bound refuses infinity

Count = Annotated[int, Meta(ge=1)]
Positive = Annotated[float, Meta(ge=1e-3, le=_MAX)]
NonNegative = Annotated[float, Meta(ge=0, le=_MAX)]


def check_fields(record: Any) -> None:
    """Raise ValueError for the first field of a dataclass that its annotation does not allow."""
    for name, annotation in get_type_hints(type(record), include_extras=True).items():
        value = getattr(record, name)
        if not isinstance(value, Path):
            try:
                msgspec.convert(value, annotation)
            except msgspec.ValidationError as error:
                message = str(error).removeprefix("Expected ")
                raise IosrFastError(f"expected {name} to be {message}, got {value!r:.80}") from None


@dataclass(frozen=True)
class Settings:
    """Limits, deadlines and files of one server. Raises ValueError that names the setting and the expected value.

    Listening: `host`; `port`, 0 for a free one (the log names it). At most `max_connections` are open; beyond that the
    one that has waited longest for its client is closed. A client must read an answer within `body_timeout_s`
    (protocol.py has the other deadlines of a connection).

    Changes of classes require the bearer token `token`; None disables changes.

    Batches: `max_batch` images (None: 8 on a CPU, where larger ones only delay each other, and the engine's own maximum
    on a GPU). With one run of the encoder, the first image of a batch waits at most `max_wait_ms`. `max_queue` images
    may be accepted and not yet answered. `decode_threads` decoders (None: chosen by BatchingClassifier);
    `engine_threads` of the encoder on a CPU (None: all cores), shared by several runs (engine_layout).

    Decoding runs in processes. A process is killed when an image takes `decode_timeout_s` of CPU time or twice as long
    by the clock. Images above 16 million pixels that are decoded at the same time have at most `max_decoding_pixels`
    together.

    Requests: a body has at most `max_body_bytes` (16 KiB without images) and must arrive within `body_timeout_s`; it
    has at most `max_images` images of `max_image_bytes` and `max_pixels` each. All bodies together take at most
    `max_buffered_bytes`. The deadline is `deadline_ms`, unless the client asks for another of at most
    `max_deadline_ms`.

    After a signal /readyz fails; the server accepts requests for another `drain_s` and answers them within `grace_s`.

    The classifier: `runtime` of its engine; `expected_digest` of the bundle (None: any); `log`, the file of changes.
    """

    host: str = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535)] = 8000
    token: str | None = field(default=None, repr=False)
    max_connections: Count = 900  # below 1,024, a common limit of open files
    max_batch: Count | None = None
    max_wait_ms: NonNegative = 2.0
    max_queue: Count = 256
    decode_threads: Count | None = None
    engine_threads: Count | None = None
    decode_timeout_s: Positive = 4.0
    max_decoding_pixels: Count = 100_000_000
    max_body_bytes: Count = 32 * MIB
    body_timeout_s: Positive = 20.0
    max_images: Count = 64
    max_image_bytes: Count = 8 * MIB
    max_pixels: Count = 50_000_000
    max_buffered_bytes: Count = 256 * MIB
    deadline_ms: Count = 5_000
    max_deadline_ms: Count = 60_000
    drain_s: NonNegative = 1.0
    grace_s: Count = 30
    runtime: str = "auto"
    expected_digest: str | None = None
    log: Path | None = None

    def __post_init__(self) -> None:
        if self.token is not None:
            _check_token(self.token)  # first, because check_fields quotes values
        check_fields(self)
        for small, large in (
            ("max_images", "max_queue"),
            ("max_image_bytes", "max_body_bytes"),
            ("max_body_bytes", "max_buffered_bytes"),
            ("max_pixels", "max_decoding_pixels"),
            ("deadline_ms", "max_deadline_ms"),
        ):
            if getattr(self, small) > getattr(self, large):
                raise IosrFastError(
                    f"expected {small} of at most {large}, got {getattr(self, small)} and {getattr(self, large)}; "
                    f"lower --{small.replace('_', '-')} or raise --{large.replace('_', '-')}"
                )

    @property
    def engine_layout(self) -> tuple[int, int]:
        """(runs, threads of each run) of the encoder on a CPU: about as many runs as threads, which use its cores.

        Each run has batches of its own, so a core that a decoder or a request takes delays one run. One run on all
        cores would wait at every layer for the core that is taken. One thread a run would be slow for a lone image.
        """
        cores = self.engine_threads or usable_threads()
        runs = math.ceil(math.sqrt(cores))
        return runs, cores // runs

    def make_batching(self, classifier: Classifier, **options: Any) -> BatchingClassifier:
        """A BatchingClassifier with these limits, whose decoders run in processes; `options` go to its constructor."""
        from PIL import Image

        # Pillow refuses images of twice this: a second check, of the size that a decoder reads inside a file.
        Image.MAX_IMAGE_PIXELS = max(1, self.max_pixels // 2)
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        return BatchingClassifier(
            classifier,
            max_batch=self.batch_for(classifier.encoder),
            max_wait_ms=self.max_wait_ms,
            max_queue=self.max_queue,
            limits=self.decode_limits,
            isolated=True,
            **{"decode_threads": self.decode_threads, **options},
        )

    def batch_for(self, encoder: Encoder) -> int:
        """`max_batch`, or the default of the engine."""
        if self.max_batch is not None:
            return self.max_batch
        # Only engines on a GPU have sizes of batches that they prepare.
        return encoder.max_batch if encoder.buckets else CPU_BATCH

    @property
    def decode_limits(self) -> DecodeLimits:
        return DecodeLimits(self.max_image_bytes, self.max_pixels, self.max_decoding_pixels, self.decode_timeout_s)


def _check_token(token: str) -> None:
    if len(token) < _MIN_TOKEN or not token.isascii() or any(not 32 < ord(letter) < 127 for letter in token):
        raise IosrFastError(
            f"expected a token of at least {_MIN_TOKEN} printable ASCII characters without spaces, got "
            f"{len(token)} characters; `python -c 'import secrets; print(secrets.token_urlsafe(32))'` makes a good one"
        )
