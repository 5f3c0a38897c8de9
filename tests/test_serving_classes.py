"""Classes and examples over HTTP: lists, changes while it serves, who may make them, and why not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.images import encode
from tests.serving_client import (
    AUTHORISED,
    CLASSES,
    SHOTS,
    TOKEN,
    Client,
    Gate,
    error_of,
    form,
    load,
    serving,
    wait_until,
)

GREY = encode(np.full((64, 64, 3), 128, np.uint8))


@pytest.fixture(scope="module")
def shared() -> Any:
    """For tests that change nothing."""
    with serving() as client:
        yield client


def test_classes_and_examples_are_listed(shared: Client) -> None:
    classifier = shared.service.classifier
    body = shared.get("/v1/classes").json()
    assert [one["name"] for one in body["classes"]] == classifier.classes_.tolist()
    assert all(one["examples"] == SHOTS for one in body["classes"]) and body["version"] == classifier.version
    class_id = body["classes"][1]["class_id"]
    examples = shared.get(f"/v1/classes/{class_id}/examples").json()
    assert examples["class_id"] == class_id and examples["example_ids"] == classifier.examples(class_id)
    picture = shared.get(f"/v1/examples/{examples['example_ids'][0]}/picture")
    assert picture.status_code == 200 and picture.headers["Content-Type"] == "image/webp"
    assert picture.content == classifier.picture(examples["example_ids"][0])
    assert error_of(shared.get("/v1/classes/nobody/examples"), 404) == "no_class"
    assert error_of(shared.get("/v1/examples/e99999/picture"), 404) == "no_example"


def test_classes_change_while_it_serves() -> None:
    with serving() as client:
        images = [encode(np.full((*size, 3), (250, 10, 250), np.uint8)) for size in ((50, 60), (64, 64))]
        asked = {"headers": AUTHORISED}
        made = client.ask("POST", "/v1/classes", data={"name": " magenta "}, files=form(*images), **asked)
        assert made.status_code == 201
        change = made.json()
        assert change["version"] == 2 and len(change["example_ids"]) == 2
        class_id = change["class_id"]
        listed = client.get("/v1/classes").json()["classes"]
        assert listed[-1] == {"class_id": class_id, "name": "magenta", "examples": 2}
        body = client.predict(images[0]).json()
        assert body["version"] == 2 and body["predictions"][0]["class_id"] == class_id
        more = client.ask("POST", f"/v1/classes/{class_id}/examples", files=form(images[0]), **asked).json()
        assert more["version"] == 3 and len(more["example_ids"]) == 1
        gone = client.ask("DELETE", f"/v1/examples/{more['example_ids'][0]}", **asked).json()
        assert gone == {"version": 4, "class_id": "", "example_ids": more["example_ids"]}
        renamed = client.ask("PATCH", f"/v1/classes/{class_id}", json={"name": "pink"}, **asked)
        assert renamed.status_code == 200 and renamed.json()["version"] == 5
        assert client.predict(images[0]).json()["predictions"][0]["label"] == "pink"
        same = client.ask("PATCH", f"/v1/classes/{class_id}", json={"name": "pink", "keep_text": True}, **asked)
        assert same.status_code == 200
        tuned = client.ask("POST", "/v1/retune", **asked)
        assert tuned.status_code == 200 and tuned.json()["version"] == 7
        removed = client.ask("DELETE", f"/v1/classes/{class_id}", **asked)
        assert removed.json()["version"] == 8 and removed.json()["class_id"] == class_id
        assert len(client.get("/v1/classes").json()["classes"]) == CLASSES


def test_changes_are_refused_with_a_reason_and_change_nothing(shared: Client) -> None:
    classifier = shared.service.classifier
    version, name = classifier.version, str(classifier.classes_[0])
    class_id = classifier.classes()[0].class_id

    def ask(method: str, path: str, **options: Any) -> Any:
        return shared.ask(method, path, headers=AUTHORISED, **options)

    assert error_of(ask("POST", "/v1/classes", data={"name": name}, files=form(GREY)), 409) == "name_taken"
    assert error_of(ask("PATCH", "/v1/classes/" + classifier.classes()[1].class_id, json={"name": name}), 409)
    for bad in ("", "  ", "a" * 201, "a\nb"):
        assert error_of(ask("POST", "/v1/classes", data={"name": bad}, files=form(GREY)), 422) == "bad_name"
    assert error_of(ask("POST", "/v1/classes", files=form(GREY)), 400) == "missing_field"
    assert error_of(ask("POST", "/v1/classes", files={"name": ("", b"new")}), 422) == "refused"  # no images
    assert error_of(ask("POST", "/v1/classes", content=GREY), 415) == "unsupported_type"
    assert (
        error_of(ask("POST", "/v1/classes", data={"name": "x", "text": "y"}, files=form(GREY)), 400)
        == "unexpected_field"
    )
    response = ask("POST", "/v1/classes", data={"name": "new"}, files=form(GREY, b"GIF89a"))
    assert error_of(response, 422) == "unsupported_type" and "number 1" in response.json()["error"]["message"]
    assert error_of(ask("POST", f"/v1/classes/{class_id}/examples", files=form(GREY[:80])), 422) == "bad_image"
    assert (
        error_of(ask("POST", f"/v1/classes/{class_id}/examples", data={}, files={"x": b"y"}), 400) == "unexpected_field"
    )
    for method, path, options in (
        ("POST", "/v1/classes/nobody/examples", {"files": form(GREY)}),
        ("PATCH", "/v1/classes/nobody", {"json": {"name": "x"}}),
        ("DELETE", "/v1/classes/nobody", {}),
        ("DELETE", f"/v1/classes/{name}", {}),  # a name is no id
        ("DELETE", "/v1/examples/e9999", {}),
    ):
        assert error_of(ask(method, path, **options), 404) in ("no_class", "no_example")
    for body in ({"name": 3}, {}, {"name": "x", "more": 1}, []):
        assert error_of(ask("PATCH", f"/v1/classes/{class_id}", json=body), 422) == "invalid_parameters"
    assert error_of(ask("PATCH", f"/v1/classes/{class_id}", content=b"{"), 422)
    assert classifier.version == version


CHANGES = [
    ("POST", "/v1/classes"),
    ("PATCH", "/v1/classes/~0"),
    ("DELETE", "/v1/classes/~0"),
    ("POST", "/v1/classes/~0/examples"),
    ("DELETE", "/v1/examples/e0"),
    ("POST", "/v1/retune"),
]


@pytest.mark.parametrize(("method", "path"), CHANGES)
def test_changes_need_the_token(shared: Client, method: str, path: str) -> None:
    for given in (
        "",
        TOKEN,
        "Bearer",
        "Bearer wrong",
        f"Basic {TOKEN}",
        f"Bearer {TOKEN}x",
        f"Bearer {TOKEN[:-1]}",
        "Bearer ü",
    ):
        headers = {"Authorization": given.encode()} if given else {}
        response = shared.ask(method, path, headers=headers)
        assert error_of(response, 401) == "unauthorized" and response.headers["WWW-Authenticate"] == "Bearer"
        assert TOKEN not in response.text
    assert shared.service.classifier.version == 1


async def answer_unread(app: Any, method: str, path: str, headers: list[tuple[bytes, bytes]]) -> int:
    """The status that `app` answers with where asking for the body fails the test."""
    statuses = []

    async def receive() -> Any:
        raise AssertionError("the body is read")

    async def send(message: Any) -> None:
        statuses.append(message.get("status"))

    scope = {"type": "http", "http_version": "1.1", "method": method, "path": path, "raw_path": path.encode()}
    scope |= {"query_string": b"", "headers": headers, "scheme": "http", "server": ("x", 80), "client": ("y", 1)}
    await app(scope, receive, send)
    return int(statuses[0])


def test_no_byte_of_a_body_is_read_before_the_token(shared: Client) -> None:
    more = [(method, path) for method in ("PUT", "PATCH", "TRACE", "post", "X") for path in ("/", "/v1/predict", "/no")]
    odd = [("POST", path) for path in ("/v1/predict/", "//v1/predict", "/v1/retune/", "/V1/PREDICT", "*", "")]
    long = [("PATCH", "/v1/classes/" + "x" * 5_000), ("PATCH", "/v1/classes/\N{ARABIC-INDIC DIGIT THREE}")]
    kinds = [
        b"application/json",
        b"text/plain",
        b"multipart/form-data; boundary=x",
        b"multipart/form-data",
        b"\xff",
        b"",
    ]
    right = b"Bearer " + TOKEN.encode()
    for given in ([], [b"Bearer wrong"], [right, right], [right, b"Bearer wrong"], [b""]):
        tokens = [(b"authorization", value) for value in given]
        for method, path in (*CHANGES, *more, *odd, *long):
            for kind in kinds:
                for sized in ([(b"content-length", b"31000000")], [(b"transfer-encoding", b"chunked")], []):
                    headers = [(b"content-type", kind), (b"content-encoding", b"gzip"), *sized, *tokens]
                    told = shared.run(answer_unread(shared.app, method, path, headers))
                    assert told == 401, (method, path, kind, sized)


def test_two_tokens_are_none(shared: Client) -> None:
    for one, two in ((TOKEN, TOKEN), (TOKEN, "x"), ("x", TOKEN)):
        headers = [("Authorization", f"Bearer {one}"), ("authorization", f"Bearer {two}")]
        assert error_of(shared.ask("POST", "/v1/retune", headers=headers), 401) == "unauthorized"


def test_a_body_without_images_is_small_even_with_the_token(shared: Client) -> None:
    class_id = shared.service.classifier.classes()[0].class_id
    padded = b" " * 17_000 + b'{"name": "x"}'

    async def parts() -> Any:
        for i in range(0, len(padded), 1000):
            yield padded[i : i + 1000]

    for body in (padded, parts(), b"[" * 100_000, b'{"name": "' + b"x" * 3_000_000 + b'"}'):
        headers = {**AUTHORISED, "Content-Type": "application/json"}
        response = shared.ask("PATCH", f"/v1/classes/{class_id}", content=body, headers=headers)
        assert error_of(response, 413) == "too_large"
    headers = [(b"authorization", b"Bearer " + TOKEN.encode()), (b"content-length", b"31000000")]
    assert shared.run(answer_unread(shared.app, "PATCH", f"/v1/classes/{class_id}", headers)) == 413
    assert shared.service.classifier.version == 1


def test_without_a_token_nobody_changes_anything() -> None:
    with serving(token=None) as client:
        for method, path in CHANGES:
            response = client.ask(method, path, headers=AUTHORISED)
            assert error_of(response, 403) == "changes_disabled" and "--token-file" in response.text
        assert client.predict(GREY).status_code == 200


def test_few_changes_may_wait() -> None:
    classifier = load()
    gate = Gate(classifier)
    with serving(classifier, max_changes=2) as client:
        gate.shut()
        waiting = [
            client.start("POST", "/v1/classes", data={"name": f"new {i}"}, files=form(GREY), headers=AUTHORISED)
            for i in range(2)
        ]
        wait_until(lambda: client.service._waiting == 2)
        response = client.ask("POST", "/v1/retune", headers=AUTHORISED)
        assert error_of(response, 503) == "busy" and int(response.headers["Retry-After"]) >= 1
        gate.open()
        assert [one.result(20).json()["version"] for one in waiting] == [2, 3]
