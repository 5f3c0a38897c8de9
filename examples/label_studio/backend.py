"""An ML backend of Label Studio: it labels tasks in advance, and each annotation changes the classifier (README.md)."""

from __future__ import annotations

import logging
import os
import secrets
import sqlite3
from pathlib import Path
from threading import Lock
from typing import Any
from urllib.parse import quote, unquote
from xml.etree import ElementTree

import typer
import uvicorn
from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.concurrency import run_in_threadpool
from starlette.middleware.trustedhost import TrustedHostMiddleware

from iosr_fast import Classifier, IosrFastError

LOCAL = "/data/local-files/?d="  # before the path of a picture below Label Studio's document root
SAME = 1 - 1e-6  # the least similarity of a picture with itself
PICTURES = "SELECT picture FROM annotations"
LABELS = "SELECT picture, label FROM annotations ORDER BY id NOT NULL, rowid"  # the last one of a picture counts
LOOPBACK = ["127.0.0.1", "localhost"]
Json = dict[str, Any]
log = logging.getLogger("uvicorn.error")


class Backend:
    """A classifier that follows the annotations of pictures below `root`; its public methods are routes.

    What Label Studio says is in BUNDLE.labels.db before the classifier is compared with it, and a change of this in
    BUNDLE.changes.db before anybody sees it: a repeated event and a restart lead to the same classifier.
    """

    def __init__(self, bundle: Path, root: Path, model: str | None = None, max_error: float = 0.05) -> None:
        self.bundle, self.root, self.max_error = bundle, root.resolve(), max_error
        self.lock = Lock()
        self.db = sqlite3.connect(f"{bundle}.labels.db", isolation_level=None, check_same_thread=False)
        self.db.row_factory = lambda _, row: row[0] if len(row) == 1 else row
        self.db.execute("CREATE TABLE IF NOT EXISTS annotations(id UNIQUE, picture, label)")
        self.classifier = Classifier.load(bundle) if bundle.exists() else Classifier(model, skip_bad=True)
        if bundle.exists():
            self.classifier.open_log(f"{bundle}.changes.db")
        self._follow(self.db.execute(PICTURES).fetchall())

    def setup(self, body: Json) -> Json:
        classes = [one.name for one in self.classifier.classes()] if self.bundle.exists() else []
        if others := set(classes) - _choices(body["schema"])[3]:
            raise IosrFastError(f"expected a choice for each class, got none for {sorted(others)}: add or rename it")
        return {"model_version": f"{self.bundle.name} {getattr(self.classifier, 'version', 0)}"}

    def predict(self, body: Json) -> Json:
        name, image, key, _ = _choices(body["label_config"])
        version = self.setup({"schema": body["label_config"]})
        least = self.classifier.automation().smallest if self.bundle.exists() else 1.0
        promise = self.max_error if least <= self.max_error else None
        results = list[Json]()
        for path in [self.root / self._picture(task, key) for task in body["tasks"]]:
            results.append({**version, "score": 0.0, "result": []})  # of what can't be read, and before the first fit
            try:
                [answer] = self.classifier.explain([path], 1, max_error=promise)
            except (ValueError, OSError) as error:
                log.warning("%s: %s", path, error)
                continue
            words = "accepted" if answer.accepted and answer.label == answer.top[0].label else "needs a look"
            region = {"from_name": name, "to_name": image, "type": "choices", "meta": {"text": [words]}}
            region["value"] = {"choices": [answer.top[0].label]}
            results[-1] |= {"score": answer.top[0].probability, "result": [region]}
        return {"results": results}

    async def webhook(self, body: Json) -> Json:
        noted = self._note(body) if body["action"].startswith("ANNOTATION") else []  # in the order of events
        await run_in_threadpool(self._follow, noted)
        if body["action"] == "START_TRAINING":
            await run_in_threadpool(self.classifier.retune)
        return {"status": "ok"}

    def suggest(self, n: int = 20, key: str = "image") -> list[Json]:
        """Tasks of n pictures below the root to annotate next."""
        done = self.db.execute(PICTURES).fetchall()
        found = self.classifier.suggest(self.root, n + len(done), skip_bad=True).paths
        pictures = [path.relative_to(self.root).as_posix() for path in found]
        return [{"data": {key: LOCAL + quote(picture)}} for picture in pictures if picture not in done][:n]

    def _picture(self, task: Json, key: str) -> str:
        url = str(task["data"].get(key) or task["data"].get("$undefined$"))
        path = (self.root / unquote(url.partition(LOCAL)[2])).resolve()
        if LOCAL not in url or not path.is_relative_to(self.root):
            raise IosrFastError(f"expected a picture of local files, {LOCAL}PATH, below {self.root}, got {url:.200}")
        return path.relative_to(self.root).as_posix()

    def _note(self, event: Json) -> list[str]:
        """Write the annotations of an event down; returns their pictures."""
        if event["action"].endswith("DELETED"):
            # A start compares their pictures, too.
            forget = "UPDATE annotations SET id = NULL, label = NULL WHERE id = ? RETURNING picture"
            return [picture for one in event["annotations"] for picture in self.db.execute(forget, [one["id"]])]
        name, _, key, _ = _choices(event["project"]["label_config"])
        several = isinstance(event["task"], list)
        tasks = event["task"] if several else [event["task"]]
        pictures = {task["id"]: self._picture(task, key) for task in tasks}
        for one in event["annotation"] if several else [event["annotation"]]:
            regions = [region["value"] for region in one["result"] if region.get("from_name") == name]
            labels = [] if one["was_cancelled"] else [label for value in regions for label in value["choices"]]
            if len(labels) > 1:
                raise IosrFastError(f"expected one choice for a picture, got {labels}")
            row = one["id"], pictures[one["task"]], *(labels or [None])
            self.db.execute("REPLACE INTO annotations VALUES(?, ?, ?)", row)
        return [*pictures.values()]

    def _follow(self, pictures: list[str]) -> None:
        """Make pictures support images of their class, or of none; a warning says why not."""
        with self.lock:
            labels = dict(self.db.execute(LABELS))
            known = {self.root / picture: label for picture, label in labels.items() if label}
            paths = [self.root / picture for picture in pictures]
            for path in sorted(paths, key=lambda path: path not in known):  # a class gets pictures before it loses some
                try:
                    self._move(path, known) if self.bundle.exists() else self._fit(known)
                except (ValueError, OSError) as error:  # a restart tries again
                    log.warning("%s: %s", path, error)

    def _fit(self, known: dict[Path, str]) -> None:
        if len(set(known.values())) > 1:
            self.classifier.fit([*known], [*known.values()]).save(self.bundle)
            self.classifier.open_log(f"{self.bundle}.changes.db")

    def _move(self, path: Path, known: dict[Path, str]) -> None:
        label = known.get(path)
        [answer] = self.classifier.explain([path], 1, nearest=1)
        held = {one.label: one.example_id for one in answer.nearest if one.similarity > SAME}
        for other in held.keys() - {label}:
            if len(self.classifier.examples(other)) > 1:
                self.classifier.remove_examples([held[other]])
            else:
                self.classifier.remove_class(other)
        if label and label not in held:
            classes = [one.name for one in self.classifier.classes()]
            (self.classifier.add_examples if label in classes else self.classifier.add_class)(label, [path])


