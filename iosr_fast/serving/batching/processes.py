"""A decoder in its own process, which is killed if an image takes too long or too much memory, or crashes it."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

import iosr_fast
from iosr_fast.exceptions import BadImageError, DeadlineExceededError
from iosr_fast.images.decoder_process.wire import ANSWER, BUFFER, MAX_MESSAGE, READY, REQUEST, Answer, Request, Status
from iosr_fast.images.geometry import Geometry
from iosr_fast.images.limits import DecodeLimits, claimed_size, work_pixels
from iosr_fast.images.preprocess import ENCODED
from iosr_fast.serving.batching.decode import Decoder, grey_png

log = logging.getLogger(__name__)

_START_S = 30.0  # a swapping machine starts an interpreter slowly
# A passed deadline kills the process only after this time, because a restart takes about as long.
_MIN_S = 0.5
_CLOCK_PER_CPU = 2.0  # seconds by the clock for each second of CPU time, because cores may be overloaded
_NO_LIMIT = 1 << 40  # pixels
# Variables that an interpreter may need; secrets such as tokens are not passed on.
_ENVIRONMENT = ("LANG", "LC_ALL", "LD_LIBRARY_PATH", "PATH", "SYSTEMROOT")
_MAIN = "import sys; sys.path[:] = sys.argv[2:]; from iosr_fast.images.decoder_process.child import main; main()"


class _ProcessLost(Exception):
    """The process has ended, or sent an invalid message."""


class DecoderProcess(Decoder):
    """A Decoder for one thread (`kill` for any). Call `start` before the first image and after one that killed it."""

    def __init__(self, limits: DecodeLimits) -> None:
        super().__init__(limits)
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: socket.socket | None = None

    def start(self) -> None:
        """Start the process unless it runs. Raises RuntimeError, with its output, if it can't decode."""
        if self._process is not None and self._process.poll() is None:
            return
        self.close()
        self._channel, remote = socket.socketpair()
        with tempfile.TemporaryFile() as errors:
            try:
                with remote:
                    for side in (self._channel, remote):
                        side.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER)
                    self._process = _interpreter(remote, errors)
                ready, lacks = READY.unpack(self._receive(READY.size, time.monotonic() + _START_S).tobytes())
                if ready != b"ready":
                    raise _ProcessLost("it sent an unexpected first message")
                if lacks := lacks.rstrip(b"\0").decode():
                    self.warning = f"decoders are not confined as they should be: this system lacks {lacks}"
                # A test image, so that a broken library shows here and not as bad images.
                self._exchange(grey_png(), Geometry(2), time.monotonic() + _START_S)
            except (_ProcessLost, OSError, BadImageError) as error:
                self.kill()
                errors.seek(0)
                output = errors.read().decode("utf-8", "replace").strip()[-2000:]
                raise RuntimeError(f"the process that decodes images does not start: {output or error}") from error

    def decode(
        self, image: Any, position: int, geometry: Geometry | None, deadline: float, exif_orientation: bool = True
    ) -> np.ndarray:
        """As Decoder.decode. Only encoded bytes are untrusted; other images are decoded in this process.

        Raises DeadlineExceededError if the deadline came first.
        """
        if not isinstance(image, ENCODED):
            return super().decode(image, position, geometry, deadline, exif_orientation)
        self.check_bytes(image, position)
        if geometry is None and claimed_size(image) is None:
            raise BadImageError(None, position, "expected a JPEG, PNG or WebP image with an intact header")
        try:
            self.start()  # it may have been killed while idle, which is not the fault of this image
        except RuntimeError as error:
            raise BadImageError(None, position, f"{error}; send it again") from error
        left_s = max(_MIN_S, deadline - time.monotonic())
        limit_s = _CLOCK_PER_CPU * self.limits.timeout_s
        try:
            return self._exchange(image, geometry, time.monotonic() + min(left_s, limit_s), position, exif_orientation)
        except TimeoutError:
            self.kill()
            if left_s < limit_s:
                raise DeadlineExceededError(
                    "the deadline passed while the image was decoded; allow more time, or send a smaller one"
                ) from None
            raise self._too_slow(position) from None
        except (_ProcessLost, OSError, ValueError) as error:
            if isinstance(error, BadImageError):
                raise
            self.kill()
            if self._process is not None and self._process.returncode == -signal.SIGXCPU:
                raise self._too_slow(position) from None
            log.warning("a decoder ended while it decoded an image: %s", error)
            raise BadImageError(None, position, "the decoder crashed on it, or was killed by the system") from error

    def kill(self) -> None:
        """End the process at once. May be called from any thread."""
        process, channel = self._process, self._channel
        if process is not None:
            process.kill()
            process.wait()
        if channel is not None:
            channel.close()

    def close(self) -> None:
        """End the idle process."""
        self.kill()
        self._process = self._channel = None

    def _too_slow(self, position: int) -> BadImageError:
        reason = f"it takes more than {self.limits.timeout_s:g} s to decode; send a smaller or simpler one"
        return BadImageError(None, position, reason)

    def _exchange(
        self, image: Any, geometry: Geometry | None, until: float, position: int = 0, exif_orientation: bool = True
    ) -> np.ndarray:
        """Pixels (height, width, 3) of encoded bytes. Raises BadImageError, TimeoutError, _ProcessLost."""
        assert self._channel is not None
        data = memoryview(image).cast("B")
        claimed, max_pixels = claimed_size(data), self.limits.max_pixels or _NO_LIMIT
        work = max_pixels if claimed is None else work_pixels(claimed, geometry or Geometry(1))
        request = Request.of(geometry, len(data), max_pixels, work, self.limits.timeout_s, exif_orientation)
        self._channel.settimeout(max(1e-3, until - time.monotonic()))
        self._channel.sendall(REQUEST.pack(*request))
        self._channel.sendall(data)
        answer = Answer(*ANSWER.unpack(self._receive(ANSWER.size, until).tobytes()))
        if answer.status == Status.OK:
            sides = answer.height, answer.width
            most = geometry.size**2 if geometry else claimed[0] * claimed[1] if claimed else 0
            if sides[0] * sides[1] > most or (geometry and sides != (geometry.size, geometry.size)):
                raise _ProcessLost(f"it sent an invalid answer: {answer}")
            return self._receive(sides[0] * sides[1] * 3, until).reshape(*sides, 3)
        if answer.status > max(Status) or answer.length > MAX_MESSAGE:
            raise _ProcessLost(f"it sent an invalid answer: {answer}")
        raise BadImageError(None, position, self._receive(answer.length, until).tobytes().decode("utf-8", "replace"))

    def _receive(self, count: int, until: float) -> np.ndarray:
        """The next bytes."""
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
