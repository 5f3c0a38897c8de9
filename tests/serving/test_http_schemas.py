"""OpenAPI says what is true: requests made from it, good and bad, get the answers that it promises."""

from __future__ import annotations

from typing import Any

import pytest

from tests.serving.http_client import AUTHORISED, Client, form, queries, serving

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis comes with the dev extra")

from hypothesis import HealthCheck, Phase, given, settings  # noqa: E402
from schemathesis import GenerationMode, checks  # noqa: E402
from schemathesis.specs.openapi.checks import (  # noqa: E402
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

pytestmark = pytest.mark.slow

CHECKS = [
    checks.not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]
OPERATIONS = {
    ("POST", "/v1/predict"),
    ("GET", "/v1/classifier"),
    ("GET", "/v1/classes"),
    ("POST", "/v1/classes"),
    ("PATCH", "/v1/classes/{class_id}"),
    ("DELETE", "/v1/classes/{class_id}"),
    ("GET", "/v1/classes/{class_id}/examples"),
    ("POST", "/v1/classes/{class_id}/examples"),
    ("DELETE", "/v1/examples/{example_id}"),
    ("GET", "/v1/examples/{example_id}/picture"),
    ("POST", "/v1/retune"),
    ("GET", "/healthz"),
    ("GET", "/readyz"),
    ("GET", "/metrics"),
}


@pytest.fixture(scope="module")
def served() -> Any:
    with serving() as client:
        yield client


@pytest.fixture(scope="module")
def schema(served: Client) -> Any:
    return schemathesis.openapi.from_asgi("/openapi.json", served.app)


def operations(schema: Any) -> list[Any]:
    return [found.ok() for found in schema.get_all_operations()]


def test_everything_is_described(served: Client, schema: Any) -> None:
    assert {(one.method.upper(), one.path) for one in operations(schema)} == OPERATIONS
    described = served.get("/openapi.json").json()
    for path, methods in described["paths"].items():
        for method, told in methods.items():
            assert told["summary"] and told["responses"], (method, path)
            protected = method != "get" and path != "/v1/predict"
            assert ("security" in told) == protected, (method, path)
            if protected:
                assert {"401", "403", "503"} <= set(told["responses"])
    body = described["paths"]["/v1/predict"]["post"]["requestBody"]["content"]
    assert {"multipart/form-data", "application/octet-stream", "image/png"} <= set(body)


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
@pytest.mark.parametrize("real_ids", [True, False], ids=["real ids", "any ids"])
def test_what_is_generated_gets_what_is_promised(served: Client, schema: Any, mode: Any, real_ids: bool) -> None:
    classes = served.service.classifier.classes()
    ids = {"class_id": classes[-1].class_id, "example_id": served.service.classifier.examples(classes[0].name)[0]}

    def ask(case: Any) -> None:
        if real_ids:
            case.path_parameters = {name: ids[name] for name in case.path_parameters or {}}
        response = case.call(headers={**AUTHORISED, **dict(case.headers or {})})
        case.validate_response(response, checks=CHECKS)

    quick = settings(
        max_examples=5,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    asked = 0
    for operation in operations(schema):
        parts = (operation.path_parameters, operation.query, operation.headers, operation.body)
        if mode is GenerationMode.NEGATIVE and not any(parts):
            continue  # nothing about it can be wrong
        quick(given(case=operation.as_strategy(generation_mode=mode))(ask))()
        asked += 1
    assert asked >= 8


def test_answers_to_good_images_are_as_described(served: Client, schema: Any) -> None:
    """What a generator of random bytes doesn't reach: 200 and 201 with all that is in them."""
    image = queries()[0]
    for path, options in (
        ("/v1/predict?top=3&nearest=2", {"files": form(image, b"zip")}),
        ("/v1/predict", {"content": image, "headers": {"Content-Type": "image/png"}}),
        ("/v1/predict", {"files": form(b"zip", b"")}),
        ("/v1/predict?unknown=reject&keep=0.5", {"files": form(image)}),
        ("/v1/predict?unknown=reject&keep=0.999", {"files": form(image)}),
        ("/v1/classes", {"data": {"name": "a new one"}, "files": form(image), "headers": AUTHORISED}),
    ):
        response = served.ask("POST", path, **options)
        operation = schema[path.partition("?")[0]]["POST"]
        assert response.status_code in (200, 201, 422)
        response.request.read()  # schemathesis tells of the request where it complains
        operation.validate_response(response)
