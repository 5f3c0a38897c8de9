"""All settings of the server, with defaults, ranges and the help of the command's options."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import msgspec
from msgspec import Meta

from iosr_fast.exceptions import IosrFastError
from iosr_fast.images.limits import DecodeLimits
from iosr_fast.serving.http.addresses import is_loopback, is_named
from iosr_fast.serving.http.tokens import Token, read_tokens
from iosr_fast.serving.limits import MIB, Count, Deadlines, Limits, Option

NAME = re.compile(r"[A-Za-z0-9._-]+")  # of a host, and of a classifier in a path
_ORIGIN = re.compile(r"\*|(?!http://.*:80$|https://.*:443$)[a-z][a-z0-9+.-]*://([a-z0-9._-]+|\[[0-9a-f:.]+])(:\d+)?")

BetweenZeroAndOne = Annotated[float, Meta(gt=0, lt=1)]


def check_fields(record: Any) -> None:
    """Raise ValueError for the first field of a dataclass that its annotation does not allow."""
    annotations = get_type_hints(type(record), include_extras=True)
    for name in (one.name for one in fields(record)):
        value, annotation = getattr(record, name), annotations[name]
        if not isinstance(value, Path):
            try:
                msgspec.convert(value, annotation)
            except msgspec.ValidationError as error:
                message = str(error).removeprefix("Expected ")
                raise IosrFastError(f"expected {name} to be {message}, got {value!r:.80}") from None


@dataclass(frozen=True)
class Settings(Limits, Deadlines):
    """All settings of one server. Raises ValueError that names the setting and the expected value.

    `token` is the text of a token file (tokens.py); None disables changes of classes. Clients share the queue and the
    memory for bodies (addresses.client_of). A client must also read an answer within `body_timeout_s`; connection.py
    has the other deadlines of a connection.
    """

    host: Annotated[str, Option("Address to listen on; 0.0.0.0: all.")] = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535), Option("Port; 0: a free one, which the log names.")] = 8000
    public_host: Annotated[
        tuple[str, ...],
        Option("Name that clients have for this server; may be repeated. Requests for other names get status 400."),
    ] = ()
    allow_origin: Annotated[
        tuple[str, ...],
        Option("Origin of other pages that may call the API, like https://shop.example, or *; may be repeated."),
    ] = ()
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
    collect_limit: Annotated[Count, Option("Most uploads in it; the client with most loses unlabelled ones.")] = 1_000
    check_share: Annotated[
        BetweenZeroAndOne | None,
        Option("Share of accepted pictures, like 1%, that --collect keeps, too, for somebody to check (checks.csv)."),
    ] = None
    log: Annotated[Path | None, Option("File that records class changes, to replay; of several, a folder.")] = None
    runtime: Annotated[str, Option("auto, onnxruntime, openvino, tensorrt, tensorrt_rtx or torch.")] = "auto"
    expected_digest: Annotated[
        str | None, Option("Refuse a folder with another digest than this, of `iosr-fast info FOLDER`.")
    ] = None

    # None: 8 on a CPU, where larger batches only delay each other, and the engine's own maximum on a GPU.
    max_batch: Annotated[
        Count | None,
        Option("Most images of a batch [default: 8 on a CPU; on a GPU as many as the engine takes].", "Batches"),
    ] = None
    decode_threads: Annotated[Count | None, Option("Images decoded in parallel [default: chosen].", "Batches")] = None

    def __post_init__(self) -> None:
        if self.token is not None:
            read_tokens(self.token)  # first, because check_fields quotes values
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
        if wrong := [name for name in self.public_host if not NAME.fullmatch(name)]:
            raise IosrFastError(f"expected public_host to be a name without a port, got {wrong[0]!r:.80}")
        if wrong := [origin for origin in self.allow_origin if not _ORIGIN.fullmatch(origin)]:
            expected = "scheme://host or scheme://host:port as browsers send it (small letters, no path, no usual port)"
            raise IosrFastError(f"expected allow_origin to be {expected}, or *, got {wrong[0]!r:.80}")
        for small, large in (
            ("max_images", "max_queue"),
            ("max_image_mb", "max_body_mb"),
            ("deadline_ms", "max_deadline_ms"),
        ):
            if getattr(self, small) > getattr(self, large):
                raise IosrFastError(
                    f"expected {small} of at most {large}, got {getattr(self, small)} and {getattr(self, large)}; "
                    f"lower --{small.replace('_', '-')} or raise --{large.replace('_', '-')}"
                )

    def check_several(self) -> None:
        """Raise IosrFastError for what only a single classifier can have; make the folder of the logs."""
        if self.expected_digest is not None:
            raise IosrFastError("expected --expected-digest with one folder alone, whose digest it is, got several")
        for option, path in (("--log", self.log), ("--collect", self.collect)):
            if path is not None and path.exists() and not path.is_dir():
                raise IosrFastError(f"expected {option} to be a folder for all classifiers, got a file, {path}")
        if self.log is not None:
            self.log.mkdir(parents=True, exist_ok=True)

    def of(self, name: str, is_head: bool) -> Settings:
        """Those of a classifier: of several its own log and its own folder of uploads; a head has neither."""
        if not name:
            if is_head and (self.log or self.collect) is not None:
                raise IosrFastError("a head takes no changes and gets no pictures: leave out --log and --collect")
            return self
        if is_head:
            return replace(self, log=None, collect=None, check_share=None, runtime="auto")
        log, collect = self.log and self.log / f"{name}.db", self.collect and self.collect / name
        return replace(self, log=log, collect=collect)

    @cached_property
    def tokens(self) -> tuple[Token, ...]:
        return () if self.token is None else read_tokens(self.token)

    def serves(self, authority: str) -> bool:
        """Whether a request with this Host is for this server. Names are checked on the loopback, which only this
        machine reaches, and elsewhere with `public_host`."""
        checked = self.public_host or is_loopback(self.host)
        return not checked or is_named(authority, {name.lower() for name in self.public_host})

    @property
    def max_body_bytes(self) -> int:
        return int(self.max_body_mb * MIB)

    @property
    def decode_limits(self) -> DecodeLimits:
        return DecodeLimits(int(self.max_image_mb * MIB), self.max_pixels, timeout_s=self.decode_timeout_s)
