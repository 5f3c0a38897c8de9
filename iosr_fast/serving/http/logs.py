"""Logs to stderr: requests, changes, start, stop. Never contains an image or a token."""

from __future__ import annotations

import json
import logging
import queue
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from logging.handlers import QueueHandler, QueueListener
from typing import Any

from iosr_fast.exceptions import printable

logger = logging.getLogger("iosr_fast.serving")
_MAX_QUEUED = 10_000  # lines for a slow reader of stderr; more are dropped, so that no request waits


def log(event: str, *, level: int = logging.INFO, **facts: Any) -> None:
    """Log `event` with `facts` of JSON types."""
    logger.log(level, event, extra={"facts": facts})


def _facts(record: logging.LogRecord) -> dict[str, Any]:
    """Event and facts of a record of `log`, or the message of another library."""
    facts = getattr(record, "facts", None)
    if facts is None:
        return {"event": "log", "logger": record.name, "message": record.getMessage()}
    return {"event": record.msg, **facts}


class JsonFormatter(logging.Formatter):
    """One JSON object a line, for programs."""

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line = {"time": time, "level": record.levelname.lower(), **_facts(record)}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


class PlainFormatter(logging.Formatter):
    """A line for people, such as `12:00:01 request method=GET path=/ status=200`."""

    def format(self, record: logging.LogRecord) -> str:
        facts = _facts(record)
        words = [datetime.fromtimestamp(record.created).strftime("%H:%M:%S"), facts.pop("event")]
        words += [f"{name}={value}" for name, value in facts.items() if value not in ("", None)]
        line = printable(" ".join(words))
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class _Queue(QueueHandler):
    """Passes records to a thread; drops them if the queue is full, and logs how many."""

    dropped = 0

    def emit(self, record: logging.LogRecord) -> None:  # formatted by the thread
        try:
            self.queue.put_nowait(record)
        except queue.Full:
            self.dropped += 1
            return
        if self.dropped:
            count, self.dropped = self.dropped, 0
            log("log_lines_dropped", level=logging.WARNING, count=count)


@contextmanager
def logs_to_stderr(plain: bool = False) -> Iterator[None]:
    """Within the block, a separate thread writes all logs of this process to stderr, as JSON or as `plain` lines."""
    root = logging.getLogger()
    before, quiet = root.handlers[:], {"python_multipart": logging.ERROR, "uvicorn.error": logging.WARNING}
    to_stderr = logging.StreamHandler(sys.stderr)
    to_stderr.setFormatter(PlainFormatter() if plain else JsonFormatter())
    records: queue.Queue[Any] = queue.Queue(_MAX_QUEUED)
    listener = QueueListener(records, to_stderr)
    root.handlers[:] = [_Queue(records)]
    logger.setLevel(logging.INFO)
    for name, minimum in quiet.items():  # what clients send must not fill the log
        logging.getLogger(name).setLevel(minimum)
    listener.start()
    try:
        yield
    finally:
        listener.stop()
        root.handlers[:] = before
