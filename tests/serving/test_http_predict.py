"""POST /v1/predict on a real classifier of the demo: its answers, and every way it may refuse."""

from __future__ import annotations

import logging
import threading
from typing import Any

import numpy as np
import pytest

from iosr_fast.exceptions import IosrFastError
from iosr_fast.methods.unknown import fit_unknown
from iosr_fast.serving.http.logs import JsonFormatter
from tests.pictures import GREY
from tests.serving.http_client import (
    AUTHORISED,
    CLASSES,
    SHOTS,
    Client,
    Gate,
    error_of,
    form,
    load,
    queries,
    query_labels,
    serving,
    wait_until,
)

pytestmark = pytest.mark.slow


def test_one_image_is_classified_as_the_library_does(shared: Client) -> None:
    classifier, images = shared.service.classifier, queries()
    truth = classifier.predict_proba(images)
    for image, row in zip(images[:5], truth, strict=False):
        body = shared.predict(image, query=f"?top={CLASSES}").json()
        assert set(body) == {"version", "latency_ms", "predictions"} and body["version"] == classifier.version
        (made,) = body["predictions"]
        told = {one["label"]: one["probability"] for one in made["top"]}
        np.testing.assert_allclose([told[name] for name in classifier.classes_], row, atol=1e-5)
        assert made["label"] == classifier.classes_[row.argmax()] == made["top"][0]["label"]
        assert made["logit"] == pytest.approx(made["zero_shot"] + made["cache"], abs=1e-4)
        assert made["nearest"] == [] and body["latency_ms"] > 0


def test_many_images_come_back_in_order(shared: Client) -> None:
    images = queries()
    body = shared.predict(*images, query="?top=2&nearest=3").json()
    labels = [made["label"] for made in body["predictions"]]
    assert labels == shared.service.classifier.predict(images).tolist()
    assert np.mean([a == b for a, b in zip(labels, query_labels(), strict=True)]) > 0.5
    for made in body["predictions"]:
        assert len(made["top"]) == 2 and len(made["nearest"]) == 3
        assert set(made["nearest"][0]) == {"example_id", "label", "class_id", "similarity"}


def test_a_bad_image_is_an_error_in_its_place(shared: Client) -> None:
    good, cut = queries()[0], queries()[1][:200]
    response = shared.predict(good, cut, b"<svg/>", good)
    assert response.status_code == 200
    made = response.json()["predictions"]
    assert made[0] == made[3] and "label" in made[0]
    assert [one["error"]["code"] for one in made[1:3]] == ["bad_image", "unsupported_type"]
    response = shared.predict(cut, b"<svg/>")
    assert response.status_code == 422 and len(response.json()["predictions"]) == 2


def test_unknown_images_are_rejected_as_by_the_library_also_after_a_change() -> None:
    classifier, images = load(), queries()
    with serving(classifier) as client:
        for number in range(2):
            assert client.get("/v1/classifier").json()["unknown"] is None
            body = client.predict(*images, query="?unknown=reject&keep=0.5").json()
            made, expected = body["predictions"], classifier.explain(images, unknown="reject", keep=0.5)
            assert body["version"] == classifier.version == number + 1
            assert [one["label"] for one in made] == [one.label for one in expected]
            for one, other in zip(made, expected, strict=True):
                score = pytest.approx(other.unknown.score, abs=1e-3)
                assert one["unknown"] == {"score": score, "rejected": one["label"] is None}
                assert one["class_id"] == other.class_id
            known = client.get("/v1/classifier?keep=0.5").json()["unknown"]
            assert known == {"promised": True, "keep": 0.5, "sentence": classifier.unknown_.summary(0.5)}
            assert 0 < sum(one.label is None for one in expected) < len(images)
            added = {"data": {"name": f"new {number}"}, "files": form(*images[:3]), "headers": AUTHORISED}
            assert client.ask("POST", "/v1/classes", **added).status_code == 201
        assert client.predict(images[0]).json()["predictions"][0]["unknown"] is None
        refused = client.predict(images[0], query="?unknown=reject&keep=0.999")
        assert error_of(refused, 422) == "no_promise"
        with pytest.raises(IosrFastError) as error:
            classifier.unknown_.threshold(0.999)
        assert refused.json()["error"]["message"] == str(error.value)


def test_others_do_not_wait_while_rejection_is_fitted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go = threading.Event(), threading.Event()
    fits: list[Any] = []

    def slow_fit(*args: Any) -> Any:
        fits.append(args)
        begun.set()
        assert go.wait(20)
        return fit_unknown(*args)

    monkeypatch.setattr("iosr_fast.head.head.fit_unknown", slow_fit)
    with serving() as client:
        asked = [client.start("POST", "/v1/predict?unknown=reject&keep=0.9", content=GREY) for _ in range(3)]
        assert begun.wait(20)
        assert client.predict(GREY).status_code == client.get("/v1/classifier").status_code == 200
        late = client.predict(GREY, query="?unknown=reject&keep=0.9&deadline_ms=50")
        assert error_of(late, 504) == "deadline_exceeded" and not any(one.done() for one in asked)
        go.set()
        assert [one.result(20).status_code for one in asked] == [200] * 3 and len(fits) == 1


