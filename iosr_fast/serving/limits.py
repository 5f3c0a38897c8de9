"""What a server bounds: times (Deadlines), and counts and sizes (Limits). Operators set what has an Option."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, NamedTuple

from msgspec import Meta

MIB = 1 << 20
_MAX = 1e12  # msgspec compares with finite numbers only; this bound refuses infinity

Count = Annotated[int, Meta(ge=1)]
Positive = Annotated[float, Meta(ge=1e-3, le=_MAX)]
NonNegative = Annotated[float, Meta(ge=0, le=_MAX)]


class Option(NamedTuple):
    """A setting as an option of `iosr-fast serve`, in a section of its help."""

    help: str
    section: str = ""


@dataclass(frozen=True)
class Deadlines:
    """How long a client, a decoder or the engine may take, in seconds."""

    # A connection waits for its client.
    head_s: ClassVar[float] = 10.0  # from the first byte of a head to its last
    keep_alive_s: ClassVar[float] = 65.0  # for the next request
    half_closed_s: ClassVar[float] = 1.0  # for a client that has closed its side, and may be gone, until its answer
    linger_s: ClassVar[float] = 5.0  # for what is still sent after the answer; closed at once, clients might miss it
    accept_pause_s: ClassVar[float] = 0.1  # after an error, as where no more files may be open
    # A request.
    after_deadline_s: ClassVar[float] = 0.25  # for a batch that started before it
    change_decode_s: ClassVar[float] = 60.0  # that an image of a change may wait for a decoder
    # Health and metrics.
    probe_after_s: ClassVar[float] = 30.0  # without a classified image, /healthz classifies one,
    probe_within_s: ClassVar[float] = 2.0  # and expects an answer
    stuck_after_s: ClassVar[float] = 120.0  # without an answer, a server too busy for the probe is unhealthy
    scrape_s: ClassVar[float] = 1.0  # for which the text of /metrics is kept
    read_labels_s: ClassVar[float] = 5.0  # between two readings of the labels of --collect
    # Decoders and batches.
    decoder_start_s: ClassVar[float] = 30.0  # a swapping machine starts an interpreter slowly
    decoder_pause_s: ClassVar[float] = 0.1  # before a decoder that failed to start is started again; doubles,
    decoder_longest_pause_s: ClassVar[float] = 5.0  # up to this
    least_decode_s: ClassVar[float] = 0.5  # a passed deadline kills a decoder only then, as a restart takes as long
    engine_probe_s: ClassVar[float] = 1.0  # between probes of a failed engine: load balancers send it no traffic
    at_exit_s: ClassVar[float] = 5.0  # that an exiting interpreter waits for accepted images
    backlog_s: ClassVar[float] = 60.0  # of decoding that may wait for each decoder
    least_retry_s: ClassVar[float] = 0.01

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


@dataclass(frozen=True)
class Limits:
    """How much may be sent, wait or be open, in bytes where nothing else is said."""

    head: ClassVar[int] = 64 << 10
    request_line: ClassVar[int] = 8 << 10
    headers: ClassVar[int] = 100  # headers of a request
    chunk_framing: ClassVar[int] = 24 << 10  # of size lines beyond an eighth of the content: each chunk costs time
    part_headers: ClassVar[int] = 4096  # of a part of a form
    body_without_images: ClassVar[int] = 64 << 10  # such as a name with descriptions; only POST takes images
    bodies: ClassVar[int] = 8  # largest bodies in memory together; of these a client alone has half (Shares)
    box_text: ClassVar[int] = 128  # of a box in JSON
    changes: ClassVar[int] = 8  # changes that may wait
    page: ClassVar[int] = 1_000  # entries of a page of a list
    backlog: ClassVar[int] = 1024  # connections in the kernel: where it is full, clients try again after a second
    accepted_at_once: ClassVar[int] = 32  # connections taken in one pass of the event loop: more would delay requests
    log_lines: ClassVar[int] = 10_000  # for a slow reader of stderr; more are dropped, so that no request waits
    series: ClassVar[int] = 10_000  # classes with series of metrics of their own; more would slow down every scrape
    uploads_to_judge: ClassVar[int] = 64 << 20  # of --collect that wait to be judged
    decoders: ClassVar[int] = 8  # decoders by default

    max_images: Annotated[Count, Option("Most images of a request.", "Limits")] = 64
    max_body_mb: Annotated[Positive, Option("Largest request, in MB.", "Limits")] = 32.0
    max_image_mb: Annotated[Positive, Option("Largest image file, in MB.", "Limits")] = 8.0
    max_pixels: Annotated[Count, Option("Largest image, in pixels.", "Limits")] = 50_000_000
    max_connections: Annotated[Count, Option("Most open connections.", "Limits")] = 900  # many systems allow 1,024
    max_queue: Annotated[
        Count, Option("Most images that are accepted and not yet answered; others get status 503.", "Batches")
    ] = 512  # of which a client that is alone has half (Shares)
