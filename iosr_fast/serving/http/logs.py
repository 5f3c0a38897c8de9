"""Logs to stderr: requests, changes, start, stop. Never contains an image or a token."""

from __future__ import annotations

import json
import logging
import queue
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from logging.handlers import QueueHandler, QueueListener
from typing import Any

from iosr_fast.exceptions import printable
from iosr_fast.serving.limits import Limits

logger = logging.getLogger("iosr_fast.serving")
TOKEN_NAME: ContextVar[str] = ContextVar("token_name", default="")  # of the request that is answered
CLASSIFIER: ContextVar[str] = ContextVar("classifier", default="")  # of several, the one that lines are about


def log(event: str, *, level: int = logging.INFO, **facts: Any) -> None:
    """Log `event` with `facts` of JSON types, and the name of the request's token."""
    token = {"token": TOKEN_NAME.get()} if TOKEN_NAME.get() else {}
    logger.log(level, event, extra={"facts": facts | token})


class Formatter(logging.Formatter):
    """A line for people, `12:00:01 request method=GET path=/ status=200`, where `plain`; for programs a JSON object."""

    def __init__(self, plain: bool) -> None:
        super().__init__()
        self._plain = plain

    def format(self, record: logging.LogRecord) -> str:
        time, facts = datetime.fromtimestamp(record.created, UTC), getattr(record, "facts", None)
        event = record.msg
        if facts is None:  # of another library
            event, facts = "log", {"logger": record.name, "message": record.getMessage()}
        if name := getattr(record, "classifier", ""):
            facts = {**facts, "classifier": name}
        error = self.formatException(record.exc_info) if record.exc_info else ""
        if self._plain:
            words = [f"{name}={value}" for name, value in facts.items() if value not in ("", None)]
            line = printable(" ".join([time.astimezone().strftime("%H:%M:%S"), event, *words]))
            return f"{line}\n{error}" if error else line
        first = {"time": time.isoformat(timespec="milliseconds"), "level": record.levelname.lower(), "event": event}
        return json.dumps({**first, **facts, **({"exception": error} if error else {})})


class _Queue(QueueHandler):
    """Passes records to a thread, which formats them; drops them if the queue is full, and logs how many."""

    dropped = 0

    def emit(self, record: logging.LogRecord) -> None:
        record.classifier = CLASSIFIER.get()  # in the thread that logs
        try:
            self.queue.put_nowait(record)
        except queue.Full:
            self.dropped += 1
            return
        if self.dropped:
            count, self.dropped = self.dropped, 0
            log("log_lines_dropped", level=logging.WARNING, count=count)


@contextmanager
def logs_to_stderr() -> Iterator[None]:
    """Within the block, a separate thread writes all logs of this process to stderr: to a terminal lines for people,
    to a file or pipe JSON."""
    root = logging.getLogger()
    before = root.handlers[:]
    to_stderr = logging.StreamHandler(sys.stderr)
    to_stderr.setFormatter(Formatter(sys.stderr.isatty()))
    records: queue.Queue[Any] = queue.Queue(Limits.log_lines)
    listener = QueueListener(records, to_stderr)
    root.handlers[:] = [_Queue(records)]
    logger.setLevel(logging.INFO)
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)  # what clients send must not fill the log
    listener.start()
    try:
        yield
    finally:
        listener.stop()
        root.handlers[:] = before
