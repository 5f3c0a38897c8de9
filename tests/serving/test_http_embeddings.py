"""Embeddings over HTTP: equal to the encoder's, in the shapes that clients of embedding servers know."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.exceptions import IosrFastError
from iosr_fast.images.preprocess import to_pixels
from iosr_fast.serving.http.open_site import open_site
from iosr_fast.serving.http.settings import Settings
from tests.pictures import GREY
from tests.serving.http_client import TOKEN, Client, Gate, error_of, form, load, queries, serving


def url(image: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(image).decode()}"


def rows_of(response: Any) -> np.ndarray:
    """(N, D) of an answer, in whichever encoding."""
    assert response.status_code == 200, response.text
    data = response.json()["data"]
    assert [one["index"] for one in data] == [*range(len(data))]
    coded = [one["embedding"] for one in data]
    return np.array([np.frombuffer(base64.b64decode(one), "<f4") if isinstance(one, str) else one for one in coded])


def encoded(client: Client, images: list[bytes]) -> Embeddings:
    encoder = client.site.served[""].batching.encoder
    return encoder.encode(to_pixels(images, encoder.geometry)).to_numpy()


@pytest.fixture(scope="module")
def engine(shared: Client) -> Iterator[Client]:
    """A client of a server of an engine folder alone."""
    source = shared.served.classifier.encoder.source
    settings = Settings(token=f"all {TOKEN}\nshop shops-secret-token predict")
    with open_site({"": Path(source.folder)}, settings) as site:
        client = Client(site)
        yield client
        client.close()


HEADERS = {"Authorization": "Bearer shops-secret-token"}


def embed(client: Client, **body: Any) -> Any:
    return client.ask("POST", "/v1/embeddings", json=body, headers=HEADERS)


@pytest.mark.parametrize("kind", ["plain", "adapted"])
def test_embeddings_are_the_encoders(engine: Client, kind: str) -> None:
    images = queries()[:3]
    expected = getattr(encoded(engine, images), kind)
    urls, made = [*map(url, images)], list[Any]()
    for encoding in ("float", "base64"):
        made.append(embed(engine, input=urls, encoding_format=encoding, embedding=kind))
        fields = {"encoding_format": encoding, "embedding": kind}
        made.append(engine.ask("POST", "/v1/embeddings", files=form(*images), data=fields, headers=HEADERS))
    for response in made:
        np.testing.assert_allclose(rows_of(response), expected, atol=1e-5)
    np.testing.assert_allclose(rows_of(embed(engine, input=urls[0], embedding=kind)), expected[:1], atol=1e-5)


def test_a_client_of_infinity_is_answered_unchanged(engine: Client) -> None:
    """Its generated client sends all fields, with these defaults, and reads all of these."""
    sent = {"model": "default/not-specified", "encoding_format": "float", "user": None, "dimensions": 0}
    answer = embed(engine, **sent, modality="image", input=[url(GREY)]).json()
    assert answer.keys() == {"object", "data", "model", "usage", "id", "created"} and answer["object"] == "list"
    assert answer["usage"].keys() == {"prompt_tokens", "total_tokens"} and answer["model"] == "demo"
    assert isinstance(answer["id"], str) and isinstance(answer["created"], int)
    (item,) = answer["data"]
    assert item.keys() == {"object", "embedding", "index"} and item["object"] == "embedding"


def test_texts_are_compared_with_plain_embeddings_of_images(shared: Client) -> None:
    texts = ["a red heart", "a green book"]
    made = rows_of(embed(shared, input=[*texts, url(GREY)], model="demo"))
    np.testing.assert_allclose(made[:2], shared.served.classifier._fitted().clip.text.embed(texts), atol=1e-5)
    np.testing.assert_allclose(made[2:], encoded(shared, [GREY]).plain, atol=1e-5)
    assert error_of(embed(shared, input=texts, embedding="adapted"), 422) == "no_adapted"


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({"input": "a cat"}, 422, "no_texts"),
        ({"input": []}, 400, "no_image"),
        ({"input": [url(GREY)] * 65}, 413, "too_many_images"),
        ({"input": [url(GREY), url(b"zip")]}, 422, "unsupported_type"),
        ({"input": [url(GREY), url(GREY[:60])]}, 422, "bad_image"),
        ({"input": "data:image/png,plain"}, 422, "bad_image"),
        ({"input": "data:image/png;base64,?"}, 422, "bad_image"),
        ({"input": "http://localhost/picture.png"}, 422, "invalid_parameters"),  # nothing is fetched
        ({"input": "x", "modality": "image"}, 422, "invalid_parameters"),
        ({"input": url(GREY), "model": "demos"}, 404, "no_model"),
        ({"input": url(GREY), "dimensions": 64}, 422, "invalid_parameters"),
        ({"input": url(GREY), "encoding": "base64"}, 422, "invalid_parameters"),
        ({"input": 1}, 422, "invalid_parameters"),
    ],
)
def test_what_can_not_be_embedded_is_refused(engine: Client, body: dict[str, Any], status: int, code: str) -> None:
    assert error_of(embed(engine, **body), status) == code


def test_an_encoder_without_an_adapter_has_no_adapted_embeddings(engine: Client, monkeypatch) -> None:
    monkeypatch.setattr(engine.site.served[""].batching.encoder, "adapted", False)
    assert error_of(embed(engine, input=url(GREY), embedding="adapted"), 422) == "no_adapted"
    assert rows_of(embed(engine, input=url(GREY))).shape == (1, 128)


def test_an_engine_alone_has_no_classes(engine: Client) -> None:
    assert error_of(engine.ask("POST", "/v1/predict", content=GREY, headers=HEADERS), 404) == "not_found"
    assert engine.get("/readyz").json()["status"] == engine.get("/healthz").json()["status"] == "ok"
    assert "iosr_fast_queue_images 0.0" in engine.get("/metrics").text and "embeddings" in engine.get("/").text
    paths = engine.get("/openapi.json").json()["paths"]
    assert paths.keys() == {"/v1/embeddings", "/healthz", "/readyz", "/metrics"}
    assert error_of(engine.ask("POST", "/v1/embeddings", json={"input": url(GREY)}), 401) == "unauthorized"
    folder = engine.site.folders[""]
    with pytest.raises(IosrFastError, match="leave out --log"), open_site({"": folder}, Settings(max_error=0.1)):
        pass


def test_embeddings_wait_in_the_queue_of_predictions() -> None:
    classifier = load()
    gate = Gate(classifier)
    with serving(classifier, max_batch=1, max_queue=2, max_images=2) as client:
        gate.shut()
        waiting = client.start("POST", "/v1/embeddings", json={"input": [url(GREY), url(GREY)]})
        assert gate.entered.wait(20)
        assert error_of(client.predict(GREY), 503) == error_of(embed(client, input=url(GREY)), 503) == "queue_full"
        gate.open()
        assert rows_of(waiting.result(20)).shape == (2, 128)
