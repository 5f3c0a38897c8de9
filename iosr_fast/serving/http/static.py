"""Pages and their files at static/: read once, served from memory under a strict Content-Security-Policy."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from iosr_fast.pages import page_files
from iosr_fast.serving.http.errors import ApiError
from iosr_fast.serving.http.middleware import SERVED
from iosr_fast.serving.http.site import ServedEncoder

_POLICY = (
    "default-src 'self'; object-src 'none'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'"
)


def make_router() -> APIRouter:
    """Serves the files of pages/server: the page of a classifier, or of all. A head, which takes no images,
    has a sentence instead. A requested name is a key of a dict, never a path."""
    files, router = page_files("server"), APIRouter(include_in_schema=False)

    @router.get("/")
    @router.get("/static/{name}")
    async def page(request: Request, name: str = "") -> Response:
        served: ServedEncoder | None = request.scope[SERVED]
        name = name or ("classifiers.html" if served is None else "index.html")
        content, kind = files.get(name, (b"", ""))
        if served is not None and served.sentence:
            content, kind = served.sentence.encode() if name == "index.html" else b"", "text/plain"
        if not content:
            raise ApiError(404, "not_found", f"there is no file {name[:80]!r}")
        headers = {"Content-Security-Policy": _POLICY, "Cache-Control": "no-cache"}
        return Response(content, headers=headers, media_type=kind)

    return router
