"""Every error that a client sees has one form: {"error": {"code": ..., "message": ...}}."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

# What the framework itself refuses (routing, mostly) and what that is called here.
_CODES = {400: "bad_request", 404: "not_found", 405: "method_not_allowed", 413: "too_large", 415: "unsupported_type"}


class ApiError(HTTPException):
    """An answer other than success: HTTP status, a code for programs and a message for people."""

    def __init__(self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(status, message, dict(headers) if headers else None)
        self.code = code


def busy(code: str, message: str, retry_after_s: float = 1.0) -> ApiError:
    """503, to be tried again after whole seconds, at least one."""
    return ApiError(503, code, message, {"Retry-After": str(max(1, math.ceil(retry_after_s)))})


def error_body(code: str, message: str) -> dict[str, Any]:
    return {"error": {"code": code, "message": message}}


def error_response(error: HTTPException) -> Response:
    code = error.code if isinstance(error, ApiError) else _CODES.get(error.status_code, f"http_{error.status_code}")
    return JSONResponse(error_body(code, str(error.detail)), error.status_code, error.headers)


def install(app: FastAPI) -> None:
    """Make `app` answer all of its errors in that form."""

    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        response = error_response(error)
        request.scope["iosr_fast.code"] = error.code if isinstance(error, ApiError) else _CODES.get(error.status_code)
        return response

    async def invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        told = "; ".join(_told(one) for one in error.errors()[:5])
        return await refused(request, ApiError(422, "invalid_parameters", told))

    app.add_exception_handler(HTTPException, refused)
    app.add_exception_handler(RequestValidationError, invalid)


def _told(error: Mapping[str, Any]) -> str:
    """`query.top: Input should be greater than or equal to 1, got '0'`; what came is cut short."""
    came = error.get("input")
    got = f", got {came!r:.60}" if isinstance(came, str | int | float) else ""
    return f"{'.'.join(str(part) for part in error['loc'])}: {error['msg']}{got}"
