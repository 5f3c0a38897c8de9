"""Errors of the HTTP API, all of the form {"error": {"code": ..., "message": ...}}."""

from __future__ import annotations

import math
from collections.abc import Mapping, MutableMapping
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from starlette.routing import Match

from iosr_fast.exceptions import BadImageError, ClosedError, DeadlineExceededError, IosrFastError, QueueFullError
from iosr_fast.sealed.files import DISK_FULL
from iosr_fast.store.change_log import LogWriteError

# Codes of errors that the framework itself raises, in routing and where JSON is read.
_CODES = {400: "bad_request", 404: "not_found", 405: "method_not_allowed"}


class ApiError(HTTPException):
    """An error answer: HTTP status, a code for programs and a message for people."""

    def __init__(self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(status, message, headers)
        self.code = code


def busy(code: str, message: str, retry_after_s: float = 1.0) -> ApiError:
    """503 with Retry-After in whole seconds, at least one."""
    return ApiError(503, code, message, {"Retry-After": str(max(1, math.ceil(retry_after_s)))})


def internal_error() -> ApiError:
    return ApiError(500, "internal", "the server failed at this request; see its log")


def of_library(error: Exception, refused: str) -> Exception:
    """The ApiError for an exception of the library, with the code `refused` for what it refuses; others unchanged."""
    match error:
        case QueueFullError():
            return busy("queue_full", str(error), error.retry_after_s)
        case DeadlineExceededError():
            message = "no answer was ready before the deadline; allow more time, or send fewer images"
            return ApiError(504, "deadline_exceeded", message)
        case ClosedError():
            return busy("closed", "the server is shutting down; send the request to another one")
        case BadImageError():
            return ApiError(422, "bad_image", f"image {error.where}: {error.reason}")
        case IosrFastError():
            return ApiError(422, refused, str(error))
        case LogWriteError():
            code = "storage_full" if error.errno in DISK_FULL else "log_failed"
            until = "predictions continue, and changes are accepted again once the log can be written"
            return ApiError(507, code, f"{error.strerror}; {until}")
    return error


def no_class(class_id: str) -> ApiError:
    return ApiError(404, "no_class", f"no class has the id {class_id!r}; /v1/classes lists all classes")


def no_example(example_id: str) -> ApiError:
    return ApiError(404, "no_example", f"no support image has the id {example_id!r}")


def error_body(code: str, message: str) -> dict[str, Any]:
    return {"error": {"code": code, "message": message}}


def error_response(scope: MutableMapping[str, Any], error: HTTPException) -> Response:
    """The answer to the request of `scope`, whose log line and metrics get the code."""
    code = getattr(error, "code", "") or _CODES.get(error.status_code, f"http_{error.status_code}")
    scope["iosr_fast.code"] = code
    return JSONResponse(error_body(code, str(error.detail)), error.status_code, error.headers)


def is_routed(scope: MutableMapping[str, Any], method: str) -> bool:
    """Whether the application of a request has a route for its path and this method."""
    return any(route.matches({**scope, "method": method})[0] is Match.FULL for route in scope["app"].routes)


async def _refuse(request: Request, error: Exception) -> Response:
    if isinstance(error, RequestValidationError):
        message = "; ".join(_describe(detail) for detail in error.errors()[:5])
        error = ApiError(422, "invalid_parameters", message)
    assert isinstance(error, HTTPException)
    if error.status_code == 405:  # the framework names the methods of one route
        allowed = [method for method in ("GET", "POST", "PUT", "PATCH", "DELETE") if is_routed(request.scope, method)]
        error.headers = {"Allow": ", ".join(allowed).replace("GET", "GET, HEAD")}
    return error_response(request.scope, error)


HANDLERS: dict[Any, Any] = {HTTPException: _refuse, RequestValidationError: _refuse}  # of an application


def _describe(error: Mapping[str, Any]) -> str:
    """`query.top: Input should be greater than or equal to 1, got '0'`, with the input cut to 60 characters."""
    value, message = error.get("input"), error["msg"].removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        message = "expected no such parameter; /openapi.json lists those that there are"
    got = f", got {value!r:.60}" if isinstance(value, str | int | float) else ""
    return f"{'.'.join(str(part) for part in error['loc'])}: {message}{got}"
