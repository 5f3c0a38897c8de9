"""The command `iosr-fast serve`."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from iosr_fast.cli.options import (
    BatchOption,
    Deadline,
    LimitOption,
    MaxBatch,
    MaxDeadline,
    MaxImages,
    MaxWait,
    Runtime,
    SavedClassifier,
    TimeOption,
)
from iosr_fast.exceptions import IosrFastError
from iosr_fast.serving.http.settings import MIB, Settings
from iosr_fast.utils.require import require

TOKEN = "IOSR_FAST_TOKEN"
_DEFAULT = Settings()


def serve(
    classifier: SavedClassifier,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0: all.")] = _DEFAULT.host,
    port: Annotated[int, typer.Option(help="Port; 0: a free one, which the log names.")] = _DEFAULT.port,
    token_file: Annotated[
        Path | None,
        typer.Option(
            help=f"File with the bearer token for class changes [default: the variable {TOKEN}; without either, "
            "changes are off]."
        ),
    ] = None,
    log: Annotated[
        Path | None, typer.Option(help="File that records class changes; they are replayed at the start.")
    ] = None,
    runtime: Runtime = _DEFAULT.runtime,
    expected_digest: Annotated[
        str | None,
        typer.Option(help="Refuse a folder with another digest than this, of `iosr-fast info FOLDER`."),
    ] = None,
    max_batch: MaxBatch = None,
    max_wait_ms: MaxWait = _DEFAULT.max_wait_ms,
    max_queue: Annotated[
        int, BatchOption(help="Most images that are accepted and not yet answered; others get status 503.")
    ] = _DEFAULT.max_queue,
    decode_threads: Annotated[int | None, BatchOption(help="Images decoded in parallel [default: chosen].")] = None,
    engine_threads: Annotated[int | None, BatchOption(help="CPU cores of the encoder [default: all].")] = None,
    max_images: MaxImages = _DEFAULT.max_images,
    max_body_mb: Annotated[float, LimitOption(help="Largest request, in MB.")] = _DEFAULT.max_body_bytes / MIB,
    max_image_mb: Annotated[float, LimitOption(help="Largest image file, in MB.")] = _DEFAULT.max_image_bytes / MIB,
    max_buffered_mb: Annotated[
        float, LimitOption(help="Largest total of the requests that are being received, in MB.")
    ] = _DEFAULT.max_buffered_bytes / MIB,
    max_pixels: Annotated[int, LimitOption(help="Largest image, in pixels.")] = _DEFAULT.max_pixels,
    max_decoding_pixels: Annotated[
        int, LimitOption(help="Largest total of the images above 16 million pixels that are decoded in parallel.")
    ] = _DEFAULT.max_decoding_pixels,
    decode_timeout_s: Annotated[
        float, TimeOption("--decode-timeout", help="CPU seconds to decode an image.")
    ] = _DEFAULT.decode_timeout_s,
    max_connections: Annotated[int, LimitOption(help="Most open connections.")] = _DEFAULT.max_connections,
    body_timeout_s: Annotated[
        float, TimeOption("--body-timeout", help="Seconds to receive the body of a request.")
    ] = _DEFAULT.body_timeout_s,
    deadline_ms: Deadline = _DEFAULT.deadline_ms,
    max_deadline_ms: MaxDeadline = _DEFAULT.max_deadline_ms,
    drain_s: Annotated[
        float, TimeOption("--drain", help="After a signal to stop: seconds in which requests are still accepted.")
    ] = _DEFAULT.drain_s,
    grace_s: Annotated[
        int, TimeOption("--grace", help="Then: seconds to answer the requests that were accepted.")
    ] = _DEFAULT.grace_s,
) -> None:
    """Serve a saved classifier over HTTP. Clients with the token may change its classes."""
    options: dict[str, Any] = {**locals()}
    del options["classifier"], options["token_file"]  # the others are the fields of Settings
    for module in ("fastapi", "uvicorn", "httptools", "python_multipart", "prometheus_client", "threadpoolctl"):
        require(module, "serve")
    for name in ("body", "image", "buffered"):
        options[f"max_{name}_bytes"] = _bytes(f"--max-{name}-mb", options.pop(f"max_{name}_mb"))
    settings = Settings(token=_token(token_file), **options)
    from iosr_fast.serving.http.server import run

    run(classifier, settings)


def _bytes(option: str, mib: float) -> int:
    if not math.isfinite(mib):
        raise IosrFastError(f"expected {option} to be a number of MB, got {mib}")
    return int(mib * MIB)


def _token(file: Path | None) -> str | None:
    if file is not None:
        try:
            return file.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise IosrFastError(f"can't read the token in {file}: {error}") from error
    return os.environ.get(TOKEN) or None
