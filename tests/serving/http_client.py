"""Shared by the tests of the server: a small classifier, an application, and a client in the same process."""

from __future__ import annotations

import asyncio
import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from iosr_fast.backbones.demo.pictures import load_pictures
from iosr_fast.classifier import Classifier
from iosr_fast.serving.batching import BatchingClassifier
from iosr_fast.serving.http.app import create_app
from iosr_fast.serving.http.metrics import ClassifierMetrics, EngineMetrics
from iosr_fast.serving.http.open_site import batch_for, named_folders, open_site
from iosr_fast.serving.http.settings import Settings
from iosr_fast.serving.http.site import ServedClassifier, Site
from tests.demo_cache import demo_cache, shared_cache
from tests.pictures import encode

CLASSES, SHOTS = 8, 3
TOKEN = "a-token-for-tests-only"
AUTHORISED = {"Authorization": f"Bearer {TOKEN}"}


@functools.cache
def _drawn() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, list[str]]:
    pictures = load_pictures("held-out", min_styles=5)
    chosen = np.linspace(0, len(pictures.names) - 1, CLASSES).astype(int)
    rows = [np.flatnonzero(pictures.concepts == concept) for concept in chosen]
    support, queries = np.concatenate([r[:SHOTS] for r in rows]), np.concatenate([r[SHOTS:] for r in rows])
    labels = np.searchsorted(chosen, pictures.concepts)
    names = [pictures.names[concept] for concept in chosen]
    return pictures.images[support], labels[support], pictures.images[queries], labels[queries], names


@functools.cache
def bundle() -> Path:
    """A saved classifier of the demo with CLASSES classes of SHOTS images, built once a machine. Never change it."""
    folder = demo_cache() / "bundles" / "serving"
    with shared_cache():
        if not (folder / "manifest.json").is_file():
            images, labels, _, _, names = _drawn()
            classifier = Classifier("demo", runtime="onnxruntime", method="tip-adapter++")
            classifier.fit(images, [names[c] for c in labels], class_names=names)
            classifier.save(folder)
    return folder


# Pictures of the demo with several labels each, or none.
TAGS = {
    **{
        "green heart": "heart green",
        "light blue heart": "heart blue",
        "black heart": "heart",
        "green book": "book green",
    },
    **{"blue book": "book blue", "orange book": "book", "green apple": "green", "blue circle": "blue", "kimono": ""},
    **{"evergreen tree": "green", "nerd face": "face", "kissing face": "face", "bookmark": "", "purple square": ""},
}


@functools.cache
def tagged() -> tuple[list[np.ndarray], list[set[str]], list[bytes]]:
    """The support images of `several_bundle` with their labels, and a query of each of TAGS, as PNG."""
    pictures, images, labels, queries = load_pictures("held-out"), list[np.ndarray](), list[set[str]](), list[bytes]()
    for name, tags in TAGS.items():
        *support, query = pictures.images[pictures.concepts == pictures.names.index(name)]
        images, labels = images + support, labels + [{*tags.split()}] * len(support)
        queries.append(encode(query))
    return images, labels, queries


@functools.cache
def several_bundle() -> Path:
    """A saved classifier of the demo whose pictures have the labels of TAGS, built once a machine. Never change it."""
    folder = demo_cache() / "bundles" / "serving-several-labels"
    with shared_cache():
        if not (folder / "manifest.json").is_file():
            Classifier("demo", runtime="onnxruntime").fit(*tagged()[:2]).save(folder)
    return folder


def load() -> Classifier:
    """A new classifier, which the test may change."""
    return Classifier.load(bundle(), verify=False)


def support() -> tuple[np.ndarray, list[str]]:
    """Its support images and their labels."""
    images, labels, _, _, names = _drawn()
    return images, [names[label] for label in labels]


def queries() -> list[bytes]:
    """Pictures outside of the support set, as PNG."""
    return [encode(image) for image in _drawn()[2]]


def query_labels() -> list[str]:
    _, _, _, labels, names = _drawn()
    return [names[label] for label in labels]


def form(*images: bytes) -> list[tuple[str, tuple[str, bytes, str]]]:
    return [("images", (f"{i}.png", image, "image/png")) for i, image in enumerate(images)]


