"""What operations look at: health, readiness, metrics, logs, headers, settings."""

from __future__ import annotations

import json
import logging
import time
from typing import Any
from unittest.mock import Mock

import pytest

from iosr_fast.exceptions import QueueFullError
from iosr_fast.head.predictions import Prediction
from iosr_fast.serving.batching import BatchingClassifier
from iosr_fast.serving.http import metrics
from iosr_fast.serving.http.app import warm
from iosr_fast.serving.http.logs import Formatter
from iosr_fast.serving.http.logs import logger as serving_logger
from iosr_fast.serving.http.settings import Settings
from tests.pictures import GREY
from tests.serving import http_client
from tests.serving.http_client import AUTHORISED, CLASSES, TOKEN, Client, Gate, error_of, httpx, load, queries, serving
from tests.waiting import wait_until


def test_health_probes_an_idle_server(monkeypatch: pytest.MonkeyPatch) -> None:
    http_client.probe_soon(monkeypatch)
    classifier = load()
    gate = Gate(classifier)
    with serving(classifier, max_batch=1, max_queue=2, max_images=1) as client:
        time.sleep(0.02)
        assert client.get("/healthz").json() == {"status": "ok", "detail": ""}
        metrics_text = client.get("/metrics").text
        assert 'iosr_fast_image_seconds_count{outcome="ok"} 1.0' in metrics_text
        assert "iosr_fast_predictions_total{" not in metrics_text, "a probe is nobody's image"
        gate.shut()
        time.sleep(0.02)
        client.site.loading = True
        assert client.get("/healthz").status_code == 200  # the engine has not run yet
        client.site.loading = False
        response = client.get("/healthz")
        assert response.status_code == 503 and "not classified within 1 s" in response.json()["detail"]
        gate.open()
        wait_until(lambda: client.served.batching.pending == 0)
        time.sleep(0.02)
        assert client.get("/healthz").status_code == 200
        monkeypatch.setattr(BatchingClassifier, "classify", Mock(side_effect=QueueFullError("it is full", 1.0)))
        time.sleep(0.02)
        assert client.get("/healthz").status_code == 200  # too busy for a probe


