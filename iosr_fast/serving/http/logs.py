"""One JSON object a line to stderr: each request, start, stop and change. No image, no token is ever in it."""

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

logger = logging.getLogger("iosr_fast.serving.http")
_HELD = 10_000  # lines that wait for a slow reader of stderr; more are dropped, so that nobody waits for it


def log(event: str, *, level: int = logging.INFO, **facts: Any) -> None:
    """Write `event` with `facts`, which have to be JSON's own types."""
    logger.log(level, event, extra={"facts": facts})


class JsonFormatter(logging.Formatter):
    """A record of `log` as its facts; one of another library as its message."""

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
    """Hands records to a thread; drops them where that thread is too slow, and then says how many."""

    dropped = 0

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        return record  # it stays in this process, and the other thread formats it

    def enqueue(self, record: logging.LogRecord) -> None:
        try:
            self.queue.put_nowait(record)
        except queue.Full:
            self.dropped += 1
            return
        if self.dropped:
            lost, self.dropped = self.dropped, 0
            log("log_lines_dropped", level=logging.WARNING, count=lost)


@contextmanager
def json_logs(level: int = logging.INFO) -> Iterator[None]:
    """Send this process's logs to stderr as JSON, from a thread of their own, as long as the block runs."""
    root = logging.getLogger()
    before, quiet = root.handlers[:], {"python_multipart": logging.ERROR, "uvicorn.error": logging.WARNING}
    to_stderr = logging.StreamHandler(sys.stderr)
    to_stderr.setFormatter(JsonFormatter())
    held: queue.Queue[Any] = queue.Queue(_HELD)
    handler = _Queue(held)
    listener = QueueListener(held, to_stderr)
    root.handlers[:] = [handler]
    logger.setLevel(level)
    for name, least in quiet.items():  # what a client sends must not fill the log
        logging.getLogger(name).setLevel(least)
    listener.start()
    try:
        yield
    finally:
        listener.stop()
        root.handlers[:] = before
