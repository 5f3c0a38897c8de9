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
from unittest.mock import AsyncMock, Mock

import numpy as np
import pytest

from iosr_fast import FewShotHead
from iosr_fast.exceptions import IosrFastError
from iosr_fast.head import head
from iosr_fast.serving.http.logs import Formatter
from iosr_fast.serving.http.open_site import open_site
from iosr_fast.serving.http.settings import Settings
from tests.pictures import GREY
from tests.serving import http_client
from tests.serving.batching_fakes import PATIENCE_S
from tests.serving.http_client import AUTHORISED, CLASSES, SHOTS, Client, Gate, error_of, form, load, queries, serving
from tests.serving.http_process import started
from tests.store.live_parts import with_tree
from tests.waiting import wait_until


def test_images_are_classified_in_order_as_in_the_library(shared: Client) -> None:
    classifier, images, truth = shared.served.classifier, queries(), http_client.query_labels()
    body = shared.predict(*images, query=f"?top={CLASSES}&nearest=3").json()
    assert set(body) == {"version", "latency_ms", "predictions"} and body["version"] == classifier.version
    assert np.mean([one["label"] == label for one, label in zip(body["predictions"], truth, strict=True)]) > 0.5
    for made, row in zip(body["predictions"], classifier.predict_proba(images), strict=True):
        told = {one["label"]: one["probability"] for one in made["top"]}
        np.testing.assert_allclose([told[name] for name in classifier.classes_], row, atol=1e-5)
        assert made["label"] == classifier.classes_[row.argmax()] == made["top"][0]["label"]
        assert made["logit"] == pytest.approx(made["zero_shot"] + made["cache"], abs=1e-4)
        assert len(made["nearest"]) == 3
        assert set(made["nearest"][0]) == {"example_id", "label", "class_id", "similarity"}
    (alone,) = shared.predict(images[0]).json()["predictions"]
    assert alone["label"] == body["predictions"][0]["label"] and len(alone["top"]) == 5
    assert alone["nearest"] == [] and alone["unknown"] is alone["accepted"] is None and alone["level"] == 0


def test_a_bad_image_is_an_error_in_its_place(shared: Client) -> None:
    good, cut = queries()[0], queries()[1][:200]
    response = shared.predict(good, cut, b"<svg/>", good)
    made = response.json()["predictions"]
    assert response.status_code == 200 and made[0] == made[3] and "label" in made[0]
    assert [one["error"]["code"] for one in made[1:3]] == ["bad_image", "unsupported_type"]
    response = shared.predict(cut, b"<svg/>")
    assert response.status_code == 422 and len(response.json()["predictions"]) == 2


def add_class(client: Client, name: str, *images: bytes) -> None:
    added = client.ask("POST", "/v1/classes", data={"name": name}, files=form(*images), headers=AUTHORISED)
    assert added.status_code == 201


def test_unknown_images_are_rejected_also_after_a_change() -> None:
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
            add_class(client, f"new {number}", *images[3 * number :][:3])
        refused = client.predict(images[0], query="?unknown=reject&keep=0.999")
        with pytest.raises(IosrFastError) as error:
            classifier.unknown_.threshold(0.999)
        assert error_of(refused, 422) == "no_promise" and refused.json()["error"]["message"] == str(error.value)


def test_who_asks_for_unknown_pictures_first_waits_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    classifier, image, query = load(), queries()[1], "?unknown=reject&keep=0.5"
    begun, go, compute, fits = threading.Event(), threading.Event(), head.fit_unknown, list[int]()

    def held(*given: Any) -> Any:
        fits.append(classifier.version)
        begun.set()
        assert go.wait(PATIENCE_S)
        return compute(*given)

    monkeypatch.setattr(head, "fit_unknown", held)
    with serving(classifier) as client, ThreadPoolExecutor(3) as pool:
        add_class(client, "new", queries()[0])
        assert not fits
        asked = [pool.submit(client.predict, image, query=query) for _ in range(2)]
        asked.append(pool.submit(client.get, "/v1/classifier"))
        assert begun.wait(PATIENCE_S)
        assert client.predict(image).status_code == 200 and not any(one.done() for one in asked)
        go.set()
        assert [one.result(PATIENCE_S).status_code for one in asked] == [200, 200, 200] and fits == [2]
        monkeypatch.setattr(client.served, "change", None)  # later ones wait for no change
        assert client.predict(image, query=query).status_code == 200


