"""An ML backend of Label Studio: it labels tasks in advance, and each annotation changes the classifier (README.md)."""

from __future__ import annotations

import json
import logging
import os
import secrets
import sqlite3
from pathlib import Path
from threading import Lock
from typing import Annotated, Any
from urllib.parse import quote, unquote
from xml.etree import ElementTree

import msgspec
import numpy as np
import typer
import uvicorn
from fastapi import Depends, FastAPI, HTTPException, Query, Request
from fastapi.concurrency import run_in_threadpool
from starlette.middleware.trustedhost import TrustedHostMiddleware

from iosr_fast import Classifier
from iosr_fast.exceptions import BadImageError, IosrFastError
from iosr_fast.files.source import Source
from iosr_fast.head.names import check_new_name
from iosr_fast.images.listing import list_images
from iosr_fast.serving.batching import BatchingClassifier, DecodeLimits

LOCAL = "/data/local-files/?d="  # before the path of a picture below Label Studio's document root
SAME = 1 - 1e-6  # the least similarity of a picture with itself
PICTURES = "SELECT picture FROM annotations"
LABELS = "SELECT picture, label FROM annotations ORDER BY id NOT NULL, rowid"  # the last one of a picture counts
Label = str | frozenset[str]  # of a picture; in the database a text, or JSON of the choices where these may be several
LOOPBACK = ["127.0.0.1", "localhost"]
MAX_BODY, MAX_FILE, MAX_CONFIG = 8 << 20, 32 << 20, 1 << 18  # bytes; characters, which entities multiply by up to 100
Json = dict[str, Any]
Id = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]  # as SQLite keeps numbers
log = logging.getLogger("uvicorn.error")


