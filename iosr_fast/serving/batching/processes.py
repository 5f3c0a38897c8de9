"""A decoder in its own process, which is killed if an image takes too long or too much memory, or crashes it."""

from __future__ import annotations

import fcntl
import logging
import mmap
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
from iosr_fast.images.decoder_process.wire import (
    ANSWER,
    MAX_MESSAGE,
    READY,
    REQUEST,
    Answer,
    Request,
    Status,
    Task,
    geometry_fields,
)
from iosr_fast.images.geometry import Geometry
from iosr_fast.images.limits import DecodeLimits, claimed_size, work_pixels
from iosr_fast.images.preprocess import ENCODED
from iosr_fast.serving.batching.decode import Decoder, check_bytes, grey_png

log = logging.getLogger(__name__)

_START_S = 30.0  # a swapping machine starts an interpreter slowly
# A passed deadline kills the process only after this time, because a restart takes about as long.
_MIN_S = 0.5
_CLOCK_PER_CPU = 2.0  # seconds by the clock for each second of CPU time, because cores may be overloaded
_NO_LIMIT = 1 << 40  # pixels
_TESTED, _WHOLE = Geometry(2), Geometry(1)  # of the test image; of whole images, which are not resized
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
        self._block: mmap.mmap | None = None

    def start(self) -> None:
        """Start the process unless it runs. Raises RuntimeError, with its output, if it can't decode."""
        if self._process is not None and self._process.poll() is None:
            return
        self.close()
        self._channel, remote = socket.socketpair()
        with tempfile.TemporaryFile() as errors:
            try:
                with remote:
                    self._process = _interpreter(remote, errors)
                if self._receive(len(READY), time.monotonic() + _START_S) != READY:
                    raise _ProcessLost("it sent an unexpected first message")
                # A test image, so that a broken library shows here and not as bad images.
                until = time.monotonic() + _START_S
                answer, message = self._exchange(Task.CROP, grey_png(), _TESTED, 2 * 2 * 3, until)
                if answer.status != Status.OK:
                    raise _ProcessLost(f"it can't decode a grey PNG: {message}")
            except (_ProcessLost, OSError) as error:
                self.kill()
                errors.seek(0)
                output = errors.read().decode("utf-8", "replace").strip()[-2000:]
                raise RuntimeError(f"the process that decodes images does not start: {output or error}") from error

    def decode(
        self, image: Any, position: int, geometry: Geometry | None, deadline: float, exif_orientation: bool = True
    ) -> np.ndarray:
        """As the function `decode`. Only encoded bytes are untrusted; other images are decoded in this process."""
        if not isinstance(image, ENCODED):
            return super().decode(image, position, geometry, deadline, exif_orientation)
        check_bytes(image, position, self._limits)
        if geometry is not None:
            self.start()  # it may have been killed while idle, which is not the fault of this image
            room = geometry.size**2 * 3
            return self._ask(Task.CROP, image, position, geometry, room, deadline, exif_orientation).copy()
        sides = claimed_size(image)
        if sides is None:
            raise BadImageError(None, position, "expected a JPEG, PNG or WebP image with an intact header")
        self.start()
        self._block = None
        try:
            return self._ask(Task.WHOLE, image, position, _WHOLE, sides[0] * sides[1] * 3, deadline, exif_orientation)
        finally:
            self._block = None  # now only the array refers to the memory

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
        self._process = self._channel = self._block = None

    def _ask(
        self, task: Task, image: Any, position: int, geometry: Geometry, room: int, deadline: float, upright: bool
    ) -> np.ndarray:
        """The pixels, in the shared block. Raises BadImageError, or DeadlineExceededError if that came first."""
        left_s = max(_MIN_S, deadline - time.monotonic())
        limit_s = _CLOCK_PER_CPU * self._limits.timeout_s
        try:
            until = time.monotonic() + min(left_s, limit_s)
            answer, message = self._exchange(task, image, geometry, room, until, upright)
        except TimeoutError:
            self.kill()
            if left_s < limit_s:
                raise DeadlineExceededError(
                    "the deadline passed while the image was decoded; allow more time, or send a smaller one"
                ) from None
            raise self._too_slow(position) from None
        except (_ProcessLost, OSError, ValueError) as error:
            self.kill()
            if self._process is not None and self._process.returncode == -signal.SIGXCPU:
                raise self._too_slow(position) from None
            log.warning("a decoder ended while it decoded an image: %s", error)
            raise BadImageError(None, position, "the decoder crashed on it, or was killed by the system") from error
        if answer.status == Status.OK:
            assert self._block is not None
            return np.frombuffer(self._block, np.uint8, answer.height * answer.width * 3).reshape(
                answer.height, answer.width, 3
            )
        reason = "it needs more memory to decode than its size allows"
        raise BadImageError(None, position, reason if answer.status == Status.NO_MEMORY else message)

    def _too_slow(self, position: int) -> BadImageError:
        reason = f"it takes more than {self._limits.timeout_s:g} s to decode; send a smaller or simpler one"
        return BadImageError(None, position, reason)

    def _exchange(
        self, task: Task, image: Any, geometry: Geometry, room: int, until: float, upright: bool = True
    ) -> tuple[Answer, str]:
        assert self._channel is not None
        data = memoryview(image).cast("B")
        size, max_pixels = claimed_size(data), self._limits.max_pixels or _NO_LIMIT
        work = max_pixels if size is None else work_pixels(size, geometry)
        fresh: list[int] = []
        try:
            if self._block is None or len(self._block) < room:
                try:
                    file, self._block = _shared(room)
                except OSError as error:  # of this machine, not of the image
                    raise RuntimeError(f"no memory to share for pixels of an image: {error}") from error
                fresh.append(file)
            form, block = geometry_fields(geometry), room if fresh else 0
            head = REQUEST.pack(
                *Request(task, *form, block, len(data), max_pixels, work, self._limits.timeout_s, upright)
            )
            self._channel.settimeout(max(1e-3, until - time.monotonic()))
            sent = socket.send_fds(self._channel, [head, data], fresh)
        finally:
            for file in fresh:
                os.close(file)
        if sent < len(head) + len(data):
            self._channel.sendall(data[sent - len(head) :])
        answer = Answer(*ANSWER.unpack(self._receive(ANSWER.size, until)))
        sides = answer.height, answer.width
        fits = (
            sides == (geometry.size, geometry.size)
            if task == Task.CROP
            else sides[0] * sides[1] * 3 <= len(self._block)
        )
        if answer.status > max(Status) or answer.length > MAX_MESSAGE or (answer.status == Status.OK and not fits):
            raise _ProcessLost(f"it sent an invalid answer: {answer}")
        return answer, self._receive(answer.length, until).decode("utf-8", "replace")

    def _receive(self, count: int, until: float) -> bytes:
        assert self._channel is not None
        parts: list[bytes] = []
        while count:
            self._channel.settimeout(max(1e-3, until - time.monotonic()))
            part = self._channel.recv(count)
            if not part:
                raise _ProcessLost("it has ended")
            parts.append(part)
            count -= len(part)
        return b"".join(parts)


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


def _shared(size: int) -> tuple[int, mmap.mmap]:
    """A file of anonymous memory and its mapping; nothing remains when both processes have ended."""
    if not hasattr(os, "memfd_create"):
        with tempfile.TemporaryFile() as temporary:
            file = os.dup(temporary.fileno())
            os.ftruncate(file, size)
            return file, mmap.mmap(file, size)
    file = os.memfd_create("iosr-fast-pixels", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(file, size)
    # If the other process could truncate it, reading it here would crash.
    fcntl.fcntl(file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    return file, mmap.mmap(file, size)
