"""All settings of the server, with defaults, ranges and the help of the command's options."""

from __future__ import annotations

import ipaddress
import math
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, get_type_hints

import msgspec
from msgspec import Meta

from iosr_fast.encoders.encoder import Encoder
from iosr_fast.encoders.rows import Rows
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
BetweenZeroAndOne = Annotated[float, Meta(gt=0, lt=1)]
NonNegative = Annotated[float, Meta(ge=0, le=_MAX)]


class Option(NamedTuple):
    """A setting as an option of `iosr-fast serve`, in a section of its help."""

    help: str
    section: str = ""


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

    Changes of classes require the bearer token `token`; None disables changes. Clients are known by their addresses and
    share the queue and the memory for bodies. Images above 16 million pixels count for `max_decoding_pixels`. A client
    must also read an answer within `body_timeout_s`; connection.py has the other deadlines of a connection.
    """

    host: Annotated[str, Option("Address to listen on; 0.0.0.0: all.")] = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535), Option("Port; 0: a free one, which the log names.")] = 8000
    token: str | None = field(default=None, repr=False)
    trusted_proxy: Annotated[
        tuple[str, ...],
        Option("Address or network of a proxy, whose X-Forwarded-For names the client; may be repeated."),
    ] = ()
    max_error: Annotated[
        BetweenZeroAndOne | None,
        Option("Share of wrong labels that accepted ones may have, like 1%, where a request names none."),
    ] = None
    collect: Annotated[
        Path | None, Option("Folder that keeps uploads that need a look, by --max-error, and collected.csv.")
    ] = None
    collect_limit: Annotated[Count, Option("Most uploads in it; the oldest without a label go.")] = 1_000
    check_share: Annotated[
        BetweenZeroAndOne | None,
        Option("Share of accepted pictures, like 1%, that --collect keeps, too, for somebody to check (checks.csv)."),
    ] = None
    log: Annotated[Path | None, Option("File that records class changes; they are replayed at the start.")] = None
    log_json: Annotated[bool, Option("Write JSON lines to a terminal, too, as to a file or pipe.")] = False
    runtime: Annotated[str, Option("auto, onnxruntime, openvino, tensorrt, tensorrt_rtx or torch.")] = "auto"
    expected_digest: Annotated[
        str | None, Option("Refuse a folder with another digest than this, of `iosr-fast info FOLDER`.")
    ] = None

    # None: 8 on a CPU, where larger batches only delay each other, and the engine's own maximum on a GPU.
    max_batch: Annotated[
        Count | None,
        Option("Most images of a batch [default: 8 on a CPU; on a GPU as many as the engine takes].", "Batches"),
    ] = None
    max_wait_ms: Annotated[
        NonNegative, Option("Longest wait of a batch for more images, in milliseconds.", "Batches")
    ] = 2.0
    max_queue: Annotated[
        Count, Option("Most images that are accepted and not yet answered; others get status 503.", "Batches")
    ] = 512  # of which a client that is alone has half (Shares)
    decode_threads: Annotated[Count | None, Option("Images decoded in parallel [default: chosen].", "Batches")] = None
    engine_threads: Annotated[Count | None, Option("CPU cores of the encoder [default: all].", "Batches")] = None

    max_images: Annotated[Count, Option("Most images of a request.", "Limits")] = 64
    max_body_mb: Annotated[Positive, Option("Largest request, in MB.", "Limits")] = 32.0
    max_image_mb: Annotated[Positive, Option("Largest image file, in MB.", "Limits")] = 8.0
    max_buffered_mb: Annotated[
        Positive, Option("Largest total of the requests that are being received, in MB.", "Limits")
    ] = 256.0
    max_pixels: Annotated[Count, Option("Largest image, in pixels.", "Limits")] = 50_000_000
    max_decoding_pixels: Annotated[
        Count, Option("Largest total of the images above 16 million pixels that are decoded in parallel.", "Limits")
    ] = 100_000_000
    max_connections: Annotated[Count, Option("Most open connections.", "Limits")] = 900  # many systems allow 1,024

    decode_timeout_s: Annotated[Positive, Option("CPU seconds to decode an image.", "Time limits")] = 4.0
    body_timeout_s: Annotated[Positive, Option("Seconds to receive the body of a request.", "Time limits")] = 20.0
    deadline_ms: Annotated[Count, Option("Deadline of a request that names none, in milliseconds.", "Time limits")] = (
        5_000
    )
    max_deadline_ms: Annotated[
        Count, Option("Longest deadline that a request may name, in milliseconds.", "Time limits")
    ] = 60_000
    drain_s: Annotated[
        NonNegative, Option("After a signal to stop: seconds in which requests are still accepted.", "Time limits")
    ] = 1.0
    grace_s: Annotated[Count, Option("Then: seconds to answer the requests that were accepted.", "Time limits")] = 30

    def __post_init__(self) -> None:
        if self.token is not None:
            _check_token(self.token)  # first, because check_fields quotes values
        check_fields(self)
        if self.collect is not None and self.max_error is None:
            raise IosrFastError("expected --max-error with --collect: it says which uploads need a look")
        if self.check_share is not None and self.collect is None:
            raise IosrFastError("expected --collect with --check-share: it names the folder of what is kept")
        for address in self.trusted_proxy:
            try:
                ipaddress.ip_network(address)
            except ValueError as error:
                raise IosrFastError(f"expected trusted_proxy to be an address, or a network: {error}") from None
        for small, factor, large in (
            ("max_images", 1, "max_queue"),
            ("max_image_mb", 1, "max_body_mb"),
            ("max_body_mb", 2, "max_buffered_mb"),  # half is the largest share of a client (Shares)
            ("max_pixels", 1, "max_decoding_pixels"),
            ("deadline_ms", 1, "max_deadline_ms"),
        ):
            if factor * getattr(self, small) > getattr(self, large):
                raise IosrFastError(
                    f"expected {small} of at most {'half of ' * (factor - 1)}{large}, got {getattr(self, small)} and "
                    f"{getattr(self, large)}; lower --{small.replace('_', '-')} or raise --{large.replace('_', '-')}"
                )

    @property
    def max_body_bytes(self) -> int:
        return int(self.max_body_mb * MIB)

    @property
    def engine_layout(self) -> tuple[int, int]:
        """(runs, threads of each run) of the encoder on a CPU: about as many runs as threads, which use its cores.

        Each run has batches of its own, so a core that a decoder or a request takes delays one run. One run on all
        cores would wait at every layer for the core that is taken. One thread a run would be slow for a lone image.
        """
        cores = self.engine_threads or usable_threads()
        runs = math.ceil(math.sqrt(cores))
        return runs, cores // runs

    def open(self, folder: str | Path) -> Classifier:
        """What is served of a folder (classifier.open_saved). Raises IosrFastError for what can't be."""
        from iosr_fast.classifier import open_saved

        runs, threads = self.engine_layout
        served = open_saved(folder, self.runtime, threads, self.expected_digest, runs)
        if isinstance(served.encoder, Rows) and (self.log or self.collect) is not None:
            raise IosrFastError("a head takes no changes and gets no pictures: leave out --log and --collect")
        served.snapshot().require_single_label("the HTTP API", "serve one fitted with one label, or use predict")
        return served

    def make_batching(self, classifier: Classifier, **options: Any) -> BatchingClassifier:
        """A BatchingClassifier with these limits, whose decoders run in processes; `options` go to its constructor."""
        from PIL import Image

        own: dict[str, Any] = {"isolated": True, "decode_threads": self.decode_threads}
        own["max_batch"] = self.batch_for(classifier.encoder)
        if isinstance(classifier.encoder, Rows):  # nothing to decode, and little that a large batch delays
            own = {"decode_threads": 1, "max_batch": self.max_batch or self.max_images}
        # Pillow refuses images of twice this: a second check, of the size that a decoder reads inside a file.
        Image.MAX_IMAGE_PIXELS = max(1, self.max_pixels // 2)
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        return BatchingClassifier(
            classifier,
            max_wait_ms=self.max_wait_ms,
            max_queue=self.max_queue,
            limits=self.decode_limits,
            max_error=self.max_error,
            **{**own, **options},
        )

    def batch_for(self, encoder: Encoder) -> int:
        """`max_batch`, or the default of the engine."""
        if self.max_batch is not None:
            return self.max_batch
        # Only engines on a GPU have sizes of batches that they prepare.
        return encoder.max_batch if encoder.buckets else CPU_BATCH

    @property
    def decode_limits(self) -> DecodeLimits:
        most_bytes = int(self.max_image_mb * MIB)
        return DecodeLimits(most_bytes, self.max_pixels, self.max_decoding_pixels, self.decode_timeout_s)


def _check_token(token: str) -> None:
    if len(token) < _MIN_TOKEN or not token.isascii() or any(not 32 < ord(letter) < 127 for letter in token):
        raise IosrFastError(
            f"expected a token of at least {_MIN_TOKEN} printable ASCII characters without spaces, got "
            f"{len(token)} characters; `python -c 'import secrets; print(secrets.token_urlsafe(32))'` makes a good one"
        )