class Picture:
    """A file that the library takes as an array, which a process of the decoders makes each time it is read."""

    def __init__(self, decoders: BatchingClassifier, path: Path) -> None:
        self.decoders, self.path = decoders, path

    def __fspath__(self) -> str:
        return str(self.path)

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        if not self.path.is_file() or self.path != self.path.resolve():  # a link may lead anywhere
            raise IosrFastError(f"expected a regular file, and no link, got {self.path}")
        try:
            with open(os.open(self.path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:  # it may be a FIFO by now
                return self.decoders.decode_whole(file.read(MAX_FILE + 1)).result()
        except BadImageError as error:
            raise IosrFastError(f"{self.path}: {error.reason}") from error


async def read(request: Request) -> Json:
    """The JSON object of a body, of a type that pages of other sites can't send."""
    if not request.headers.get("content-type", "").startswith("application/json"):
        raise HTTPException(415, "expected a body of the type application/json")
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY:
            raise HTTPException(413, f"expected a body of at most {MAX_BODY} bytes", {"connection": "close"})
    return msgspec.json.decode(body, type=Json)


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
        greys = [np.full((9, 9, 3), grey, np.uint8) for grey in (0, 255)]  # decoders need a classifier on the model
        fitted = self.classifier if bundle.exists() else Classifier(model).fit(greys, ["black", "white"])
        self.decoders = BatchingClassifier(fitted, limits=DecodeLimits(MAX_FILE), isolated=True)
        self._follow(self.db.execute(PICTURES).fetchall())

    def setup(self, body: Annotated[Json, Depends(read)]) -> Json:
        classes = [one.name for one in self.classifier.classes()] if self.bundle.exists() else []
        *_, labels, several = _choices(body["schema"])
        if others := set(classes) - labels:
            raise IosrFastError(f"expected a choice for each class, got none for {sorted(others)}: add or rename it")
        if classes and several != self.classifier.snapshot().is_multi_label:
            fix = 'single choice, got choice="multiple"' if several else 'choice="multiple", got single choice'
            raise IosrFastError(f"expected {fix}: the classifier has {'one label' if several else 'several labels'}")
        return {"model_version": f"{self.bundle.name} {self.classifier.version if classes else 0}"}

    def predict(self, body: Annotated[Json, Depends(read)]) -> Json:
        name, image, key, *_ = _choices(body["label_config"])
        version = self.setup({"schema": body["label_config"]})
        least = self.classifier.automation().smallest if self.bundle.exists() else 1.0
        promise = self.max_error if least <= self.max_error else None
        results = list[Json]()
        for picture in [self._picture(task, key) for task in msgspec.convert(body["tasks"], list[Json])]:
            results.append({**version, "score": 0.0, "result": []})  # of what can't be read, and before the first fit
            try:
                [answer] = self.classifier.explain([Picture(self.decoders, self.root / picture)], 1, max_error=promise)
            except (ValueError, OSError) as error:
                log.warning("%s: %s", picture, error)
                continue
            labels = [label for label, _ in answer.pairs]
            accepted = set(answer.accepted_labels)  # with a tree a node, maybe
            words = "accepted" if accepted.issuperset(labels) else "needs a look"
            region = {"from_name": name, "to_name": image, "type": "choices", "meta": {"text": [words]}}
            region["value"] = {"choices": labels}
            share = min((share for _, share in answer.pairs), default=1 - answer.probability)
            results[-1] |= {"score": share, "result": [region] * bool(labels)}
        return {"results": results}

    async def webhook(self, body: Annotated[Json, Depends(read)]) -> Json:
        noted = self._note(body) if body["action"].startswith("ANNOTATION") else []  # in the order of events
        await run_in_threadpool(self._follow, noted)
        if body["action"] == "START_TRAINING":
            await run_in_threadpool(self.classifier.retune)
        return {"status": "ok"}

    def suggest(self, n: Annotated[int, Query(ge=1, le=1000)] = 20, key: str = "image") -> list[Json]:
        """Tasks of n pictures below the root to annotate next."""
        done = self.db.execute(PICTURES).fetchall()
        files: Any = [Picture(self.decoders, Path(file)) for file in list_images(self.root).paths]
        found = self.classifier.suggest(Source(files, files), n + len(done), skip_bad=True).paths
        pictures = [path.relative_to(self.root).as_posix() for path in found]
        return [{"data": {key: LOCAL + quote(os.fsencode(picture))}} for picture in pictures if picture not in done][:n]

    def _picture(self, task: Json, key: str) -> str:
        url = msgspec.convert(task["data"].get(key) or task["data"].get("$undefined$"), str)
        path = Path(os.path.realpath(self.root / unquote(url.partition(LOCAL)[2])))  # of links in a circle, too
        if LOCAL not in url or not path.is_relative_to(self.root):
            raise IosrFastError(f"expected a picture of local files, {LOCAL}PATH, below {self.root}, got {url:.200}")
        return path.relative_to(self.root).as_posix()

    def _note(self, event: Json) -> list[str]:
        """Write the annotations of an event down; returns their pictures."""
        if event["action"].endswith("DELETED"):
            # A start compares their pictures, too.
            forget = "UPDATE annotations SET id = NULL, label = NULL WHERE id = ? RETURNING picture"
            ids = [msgspec.convert(one["id"], Id) for one in msgspec.convert(event["annotations"], list[Json])]
            return [picture for one in ids for picture in self.db.execute(forget, [one])]
        name, _, key, _, several = _choices(event["project"]["label_config"])
        batch = isinstance(event["task"], list)
        tasks = event["task"] if batch else [event["task"]]
        pictures = {task["id"]: self._picture(task, key) for task in tasks}
        for one in event["annotation"] if batch else [event["annotation"]]:
            regions = [] if one["was_cancelled"] else msgspec.convert(one["result"], list[Json])
            values = [region["value"] for region in regions if region.get("from_name") == name]
            labels: list[Any] = [label for value in values for label in msgspec.convert(value["choices"], list[str])]
            if len(labels) > 1 and not several:
                raise IosrFastError(f"expected one choice for a picture, got {labels!s:.200}")
            for label in labels:
                check_new_name(label, ())
            text = json.dumps(sorted(labels)) if several and not one["was_cancelled"] else "".join(labels) or None
            row = [msgspec.convert(one["id"], Id), pictures[one["task"]], text]
            self.db.execute("REPLACE INTO annotations VALUES(?, ?, ?)", row)
        return [*pictures.values()]

    def _follow(self, pictures: list[str]) -> None:
        """Make pictures support images of their class, or of none; a warning says why not."""
        with self.lock:
            labelled = dict(self.db.execute(LABELS)).items()
            known: dict[str, Label] = {picture: _label(text) for picture, text in labelled if text}
            for picture in sorted(pictures, key=lambda one: one not in known):  # a class gets some before it loses some
                try:
                    self._move(picture, known) if self.bundle.exists() else self._fit(known)
                except (ValueError, OSError) as error:  # a restart tries again
                    log.warning("%s: %s", picture, error)

    def _fit(self, known: dict[str, Label]) -> None:
        names = {name for label in known.values() for name in ([label] if isinstance(label, str) else label)}
        if len(names) > 1:
            pictures = [Picture(self.decoders, self.root / picture) for picture in known]
            self.classifier.fit(pictures, [*known.values()]).save(self.bundle)
            self.classifier.open_log(f"{self.bundle}.changes.db")

    def _move(self, picture: str, known: dict[str, Label]) -> None:
        label, image = known.get(picture), Picture(self.decoders, self.root / picture)
        [answer] = self.classifier.explain([image], 1, nearest=1)
        held = {one.label: one.example_id for one in answer.nearest if one.similarity > SAME}
        if self.classifier.snapshot().is_multi_label:
            self._give(label, image, [*held.values()])
            return
        if not isinstance(label, str | None):
            raise IosrFastError(f"expected one choice, as the classifier has one label a picture, got {sorted(label)}")
        for other in held.keys() - {label}:
            alone = len(self.classifier.examples(other)) == 1
            self.classifier.remove_class(other) if alone else self.classifier.remove_examples([held[other]])
        if label and label not in held:
            classes = [one.name for one in self.classifier.classes()]
            (self.classifier.add_examples if label in classes else self.classifier.add_class)(label, [image])

    def _give(self, label: Label | None, image: Picture, held: list[str]) -> None:
        """Make an image a support image of all its labels, or of none; None takes it out. Classes that have no image
        any more stay."""
        if isinstance(label, str):
            raise IosrFastError(f"expected a list of choices, as the classifier has several labels, got {label!r}")
        if label is None:
            self.classifier.remove_examples(held) if held else None
            return
        classes = {one.name for one in self.classifier.classes()}
        if not held:
            held = [*self.classifier.add_examples(label & classes, [image]).example_ids]
        for name in sorted(label - classes):
            self.classifier.add_class(name, [image])
        self.classifier.relabel(held, label)


def _label(text: str) -> Label:
    return frozenset(json.loads(text)) if text.startswith("[") else text


def _choices(config: str) -> tuple[str, str, str, set[str], bool]:
    """Of the choices for an image: their name, the image's, the key of its task data, the labels, and whether these may
    be several."""
    root = ElementTree.fromstring(msgspec.convert(config, Annotated[str, msgspec.Meta(max_length=MAX_CONFIG)]))
    keys = {tag.get("name"): tag.get("value", "").removeprefix("$") for tag in root.iter("Image")}
    for tag in root.iter("Choices"):
        if (image := tag.get("toName", "")) in keys:
            labels = {one.get("alias", one.get("value", "")) for one in tag.iter("Choice")}
            return tag.get("name", ""), image, keys[image], labels, tag.get("choice") == "multiple"
    raise IosrFastError("expected a labelling interface with <Choices> for an <Image>, got another one")


def make_app(backend: Backend, authorization: str = "") -> FastAPI:
    """The protocol of label-studio-ml-backend, for this machine, or for all that send this header."""

    def check(request: Request) -> Any:
        given = request.headers.get("authorization", "")
        if authorization and not secrets.compare_digest(given.encode(), authorization.encode()):
            raise HTTPException(401, headers={"WWW-Authenticate": "Basic"})
        try:
            yield
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError, ElementTree.ParseError) as error:
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
