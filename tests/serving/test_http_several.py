"""Several classifiers in one server: what they share, what each has alone, and what one can't do to the others."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import openapi_spec_validator
import pytest
import schemathesis
from hypothesis import given
from typer.testing import CliRunner

from iosr_fast import FewShotHead
from iosr_fast.classifier import Classifier
from iosr_fast.cli import app
from iosr_fast.exceptions import QueueFullError
from iosr_fast.serving.batching import engine
from iosr_fast.serving.http.app import warm
from iosr_fast.serving.http.open_site import named_folders, open_site
from iosr_fast.serving.http.settings import Settings
from tests.pictures import GREY
from tests.serving import http_client
from tests.serving.http_client import AUTHORISED, CLASSES, TOKEN, Client, error_of, form, queries, serving_several
from tests.serving.http_process import started
from tests.serving.test_http_schemas import CHECKS, QUICK

pytestmark = pytest.mark.slow
SERVED = ["kind", "letter", "rows", "turned"]  # turned: without EXIF orientation, so with an encoder of its own


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of saved classifiers: SERVED, one that is damaged, and one with a pipe that would never be read."""
    folder = tmp_path_factory.mktemp("shelf")
    images, labels = http_client.support()
    letters = [label[0] for label in labels]
    letter = Classifier("demo", runtime="onnxruntime", method="tip-adapter")
    letter.fit(images[:12], letters[:12]).save(folder / "letter")
    turned = Classifier("demo", runtime="onnxruntime", method="tip-adapter++", exif_orientation=False)
    turned.fit(images, letters).save(folder / "turned")
    rng = np.random.default_rng(0)
    FewShotHead().fit(rng.standard_normal((20, 16)), ["ant", "bee"] * 10).save(folder / "rows")
    for name in ("kind", "broken"):
        shutil.copytree(http_client.bundle(), folder / name)
    damaged = folder / "broken" / "support.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    (folder / "piped").mkdir()
    os.mkfifo(folder / "piped" / "manifest.json")
    return folder


@pytest.fixture(scope="module")
def several(shelf: Path) -> Iterator[Client]:
    """For tests that change nothing."""
    with serving_several(shelf, decode_threads=2) as client:
        yield client


def ask(client: Client, *names: str, images: list[bytes] | None = None, query: Any = None, **options: Any) -> Any:
    """The answer of /v1/predict of these classifiers."""
    params = {"classifier": list(names), "top": 2, "nearest": 1, **(query or {})}
    return client.ask("POST", "/v1/predict", params=params, files=form(*(images or [GREY])), **options)


def answers_of(client: Client, *names: str, **options: Any) -> dict[str, Any]:
    """What each of them answers, by name, but for the time that it took."""
    answers = ask(client, *names, **options).json()["classifiers"]
    return {name: {key: answer[key] for key in answer if key != "latency_ms"} for name, answer in answers.items()}


def test_answers_for_several_are_those_of_each(several: Client, shelf: Path) -> None:
    *images, damaged = *queries()[:3], b"zip"
    answers = ask(several, "turned", "letter", "kind", images=[*images, damaged]).json()["classifiers"]
    assert list(answers) == ["turned", "letter", "kind"]
    for name, answer in answers.items():
        path = f"/v1/classifiers/{name}/predict?top=2&nearest=1"
        own = several.ask("POST", path, files=form(*images, damaged)).json()
        alone = Classifier.load(shelf / name).explain(images)
        assert own.keys() == answer.keys() and own["version"] == answer["version"] == 1
        assert answer["predictions"].pop() == own["predictions"].pop() and len(own["predictions"]) == 3
        for one, other, expected in zip(answer["predictions"], own["predictions"], alone, strict=True):
            assert one["label"] == other["label"] == expected.label and one.keys() == other.keys()
            assert [one["logit"], other["logit"]] == pytest.approx([expected.logit] * 2, abs=1e-3)
    kind, letter = (several.site.served[name] for name in ("kind", "letter"))
    assert kind.batching is letter.batching and kind.classifier.encoder is letter.classifier.encoder
    assert len(several.site.engines) == 3