def test_labels_are_accepted_by_a_promise() -> None:
    classifier, images = load(), queries()
    expected = [one.accepted for one in classifier.explain(images, max_error=0.4)]
    with serving(classifier) as client:  # that the request names
        made = client.predict(*images, query="?max_error=0.4").json()["predictions"]
        assert [one["accepted"] for one in made] == expected and {*expected} == {True, False}
        refused = client.predict(images[0], query="?max_error=0.001")
        assert error_of(refused, 422) == "no_promise" and "needs at least 2995" in refused.json()["error"]["message"]
        assert error_of(client.predict(images[0], query="?max_error=5e-324"), 422) == "no_promise"
    with serving(classifier, max_error=0.4) as client:  # or the server
        assert [one["accepted"] for one in client.predict(*images).json()["predictions"]] == expected
        assert client.get("/v1/classifier").json()["max_error"] == 0.4
        for name in classifier.classes_[:-2].tolist():  # then left-out images are too few, and no label is accepted
            classifier.remove_class(name)
        classifier.remove_examples([one for c in classifier.classes() for one in classifier.examples(c.class_id)[2:]])
        assert classifier.snapshot().computed("strange_odds") is not None, "before an answer needs it"
        assert not any(one["accepted"] for one in client.predict(*images).json()["predictions"])


def test_a_tree_gives_nodes_their_places_and_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    images, paths = queries(), [(), (), ("left",), ("left", "near"), ("left", "near"), (), (), ()]
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
        assert [*client.served.recent.strangers.last] == [one["top"][0]["probability"] <= limit for one in made]
        rejected = client.predict(*images, query="?max_error=0.4&unknown=reject&keep=0.05").json()["predictions"]
        unknown = [one for one in rejected if one["label"] is None]
        assert unknown and all(one["probability"] == one["top"][0]["probability"] for one in unknown)
        assert not any(one["level"] for one in unknown)
        of_node = 'iosr_fast_predictions_total{class_id="",name="near"}'
        assert of_node in client.get("/metrics").text and "unknown_total 0" not in client.get("/metrics").text
        for class_id in ("~3", "~4"):
            moved = {"files": http_client.fields(parent="left"), "headers": AUTHORISED}
            client.ask("PATCH", f"/v1/classes/{class_id}", **moved)
        assert of_node not in client.get("/metrics").text and 'name="left"' in client.get("/metrics").text


def test_the_classifier_is_described(shared: Client) -> None:
    classifier, told = shared.served.classifier, shared.get("/v1/classifier").json()
    known, measured, snapshot = classifier.calibration(), told["measured"], classifier.snapshot()
    assert (measured["accuracy"], measured["images"]) == (known.accuracy, known.n_images)
    assert (measured["protocol"], measured["summary"], measured["stale"]) == ("loo", snapshot.summary(), False)
    assert measured["interval"][0] < known.accuracy < measured["interval"][1]
    assert told["doubts"] == list(snapshot.doubts)
    assert (told["model"], told["method"], told["version"]) == ("demo", classifier.method_, classifier.version)
    assert (told["classes"], told["examples"]) == (CLASSES, CLASSES * SHOTS)


@pytest.mark.parametrize(
    ("query", "told"),
    [
        *((f"top={top}", top) for top in ("0", "101", "many")),
        ("nearest=-1", "nearest"),
        ("unknown=yes", "yes"),
        ("deadline_ms=60001", "deadline_ms"),
        ("keep=1", "keep"),
        ("max_error=0", "max_error"),
        ("keep=0.9", "keep only with unknown=reject"),
        *((wrong, "expected no such parameter; ") for wrong in ("unknwon=reject", "top=1&Top=1", "%FF")),
        ("unknown=reject&keep=0.9&keep=0.5", "each query parameter once, got 'keep'"),
    ],
)
def test_wrong_parameters_are_named(shared: Client, query: str, told: str) -> None:
    response = shared.predict(GREY, query=f"?{query}")
    assert error_of(response, 422) == "invalid_parameters" and told in response.json()["error"]["message"]