def _choices(config: str) -> tuple[str, str, str, set[str]]:
    """Of the choices for an image: their name, the image's, the key of its task data, and the labels."""
    root = ElementTree.fromstring(config)
    keys = {tag.get("name"): tag.get("value", "").removeprefix("$") for tag in root.iter("Image")}
    for tag in root.iter("Choices"):
        if (image := tag.get("toName", "")) in keys:
            labels = {one.get("alias", one.get("value", "")) for one in tag.iter("Choice")}
            return tag.get("name", ""), image, keys[image], labels
    raise IosrFastError("expected a labelling interface with <Choices> for an <Image>, got another one")


def make_app(backend: Backend, authorization: str = "") -> FastAPI:
    """The protocol of label-studio-ml-backend, for this machine, or for all that send this header."""

    def check(request: Request) -> Any:
        given = request.headers.get("authorization", "")
        if authorization and not secrets.compare_digest(given.encode(), authorization.encode()):
            raise HTTPException(401, headers={"WWW-Authenticate": "Basic"})
        try:
            yield
        except (ValueError, LookupError, TypeError, AttributeError, ElementTree.ParseError) as error:
            log.warning("%s: %r", request.url.path, error)
            raise HTTPException(422, str(error)) from error

    app = FastAPI(dependencies=[Depends(check)], openapi_url=None)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=["*"] if authorization else LOOPBACK)
    app.get("/health")(lambda: {"status": "UP", "model_class": "iosr_fast"})
    app.get("/suggest")(backend.suggest)
    for route in (backend.setup, backend.predict, backend.webhook):
        app.post(f"/{route.__name__}")(route)
    return app


def main(bundle: Path, root: Path, model: str = "", max_error: float = 0.05, port: int = 9090) -> None:
    """Serve BUNDLE, or a classifier of --model that is fitted to the first annotations, for pictures below ROOT."""
    authorization = os.environ.get("AUTHORIZATION", "")
    app = make_app(Backend(bundle, root, model or None, max_error), authorization)
    uvicorn.run(app, host="0.0.0.0" if authorization else LOOPBACK[0], port=port)


if __name__ == "__main__":
    typer.run(main)