def test_the_classifier_is_described(shared: Client) -> None:
    classifier, told = shared.service.classifier, shared.get("/v1/classifier").json()
    tuned = classifier.tuned_
    assert tuned is not None and told["measured"] == {
        "accuracy": tuned.accuracy,
        "interval": list(tuned.interval),
        "images": tuned.scored,
        "protocol": "loo",
        "summary": tuned.summary(),
        "stale": False,
    }
    assert (told["model"], told["method"], told["version"]) == ("demo", classifier.method_, classifier.version)
    assert (told["classes"], told["examples"]) == (CLASSES, CLASSES * SHOTS)


@pytest.mark.parametrize(
    "query", ["top=0", "top=101", "top=many", "nearest=-1", "deadline_ms=60001", "unknown=yes", "keep=1"]
)
def test_parameters_out_of_range_are_named(shared: Client, query: str) -> None:
    response = shared.predict(GREY, query=f"?{query}")
    assert error_of(response, 422) == "invalid_parameters"
    name, _, value = query.partition("=")
    assert name in response.json()["error"]["message"] and value in response.json()["error"]["message"]


@pytest.mark.parametrize(
    "query", ["unknwon=reject", "unknown=reject&keep=0.9&keep=0.5", "top=1&Top=1", "%FF", "keep=0.9"]
)
def test_parameters_are_known_and_there_once(shared: Client, query: str) -> None:
    response = shared.predict(GREY, query=f"?{query}")
    assert error_of(response, 422) == "invalid_parameters"
    if query == "keep=0.9":
        assert "keep only with unknown=reject" in response.json()["error"]["message"]
        return
    parameters = shared.get("/openapi.json").json()["paths"]["/v1/predict"]["post"]["parameters"]
    names = ", ".join(one["name"] for one in parameters)
    assert f"expected the query parameters {names}, each at most once, got" in response.json()["error"]["message"]


def test_a_deadline_that_passes_is_a_504() -> None:
    classifier = load()
    gate = Gate(classifier)
    with serving(classifier, max_batch=1) as client:
        gate.shut()
        first = client.start("POST", "/v1/predict?deadline_ms=60000", content=GREY)
        assert gate.entered.wait(20), "else the second one may be encoded before it"
        assert error_of(client.predict(GREY, query="?deadline_ms=30"), 504) == "deadline_exceeded"
        wait_until(lambda: client.service.batching.pending == 1)  # an image that was given up gives its place back
        gate.open()
        assert first.result(20).status_code == 200


def test_a_full_queue_is_refused_before_the_body_is_read() -> None:
    classifier = load()
    gate = Gate(classifier)
    with serving(classifier, max_batch=1, max_queue=2, max_images=2) as client:
        gate.shut()
        waiting = client.service.batching.submit_many([GREY, GREY])
        read = []

        async def body() -> Any:
            read.append(1)
            yield GREY

        response = client.ask("POST", "/v1/predict", content=body())
        assert error_of(response, 503) == "queue_full" and not read
        assert int(response.headers["Retry-After"]) >= 1
        gate.open()
        assert all(one.result(20).label for one in waiting)


def test_a_client_that_disconnects_frees_its_places() -> None:
    classifier = load()
    gate = Gate(classifier)
    with serving(classifier, max_batch=1) as client:
        gate.shut()
        held = client.start("POST", "/v1/predict?deadline_ms=60000", content=GREY)
        wait_until(lambda: client.service.batching.pending == 1)
        messages = [{"type": "http.disconnect"}, {"type": "http.request", "body": GREY, "more_body": False}]

        async def receive() -> dict[str, Any]:
            return messages.pop() if len(messages) > 1 else messages[0]

        async def send(message: Any) -> None:
            pytest.fail(f"nobody is there to hear {message}")

        scope = {"type": "http", "method": "POST", "path": "/v1/predict", "query_string": b"", "headers": []}
        client.run(
            client.app({**scope, "http_version": "1.1", "scheme": "http", "server": ("test", 80)}, receive, send)
        )
        wait_until(lambda: client.service.batching.pending == 1)
        gate.open()
        assert held.result(20).status_code == 200


def test_an_engine_that_fails_is_reported_and_recovers() -> None:
    classifier = load()
    gate = Gate(classifier)
    with serving(classifier) as client:
        gate.error = RuntimeError("CUDA error: out of luck")
        response = client.predict(GREY)
        assert error_of(response, 503) == "engine_failed" and "luck" not in response.text
        response = client.get("/healthz")
        assert response.status_code == 503 and "out of luck" in response.json()["detail"]
        assert client.get("/readyz").status_code == 503
        gate.error = None
        assert client.predict(GREY).status_code == 200
        assert client.get("/healthz").status_code == client.get("/readyz").status_code == 200


def test_an_unexpected_error_is_a_500_with_its_trace_in_the_log(caplog: pytest.LogCaptureFixture, monkeypatch) -> None:
    with serving() as client:
        monkeypatch.setattr(type(client.service.uploads), "check", lambda *_: 1 / 0)
        with caplog.at_level(logging.INFO, "iosr_fast.serving"):
            response = client.predict(GREY, headers={"X-Request-ID": "abc-1"})
        assert error_of(response, 500) == "internal" and "division" not in response.text
        assert response.headers["X-Request-ID"] == "abc-1"
        failed = next(record for record in caplog.records if record.exc_info)
        assert "ZeroDivisionError" in JsonFormatter().format(failed)