def test_late_full_and_abandoned_requests_give_up_their_places() -> None:
    classifier = load()
    gate = Gate(classifier)
    with serving(classifier, max_batch=1, max_queue=4, max_images=4, body_timeout_s=0.3) as client:
        gate.shut()
        held = client.start("POST", "/v1/predict?deadline_ms=60000", content=GREY)
        assert gate.entered.wait(20), "else the next one may be encoded before it"
        late = client.predict(GREY, query="?deadline_ms=400")  # the timeout ends with the body
        assert error_of(late, 504) == "deadline_exceeded"
        wait_until(lambda: client.served.batching.pending == 1)

        messages = [{"type": "http.disconnect"}, {"type": "http.request", "body": GREY, "more_body": False}]
        receive = AsyncMock(side_effect=lambda: messages.pop() if len(messages) > 1 else messages[0])
        scope = {"type": "http", "method": "POST", "path": "/v1/predict", "headers": []}
        scope |= {"query_string": b"deadline_ms=60000", "http_version": "1.1", "scheme": "http", "server": ("test", 80)}
        client.run(client.app(scope, receive, Mock(side_effect=AssertionError("nobody is there to hear"))))
        wait_until(lambda: client.served.batching.pending == 1)

        waiting = client.served.batching.submit_many([GREY] * 3)
        assert error_of(client.predict(GREY), 503) == "queue_full"
        gate.open()
        assert held.result(20).status_code == 200 and all(one.result(20).label for one in waiting)
        for counted in ('route="/v1/predict",status="499"} 1.0', 'iosr_fast_refusals_total{reason="full"} 1.0'):
            assert counted in client.get("/metrics").text


