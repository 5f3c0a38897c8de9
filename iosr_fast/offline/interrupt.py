"""SIGINT and SIGTERM wait until the step at hand is done and saved; a second SIGINT (Ctrl-C again) acts at once."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


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