def fields(**texts: str | list[str]) -> list[tuple[str, tuple[None, str]]]:
    """A form without images."""
    return [(name, (None, one)) for name, text in texts.items() for one in ([text] if isinstance(text, str) else text)]


class Client:
    """Requests from any thread to an application in this process, which has its own event loop."""

    def __init__(self, site: Site) -> None:
        self.app, self.site = create_app(site), site
        self.served = site.served.get("")  # the only classifier
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        # Errors must be answers; an exception that leaves the application fails the test.
        self._client = httpx.AsyncClient(transport=httpx.ASGITransport(self.app), base_url="http://test")

    def run(self, coroutine: Any, timeout: float = 30.0) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(timeout)

    def start(self, method: str, path: str, **options: Any) -> Any:
        """A Future of the response."""
        return asyncio.run_coroutine_threadsafe(self._client.request(method, path, **options), self._loop)

    def ask(self, method: str, path: str, **options: Any) -> Any:
        return self.start(method, path, **options).result(30)

    def get(self, path: str, **options: Any) -> Any:
        return self.ask("GET", path, **options)

    def predict(self, *images: bytes, query: str = "", **options: Any) -> Any:
        """One image as the body, several as a form."""
        if len(images) == 1:
            options = {"headers": {"Content-Type": "image/png"}, "content": images[0], **options}
        else:
            options = {"files": form(*images), **options}
        return self.ask("POST", f"/v1/predict{query}", **options)

    def close(self) -> None:
        self.run(self._client.aclose())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


@contextmanager
def serving(
    classifier: Any = None, batching: dict[str, Any] | None = None, collector: Any = None, **settings: Any
) -> Iterator[Client]:
    """A client of an application; `settings` are those of Settings, `batching` options of BatchingClassifier."""
    classifier = load() if classifier is None else classifier
    made = Settings(**{"token": TOKEN, **settings})
    options = {"max_batch": batch_for(classifier.encoder, made), "max_queue": made.max_queue}
    options |= {"max_error": made.max_error, "collect": collector and collector.offer, **(batching or {})}
    site = Site(made, {"": Path("served")})
    observer, metrics = EngineMetrics(site.metrics), ClassifierMetrics(site.metrics)
    batches = BatchingClassifier(classifier, observer=observer, **options)
    served = site.served[""] = ServedClassifier(site, "", made, batches, observer, metrics, collector=collector)
    client = Client(site)
    try:
        yield client
    finally:
        client.close()
        served.close()
        batches.close()


@contextmanager
def serving_several(*folders: Path, **settings: Any) -> Iterator[Client]:
    """A client of the application of several saved classifiers, opened as `iosr-fast serve` does."""
    with open_site(named_folders(folders), Settings(**{"token": TOKEN, **settings})) as site:
        client = Client(site)
        try:
            yield client
        finally:
            client.close()


class Gate:
    """An encoder that waits while the gate is shut, and raises `error` if set."""

    def __init__(self, classifier: Classifier) -> None:
        self._encoder = classifier.encoder
        self._open = threading.Event()
        self._open.set()
        self.entered = threading.Event()  # since it was shut
        self.error: Exception | None = None
        fit = classifier._fit
        classifier._fit = replace(fit, clip=replace(fit.clip, encoder=self))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._encoder, name)

    def encode(self, pixels: np.ndarray) -> Any:
        self.entered.set()
        assert self._open.wait(20)
        if self.error is not None:
            raise self.error
        return self._encoder.encode(pixels)

    encode_on_device = encode

    def shut(self) -> None:
        self._open.clear()
        self.entered.clear()

    def open(self) -> None:
        self._open.set()


def error_of(response: Any, status: int) -> str:
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"error"} and set(body["error"]) == {"code", "message"} and body["error"]["message"]
    return body["error"]["code"]


def probe_soon(patch: pytest.MonkeyPatch) -> None:
    """Health checks classify an image of their own at once, and give up soon."""
    for name, seconds in (("probe_after_s", 0.01), ("probe_within_s", 1.0), ("stuck_after_s", 60.0)):
        patch.setattr(f"iosr_fast.serving.limits.Deadlines.{name}", seconds)
