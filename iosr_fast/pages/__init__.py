"""The files of pages: of the `server`, some of which the others use too, of a `report`, and of a classifier as one
`file` in a browser. Rooms read them here alone, so that a page's parts are found in one place."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from pathlib import PurePath

SUFFIXES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}


@cache
def page_file(name: str) -> bytes:
    """The content of a file, as page_file("server/theme.css")."""
    return (files(__name__) / name).read_bytes()


def page_files(folder: str) -> dict[str, tuple[bytes, str]]:
    """Content and media type of all files of `server`, `report` or `file`, by name."""
    names = [each.name for each in (files(__name__) / folder).iterdir() if PurePath(each.name).suffix in SUFFIXES]
    return {name: (page_file(f"{folder}/{name}"), SUFFIXES[PurePath(name).suffix]) for name in names}
