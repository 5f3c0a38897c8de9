"""POST /v1/predict on a real classifier of the demo: its answers, and every way it may refuse."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from iosr_fast import FewShotHead
from iosr_fast.exceptions import IosrFastError
from iosr_fast.head import head
from iosr_fast.serving.http.logs import Formatter
from iosr_fast.serving.http.opening import open_served
from iosr_fast.serving.http.settings import Settings
from tests.pictures import GREY
from tests.serving.batching_fakes import PATIENCE_S
from tests.serving.http_client import (
    AUTHORISED,
    CLASSES,
    SHOTS,
    Client,
    Gate,
    error_of,
    fields,
    form,
    load,
    probe_soon,
    queries,
    query_labels,
    serving,
)
from tests.serving.http_process import started
from tests.store.live_parts import with_tree
from tests.waiting import wait_until


def test_images_are_classified_in_order_as_the_library_does(shared: Client) -> None:
    classifier, images = shared.service.classifier, queries()
    body = shared.predict(*images, query=f"?top={CLASSES}&nearest=3").json()
    assert set(body) == {"version", "latency_ms", "predictions"} and body["version"] == classifier.version
    assert (
        np.mean([one["label"] == label for one, label in zip(body["predictions"], query_labels(), strict=True)]) > 0.5
    )
    for made, row in zip(body["predictions"], classifier.predict_proba(images), strict=True):
        told = {one["label"]: one["probability"] for one in made["top"]}
        np.testing.assert_allclose([told[name] for name in classifier.classes_], row, atol=1e-5)
        assert made["label"] == classifier.classes_[row.argmax()] == made["top"][0]["label"]
        assert made["logit"] == pytest.approx(made["zero_shot"] + made["cache"], abs=1e-4)
        assert len(made["nearest"]) == 3
        assert set(made["nearest"][0]) == {"example_id", "label", "class_id", "similarity"}
    (alone,) = shared.predict(images[0]).json()["predictions"]
    assert alone["label"] == body["predictions"][0]["label"] and len(alone["top"]) == 5 and alone["nearest"] == []


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
            body = client.predict(*images, query="?unknown=reject&keep=0.5").json()
            made, expected = body["predictions"], classifier.explain(images, unknown="reject", keep=0.5)
            assert body["version"] == classifier.version == number + 1
            assert [(one["label"], one["class_id"]) for one in made] == [(one.label, one.class_id) for one in expected]
            scores = [one.unknown.score for one in expected]
            assert [one["unknown"]["score"] for one in made] == pytest.approx(scores, abs=1e-3)
            assert [one["unknown"]["rejected"] for one in made] == [one["label"] is None for one in made]
            known = client.get("/v1/classifier?keep=0.5").json()["unknown"]
            assert known == {"promised": True, "keep": 0.5, "sentence": classifier.unknown_.summary(0.5)}
            assert 0 < sum(one.label is None for one in expected) < len(images)
            new = form(*images[3 * number :][:3])
            added = {"data": {"name": f"new {number}"}, "files": new, "headers": AUTHORISED}
            assert client.ask("POST", "/v1/classes", **added).status_code == 201
        assert client.predict(images[0]).json()["predictions"][0]["unknown"] is None
        refused = client.predict(images[0], query="?unknown=reject&keep=0.999")
        assert error_of(refused, 422) == "no_promise"
        with pytest.raises(IosrFastError) as error:
            classifier.unknown_.threshold(0.999)
        assert refused.json()["error"]["message"] == str(error.value)


def test_who_asks_for_unknown_pictures_first_waits_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    classifier, images = load(), queries()
    begun, go, fits = threading.Event(), threading.Event(), list[int]()

    def held(*given: Any) -> Any:
        fits.append(classifier.version)
        begun.set()
        assert go.wait(PATIENCE_S)
        return compute(*given)

    compute = head.fit_unknown
    monkeypatch.setattr(head, "fit_unknown", held)
    with serving(classifier) as client, ThreadPoolExecutor(3) as pool:
        added = {"data": {"name": "new"}, "files": form(images[0]), "headers": AUTHORISED}
        assert client.ask("POST", "/v1/classes", **added).status_code == 201 and not fits
        asked = [pool.submit(client.predict, images[1], query="?unknown=reject&keep=0.5") for _ in range(2)]
        asked.append(pool.submit(client.get, "/v1/classifier"))
        assert begun.wait(PATIENCE_S)
        assert client.predict(images[1]).status_code == 200 and not any(one.done() for one in asked)
        go.set()
        assert [one.result(PATIENCE_S).status_code for one in asked] == [200, 200, 200] and fits == [2]
        monkeypatch.setattr(client.service, "change", None)  # later ones wait for no change
        assert client.predict(images[1], query="?unknown=reject&keep=0.5").status_code == 200


def test_labels_are_accepted_by_a_promise_that_the_request_or_the_server_names() -> None:
    classifier, images = load(), queries()
    expected = classifier.explain(images, max_error=0.4)
    with serving(classifier) as client:
        made = client.predict(*images, query="?max_error=0.4").json()["predictions"]
        assert [(one["accepted"], one["label"]) for one in made] == [(one.accepted, one.label) for one in expected]
        assert {one["accepted"] for one in made} == {True, False}
        assert client.predict(images[0]).json()["predictions"][0]["accepted"] is None
        refused = client.predict(images[0], query="?max_error=0.001")
        assert error_of(refused, 422) == "no_promise" and "needs at least 2995" in refused.json()["error"]["message"]
        assert error_of(client.predict(images[0], query="?max_error=5e-324"), 422) == "no_promise"
    with serving(classifier, max_error=0.4) as client:
        again = client.predict(*images).json()["predictions"]
        assert [one["accepted"] for one in again] == [one["accepted"] for one in made]
        assert client.get("/v1/classifier").json()["max_error"] == 0.4
        for name in classifier.classes_[:-2].tolist():  # then left-out images are too few, and no label is accepted
            classifier.remove_class(name)
        classifier.remove_examples([one for c in classifier.classes() for one in classifier.examples(c.class_id)[2:]])
        assert classifier.snapshot().computed("strange_odds") is not None, "before an answer needs it"
        assert not any(one["accepted"] for one in client.predict(*images).json()["predictions"])


def test_a_tree_gives_nodes_their_places_and_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    images = queries()
    paths = [(), (), ("left",), ("left", "near"), ("left", "near"), (), (), ()]
    classifier = with_tree(load(), paths)
    expected = [one.to_dict() for one in classifier.explain(images, max_error=0.4)]
    nodes = [one for one in expected if one["level"]]
    assert {(one["label"], *one["path"]) for one in nodes} == {("near", "left"), ("left",)}
    assert all(one["accepted"] and one["class_id"] is None for one in nodes)
    limit = max(one["top"][0]["probability"] for one in nodes) + 1e-3
    monkeypatch.setattr(head, "strange_odds", lambda left_out: math.log(limit / (1 - limit)))
    with serving(classifier) as client:
        made = client.predict(*images, query="?max_error=0.4").json()["predictions"]
        for one, other in zip(made, expected, strict=True):
            assert one["path"] == [*other["path"]] and one.keys() == other.keys()
            assert all(one[name] == other[name] for name in ("label", "class_id", "level", "accepted"))
            assert one["probability"] == pytest.approx(other["probability"], abs=1e-5)
        assert [*client.service.recent.strangers.last] == [one["top"][0]["probability"] <= limit for one in made]
        rejected = client.predict(*images, query="?max_error=0.4&unknown=reject&keep=0.05").json()["predictions"]
        unknown = [one for one in rejected if one["label"] is None]
        assert unknown and all(
            one["level"] == 0 and one["probability"] == one["top"][0]["probability"] for one in unknown
        )
        assert client.predict(images[0]).json()["predictions"][0]["level"] == 0
        assert [one["path"] for one in client.get("/v1/classes").json()["classes"]] == [list(path) for path in paths]
        of_node = 'iosr_fast_predictions_total{class_id="",name="near"}'
        assert of_node in client.get("/metrics").text and "unknown_total 0" not in client.get("/metrics").text
        for class_id in ("~3", "~4"):
            client.ask("PATCH", f"/v1/classes/{class_id}", files=fields(parent="left"), headers=AUTHORISED)
        assert of_node not in client.get("/metrics").text and 'name="left"' in client.get("/metrics").text
        answers = client.get("/openapi.json").json()["components"]["schemas"]
        assert {"level", "path"} <= answers["Prediction"]["properties"].keys()


def test_the_classifier_is_described(shared: Client) -> None:
    classifier = shared.service.classifier
    known = classifier.calibration()
    told = shared.get("/v1/classifier").json()
    measured, summary = told["measured"], classifier.snapshot().summary()
    assert (measured["accuracy"], measured["images"]) == (known.accuracy, known.n_images)
    assert (measured["protocol"], measured["summary"], measured["stale"]) == ("loo", summary, False)
    assert measured["interval"][0] < known.accuracy < measured["interval"][1]
    assert told["doubts"] == list(classifier.snapshot().doubts)
    assert (told["model"], told["method"], told["version"]) == ("demo", classifier.method_, classifier.version)
    assert (told["classes"], told["examples"]) == (CLASSES, CLASSES * SHOTS)


@pytest.mark.parametrize(
    ("query", "told"),
    [
        *((wrong, wrong.partition("=")[2]) for wrong in ("top=0", "top=101", "top=many", "nearest=-1", "unknown=yes")),
        ("deadline_ms=60001", "deadline_ms"),
        ("keep=1", "keep"),
        ("max_error=0", "max_error"),
        ("keep=0.9", "keep only with unknown=reject"),
        *(
            (wrong, "expected the query parameters top, nearest, unknown, keep, max_error, deadline_ms, boxes, each")
            for wrong in ("unknwon=reject", "unknown=reject&keep=0.9&keep=0.5", "top=1&Top=1", "%FF")
        ),
    ],
)
def test_wrong_parameters_are_named(shared: Client, query: str, told: str) -> None:
    response = shared.predict(GREY, query=f"?{query}")
    assert error_of(response, 422) == "invalid_parameters" and told in response.json()["error"]["message"]


def test_a_deadline_that_passes_is_a_504() -> None:
    classifier = load()
    gate = Gate(classifier)
    with serving(classifier, max_batch=1, body_timeout_s=0.3) as client:  # which ends with the body
        gate.shut()
        first = client.start("POST", "/v1/predict?deadline_ms=60000", content=GREY)
        assert gate.entered.wait(20), "else the second one may be encoded before it"
        assert error_of(client.predict(GREY, query="?deadline_ms=300"), 504) == "deadline_exceeded"
        wait_until(lambda: client.service.batching.pending == 1)  # an image that was given up gives its place back
        gate.open()
        assert first.result(20).status_code == 200


def test_time_counts_from_the_last_byte(shared: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    check = shared.service.uploads.check

    async def slow() -> Any:
        yield GREY[:9]
        await asyncio.sleep(1.1)
        yield GREY[9:]

    assert shared.ask("POST", "/v1/predict?deadline_ms=1000", content=slow()).status_code == 200
    monkeypatch.setattr(shared.service.uploads, "check", lambda data: time.sleep(0.3) or check(data))
    assert error_of(shared.predict(GREY, query="?deadline_ms=299"), 504) == "deadline_exceeded"
    assert shared.predict(GREY).json()["latency_ms"] >= 300, "what reads the body is part of the answer"


def test_a_full_queue_refuses_a_request_at_once() -> None:
    classifier = load()
    gate = Gate(classifier)
    with serving(classifier, max_batch=1, max_queue=2, max_images=2) as client:
        gate.shut()
        waiting = client.service.batching.submit_many([GREY, GREY])
        response = client.predict(GREY)
        assert error_of(response, 503) == "queue_full" and int(response.headers["Retry-After"]) >= 1
        assert 'iosr_fast_refusals_total{reason="full"} 1.0' in client.get("/metrics").text
        gate.open()
        assert all(one.result(20).label for one in waiting)


def test_a_client_that_disconnects_frees_its_places() -> None:
    classifier = load()
    gate = Gate(classifier)
    with serving(classifier, max_batch=1) as client:
        gate.shut()
        held = client.start("POST", "/v1/predict?deadline_ms=60000", content=GREY)
        assert gate.entered.wait(20) and client.service.batching.pending == 1
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
        assert 'route="/v1/predict",status="499"} 1.0' in client.get("/metrics").text
        gate.open()
        assert held.result(20).status_code == 200


@pytest.mark.parametrize("error", [RuntimeError("CUDA error: out of luck"), MemoryError()])
def test_an_engine_that_fails_is_reported_and_recovers(error: Exception) -> None:
    classifier = load()
    gate = Gate(classifier)
    with serving(classifier) as client:
        gate.error = error
        response = client.predict(GREY)
        assert error_of(response, 503) == "engine_failed" and "luck" not in response.text
        response = client.get("/healthz")
        assert response.status_code == 503 and str(error) in response.json()["detail"]
        assert client.get("/readyz").status_code == 503
        gate.error = None
        assert client.predict(GREY).status_code == 200
        assert client.get("/healthz").status_code == client.get("/readyz").status_code == 200


def test_numbers_that_are_not_finite_are_no_answer(shared: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    (made,) = shared.service.classifier.explain([GREY])

    async def classify_many(images: Any, **options: Any) -> list[Any]:
        return [replace(made, probability=math.nan)]

    monkeypatch.setattr(shared.service.batching, "classify_many", classify_many)
    assert error_of(shared.predict(GREY), 500) == "internal"


def test_an_unexpected_error_is_a_500_with_its_trace_in_the_log(caplog: pytest.LogCaptureFixture, monkeypatch) -> None:
    with serving() as client:
        monkeypatch.setattr(type(client.service.uploads), "check", lambda *_: 1 / 0)
        with caplog.at_level(logging.INFO, "iosr_fast.serving"):
            response = client.predict(GREY, headers={"X-Request-ID": "abc-1"})
        assert error_of(response, 500) == "internal" and "division" not in response.text
        assert response.headers["X-Request-ID"] == "abc-1"
        failed = next(record for record in caplog.records if record.exc_info)
        assert "ZeroDivisionError" in Formatter(plain=False).format(failed)


# --- a head on embeddings ---

CENTRES = np.random.default_rng(0).standard_normal((4, 384))


@pytest.fixture(scope="module")
def served_head(head_folder: Path) -> Iterator[Client]:
    with serving(open_served(head_folder, Settings()), max_images=3) as client:
        yield client


@pytest.fixture(scope="module")
def head_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A FewShotHead on embeddings of 384 channels, saved."""
    folder = tmp_path_factory.mktemp("head") / "head"
    support = np.repeat(CENTRES, 10, axis=0) + 0.8 * np.random.default_rng(1).standard_normal((40, 384))
    FewShotHead().fit(support, np.repeat(["ant", "bee", "cat", "dog"], 10)).save(folder)
    return folder


