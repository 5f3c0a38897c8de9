"""SIGINT and SIGTERM wait until the step at hand is done and saved; a second SIGINT (Ctrl-C again) acts at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any, TypeVar

SIGNALS = (signal.SIGINT, signal.SIGTERM)
T = TypeVar("T")


class Interrupt:
    """`asked` becomes true in this process; the training loop sets `everywhere` once any process was asked.

    Signals can only be handled in a process's main thread: elsewhere nothing is changed and they act as they did.
    """

    def __init__(self) -> None:
        self.asked = self.everywhere = self._interrupted = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        # Ctrl-C reaches the processes of torchrun twice, as SIGINT from the terminal and as SIGTERM from torchrun.
        if number == signal.SIGINT and self._interrupted:
            raise KeyboardInterrupt
        self._interrupted = self._interrupted or number == signal.SIGINT
        self.asked = True


def sheltered(made: Iterator[T]) -> Iterator[T]:
    """The items of `made`, whose processes (those that it starts for its first item) never get SIGNALS.

    A terminal, torchrun and batch systems signal all processes of a group. Those that decode would end, and the step
    that is to be done and saved would wait for pictures in vain. Signals of this thread wait for the first item.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows, which has no such groups
        yield from made
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # is inherited
    try:
        first = next(made, None)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    if first is not None:
        yield first
        yield from made
