"""OpenAPI is true: requests made from it, good and bad, get the responses that it describes."""

from __future__ import annotations

import json
from typing import Any

import openapi_spec_validator
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode, checks
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from iosr_fast.serving.http.schemas import long_answer
from tests.serving.http_client import AUTHORISED, Client, form, queries, serving

pytestmark = pytest.mark.slow

CHECKS = [checks.not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
QUICK = settings(
    max_examples=5,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def served() -> Any:
    with serving() as client:
        yield client


@pytest.fixture(scope="module")
def schema(served: Client) -> Any:
    return schemathesis.openapi.from_asgi("/openapi.json", served.app)


def test_everything_is_described(served: Client) -> None:
    described = served.get("/openapi.json").json()
    openapi_spec_validator.validate(described)
    operations = [(path, method) for path, methods in described["paths"].items() for method in methods]
    assert len(operations) == 18
    for path, method in operations:
        told = described["paths"][path][method]
        assert told["summary"] and {"200", "201"} & set(told["responses"]), (method, path)
        assert all(told["responses"][errors]["content"]["application/json"] for errors in ("4XX", "5XX"))
        protected = method != "get" and path not in ("/v1/predict", "/v1/embeddings")
        assert ("security" in told) == protected, (method, path)
        keep = [one["schema"] for one in told.get("parameters", ()) if one["name"] == "keep"]
        assert not any("default" in one for one in keep), "clients send defaults, and it is refused without unknown"
    body = described["paths"]["/v1/predict"]["post"]["requestBody"]["content"]
    assert {"multipart/form-data", "application/octet-stream", "image/png"} <= set(body)
    assert {"level", "path"} <= described["components"]["schemas"]["Prediction"]["properties"].keys()


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
@pytest.mark.parametrize("real_ids", [True, False], ids=["real ids", "any ids"])
def test_generated_requests_get_described_answers(served: Client, schema: Any, mode: Any, real_ids: bool) -> None:
    classes = served.served.classifier.classes()
    ids = {"class_id": classes[-1].class_id, "example_id": served.served.classifier.examples(classes[0].name)[0]}

    def ask(case: Any) -> None:
        if real_ids:
            case.path_parameters = {name: ids[name] for name in case.path_parameters or {}}
        response = case.call(headers={**AUTHORISED, **dict(case.headers or {})})
        case.validate_response(response, checks=CHECKS)

    for operation in [found.ok() for found in schema.get_all_operations()]:
        parts = (operation.path_parameters, operation.query, operation.headers, operation.body)
        if mode is GenerationMode.POSITIVE or any(parts):  # else nothing about it can be wrong
            QUICK(given(case=operation.as_strategy(generation_mode=mode))(ask))()


def test_predictions_are_written_in_order_and_exactly(served: Client) -> None:
    made = served.served.classifier.explain(queries(), top=8, nearest=3, unknown="reject", keep=0.5)
    written = json.dumps([one.to_dict() for one in made])
    assert json.dumps(json.loads(long_answer(made).body)) == written


def test_responses_to_good_images_are_as_described(served: Client, schema: Any) -> None:
    """Those that random bytes don't reach: 200 and 201 with all that is in them."""
    image = queries()[0]
    for path, options in (
        ("/v1/predict?top=3&nearest=2", {"files": form(image, b"zip")}),
        ("/v1/predict", {"content": image, "headers": {"Content-Type": "image/png"}}),
        ("/v1/predict", {"files": form(b"zip", b"")}),
        ("/v1/predict", {"files": form(image), "data": {"boxes": "[[0, 0, 9, 9], [99, 99, 1, 2]]"}}),
        ("/v1/predict?unknown=reject&keep=0.5", {"files": form(image)}),
        ("/v1/examples", {"data": {"class_id": "~0"}, "files": form(image), "headers": AUTHORISED}),
        ("/v1/classes", {"data": {"name": "a new one"}, "files": form(image), "headers": AUTHORISED}),
    ):
        response = served.ask("POST", path, **options)
        assert response.status_code in (200, 201, 422)
        response.request.read()  # schemathesis shows the request in its complaints
        schema[path.partition("?")[0]]["POST"].validate_response(response)