def test_a_saved_head_is_served_without_encoder_and_decoders(head_folder: Path) -> None:
    rows = 3.0 * CENTRES
    with started(folder=head_folder) as server:
        query = {"top": 4, "nearest": 1, "unknown": "reject", "keep": 0.9}
        answer = server.client.post("/v1/predict", params=query, json={"embeddings": rows.tolist()}).json()
        process = Path("/proc") / str(server.lines[1]["pid"])
        assert not [
            name for name in ("onnxruntime", "openvino", "torch", "sklearn") if name in (process / "maps").read_text()
        ]
        assert not (process / "task" / process.name / "children").read_text()
    predicted = answer["predictions"]
    assert [one["label"] for one in predicted] == ["ant", "bee", "cat", "dog"] and answer["version"] == 1
    loaded = FewShotHead.load(head_folder)
    for one, expected in zip(predicted, loaded.predict_proba(rows), strict=True):
        told = {each["label"]: each["probability"] for each in one["top"]}
        np.testing.assert_allclose([told[name] for name in loaded.classes_], expected, atol=1e-5)
        assert one["nearest"][0]["label"] == one["label"] and one["zero_shot"] == 0 and not one["unknown"]["rejected"]


@pytest.mark.parametrize(
    ("body", "status", "told"),
    [
        (b"", 400, "got no JSON"),
        (b'{"embeddings": [[NaN]]}', 400, "got no JSON"),
        (b'{"\xff": [[1]]}', 400, "got no JSON"),  # a key that is no UTF-8
        (b'{"embeddings": [' + b'{"a":' * 7000, 400, "got no JSON"),
        (b"{}", 422, "missing required field `embeddings`"),
        (b'{"embeddings": [], "top": 1}', 422, "unknown field `top`"),
        (b'{"embeddings": []}', 422, "at most 3 rows of 384 numbers: got none"),
        (b'{"embeddings": [["1"]]}', 422, "Expected `float`, got `str` - at `$[0]` in row 0"),
        (b'{"embeddings": [[1e999]]}', 422, "out of range"),
        (b'{"embeddings": [1]}', 422, "Expected `array`, got `int` in row 0"),
        (b'{"embeddings": [' + b"[1]," * 1000, 413, "got 1000 rows"),  # before anything is read as a number
        (b'{"embeddings": [[' + b"x," * 6800 + b"]]}", 400, "got no JSON"),
        (b'{"embeddings": [[' + b"0," * 6800 + b"0]]}", 422, "got more than 13312 bytes in row 0"),
        ([[1] * 384, [1] * 383], 422, "got 383 numbers in row 1"),
        ([[1] * 384, [0] * 384], 422, "got zeros, which have no direction, in row 1"),
        ([[1] * 384] * 4, 413, "got 4 rows"),
        (b" " * 50_000, 413, "a body of at most"),
    ],
)
def test_wrong_embeddings_are_refused(
    served_head: Client, body: Any, status: int, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("iosr_fast.serving.http.embeddings._QUICK", 1000)  # longer bodies are read in a thread
    content = body if isinstance(body, bytes) else json.dumps({"embeddings": body}).encode()
    answer = served_head.ask("POST", "/v1/predict", content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code == status and told in answer.json()["error"]["message"], answer.text


def test_a_served_head_says_what_it_takes(served_head: Client, shared: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("iosr_fast.head.head.out_of_fold", None)  # called at the start, and by no request
    path, rows = "/v1/predict?max_error=0.1&unknown=reject", {"embeddings": [[1.0] * 384]}
    assert served_head.ask("POST", path, json=rows).json()["predictions"][0]["accepted"] in (True, False)
    probe_soon(monkeypatch)  # by a row of its own
    assert served_head.get("/healthz").json() == {"status": "ok", "detail": ""}
    assert (
        'POST {"embeddings": [[...], ...]}' in served_head.get("/").text
        and served_head.get("/static/app.js").status_code == 404
    )
    image = served_head.predict(queries()[0])
    assert error_of(image, 415) == "unsupported_type" and "takes embeddings and no images" in image.text
    boxes = served_head.ask("POST", "/v1/predict?boxes=[[0,0,1,1]]", json={"embeddings": [[1.0]]})
    assert error_of(boxes, 422) == "invalid_parameters" and "expected no boxes" in boxes.text
    rows = shared.ask("POST", "/v1/predict", json={"embeddings": [[1.0]]})
    assert error_of(rows, 415) == "unsupported_type" and "expected a Content-Type of an image" in rows.text
    for method, path in (("POST", "/v1/classes"), ("DELETE", "/v1/classes/~0"), ("POST", "/v1/retune")):
        refused = served_head.ask(method, path, headers=AUTHORISED)
        assert error_of(refused, 403) == "changes_disabled" and "a head takes no changes" in refused.text
    overview = served_head.get("/v1/classifier").json()
    assert (overview["classes"], overview["examples"], overview["model"]) == (4, 40, None)
    assert error_of(served_head.get("/v1/examples/e0/picture"), 404) == "no_picture"
    assert served_head.get("/v1/classes").json()["total"] == 4 and served_head.get("/readyz").status_code == 200
    assert b"iosr_fast_classes 4.0" in served_head.get("/metrics").content
    paths = served_head.get("/openapi.json").json()["paths"]
    assert [*paths["/v1/predict"]["post"]["requestBody"]["content"]] == [
        "application/json"
    ] and "/v1/retune" not in paths
