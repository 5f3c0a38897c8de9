"""Bounds on request bodies: bytes and seconds of each, bytes of all together."""

from __future__ import annotations

import asyncio

from starlette.types import Message, Receive, Scope

from iosr_fast.serving.http.errors import ApiError, busy
from iosr_fast.serving.http.settings import Settings

_MAX_OTHER = 16 << 10  # bytes of a body without images, such as a name in JSON; only POST takes images


class Budget:
    """Bytes of all bodies in memory. For one event loop, not for threads."""

    def __init__(self, limit: int) -> None:
        self.limit, self.used = limit, 0

    def take(self, count: int) -> bool:
        """Reserve `count` bytes; False, with nothing reserved, if they exceed the limit."""
        if self.used + count > self.limit:
            return False
        self.used += count
        return True

    def give(self, count: int) -> None:
        self.used -= count


class BoundedBody:
    """An ASGI `receive` that raises ApiError for a body that is too long (413), too slow (408) or has no room (503).

    It bounds every reader, the framework included, and counts received bytes, whatever Content-Length says.
    """

    def __init__(self, scope: Scope, receive: Receive, settings: Settings, budget: Budget) -> None:
        self._receive, self._settings, self._budget = receive, settings, budget
        limit = settings.max_body_bytes
        self._limit = limit if scope["method"] == "POST" else min(limit, _MAX_OTHER)
        self._deadline = asyncio.get_running_loop().time() + settings.body_timeout_s
        self._content_length = _content_length(scope)
        self.size = 0
        self._whole = False

    async def receive(self) -> Message:
        """The next ASGI message. Raises ApiError."""
        if self._whole:
            return await self._receive()
        limit = self._limit
        if self._content_length > limit:
            raise self._too_large(f"{self._content_length} bytes")
        try:
            async with asyncio.timeout_at(self._deadline):
                message = await self._receive()
        except TimeoutError:
            seconds = self._settings.body_timeout_s
            raise ApiError(
                408,
                "body_too_slow",
                f"expected the whole body within {seconds:g} s, got {self.size} bytes in that time",
            ) from None
        if message["type"] == "http.request":
            count = len(message.get("body", b""))
            if self.size + count > limit:
                raise self._too_large("more")
            if not self._budget.take(count):
                raise busy("busy", "too many request bodies are being received; try again")
            self.size += count
            self._whole = not message.get("more_body", False)
        return message

    def release(self) -> None:
        """Return the bytes to the budget at the end of the request."""
        self._budget.give(self.size)
        self.size = 0

    def _too_large(self, got: str) -> ApiError:
        return ApiError(413, "too_large", f"expected a body of at most {self._limit} bytes, got {got}; send less")


def _content_length(scope: Scope) -> int:
    for name, value in scope["headers"]:
        if name == b"content-length":
            return int(value) if value.isdigit() and len(value) < 20 else 0
    return 0
