"""Decoding for BatchingClassifier, within limits: untrusted images in a process of their own, which may be killed."""

from __future__ import annotations

import io
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

import iosr_fast
from iosr_fast.exceptions import BadImageError, DeadlineExceededError
from iosr_fast.images.crop import path_of
from iosr_fast.images.decoder_process import wire
from iosr_fast.images.geometry import Geometry
from iosr_fast.images.limits import DecodeLimits
from iosr_fast.images.preprocess import ENCODED, decode_parts
from iosr_fast.serving.batching.item import Item, Query
from iosr_fast.serving.limits import Deadlines

log = logging.getLogger(__name__)

# A passed deadline kills the process only after this time, because a restart takes about as long.
_CLOCK_PER_CPU = 2.0  # seconds by the clock for each second of CPU time, because cores may be overloaded
_NO_LIMIT = 1 << 40  # pixels
# Variables that an interpreter may need; secrets such as tokens are not passed on.
_ENVIRONMENT = ("LANG", "LC_ALL", "LD_LIBRARY_PATH", "PATH", "SYSTEMROOT")
_MAIN = "import sys; sys.path[:] = sys.argv[2:]; from iosr_fast.images.decoder_process.child import main; main()"


class _ProcessLost(Exception):
    """The process has ended, or sent an invalid message."""


