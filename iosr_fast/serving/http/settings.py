"""Everything that can be set about the server, with its defaults. Every limit bounds something that a client sends."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path

from iosr_fast.encoders.encoder import Encoder
from iosr_fast.serving.batching import DecodeLimits

MIB = 1 << 20
CPU_BATCH = 8
_MIN_TOKEN = 16


@dataclass(frozen=True)
class Settings:
    """Checked when made: ValueError says which setting is wrong and what was expected.

    Where it listens: `host`; `port`, 0 for a free one (the log says which); `max_connections` at a time, of which the
    one that has waited longest for its client makes room for another; `header_timeout_s` for a request's headers and
    `max_header_bytes` of them (and 100 in number, 8 KiB for the request line); `keep_alive_s` without a request; an
    answer is taken within `body_timeout_s`. No byte that comes prolongs a time.
    Who may change classes: who sends `token`; None: nobody.

    Batches: `max_batch` images (None: 8 on a CPU, where more only keep each other waiting, and what the engine takes on
    a GPU), for which the first one waits at most `max_wait_ms`; `max_queue` images accepted and
    not yet answered, `decode_threads` decoders (None: batching's own choice); `engine_threads` of the encoder on a CPU
    (None: all cores but one, which is left to requests and decoders: an engine on every core keeps them waiting).

    Decoding, in processes that are killed where an image takes `decode_timeout_s` of a core, or twice as long by the
    clock: images above 16 million pixels have at most `max_decoding_pixels` together at a time.

    A request: a body of `max_body_bytes` (16 KiB where it has no images) that comes within `body_timeout_s`;
    `max_images` images of `max_image_bytes` and `max_pixels` each; all requests together hold `max_buffered_bytes` of
    bodies. A client's deadline is `deadline_ms` unless it says another, of at most `max_deadline_ms`. `max_changes`
    changes of classes may wait.

    Health: where no image was classified for `probe_after_s`, /healthz classifies one itself, at most every
    `probe_every_s`, and expects it within `probe_deadline_s`; a full queue is no failure until none was classified for
    `stuck_after_s`. On a signal /readyz fails, requests are still taken for `drain_s`, and what was accepted is
    answered within `grace_s`.

    The classifier: `runtime` of its engine, `verify` its files' hashes, `expected_digest` of the bundle (None: any),
    `log`, the file that changes are written to; `recover` opens a log of which changes are missing, and says which.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    token: str | None = field(default=None, repr=False)
    max_connections: int = 900  # below the 1,024 files that a process may often have open
    header_timeout_s: float = 10.0
    max_header_bytes: int = 64 << 10
    keep_alive_s: int = 65
    max_batch: int | None = None
    max_wait_ms: float = 2.0
    max_queue: int = 256
    decode_threads: int | None = None
    engine_threads: int | None = None
    decode_timeout_s: float = 4.0
    max_decoding_pixels: int = 100_000_000
    max_body_bytes: int = 32 * MIB
    body_timeout_s: float = 20.0
    max_images: int = 64
    max_image_bytes: int = 8 * MIB
    max_pixels: int = 50_000_000
    max_buffered_bytes: int = 256 * MIB
    deadline_ms: int = 5_000
    max_deadline_ms: int = 60_000
    max_changes: int = 8
    probe_after_s: float = 30.0
    probe_every_s: float = 10.0
    probe_deadline_s: float = 2.0
    stuck_after_s: float = 120.0
    drain_s: float = 1.0
    grace_s: int = 30
    runtime: str = "auto"
    verify: bool = True
    expected_digest: str | None = None
    log: Path | None = None
    recover: bool = False

    def batch_for(self, encoder: Encoder) -> int:
        """`max_batch`, or where it is None what suits the engine."""
        if self.max_batch is not None:
            return self.max_batch
        # Only engines on a GPU have sizes of batches that they prepare.
        return encoder.max_batch if encoder.buckets else CPU_BATCH

    @property
    def decode_limits(self) -> DecodeLimits:
        return DecodeLimits(self.max_image_bytes, self.max_pixels, self.max_decoding_pixels, self.decode_timeout_s)

    def __post_init__(self) -> None:
        for one in fields(self):
            value = getattr(self, one.name)
            if one.type not in ("int", "float", "int | None") or value is None or one.name == "port":
                continue
            if (
                isinstance(value, bool)
                or not isinstance(value, int | float)
                or (one.type != "float" and value != int(value))
            ):
                raise ValueError(f"expected {one.name} to be a number ({one.type}), got {value!r}")
            least = 0 if one.name in ("max_wait_ms", "drain_s") else 1e-3 if one.type == "float" else 1
            if not least <= value < float("inf"):
                raise ValueError(f"expected {one.name} of at least {least:g}, got {value!r}")
        if self.recover and self.log is None:
            raise ValueError("expected the log that is to be recovered, got none: name it with --log")
        if not 0 <= self.port < 65536:
            raise ValueError(f"expected a port of 0 (any free one) to 65535, got {self.port}")
        for small, large in (
            ("max_images", "max_queue"),
            ("max_image_bytes", "max_body_bytes"),
            ("max_body_bytes", "max_buffered_bytes"),
            ("max_pixels", "max_decoding_pixels"),
            ("deadline_ms", "max_deadline_ms"),
        ):
            if getattr(self, small) > getattr(self, large):
                raise ValueError(
                    f"expected {small} of at most {large}, got {getattr(self, small)} and {getattr(self, large)}; "
                    f"lower --{small.replace('_', '-')} or raise --{large.replace('_', '-')}"
                )
        if self.token is not None:
            _check_token(self.token)


def _check_token(token: str) -> None:
    if len(token) < _MIN_TOKEN or not token.isascii() or any(not 32 < ord(letter) < 127 for letter in token):
        raise ValueError(
            f"expected a token of at least {_MIN_TOKEN} printable ASCII characters without spaces, got one of "
            f"{len(token)} characters; `python -c 'import secrets; print(secrets.token_urlsafe(32))'` makes a good one"
        )
