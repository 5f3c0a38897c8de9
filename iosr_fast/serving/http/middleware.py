"""What every request passes: token, bounded body, request id, response headers, log line, metrics."""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from typing import Annotated, Any

from fastapi import Depends
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from iosr_fast.serving.http.addresses import client_of
from iosr_fast.serving.http.errors import ApiError, busy, error_response, internal_error, is_routed
from iosr_fast.serving.http.logs import CLASSIFIER, TOKEN_NAME, log, logger
from iosr_fast.serving.http.site import ServedClassifier, ServedEncoder, Site
from iosr_fast.serving.http.tokens import Token, find_token
from iosr_fast.serving.limits import Limits

_ID = re.compile(rb"[A-Za-z0-9._:/+=-]{1,128}")
_QUIET = frozenset({"/healthz", "/readyz", "/metrics"})  # polled every few seconds by machines
_HEADERS = [(b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer")]
_DISCONNECTED = 499  # as in nginx: the client closed the connection before the answer
_SAFE = frozenset({"GET", "HEAD", "OPTIONS"})  # methods that change nothing
_NAMED = re.compile(r"/v1/classifiers/([^/]*)/.*", re.DOTALL)
_ASKS = re.compile(r"/v1/(classifiers/[^/]*/)?(predict|embeddings)")  # by POST, and changes nothing
SERVED, BODY = "iosr_fast.served", "iosr_fast.body"  # keys of a scope


class RequestMiddleware:
    """Requires the token of every request that reaches a route which may change something, before its body is read.

    It finds the classifier that a path names; a path without a name is that of the only one. An unexpected exception
    is logged with its traceback and answered with 500.
    """

    def __init__(self, app: ASGIApp, site: Site) -> None:
        self._app, self._site = app, site

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status = time.perf_counter(), 0
        headers = dict(scope["headers"])
        request_id = headers.get(b"x-request-id", b"")
        if not _ID.fullmatch(request_id):
            request_id = uuid.uuid4().hex.encode()
        served, refusal = self._find(scope["path"])
        metrics = self._site.server_metrics if served is None else served.metrics
        token = find_token(self._site.settings.tokens, scope["headers"])
        TOKEN_NAME.set(token.name if token else "")
        CLASSIFIER.set("" if served is None else served.name)
        body = BoundedBody(scope, receive, self._site, served, headers.get(b"content-length", b""))
        scope[SERVED], scope[BODY] = served, body
        # HEAD is answered as GET is; the connection leaves the body out.
        inner = {**scope, "method": "GET"} if scope["method"] == "HEAD" else scope

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                closing = [(b"connection", b"close")] if self._site.draining else []
                message["headers"] = [*message["headers"], *_HEADERS, (b"x-request-id", request_id), *closing]
            await send(message)

        try:
            if refusal is not None:
                raise refusal
            check_token(self._site, served, scope, token)
            await self._app(inner, body.receive, answer)
        except ClientDisconnect:
            pass
        except Exception as error:
            if not isinstance(error, ApiError):
                logger.exception("unexpected", extra={"facts": {"request_id": request_id.decode()}})
                error = internal_error()
            if not status:
                await error_response(inner, error)(inner, receive, answer)
        finally:
            self._site.bodies.add(body.client, -body.size)
            seconds, status = time.perf_counter() - start, status or _DISCONNECTED
            route, code = _template(inner), inner.get("iosr_fast.code")
            metrics.on_request(route, scope["method"], status, seconds, code)
            log(
                "request",
                level=logging.DEBUG if route in _QUIET and status == 200 else logging.INFO,
                method=scope["method"][:20],
                path=scope["path"][:200],
                status=status,
                ms=round(seconds * 1e3, 2),
                images=inner.get("iosr_fast.images", 0),
                bytes=body.size,
                client=scope["client"][0] if scope.get("client") else "",
                request_id=request_id.decode(),
                **({} if code is None else {"code": code}),
            )

    def _find(self, path: str) -> tuple[ServedEncoder | None, ApiError | None]:
        """The classifier whose request it is, None of several without a name in the path; or the answer instead."""
        named = _NAMED.fullmatch(path)
        try:
            return (self._site.find(named[1] if named else "") if named or self._site.alone else None), None
        except ApiError as error:
            return None, error


def _template(scope: Scope) -> str:
    """The path of a request's route with the names of its parameters, the same for one classifier and of several;
    "other" without a route. FastAPI gives it with or without the prefix of its router."""
    path = str(getattr(scope.get("route"), "path", "other"))
    if path == "other" or not scope["path"].startswith("/v1/"):
        return path
    return "/v1" + path.removeprefix("/v1").removeprefix("/classifiers/{classifier}")


async def served_of(request: Request) -> Any:  # else a thread would run it
    """What a request asks, a ServedClassifier or an encoder alone, for routes. Raises ApiError where it names none."""
    served: ServedEncoder | None = request.scope[SERVED]
    if served is None:
        expected = "expected /v1/classifiers/NAME/..., as this server has several"
        raise ApiError(404, "no_classifier", f"{expected}; /v1/classifiers lists all classifiers")
    return served


Served = Annotated[ServedClassifier, Depends(served_of)]  # of a route


def check_token(site: Site, served: ServedEncoder | None, scope: Scope, token: Token | None) -> None:
    """Raise ApiError for a request that needs another token: 401 without a right one, 403 where it may only predict, or
    where the server takes no changes.

    What reaches a route by a method that is not _SAFE is a change, which needs a token, or a prediction, which does as
    soon as the server has a token that may only predict.
    """
    tokens = site.settings.tokens
    changes = scope["method"] != "POST" or not _ASKS.fullmatch(scope["path"])
    if scope["method"] in _SAFE or not (changes or any(not one.may_change for one in tokens)):
        return
    if changes and not is_routed(scope, scope["method"]):
        return  # to 404 or 405
    if changes and served is not None and not served.takes_changes:
        raise ApiError(403, "changes_disabled", "a head takes no changes: fit and save another one, and serve that")
    if changes and not any(one.may_change for one in tokens):
        raise ApiError(
            403,
            "changes_disabled",
            "no token is set, so classes can't be changed here: `iosr-fast serve` takes one from --token-file FILE or "
            "IOSR_FAST_TOKEN, requests send it as `Authorization: Bearer TOKEN`",
        )
    if token is None:
        message = "expected `Authorization: Bearer TOKEN` with a token of the server"
        raise ApiError(401, "unauthorized", message, {"WWW-Authenticate": "Bearer"})
    if changes and not token.may_change:
        raise ApiError(403, "predict_only", f"the token {token.name!r} may only predict; use another one")


class BoundedBody:
    """An ASGI `receive` that raises ApiError for a body that is too long (413), too slow (408), or beyond its client's
    share of the memory for bodies (503).

    It bounds every reader, the framework included, and counts received bytes, whatever Content-Length says.
    """

    def __init__(
        self, scope: Scope, receive: Receive, site: Site, served: ServedEncoder | None, content_length: bytes
    ) -> None:
        self._receive, self._shares, self._timeout_s = receive, site.bodies, site.settings.body_timeout_s
        most = site.settings.max_body_bytes if served is None else served.uploads.max_body
        self._limit = most if scope["method"] == "POST" else min(most, Limits.body_without_images)
        self._announced = int(content_length or b"0")  # framing.check_head has checked it
        self._deadline = asyncio.get_running_loop().time() + self._timeout_s
        self.whole_at = 0.0  # on time.perf_counter's clock; 0 before the last byte
        self.client = client_of(scope.get("client"))
        self.size = 0  # bytes that are taken from the share of the client

    async def receive(self) -> Message:
        """The next ASGI message. Raises ApiError."""
        if self.whole_at:
            return await self._receive()
        self._check_size(self._announced)
        try:
            async with asyncio.timeout_at(self._deadline):
                message = await self._receive()
        except TimeoutError:
            expected = f"expected the whole body within {self._timeout_s:g} s, got {self.size} bytes in that time"
            raise ApiError(408, "body_too_slow", expected) from None
        if message["type"] == "http.request":
            count = len(message.get("body", b""))
            self._check_size(self.size + count)
            if not self._shares.take(self.client, count):
                raise busy("busy", "the request bodies of this client fill its share of the memory; try again")
            self.size += count
            self.whole_at = 0.0 if message.get("more_body", False) else time.perf_counter()
        return message

    def _check_size(self, size: int) -> None:
        if size > self._limit:
            expected = f"expected a body of at most {self._limit} bytes, got {size} or more; send less"
            raise ApiError(413, "too_large", expected)