class Decoder:
    """Decodes for one thread (`close` for any). `start` comes before each image, and after one that killed the process.

    Only encoded bytes are untrusted: with `isolated` they are decoded in a process that is killed if an image takes too
    long or too much memory, or crashes it. Other images are decoded in the calling thread, which can't be stopped.
    `warning` says what does not confine the process.
    """

    warning = ""

    def __init__(self, limits: DecodeLimits, isolated: bool) -> None:
        self.limits, self.isolated = limits, isolated
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: socket.socket | None = None

    def start(self) -> None:
        """Start the process unless it runs or none is needed. Raises RuntimeError, with its output, if it can't
        decode."""
        if not self.isolated or (self._process is not None and self._process.poll() is None):
            return
        self.close()
        self._channel, remote = socket.socketpair()
        with tempfile.TemporaryFile() as errors:
            try:
                with remote:
                    for side in (self._channel, remote):
                        side.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, wire.BUFFER)
                    self._process = _interpreter(remote, errors)
                until = time.monotonic() + Deadlines.decoder_start_s
                ready, lacks = wire.READY.unpack(self._receive(wire.READY.size, until).tobytes())
                if ready != b"ready":
                    raise _ProcessLost("it sent an unexpected first message")
                if lacks := lacks.rstrip(b"\0").decode():
                    self.warning = f"decoders are not confined as they should be: this system lacks {lacks}"
                # A test image, so that a broken library shows here and not as bad images.
                test = Item(grey_png(), 0, Query(), 0.0, encoder=SimpleNamespace(geometry=Geometry(2)))
                (made,) = self._exchange((test,), time.monotonic() + Deadlines.decoder_start_s)
                if isinstance(made, Exception):
                    raise made
            except (_ProcessLost, OSError, BadImageError) as error:
                self.close()
                errors.seek(0)
                output = errors.read().decode("utf-8", "replace").strip()[-2000:]
                raise RuntimeError(f"the process that decodes images does not start: {output or error}") from error

    def decode(self, *items: Item) -> list[np.ndarray | Exception]:
        """The pixels of an item whose image is as open_image takes it, or of items that are parts of one picture, or
        their errors (decode_parts).

        Raises BadImageError for an image beyond the limits or that costs the process, DeadlineExceededError where this
        had to be killed for the deadline.
        """
        item = items[0]
        image, position = item.image, item.position
        if reason := self.limits.bytes_error(_encoded_bytes(image)):
            raise BadImageError(path_of(image), position, reason)
        if not self.isolated or not isinstance(image, ENCODED):
            parts = {one.position: one.crop for one in items}
            return list(decode_parts(image, parts, item.upright, item.encoder.geometry, self.limits, item.whole))
        if item.whole and item.claimed is None:  # how large an answer may be
            raise BadImageError(None, position, "expected a JPEG, PNG or WebP image with an intact header")
        left_s = max(Deadlines.least_decode_s, item.deadline - time.monotonic())
        limit_s = _CLOCK_PER_CPU * self.limits.timeout_s
        try:
            until = time.monotonic() + min(left_s, limit_s)
            return self._exchange(items, until)
        except TimeoutError:
            self.close()
            if left_s < limit_s:
                raise DeadlineExceededError(
                    "the deadline passed while the image was decoded; allow more time, or send a smaller one"
                ) from None
            raise self._too_slow(position) from None
        except (_ProcessLost, OSError, ValueError) as error:
            self.close()
            if self._process is not None and self._process.returncode == -signal.SIGXCPU:
                raise self._too_slow(position) from None
            log.warning("a decoder ended while it decoded an image: %s", error)
            raise BadImageError(None, position, "the decoder crashed on it, or was killed by the system") from error

    def close(self) -> None:
        """End the process at once. May be called from any thread, and repeatedly."""
        process, channel = self._process, self._channel
        if process is not None:
            process.kill()
            process.wait()
        if channel is not None:
            channel.close()

    def _too_slow(self, position: int) -> BadImageError:
        reason = f"it takes more than {self.limits.timeout_s:g} s to decode; send a smaller one, or fewer boxes"
        return BadImageError(None, position, reason)

    def _exchange(self, items: Sequence[Item], until: float) -> list[np.ndarray | Exception]:
        """As `decode`, of encoded bytes. Raises TimeoutError, _ProcessLost."""
        assert self._channel is not None
        item, crops = items[0], [part.crop for part in items if part.crop is not None]
        data, max_pixels = memoryview(item.image).cast("B"), self.limits.max_pixels or _NO_LIMIT
        geometry, work = item.encoder.geometry, max_pixels if item.claimed is None else item.cost
        limits = max_pixels, work, self.limits.timeout_s
        request = wire.Request.of(geometry, len(crops), len(data), *limits, item.upright, item.whole)
        self._channel.settimeout(max(1e-3, until - time.monotonic()))
        self._channel.sendall(wire.REQUEST.pack(*request))
        self._channel.sendall(b"".join(wire.PART.pack(*crop.box, crop.margin) for crop in crops))
        self._channel.sendall(data)
        return [self._result(one, until) for one in items]

    def _result(self, item: Item, until: float) -> np.ndarray | Exception:
        """The next answer: pixels (height, width, 3), or an error."""
        answer = wire.Answer(*wire.ANSWER.unpack(self._receive(wire.ANSWER.size, until).tobytes()))
        if answer.status == wire.Status.OK:
            sides, size = (answer.height, answer.width), item.encoder.geometry.size
            fits = item.claimed is not None and answer.height * answer.width <= item.claimed[0] * item.claimed[1]
            if not (fits if item.whole else sides == (size, size)):
                raise _ProcessLost(f"it sent an invalid answer: {answer}")
            return self._receive(sides[0] * sides[1] * 3, until).reshape(*sides, 3)
        if answer.status > max(wire.Status) or answer.length > wire.MAX_MESSAGE:
            raise _ProcessLost(f"it sent an invalid answer: {answer}")
        reason = self._receive(answer.length, until).tobytes().decode("utf-8", "replace")
        return BadImageError(None, item.position, reason)

    def _receive(self, count: int, until: float) -> np.ndarray:
        assert self._channel is not None
        data = np.empty(count, np.uint8)
        left = data.data
        while left:
            self._channel.settimeout(max(1e-3, until - time.monotonic()))
            received = self._channel.recv_into(left)
            if not received:
                raise _ProcessLost("it has ended")
            left = left[received:]
        return data


def _encoded_bytes(image: Any) -> int:
    """0 for images that are not encoded."""
    path = path_of(image)
    if path is not None and path.is_file():
        return path.stat().st_size
    return memoryview(image).nbytes if isinstance(image, ENCODED) else 0


def _interpreter(channel: socket.socket, errors: Any) -> subprocess.Popen[bytes]:
    """Start a new interpreter: a fork would inherit locks that other threads hold."""
    # -I and -S: no environment variables and no site module; the module search path is that of this process.
    home = str(Path(iosr_fast.__file__).resolve().parent.parent)
    paths = [home, *(path for path in sys.path if path and path != home)]
    environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
    environment["OPENBLAS_NUM_THREADS"] = environment["OMP_NUM_THREADS"] = "1"
    return subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _MAIN, str(os.getpid()), *paths],
        stdin=channel.fileno(),
        stdout=subprocess.DEVNULL,
        stderr=errors,
        env=environment,
        start_new_session=True,
    )


@cache
def grey_png() -> bytes:
    """An image that every decoder can decode, 64 x 64."""
    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", (64, 64), (128, 128, 128)).save(file, "PNG")
    return file.getvalue()
