"""ASGI middleware of every request: authorisation, request id, bounded body, response headers, log line, metrics."""

from __future__ import annotations

import logging
import re
import time
import uuid

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from iosr_fast.serving.http.body import BoundedBody
from iosr_fast.serving.http.errors import ApiError, error_response
from iosr_fast.serving.http.logs import log, logger
from iosr_fast.serving.http.service import Service

_ID = re.compile(rb"[A-Za-z0-9._:/+=-]{1,128}")
_QUIET = frozenset({"/healthz", "/readyz", "/metrics"})  # polled every few seconds by machines
_HEADERS = [(b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer")]
_DISCONNECTED = 499  # as in nginx: the client closed the connection before the answer
_SAFE = frozenset({"GET", "HEAD", "OPTIONS"})  # methods that change nothing
_PREDICT = ("POST", "/v1/predict")


class Authorisation:
    """Requires the token of every request that could change something, on any path, before its body is read.

    401 without the token, 403 if the server has none. Only safe methods and predictions need no token.
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] not in _SAFE and (scope["method"], scope["path"]) != _PREDICT:
            try:
                self._service.authorise(Headers(scope=scope))
            except ApiError as error:
                scope["iosr_fast.code"] = error.code
                await error_response(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)


class RequestMiddleware:
    """Request id, bounded body, response headers, log line and metrics of every request.

    An unexpected exception is logged with its traceback and answered with 500.
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start = time.perf_counter()
        header = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"")
        request_id = header if _ID.fullmatch(header) else uuid.uuid4().hex.encode()
        body = BoundedBody(scope, receive, self._service.settings, self._service.budget)
        status = 0
        # HEAD is answered as GET is; the connection leaves the body out.
        inner = {**scope, "method": "GET"} if scope["method"] == "HEAD" else scope

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = [*message["headers"], *_HEADERS, (b"x-request-id", request_id)]
                if self._service.draining:
                    headers.append((b"connection", b"close"))
                message["headers"] = headers
            await send(message)

        try:
            await self._app(inner, body.receive, answer)
        except ClientDisconnect:
            status = status or _DISCONNECTED
        except Exception:
            logger.exception("unexpected", extra={"facts": {"request_id": request_id.decode()}})
            inner["iosr_fast.code"] = "internal"
            if not status:
                error = ApiError(500, "internal", "the server failed at this request; see its log")
                await error_response(error)(inner, receive, answer)
        finally:
            received = body.size
            body.release()
            inner["method"] = scope["method"]  # as it was asked, for log and metrics
            self._record(inner, status or _DISCONNECTED, time.perf_counter() - start, request_id, received)

    def _record(self, scope: Scope, status: int, seconds: float, request_id: bytes, received: int) -> None:
        metrics = self._service.metrics
        route = getattr(scope.get("route"), "path", "other")
        metrics.on_request(route, scope["method"], status, seconds)
        code = scope.get("iosr_fast.code")
        if code is not None:
            metrics.on_error(code)
        facts = {
            "method": scope["method"][:20],
            "path": scope["path"][:200],
            "status": status,
            "ms": round(seconds * 1e3, 2),
            "images": scope.get("iosr_fast.images", 0),
            "bytes": received,
            "request_id": request_id.decode(),
            **({} if code is None else {"code": code}),
        }
        log("request", level=logging.DEBUG if route in _QUIET and status == 200 else logging.INFO, **facts)
