"""The command `iosr-fast serve`."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import typer

from iosr_fast.exceptions import IosrFastError
from iosr_fast.serving.http.settings import MIB, Settings
from iosr_fast.utils.require import require

TOKEN = "IOSR_FAST_TOKEN"
_DEFAULT = Settings()


def serve(
    bundle: Path = typer.Argument(..., help="a folder that `iosr-fast fit` or Classifier.save wrote"),
    host: str = typer.Option(_DEFAULT.host, help="address to listen on; 0.0.0.0 for all"),
    port: int = typer.Option(_DEFAULT.port, help="0 for a free port, which the log names"),
    token_file: Path = typer.Option(
        None, help=f"file with the bearer token for class changes [or {TOKEN}; without either: no changes]"
    ),
    log: Path = typer.Option(None, help="file that records class changes; they are replayed at the start"),
    recover: bool = typer.Option(
        False, "--recover", help="open a damaged --log: keep its intact records, report the lost ones"
    ),
    runtime: str = typer.Option(_DEFAULT.runtime),
    expected_digest: str = typer.Option(None, help="sha256:... of `iosr-fast info BUNDLE`; refuse any other content"),
    max_batch: int = typer.Option(None, help="images a batch [default: 8 on a CPU, the engine's own on a GPU]"),
    max_wait_ms: float = typer.Option(_DEFAULT.max_wait_ms, help="longest wait of a batch for more images"),
    max_queue: int = typer.Option(
        _DEFAULT.max_queue, help="images accepted and not yet answered; further ones get a 503"
    ),
    decode_threads: int = typer.Option(None, help="threads that decode images [default: chosen]"),
    engine_threads: int = typer.Option(None, help="threads of the encoder on a CPU [default: all cores but one]"),
    max_images: int = typer.Option(_DEFAULT.max_images, help="images a request"),
    max_body_mb: float = typer.Option(_DEFAULT.max_body_bytes / MIB, help="of a request"),
    max_image_mb: float = typer.Option(_DEFAULT.max_image_bytes / MIB, help="of an image, encoded"),
    max_buffered_mb: float = typer.Option(_DEFAULT.max_buffered_bytes / MIB, help="of all requests' bodies together"),
    max_pixels: int = typer.Option(_DEFAULT.max_pixels, help="of an image"),
    max_decoding_pixels: int = typer.Option(
        _DEFAULT.max_decoding_pixels, help="total pixels of images above 16 million pixels that are decoded at a time"
    ),
    decode_timeout_s: float = typer.Option(_DEFAULT.decode_timeout_s, "--decode-timeout", help="CPU seconds per image"),
    max_connections: int = typer.Option(_DEFAULT.max_connections),
    body_timeout_s: float = typer.Option(
        _DEFAULT.body_timeout_s, "--body-timeout", help="seconds for a request's body"
    ),
    deadline_ms: int = typer.Option(_DEFAULT.deadline_ms, help="for requests without a deadline"),
    max_deadline_ms: int = typer.Option(_DEFAULT.max_deadline_ms, help="longest deadline of a request"),
    drain_s: float = typer.Option(_DEFAULT.drain_s, "--drain", help="seconds to accept requests after a signal"),
    grace_s: int = typer.Option(_DEFAULT.grace_s, "--grace", help="seconds then left for accepted requests"),
) -> None:
    """Serve a classifier over HTTP: predictions for everyone, class changes with the token."""
    options: dict[str, Any] = {**locals()}
    del options["bundle"], options["token_file"]  # the others are the fields of Settings
    for module in ("fastapi", "uvicorn", "python_multipart", "prometheus_client"):
        require(module, "serve")
    for name in ("body", "image", "buffered"):
        options[f"max_{name}_bytes"] = _bytes(f"--max-{name}-mb", options.pop(f"max_{name}_mb"))
    settings = Settings(token=_token(token_file), **options)
    from iosr_fast.serving.http.server import run

    run(bundle, settings)


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
