"""The page at / and its files at /static/: read once, served from memory under a strict Content-Security-Policy."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter
from starlette.responses import Response

from iosr_fast.serving.http.errors import ApiError

FOLDER = Path(__file__).parent / "page"
_TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
_POLICY = (
    "default-src 'self'; object-src 'none'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'"
)


def make_router(sentence: str = "", start: str = "index.html") -> APIRouter:
    """Serves the files that are in the folder now, `start` at /; or a sentence in their place. A requested name is a
    key of a dict, never a path."""
    paths = [path for path in FOLDER.iterdir() if path.suffix in _TYPES]
    files = {path.name: (path.read_bytes(), _TYPES[path.suffix]) for path in paths}
    if sentence:
        files = {start: (sentence.encode(), "text/plain")}
    router = APIRouter(include_in_schema=False)

    @router.get("/")
    @router.get("/static/{name}")
    async def page(name: str = start) -> Response:
        if name not in files:
            raise ApiError(404, "not_found", f"there is no file {name[:80]!r}")
        return respond(*files[name])

    return router


def respond(content: bytes | str, kind: str) -> Response:
    headers = {"Content-Security-Policy": _POLICY, "Cache-Control": "no-cache"}
    return Response(content, headers=headers, media_type=kind)