def errors(client: Client) -> int:
    text = client.site.metrics.text().decode()
    return sum(int(float(count)) for count in re.findall(r"^iosr_fast_errors_total{.*} (.*)$", text, re.MULTILINE))


def test_an_error_has_its_place_and_is_counted_once(several: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    for names, query, code in (  # of the whole request, or of each
        ("rows", {}, "unsupported_type"),
        ("kinds", {}, "no_classifier"),
        ("kind kind", {}, "invalid_parameters"),
        ("rows broken", {}, "unsupported_type"),
        ("rows broken kind", {}, ["unsupported_type", "not_served", None]),
        ("kind letter", {"max_error": 0.2}, [None, "no_promise"]),  # which needs 14 support images
        ("full kind", {}, ["queue_full", None]),
        ("full", {}, "queue_full"),
    ):
        if "full" in names:
            full = Mock(side_effect=QueueFullError("it is full", 7.0))
            monkeypatch.setattr(several.site.served["turned"].batching, "submit_many", full)
        before, response = errors(several), ask(several, *names.replace("full", "turned").split(), query=query)
        answers, counted = response.json().get("classifiers", {}), errors(several) - before
        told = [answer.get("error", {}).get("code") for answer in answers.values()] or response.json()["error"]["code"]
        assert told == code and counted == (1 if isinstance(code, str) else len(code) - 1), names
    assert response.status_code == 503 and response.headers["Retry-After"] == "7"
    assert "did you mean 'kind'? " in ask(several, "kinds").text
    before, bad = errors(several), ask(several, "kind", "letter", images=[b"zip"])
    assert bad.status_code == 422 and set(bad.json()["classifiers"]) == {"kind", "letter"}
    assert errors(several) - before == 2
    assert error_of(several.ask("POST", "/v1/predict", content=GREY), 422) == "invalid_parameters"


def test_a_path_names_one_classifier(several: Client) -> None:
    for name, total in (("kind", CLASSES), ("rows", 2)):
        assert several.get(f"/v1/classifiers/{name}/classes").json()["total"] == total
        assert several.get(f"/v1/classifiers/{name}/").headers["Content-Type"].startswith("text/")
    rows = several.ask("POST", "/v1/classifiers/rows/predict", json={"embeddings": [[1.0] * 16]})
    assert rows.json()["predictions"][0]["label"] in ("ant", "bee")
    assert several.get("/v1/classifiers/kind/static/page.js").status_code == 200
    assert several.get("/v1/classifiers/kind/openapi.json").json() == several.get("/openapi.json").json()
    assert error_of(several.ask("POST", "/v1/classifiers/kinds/predict", content=GREY), 404) == "no_classifier"
    for path in ("", "/v1/classes", "/healthz"):
        assert error_of(several.get(f"/v1/classifiers/kind{path}"), 404) == "not_found"
    unnamed = several.get("/v1/classes")
    assert error_of(unnamed, 404) == "no_classifier" and "expected /v1/classifiers/NAME/..." in unnamed.text


def test_a_damaged_one_is_refused_alone(several: Client, shelf: Path) -> None:
    listed = {one.pop("name"): one for one in several.get("/v1/classifiers").json()["classifiers"]}
    assert list(listed) == sorted([*SERVED, "broken", "piped"])
    assert listed["piped"]["error"].startswith("expected a regular file at piped/manifest.json")
    assert listed["kind"] | {"model": "demo", "error": None, "version": 1, "classes": CLASSES} == listed["kind"]
    assert "support.safetensors" in listed["broken"]["error"] and str(shelf) not in listed["broken"]["error"]
    for method, path in (("GET", "classes"), ("POST", "predict"), ("GET", "")):
        assert error_of(several.ask(method, f"/v1/classifiers/broken/{path}"), 503) == "not_served"
    ready = several.get("/readyz")
    assert ready.status_code == 200 and ready.json()["detail"].startswith("broken: ")
    page = several.get("/")
    assert "Content-Security-Policy" in page.headers and "static/classifiers.js" in page.text


def test_changes_are_of_one_and_replayed_by_name(shelf: Path, tmp_path: Path) -> None:
    made = {"log": tmp_path / "logs", "decode_threads": 2, "token": f"all {TOKEN}\nshop shops-secret-token predict"}
    shop, path = {"Authorization": "Bearer shops-secret-token"}, "/v1/classifiers/kind/classes"
    made["log"].mkdir()
    with serving_several(shelf, **made, allow_origin=("https://shop.example",)) as client:
        before = answers_of(client, "letter", "turned", headers=shop)
        assert error_of(ask(client, "kind"), 401) == error_of(client.ask("POST", "/v1/classifiers/kind/predict"), 401)
        assert client.ask("POST", "/v1/classifiers/kind/predict", content=GREY, headers=shop).status_code == 200
        for headers, status in ((shop, 403), ({}, 401), (AUTHORISED, 201)):
            asked = {"data": {"name": "grey"}, "files": form(GREY)}
            response = client.ask("POST", path, **asked, headers={**headers, "Origin": "https://shop.example"})
            assert response.status_code == status, response.text
            assert response.headers.get_list("Access-Control-Allow-Origin") == ["https://shop.example"]
        after = answers_of(client, "kind", "letter", "turned", headers=shop)
        assert after.pop("kind")["predictions"][0]["label"] == "grey" and json.dumps(after) == json.dumps(before)
    assert sorted(path.name for path in made["log"].glob("*.db")) == ["kind.db", "letter.db", "turned.db"]
    with serving_several(shelf, **made) as client:
        versions = [one["version"] for one in client.get("/v1/classifiers").json()["classifiers"]]
        assert versions == [None, 2, 1, None, 1, 1]


def test_metrics_name_classifier_and_engine(several: Client) -> None:
    ask(several, "kind", "letter")
    several.get("/v1/classifiers/turned/classes")
    text = several.get("/metrics").text
    for series in (
        r'iosr_fast_predictions_total{class_id="~\d",classifier="kind",name=".*"}',
        r'iosr_fast_classes{classifier="kind"} 8.0',
        r'iosr_fast_image_seconds_count{engine="kind",outcome="ok"}',
        r'iosr_fast_request_seconds_count{classifier="",method="POST",route="/v1/predict",status="200"}',
        r'iosr_fast_request_seconds_count{classifier="turned",method="GET",route="/v1/classes",status="200"}',
        r"iosr_fast_body_bytes 0.0",
    ):
        assert re.search(rf"^{series}", text, re.MULTILINE), series
    lines = [line.rpartition(" ")[0] for line in text.splitlines()]
    assert len(set(lines)) == len(lines) and 'engine="letter"' not in text and text.count("TYPE process_cpu") == 1


def test_one_that_fails_leaves_the_others_whole(shelf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    predict = engine.predict
    http_client.probe_soon(monkeypatch)
    with serving_several(shelf, decode_threads=2) as client:
        before = answers_of(client, "kind", "letter")

        def fail(head: Any, *rest: Any) -> Any:
            if head.uids == client.site.served["letter"].head.uids and len(head.uids) < CLASSES:
                raise RuntimeError("no kernel image")
            return predict(head, *rest)

        monkeypatch.setattr(engine, "predict", fail)
        after = answers_of(client, "kind", "letter")
        assert after["letter"]["error"]["code"] == "engine_failed" and after["kind"] == before["kind"]
        assert error_of(client.ask("POST", "/v1/classifiers/letter/predict", content=GREY), 503) == "engine_failed"
        assert "letter: no kernel image" in client.get("/readyz").json()["detail"]
        assert client.get("/healthz").json()["status"] == "ok"
        monkeypatch.setattr(client.site.served["turned"].batching, "warm", Mock(side_effect=RuntimeError("no GPU")))
        warm(client.app, client.site)  # the others are ready
        client.site.draining = True
        assert client.get("/v1/classifiers/kind/classes").headers["Connection"] == "close"


def test_what_can_not_be_served_together_is_refused(shelf: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("iosr_fast.serving.http.server._Server.run", Mock(side_effect=AssertionError("it serves")))
    shutil.copytree(shelf / "rows", tmp_path / "kind")
    shutil.copytree(shelf / "rows", tmp_path / "two words")
    (tmp_path / "file").touch()
    for options, told in (
        ([shelf, tmp_path / "kind"], "'kind' of 2 folders; rename it"),
        ([shelf, tmp_path / "two words"], "'two words'; rename it"),
        ([shelf, "--expected-digest", "sha256:00"], "with one folder alone"),
        ([shelf, "--log", tmp_path / "file"], "--log to be a folder"),
        ([shelf / "broken", tmp_path / "nothing"], "broken can't be served: "),
    ):
        done = CliRunner().invoke(app, ["serve", *map(str, options), "--port", "0"])
        assert done.exit_code == 2 and told in done.output, done.output
    monkeypatch.chdir(shelf / "broken")
    refused = CliRunner().invoke(app, ["serve", ".", "../broken/absent"])
    assert "broken can't be served: broken is not a complete classifier: support.safetensors" in refused.output
    assert named_folders([shelf / "kind"]) == {"": shelf / "kind"}
    assert list(named_folders([shelf / "kind", shelf / "rows"])) == ["kind", "rows"]


def test_a_process_serves_a_folder_of_classifiers(shelf: Path, tmp_path: Path) -> None:
    options = ("--collect", str(tmp_path / "kept"), "--max-error", "50%", "--log", str(tmp_path / "logs"))
    with started(*options, folder=shelf) as process:
        events = [(line["event"], line.get("classifier")) for line in process.lines]
        assert [name for event, name in events if event == "loaded"] == SERVED
        assert ("refused", "broken") in events and ("listening", None) in events
        with open_site(named_folders([shelf]), Settings(log=tmp_path / "logs")) as site:
            pass
        assert site.refused["kind"].endswith("another process writes this log: 'logs/kind.db'"), "no path"
        assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == ["kind", "letter", "turned"]
        shutil.rmtree(tmp_path / "kept" / "turned")
        process.client.post("/v1/predict?classifier=turned", files=form(*queries()[1:], GREY))
        while (line := process.wait_for("log"))["logger"] != "iosr_fast.serving.collector":
            pass
        assert line["classifier"] == "turned"
        path = "/v1/classifiers/letter/classes"
        process.client.post(path, data={"name": "grey"}, files=form(GREY), headers=AUTHORISED)
        assert process.wait_for("change")["classifier"] == "letter" and process.wait_for("request")["path"] == path


def test_openapi_describes_the_front_and_each_classifier(several: Client) -> None:
    schema = schemathesis.openapi.from_asgi("/openapi.json", several.app)
    openapi_spec_validator.validate(schema.raw_schema)
    paths = schema.raw_schema["paths"]
    assert {"/v1/predict", "/v1/classifiers", "/v1/classifiers/{classifier}/classes/{class_id}"} < set(paths)

    def check(case: Any) -> None:
        for parameters in (case.path_parameters, case.query):
            if "classifier" in (parameters or {}):
                parameters["classifier"] = "kind"
        case.validate_response(case.call(), checks=CHECKS)

    for operation in [found.ok() for found in schema.get_all_operations()]:
        QUICK(given(case=operation.as_strategy())(check))()
    answer = ask(several, "kind", "broken")
    answer.request.read()
    schema["/v1/predict"]["POST"].validate_response(answer)


def test_a_server_of_one_answers_by_its_name_too(shelf: Path) -> None:
    with serving_several(shelf / "kind") as client:
        assert [one["name"] for one in client.get("/v1/classifiers").json()["classifiers"]] == ["kind"]
        assert client.get("/v1/classifiers/kind/classes").json() == client.get("/v1/classes").json()
        answers = [
            client.ask("POST", f"{path}/predict", content=GREY).json()["predictions"]
            for path in ("/v1", "/v1/classifiers/kind")
        ]
        assert answers[0] == answers[1]
        refused = client.ask("POST", "/v1/classifiers/kind/retune", headers={"Authorization": f"Bearer {TOKEN}x"})
        assert error_of(refused, 401) == "unauthorized"
        for name in ("kin", "kinds", "letter"):
            assert error_of(client.get(f"/v1/classifiers/{name}/classes"), 404) == "no_classifier"
