"""The page at / and its files at /static/: read once, served from memory under a strict Content-Security-Policy."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from iosr_fast.serving.http.errors import ApiError

_FOLDER = Path(__file__).parent / "page"
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
    ".txt": "text/plain; charset=utf-8",
}
_POLICY = (
    "default-src 'self'; object-src 'none'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'"
)


def _with_headers(content: bytes, suffix: str) -> tuple[bytes, dict[str, str]]:
    return content, {
        "Content-Type": _TYPES[suffix],
        "Content-Security-Policy": _POLICY,
        "Cache-Control": "no-cache",
    }


def make_router(sentence: str = "") -> APIRouter:
    """Serves the files that are in the folder now, or a sentence in their place. A requested name is a key of a dict,
    never a path."""
    paths = [] if sentence else [path for path in _FOLDER.iterdir() if path.suffix in _TYPES]
    files = {path.name: _with_headers(path.read_bytes(), path.suffix) for path in paths}
    if sentence:
        files["index.html"] = _with_headers(sentence.encode(), ".txt")
    router = APIRouter(include_in_schema=False)

    @router.get("/")
    @router.get("/static/{name}")
    async def page(request: Request) -> Response:
        name = request.path_params.get("name", "index.html")
        if name not in files:
            raise ApiError(404, "not_found", f"there is no file {name[:80]!r}")
        content, headers = files[name]
        return Response(content, headers=headers)

    return router