def test_time_counts_from_the_last_byte(shared: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    check = shared.served.uploads.check

    async def slow() -> Any:
        yield GREY[:9]
        await asyncio.sleep(1.1)
        yield GREY[9:]

    assert shared.ask("POST", "/v1/predict?deadline_ms=1000", content=slow()).status_code == 200
    monkeypatch.setattr(shared.served.uploads, "check", lambda data: time.sleep(0.3) or check(data))
    assert error_of(shared.predict(GREY, query="?deadline_ms=299"), 504) == "deadline_exceeded"
    assert shared.predict(GREY).json()["latency_ms"] >= 300, "what reads the body is part of the answer"


@pytest.mark.parametrize("error", [RuntimeError("CUDA error: out of luck"), MemoryError()])
def test_an_engine_that_fails_is_reported_and_recovers(error: Exception) -> None:
    classifier = load()
    gate = Gate(classifier)
    with serving(classifier) as client:
        gate.error = error
        response, health = client.predict(GREY), client.get("/healthz")
        assert error_of(response, 503) == "engine_failed" and "luck" not in response.text
        assert health.status_code == client.get("/readyz").status_code == 503 and str(error) in health.json()["detail"]
        gate.error = None
        assert client.predict(GREY).status_code == 200
        assert client.get("/healthz").status_code == client.get("/readyz").status_code == 200


def test_an_unexpected_error_is_told_in_the_log_alone(shared: Client, caplog: Any, monkeypatch) -> None:
    (made,) = shared.served.classifier.explain([GREY])
    results = [[replace(made, probability=math.nan)], ZeroDivisionError("division")]
    monkeypatch.setattr(shared.served.batching, "classify_many", AsyncMock(side_effect=results))
    with caplog.at_level(logging.INFO, "iosr_fast.serving"):
        for told in ("expected finite logits", "ZeroDivisionError: division"):
            response = shared.predict(GREY, headers={"X-Request-ID": "abc-1"})
            assert error_of(response, 500) == "internal" and response.headers["X-Request-ID"] == "abc-1"
            assert told not in response.text
            failed = [record for record in caplog.records if record.exc_info][-1]
            assert told in Formatter(plain=False).format(failed)


# --- a head on embeddings ---

CENTRES = np.random.default_rng(0).standard_normal((4, 384))


@pytest.fixture(scope="module")
def head_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A FewShotHead on embeddings of 384 channels, saved."""
    folder = tmp_path_factory.mktemp("head") / "head"
    support = np.repeat(CENTRES, 10, axis=0) + 0.8 * np.random.default_rng(1).standard_normal((40, 384))
    FewShotHead().fit(support, np.repeat(["ant", "bee", "cat", "dog"], 10)).save(folder)
    return folder


@pytest.fixture(scope="module")
def served_head(head_folder: Path) -> Iterator[Client]:
    with open_site({"": head_folder}, Settings(token=http_client.TOKEN, max_images=3)) as site:
        client = Client(site)
        yield client
        client.close()


def test_a_saved_head_is_served_without_encoder_and_decoders(head_folder: Path) -> None:
    rows = 3.0 * CENTRES
    with started(folder=head_folder) as server:
        query = {"top": 4, "nearest": 1, "unknown": "reject", "keep": 0.9}
        answer = server.client.post("/v1/predict", params=query, json={"embeddings": rows.tolist()}).json()
        process = Path("/proc") / str(server.lines[1]["pid"])
        loaded = (process / "maps").read_text()
        assert not [name for name in ("onnxruntime", "openvino", "torch", "sklearn") if name in loaded]
        assert not (process / "task" / process.name / "children").read_text()
    predicted = answer["predictions"]
    assert [one["label"] for one in predicted] == ["ant", "bee", "cat", "dog"] and answer["version"] == 1
    library = FewShotHead.load(head_folder)
    for one, expected in zip(predicted, library.predict_proba(rows), strict=True):
        told = {each["label"]: each["probability"] for each in one["top"]}
        np.testing.assert_allclose([told[name] for name in library.classes_], expected, atol=1e-5)
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
def test_wrong_embeddings_are_refused(served_head: Client, body: Any, status: int, told: str, monkeypatch) -> None:
    monkeypatch.setattr("iosr_fast.serving.http.row_uploads._QUICK", 1000)  # longer bodies are read in a thread
    content = body if isinstance(body, bytes) else json.dumps({"embeddings": body}).encode()
    answer = served_head.ask("POST", "/v1/predict", content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code == status and told in answer.json()["error"]["message"], answer.text


def test_a_served_head_says_what_it_takes(served_head: Client, shared: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("iosr_fast.head.head.out_of_fold", None)  # called at the start, and by no request
    path, rows = "/v1/predict?max_error=0.1&unknown=reject", {"embeddings": [[1.0] * 384]}
    assert served_head.ask("POST", path, json=rows).json()["predictions"][0]["accepted"] in (True, False)
    http_client.probe_soon(monkeypatch)  # by a row of its own
    assert served_head.get("/healthz").json() == {"status": "ok", "detail": ""}
    for response, status, code, told in (
        (served_head.predict(queries()[0]), 415, "unsupported_type", "takes embeddings and no images"),
        (served_head.ask("POST", f"{path}&boxes=[[0,0,1,1]]", json=rows), 422, "invalid_parameters", "query.boxes"),
        (shared.ask("POST", path, json=rows), 415, "unsupported_type", "expected a Content-Type of an image"),
        *(
            (served_head.ask(method, path, headers=AUTHORISED), 403, "changes_disabled", "a head takes no changes")
            for method, path in (("POST", "/v1/classes"), ("DELETE", "/v1/classes/~0"), ("POST", "/v1/retune"))
        ),
        (served_head.get("/v1/examples/e0/picture"), 404, "no_picture", ""),
    ):
        assert error_of(response, status) == code and told in response.text
    overview = served_head.get("/v1/classifier").json()
    assert (overview["classes"], overview["examples"], overview["model"]) == (4, 40, None)
    assert 'POST {"embeddings": [[...], ...]}' in served_head.get("/").text
    assert served_head.get("/static/app.js").status_code == 404
    paths = served_head.get("/openapi.json").json()["paths"]
    assert [*paths["/v1/predict"]["post"]["requestBody"]["content"]] == ["application/json"]
    assert "/v1/retune" not in paths
