"""The application of several classifiers: their own applications, one beside the other, and what concerns them all."""

from __future__ import annotations

import re
from html import escape
from typing import Any

from fastapi import FastAPI
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from iosr_fast.serving.http import health, predict, schemas, static
from iosr_fast.serving.http.app import OPTIONS, create_app
from iosr_fast.serving.http.errors import ApiError
from iosr_fast.serving.http.middleware import REFUSAL, WHOLE_PATH, RequestMiddleware
from iosr_fast.serving.http.service import Front, Service

_ROOT = "/v1/classifiers"
_PATH = re.compile(rf"{_ROOT}/([^/]*)/(.*)", re.DOTALL)
_NAME = {"name": "classifier", "in": "path", "required": True, "schema": {"type": "string"}, "description": "its name"}
_PAGE = """<!doctype html>
<html lang="en">
  <head>
    <meta charset="utf-8">
    <title>iosr_fast</title>
    <meta name="viewport" content="width=device-width, initial-scale=1">
    <link rel="icon" type="image/svg+xml" href="static/icon.svg">
    <link rel="stylesheet" href="static/theme.css">
    <link rel="stylesheet" href="static/page.css">
  </head>
  <body>
    <header class="row"><h1>iosr_fast</h1><a href="openapi.json" class="quiet">API</a></header>
    <main class="flow"><h2>Classifiers</h2><ul class="flow">{}</ul></main>
  </body>
</html>
"""


class SeveralApp(FastAPI):
    """Hands each request below /v1/classifiers/NAME/ to the application of that classifier, which gets it as the server
    of one gets it: REST as /v1/REST, and the page and its files as they are. Answers the others itself."""

    def __init__(self, front: Front) -> None:
        super().__init__(**OPTIONS)
        self._front = front
        self._apps = {name: create_app(service) for name, service in front.services.items()}
        self.add_middleware(RequestMiddleware, service=front)
        for router in (predict.make_router(front), health.make_router(front)):
            self.include_router(router)
        self.get(_ROOT, tags=["classes"], name="classifiers", summary="All classifiers")(self._list)
        self.get("/", include_in_schema=False)(self._page)
        self.include_router(static.make_router())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        named = _PATH.fullmatch(scope["path"]) if scope["type"] == "http" else None
        if named is None:
            await super().__call__(scope, receive, send)
            return
        name, rest = named.groups()
        inner = {**scope, WHOLE_PATH: scope["path"], "path": f"/v1/{rest}"}
        if rest in ("", "openapi.json") or rest.startswith("static/"):
            inner["path"] = f"/{rest}"
        app: Any = super().__call__ if rest == "openapi.json" else self._apps.get(name)
        if isinstance(refusal := self._front.find(name), ApiError):
            app, inner[REFUSAL] = super().__call__, refusal
        await app(inner, receive, send)

    def openapi(self) -> dict[str, Any]:
        """Its own routes, and those of a classifier, with its name as a parameter: of one that takes images, if any."""
        fresh, described = self.openapi_schema is None, super().openapi()
        if fresh:
            first = max(self._apps, key=lambda name: self._front.services[name].takes_changes)
            of_one = self._apps[first].openapi()
            for path, operations in of_one["paths"].items():
                if path.startswith("/v1/"):
                    whole = f"{_ROOT}/{{classifier}}/{path.removeprefix('/v1/')}"
                    described["paths"][whole] = {"parameters": [_NAME], **operations}
            for kind, parts in of_one["components"].items():
                described["components"].setdefault(kind, {}).update(parts)
        return described

    def _list(self) -> schemas.ClassifiersAnswer:
        listed = [schemas.Listed(name, error) for name, error in self._front.refused.items()]
        for name, one in self._front.services.items():
            head, source = one.head, one.classifier.encoder.source
            model = None if source is None else source.manifest["model"]
            facts = len(head.uids), head.version, model, head.config.method
            listed.append(schemas.Listed(name, one.failure or None, *facts))
        return schemas.ClassifiersAnswer(sorted(listed, key=lambda one: one.name))

    def _page(self) -> Response:
        lines = []
        for one in self._list().classifiers:
            name, link = escape(one.name), f'<a href="{_ROOT[1:]}/{escape(one.name)}/">{escape(one.name)}</a>'
            facts = "" if one.classes is None else f"{one.classes} classes, version {one.version}"
            words = f'<span class="quiet">{facts}</span> <span class="bad">{escape(one.error or "")}</span>'
            lines.append(f"<li>{link if facts else name} {words}</li>")
        return static.respond(_PAGE.format("".join(lines)), "text/html")


def app_of(served: Service | Front) -> FastAPI:
    """The application of a server."""
    return SeveralApp(served) if isinstance(served, Front) else create_app(served)
