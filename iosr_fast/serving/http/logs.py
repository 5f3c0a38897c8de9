"""Logs to stderr, one JSON object a line: requests, changes, start, stop. Never contains an image or a token."""

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

logger = logging.getLogger("iosr_fast.serving")
_MAX_QUEUED = 10_000  # lines for a slow reader of stderr; more are dropped, so that no request waits


def log(event: str, *, level: int = logging.INFO, **facts: Any) -> None:
    """Log `event` with `facts` of JSON types."""
    logger.log(level, event, extra={"facts": facts})


class JsonFormatter(logging.Formatter):
    """Formats a record of `log` as its facts, and a record of another library as its message."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
        }
        facts = getattr(record, "facts", None)
        if facts is None:
            line |= {"event": "log", "logger": record.name, "message": record.getMessage()}
        else:
            line |= {"event": record.msg, **facts}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


class _Queue(QueueHandler):
    """Passes records to a thread; drops them if the queue is full, and logs how many."""

    dropped = 0

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        return record  # formatted by the other thread of this process

    def enqueue(self, record: logging.LogRecord) -> None:
        try:
            self.queue.put_nowait(record)
        except queue.Full:
            self.dropped += 1
            return
        if self.dropped:
            count, self.dropped = self.dropped, 0
            log("log_lines_dropped", level=logging.WARNING, count=count)


@contextmanager
def json_logs(level: int = logging.INFO) -> Iterator[None]:
    """Within the block, all logs of this process go to stderr as JSON, written by a separate thread."""
    root = logging.getLogger()
    before, quiet = root.handlers[:], {"python_multipart": logging.ERROR, "uvicorn.error": logging.WARNING}
    to_stderr = logging.StreamHandler(sys.stderr)
    to_stderr.setFormatter(JsonFormatter())
    records: queue.Queue[Any] = queue.Queue(_MAX_QUEUED)
    listener = QueueListener(records, to_stderr)
    root.handlers[:] = [_Queue(records)]
    logger.setLevel(level)
    for name, minimum in quiet.items():  # what clients send must not fill the log
        logging.getLogger(name).setLevel(minimum)
    listener.start()
    try:
        yield
    finally:
        listener.stop()
        root.handlers[:] = before