def test_readiness_has_a_reason(caplog: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving() as client, caplog.at_level(logging.INFO, "iosr_fast.serving"):
        assert client.get("/readyz").json() == {"status": "ok", "detail": ""}
        client.site.loading = True
        assert client.get("/readyz").json()["status"] == "loading"
        client.site.loading, client.site.draining = False, True
        assert client.get("/readyz").json()["status"] == "shutting down"
        healthy = client.get("/healthz")  # no reason to restart it
        assert healthy.status_code == 200 and healthy.headers["Connection"] == "close"
        client.served.batching.close()
        closed = client.predict(GREY)
        assert error_of(closed, 503) == "closed" and int(closed.headers["Retry-After"]) >= 1
        logged = [record.facts["status"] for record in caplog.records if record.msg == "request"]
        assert logged == [503] * 3, "polls are logged where they fail"
        full = Mock(side_effect=[QueueFullError("it is full", seconds) for seconds in (7.2, 0.01)])
        monkeypatch.setattr(BatchingClassifier, "submit_many", full)
        assert [client.predict(GREY).headers["Retry-After"] for _ in range(2)] == ["8", "1"]


def test_all_shares_of_an_ipv6_network_are_one(shared: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    shares, asked = Mock(side_effect=shared.site.bodies.take), Mock(side_effect=shared.served.batching.submit_many)
    monkeypatch.setattr(shared.site.bodies, "take", shares)
    monkeypatch.setattr(shared.served.batching, "submit_many", asked)
    for host in ("2001:db8::1", "2001:db8::2:3"):
        transport = httpx.ASGITransport(shared.app, client=(host, 1))
        sent = httpx.AsyncClient(transport=transport, base_url="http://test").post("/v1/predict", content=GREY)
        assert shared.run(sent).status_code == 200
    clients = [call.args[0] for call in shares.mock_calls] + [call.kwargs["client"] for call in asked.mock_calls]
    assert set(clients) == {"2001:db8::/64"}


def test_answers_that_do_not_change_are_made_once(shared: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    warm(shared.app, shared.site)
    for described in ("fastapi.applications.get_openapi", "fastapi.FastAPI.openapi"):
        monkeypatch.setattr(described, Mock(side_effect=AssertionError))
        assert "/v1/predict" in shared.get("/openapi.json").json()["paths"]
    rendered = Mock(side_effect=shared.site.metrics.text)
    monkeypatch.setattr(shared.site.metrics, "text", rendered)
    monkeypatch.setattr("iosr_fast.serving.limits.Deadlines.scrape_s", 60.0)
    shared.get("/metrics")
    asked = [shared.start("GET", "/metrics") for _ in range(20)]
    assert len({one.result(30).content for one in asked}) == 1 and rendered.call_count <= 1


def test_metrics_count_and_forget_classes_that_are_gone() -> None:
    with serving() as client:
        image = queries()[0]
        label = client.predict(image).json()["predictions"][0]["label"]
        client.predict(image, b"zip")
        client.get("/nowhere")
        assert client.get("/healthz").status_code == 200  # and needs no picture of its own now
        text = client.get("/metrics").text
        class_id = next(info.class_id for info in client.served.classifier.classes() if info.name == label)
        for line in (
            f'iosr_fast_predictions_total{{class_id="{class_id}",name="{label}"}} 2.0',
            'iosr_fast_errors_total{code="unsupported_type"} 1.0',
            'iosr_fast_errors_total{code="not_found"} 1.0',
            'iosr_fast_request_seconds_count{method="POST",route="/v1/predict",status="200"} 2.0',
            'iosr_fast_request_seconds_count{method="GET",route="other",status="404"} 1.0',
            'iosr_fast_image_seconds_count{outcome="ok"} 2.0',
            "iosr_fast_model_version 1.0",
            f"iosr_fast_classes {CLASSES}.0",
            "iosr_fast_queue_images 0.0",
            "iosr_fast_body_bytes 0.0",
            "iosr_fast_healthy 1.0",
            "iosr_fast_batch_images_sum 2.0",
        ):
            assert line in text, line
        client.ask("PATCH", f"/v1/classes/{class_id}", files=http_client.fields(name="other"), headers=AUTHORISED)
        text = client.get("/metrics").text
        assert label not in text and "iosr_fast_model_version 2.0" in text


def test_metrics_of_many_classes_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("iosr_fast.serving.limits.Limits.series", 2)
    registry = metrics.Metrics()
    made = metrics.ClassifierMetrics(registry)
    for number in (1, 2, 3, 1, 4):
        made.on_prediction(Prediction(f"name {number}", f"~{number}", 1.0, 1.0, 1.0, 0.0, 0.0, (), (), 1))
    text = registry.text().decode()
    assert 'iosr_fast_predictions_total{class_id="~1",name="name 1"} 2.0' in text
    assert 'iosr_fast_predictions_total{class_id="",name="all others"} 2.0' in text
    made.drop_removed({"~2": "name 2"}.get)
    text = registry.text().decode()
    assert "name 1" not in text and "name 2" in text and "all others" in text


def test_a_request_is_one_line_without_image_or_token(shared: Client, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "iosr_fast.serving"):
        shared.predict(GREY, b"zip", headers={"X-Request-ID": "id.1"})
        shared.ask("POST", "/v1/retune?token=x", headers={"Authorization": f"Bearer {TOKEN}-not"})
        odd = shared.get("/v1/classes%1b[31m", headers={"X-Request-ID": 'evil"\t{'})
    records = [record for record in caplog.records if record.name == serving_logger.name]
    lines = [Formatter(plain=False).format(record) for record in records]
    first, second, third = (json.loads(line) for line in lines)
    assert first["event"] == "request" and first["images"] == 2 and first["request_id"] == "id.1"
    assert (first["method"], first["path"], first["status"]) == ("POST", "/v1/predict", 200) and 0 < first["ms"] < 1e5
    assert first["client"] == "127.0.0.1" and (second["status"], second["code"]) == (401, "unauthorized")
    assert third["request_id"] == odd.headers["X-Request-ID"] and len(third["request_id"]) == 32
    plain = [Formatter(plain=True).format(record) for record in records]
    assert "request method=POST path=/v1/predict status=200" in plain[0] and "\x1b" not in "".join(plain)
    for text in ("".join(lines), "".join(plain)):
        assert TOKEN not in text and "PNG" not in text and "\n" not in text


def test_headers_let_nothing_else_into_the_page(shared: Client) -> None:
    page, script = shared.get("/"), shared.get("/static/page.js")
    assert (page.headers["Content-Type"], page.headers["Cache-Control"]) == ("text/html; charset=utf-8", "no-cache")
    assert script.headers["Content-Type"].startswith("text/javascript")
    for policy in ("default-src 'self'", "require-trusted-types-for 'script'"):
        assert policy in page.headers["Content-Security-Policy"]
    for response in (page, script, shared.get("/v1/classes"), shared.get("/nowhere")):
        assert response.headers["X-Content-Type-Options"] == "nosniff"
        assert response.headers["Referrer-Policy"] == "no-referrer"
    for path in ("/static/", "/static/..%2fapp.py", "/static/app.py", "/docs"):
        assert error_of(shared.get(path), 404) == "not_found"


def test_methods_of_a_path(shared: Client) -> None:
    for path in ("/healthz", "/", "/nothing"):
        full, head = shared.get(path), shared.ask("HEAD", path)
        assert (head.status_code, head.content) == (full.status_code, b"")
        assert head.headers["Content-Length"] == str(len(full.content))
    for method, path, allowed in (
        ("POST", "/healthz", "GET, HEAD"),
        ("HEAD", "/v1/predict", "POST"),
        ("PUT", "/v1/classes", "GET, HEAD, POST"),
        ("GET", "/v1/classes/~0", "PATCH, DELETE"),
    ):
        refused = shared.ask(method, path)
        assert (refused.status_code, refused.headers["Allow"]) == (405, allowed)


def test_pages_of_an_allowed_origin_may_call_it(shared: Client) -> None:
    asked = {"Access-Control-Request-Method": "PATCH", "Access-Control-Request-Headers": "authorization, content-type"}
    with serving(allow_origin=("https://shop.example", "http://localhost:3000"), public_host=("test",)) as client:
        for origin, allowed in (("https://shop.example", True), ("https://shop.example.evil", False), ("null", False)):
            headers, expected = {"Origin": origin}, origin if allowed else None
            preflight = client.ask("OPTIONS", "/v1/classes/~0", headers={**headers, **asked})
            answers = [client.get("/v1/classes", headers=headers), client.ask("POST", "/v1/retune", headers=headers)]
            assert [answer.status_code for answer in (preflight, *answers)] == [200 if allowed else 400, 200, 401]
            for answer in (preflight, *answers):
                assert answer.headers.get("Access-Control-Allow-Origin") == expected
                assert "Access-Control-Allow-Credentials" not in answer.headers
        assert not client.served.settings.serves("shop.example"), "DNS rebinding: it is no name of this server"
        assert "Access-Control-Allow-Origin" not in client.get("/").headers
    with serving(allow_origin=("*",)) as client:
        client.served.batching.close()
        refused = client.predict(GREY, headers={"Origin": "null"})
        assert refused.status_code == 503 and refused.headers["Access-Control-Allow-Origin"] == "*"
    for method in ("GET", "OPTIONS"):  # by default there are none
        answer = shared.ask(method, "/v1/classes", headers={"Origin": "https://shop.example", **asked})
        assert not {"vary", "access-control-allow-origin", "access-control-allow-methods"} & {*answer.headers}


ORIGINS = "", "shop.example", "https://shop.example/", "https://Shop.example", "https://a.example:443"


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"port": 70000}, "port"),
        ({"max_queue": 0}, "expected max_queue to be `int` >= 1, got 0"),
        ({"deadline_ms": "5"}, "expected deadline_ms to be `int`, got `str`, got '5'"),
        ({"drain_s": float("nan")}, "drain_s"),
        ({"max_batch": True}, "max_batch"),
        ({"max_images": 600}, "max_images of at most max_queue"),
        ({"max_image_mb": 100}, "lower --max-image-mb or raise --max-body-mb"),
        ({"public_host": ("a b",)}, "public_host to be a name without a port"),
        *(({"allow_origin": ("*", bad)}, "allow_origin to be scheme://host or .* as browsers send") for bad in ORIGINS),
        ({"deadline_ms": 90_000}, "max_deadline_ms"),
        ({"trusted_proxy": ("proxy.example",)}, "trusted_proxy to be an address, or a network"),
        ({"token": "short"}, "at least 16"),
    ],
)
def test_settings_out_of_range_are_refused(wrong: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        Settings(**wrong)
    assert TOKEN not in repr(Settings(token=TOKEN))
