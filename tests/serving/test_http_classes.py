"""Classes and examples over HTTP: lists, changes while it serves, the token, refusals."""

from __future__ import annotations

import threading
from concurrent.futures import CancelledError
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock
from urllib.parse import quote

import numpy as np
import pytest

from iosr_fast.serving.http.errors import ApiError
from iosr_fast.serving.http.open_site import open_site
from iosr_fast.serving.http.settings import Settings
from iosr_fast.store.store import Store
from tests.pictures import GREY, encode
from tests.serving.http_client import (
    AUTHORISED,
    CLASSES,
    SHOTS,
    TOKEN,
    Client,
    Gate,
    bundle,
    error_of,
    fields,
    form,
    load,
    queries,
    serving,
)
from tests.waiting import wait_until


def test_classes_and_examples_are_listed(shared: Client) -> None:
    classifier = shared.served.classifier
    body = shared.get("/v1/classes").json()
    assert [one["name"] for one in body["classes"]] == classifier.classes_.tolist()
    assert all(one["examples"] == SHOTS for one in body["classes"]) and body["version"] == classifier.version
    class_id = body["classes"][1]["class_id"]
    examples = shared.get(f"/v1/classes/{class_id}/examples").json()
    ids = classifier.examples(class_id)
    assert examples["class_id"] == class_id and examples["example_ids"] == ids and examples["next"] is None
    for query, expected, following in (("limit=2", ids[:2], ids[1]), (f"limit=1&after={ids[1]}", ids[2:], None)):
        page = shared.get(f"/v1/classes/{class_id}/examples?{query}").json()
        assert (page["example_ids"], page["next"]) == (expected, following)
    picture = shared.get(f"/v1/examples/{ids[0]}/picture")
    assert picture.status_code == 200 and picture.headers["Content-Type"] == "image/webp"
    assert picture.content == classifier.picture(ids[0])
    assert error_of(shared.get("/v1/classes/nobody/examples"), 404) == "no_class"
    assert error_of(shared.get("/v1/examples/e99999/picture"), 404) == "no_example"


def test_a_hundred_thousand_classes_are_listed_page_by_page() -> None:
    classifier = load()
    head = classifier.snapshot()
    count = 100_000
    names = (*head.class_names, *(f"class {number}" for number in range(CLASSES, count)))
    uids = (*head.uids, *range(2 * CLASSES, 2 * count, 2))[:count]  # as after removals
    with serving(classifier) as client:
        classifier._fit = replace(classifier._fit, head=replace(head, class_names=names, uids=uids))
        body = client.get("/v1/classes").json()
        seen = list(body["classes"])
        assert len(seen) == 1_000 and body["total"] == count and body["next"] == seen[-1]["class_id"]
        for limit in (1, 999):
            page = client.get(f"/v1/classes?limit={limit}&after={seen[-1]['class_id']}").json()
            assert len(page["classes"]) == limit
            seen += page["classes"]
        assert [one["name"] for one in seen] == list(names[: len(seen)])
        odd = client.get(f"/v1/classes?limit=1&after=~{uids[50] + 1}").json()  # removed in the meantime
        assert odd["classes"][0]["class_id"] == f"~{uids[51]}"
        last = client.get(f"/v1/classes?after=~{uids[-3]}").json()
        assert [one["name"] for one in last["classes"]] == list(names[-2:]) and last["next"] is None
        for limit in ("0", "1001", "x"):
            assert error_of(client.get(f"/v1/classes?limit={limit}"), 422) == "invalid_parameters"


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
        assert listed[-1] == {"class_id": class_id, "name": "magenta", "examples": 2, "path": []}
        body = client.predict(images[0]).json()
        assert body["version"] == 2 and body["predictions"][0]["class_id"] == class_id
        more = client.ask("POST", f"/v1/classes/{class_id}/examples", files=form(images[0]), **asked).json()
        assert more["version"] == 3 and len(more["example_ids"]) == 1
        gone = client.ask("DELETE", f"/v1/examples/{more['example_ids'][0]}", **asked).json()
        assert gone == {"version": 4, "class_id": class_id, "example_ids": more["example_ids"]}
        texts = fields(name=" pink ", keep_text="True")
        renamed = client.ask("PATCH", f"/v1/classes/{class_id}", files=texts, **asked)
        assert renamed.status_code == 200 and renamed.json()["version"] == 5
        assert client.predict(images[0]).json()["predictions"][0]["label"] == "pink"
        tuned = client.ask("POST", "/v1/retune", **asked)
        assert tuned.status_code == 200 and tuned.json()["version"] == 6
        removed = client.ask("DELETE", f"/v1/classes/{class_id}", **asked)
        assert removed.json()["version"] == 7 and removed.json()["class_id"] == class_id
        assert len(client.get("/v1/classes").json()["classes"]) == CLASSES


def test_classes_are_added_and_moved_with_their_parents() -> None:
    with serving() as client:
        classifier, image = client.served.classifier, form(encode(np.full((64, 64, 3), (250, 10, 250), np.uint8)))
        first, path = str(classifier.classes_[0]), lambda: client.get("/v1/classes").json()["classes"][-1]["path"]

        def add(name: str, *parent: str) -> Any:
            data = {"name": name, "parent": [*parent]}
            return client.ask("POST", "/v1/classes", data=data, files=image, headers=AUTHORISED)

        def move(*parent: str, class_id: str = "~8", **more: str) -> Any:
            files = fields(parent=[*parent], **more)
            return client.ask("PATCH", f"/v1/classes/{class_id}", files=files, headers=AUTHORISED)

        assert add("magenta", "colour", "red").status_code == 201 and path() == ["colour", "red"]
        assert error_of(add("pink", "green"), 422) == "refused" and error_of(add("pink", first), 422) == "refused"
        for *parent, expected in (("colour", ["colour"]), ("", "a", "b", ["a", "b"]), ("", "c", ["c"])):
            assert move(*parent).status_code == 200 and path() == expected
        version = classifier.version
        for more in ({"name": "x"}, {"keep_text": "true"}, {"description": "x"}):
            assert error_of(move("a", **more), 422) == "invalid_parameters"
        for bad in (["a"] * 101, ["x" * 2_000], ["a", ""], ["", ""], ["a", first]):  # the last is the name of a class
            assert error_of(move(*bad), 422) == "refused"
        assert error_of(move("a", class_id="nobody"), 404) == "no_class" and classifier.version == version
        assert move("").status_code == 200 and path() == []  # without a tree


def test_descriptions_make_the_text_of_a_class() -> None:
    with serving() as client:
        classifier, image = client.served.classifier, form(encode(np.full((64, 64, 3), (250, 10, 250), np.uint8)))
        embed, texts = classifier._fit.clip.text.embed_classes, ["a magenta square", "one colour"]
        data = {"name": "magenta", "description": texts}
        made = client.ask("POST", "/v1/classes", data=data, files=image, headers=AUTHORISED)
        assert made.status_code == 201, made.text
        np.testing.assert_array_equal(classifier.support_.text[-1:], embed(["magenta"], None, {"magenta": texts}))
        path, files = f"/v1/classes/{made.json()['class_id']}", fields(name="pink", description=texts[:1])
        assert client.ask("PATCH", path, files=files, headers=AUTHORISED).json()["version"] == 3
        np.testing.assert_array_equal(classifier.support_.text[-1:], embed(["pink"], None, {"pink": texts[:1]}))
        assert client.ask("PATCH", path, files=files, headers=AUTHORISED).json()["version"] == 4  # its own name is free


def test_changes_are_refused_with_a_reason_and_change_nothing(shared: Client) -> None:
    classifier = shared.served.classifier
    name, (first, second) = str(classifier.classes_[0]), (info.class_id for info in classifier.classes()[:2])
    alike = name.replace("a", "\u0430").replace("e", "\u0435").replace("o", "\u043e")  # letters of Cyrillic
    good, no_text = form(GREY), {"files": [("name", (None, b"\xff"))]}
    no_images = {"content": b"--x--\r\n", "headers": {"Content-Type": "multipart/form-data; boundary=x"}}
    for method, path, options, status, code in (
        ("POST", "", {"data": {"name": name}, "files": good}, 409, "name_taken"),
        ("PATCH", f"/{second}", {"files": fields(name=name)}, 409, "name_taken"),
        *(("POST", "", {"data": {"name": bad}, "files": good}, 422, "bad_name") for bad in ("  ", "a\u202eb", "~3")),
        *(("POST", "", {"data": {"name": bad}, "files": good}, 422, "refused") for bad in (alike, name.upper())),
        ("PATCH", f"/{second}", {"files": fields(name=name.upper())}, 422, "refused"),
        ("POST", "", {"files": good}, 400, "missing_field"),
        ("POST", "", {"files": {"name": ("", b"new")}}, 422, "refused"),  # no images
        ("POST", "", {"data": {"name": ["new", "newer"]}, "files": good}, 400, "unexpected_field"),
        *(
            ("POST", "", {"data": {"name": "new", "description": text}, "files": good}, 422, "refused")
            for text in (" ", "long " * 20, "a\0b", "a\x1b[31m", "a" + " " * 2000)
        ),
        ("PATCH", f"/{first}", {"files": fields(name="x", description="a\0b")}, 422, "refused"),
        ("POST", "", {"content": GREY}, 415, "unsupported_type"),
        ("POST", "", {"data": {"name": "new"}, "files": form(GREY, b"GIF89a")}, 422, "unsupported_type"),
        ("POST", f"/{first}/examples", {"files": form(GREY, GREY[:80])}, 422, "bad_image"),
        ("POST", "/nobody/examples", {"files": good}, 404, "no_class"),
        ("PATCH", "/nobody", {"files": fields(name="x")}, 404, "no_class"),
        ("DELETE", f"/{name}", {}, 404, "no_class"),  # a name is no id
        ("PATCH", f"/{first}", {"files": fields(name="x", keep_text="1")}, 422, "invalid_parameters"),
        ("PATCH", f"/{first}", {"files": fields(description="x")}, 422, "invalid_parameters"),
        ("PATCH", f"/{first}", {"files": fields(name="x", more="1")}, 400, "unexpected_field"),
        ("PATCH", f"/{first}", {"data": {"name": "x"}, "files": good}, 400, "unexpected_field"),
        ("PATCH", f"/{first}", {"json": {"name": "x"}}, 415, "unsupported_type"),
        ("PATCH", f"/{first}", no_text, 400, "bad_form"),
        ("POST", f"/{first}/examples", no_images, 400, "no_image"),
    ):
        asked = {**options, "headers": {**AUTHORISED, **options.get("headers", {})}}
        response = shared.ask(method, f"/v1/classes{path}", **asked)
        assert error_of(response, status) == code, (method, path, options)
        if "files" in options and code in ("unsupported_type", "bad_image"):
            assert "number 1" in response.json()["error"]["message"]
    assert error_of(shared.ask("DELETE", "/v1/examples/e9999", headers=AUTHORISED), 404) == "no_example"
    assert classifier.version == 1


# --- the token ---

CHANGES = [
    ("POST", "/v1/classes"),
    ("PATCH", "/v1/classes/~0"),
    ("DELETE", "/v1/classes/~0"),
    ("POST", "/v1/classes/~0/examples"),
    ("POST", "/v1/examples"),
    ("PATCH", "/v1/examples/e0"),
    ("DELETE", "/v1/examples/e0"),
    ("POST", "/v1/retune"),
]


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
    more = [(method, path) for method in ("PUT", "PATCH", "TRACE", "post", "X") for path in ("/", "/v1/predict")]
    odd = [("POST", path) for path in ("/v1/predict/", "//v1/predict", "/v1/retune/", "/V1/PREDICT", "/no", "*", "")]
    long = [("PATCH", "/v1/classes/" + "x" * 5_000), ("PATCH", "/v1/classes/\N{ARABIC-INDIC DIGIT THREE}")]
    kinds = [b"application/json", b"multipart/form-data; boundary=x", b"multipart/form-data", b"\xff", b""]
    right = b"Bearer " + TOKEN.encode()
    odd_forms = (b"", right[7:], b"Bearer", b"Basic " + right[7:], right + b"x", right[:-1], "Bearer ü".encode())
    for given in ([], [b"Bearer wrong"], [right, right], [right, b"Bearer wrong"], *([one] for one in odd_forms)):
        tokens = [(b"authorization", value) for value in given]
        for method, path in (*CHANGES, *more, *odd, *long):
            for kind in kinds:
                for sized in ([(b"content-length", b"31000000")], [(b"transfer-encoding", b"chunked")], []):
                    headers = [(b"content-type", kind), (b"content-encoding", b"gzip"), *sized, *tokens]
                    told = shared.run(answer_unread(shared.app, method, path, headers))
                    expected = 405 if (method, path) in more else 404 if (method, path) in odd else 401
                    assert told == expected, (method, path, kind, sized)


def test_every_spelling_of_a_change_needs_the_token(shared: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = shared.get("/openapi.json").json()["paths"]
    described = [(method.upper(), path) for path, told in paths.items() for method in told if method != "get"]
    asks = {"/v1/predict", "/v1/embeddings"}  # change nothing
    assert len(described) == len(CHANGES) + len(asks) and asks < paths.keys(), "a new route is in CHANGES"
    monkeypatch.setattr(type(shared.served), "change", Mock(side_effect=ApiError(409, "reached", "a change is made")))
    right, reached = TOKEN.encode(), set()
    for method, path in CHANGES:
        odd = ("/" + path, path + "/", path + "/.", path.upper(), path.replace("1", "%31"), path + "?x", path + "\0")
        ids = [path.replace(one, other) for one in ("~0", "e0") for other in ("", "..", "a b", "é", "\n", "x" * 999)]
        for spelled in (path, *odd, *ids, *(one + "\n" for one in (path, *ids))):
            for verb in (method, method.lower(), "PUT", "QUERY"):
                ask = partial(answer_unread, shared.app, verb, spelled)
                told = shared.run(ask([(b"authorization", b"Bearer " + right)]))
                reached |= {spelled} if told not in (404, 405) else set()
                for wrong in ([], [b"Bearer " + right[:-1] + b"x"], [b"Bearer x" + right[1:]], [b"Basic " + right]):
                    refused = shared.run(ask([(b"authorization", value) for value in wrong]))
                    assert refused == (told if told in (404, 405) else 401), (verb, spelled)
    assert {path for _, path in CHANGES} | {"/v1/retune\n"} <= reached and shared.served.classifier.version == 1


def test_a_body_without_images_is_small_even_with_the_token(shared: Client) -> None:
    path = f"/v1/classes/{shared.served.classifier.classes()[0].class_id}"

    async def parts() -> Any:
        for _ in range(70):
            yield bytes(1000)

    for body in (bytes(70_000), parts()):
        headers = {**AUTHORISED, "Content-Type": "multipart/form-data; boundary=x"}
        assert error_of(shared.ask("PATCH", path, content=body, headers=headers), 413) == "too_large"
    asked = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    assert shared.run(answer_unread(shared.app, "PATCH", path, [*asked, (b"content-length", b"31000000")])) == 413
    assert shared.served.classifier.version == 1


def test_without_a_token_nobody_changes_anything() -> None:
    with serving(token=None) as client:
        for method, path in CHANGES:
            response = client.ask(method, path, headers=AUTHORISED)
            assert error_of(response, 403) == "changes_disabled" and "--token-file" in response.text
        assert error_of(client.ask("POST", "/predict", content=GREY), 404) == "not_found", "no such route"
        assert client.predict(GREY).status_code == 200


# --- many, slow and failing changes ---


def test_closing_waits_no_longer_for_a_change_than_it_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    settings, go_on = Settings(token=TOKEN, log=tmp_path / "changes.db"), threading.Event()
    with open_site({"": bundle()}, settings) as site:
        client = Client(site)
        monkeypatch.setattr(Store, "_ready", lambda self, head, before: go_on.wait(20) and head)
        changes = [client.start("DELETE", f"/v1/classes/~{number}", headers=AUTHORISED) for number in range(2)]
        wait_until(lambda: client.served.classifier._store.lock.locked() and len(client.served.unfinished) == 2)
    assert client.served.unfinished and "change_abandoned" in caplog.text, "it still runs, and has the log"
    go_on.set()
    assert changes[0].result(20).status_code == 200 and client.served.close(20) and not client.served.unfinished
    with pytest.raises(CancelledError):
        changes[1].result(20)
    client.close()


def test_few_changes_may_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("iosr_fast.serving.limits.Limits.changes", 2)
    classifier = load()
    gate = Gate(classifier)
    with serving(classifier) as client:
        gate.shut()
        waiting = [
            client.start("POST", "/v1/classes", data={"name": f"new {i}"}, files=form(image), headers=AUTHORISED)
            for i, image in enumerate(queries()[:2])
        ]
        wait_until(lambda: len(client.served.unfinished) == 2)
        response = client.ask("POST", "/v1/retune", headers=AUTHORISED)
        assert error_of(response, 503) == "busy" and int(response.headers["Retry-After"]) >= 1
        gate.open()
        assert [one.result(20).json()["version"] for one in waiting] == [2, 3]


@pytest.mark.parametrize(
    "digits", ["٣", "３", "03", "+3", "3 ", "3\n", "3\0", "-3", "3.0", "1_0", "³", "0x3", "9" * 19, "", "e3"]
)
def test_another_form_of_a_number_is_no_id(shared: Client, digits: str) -> None:
    """int() takes digits of every script, signs, spaces and underscores: each would name a class or picture twice."""
    for method, path in (
        ("DELETE", f"/v1/examples/{quote('e' + digits)}"),
        ("GET", f"/v1/examples/{quote('e' + digits)}/picture"),
        ("DELETE", f"/v1/classes/{quote('~' + digits)}"),
        ("POST", f"/v1/classes/{quote('~' + digits)}/examples"),
        ("GET", f"/v1/classes/{quote('~' + digits)}/examples"),
    ):
        options = {"files": form(GREY)} if method == "POST" else {}
        response = shared.ask(method, path, headers=AUTHORISED, **options)
        assert error_of(response, 404) in ("no_class", "no_example"), (method, path)
    for query in (f"/v1/classes?after={quote('~' + digits)}", f"/v1/classes/~0/examples?after={quote('e' + digits)}"):
        assert error_of(shared.get(query), 422) == "invalid_parameters"
    assert shared.served.classifier.version == 1


def test_a_log_that_cannot_be_written_makes_the_server_read_only(tmp_path: Any) -> None:
    classifier = load()
    classifier.open_log(tmp_path / "changes.db")
    database = classifier._store.log._db
    with serving(classifier) as client:

        def rename(name: str) -> Any:
            files = fields(name=name, keep_text="true")
            return client.ask("PATCH", "/v1/classes/~0", files=files, headers=AUTHORISED)

        assert client.get("/readyz").json() == {"status": "ok", "detail": ""}
        assert rename("one").status_code == 200
        most = database.execute("PRAGMA max_page_count").fetchone()[0]
        database.execute("PRAGMA max_page_count=1")  # no more pages than there are, as on a full disk
        names = (f"{number}".rjust(500, "x") for number in range(20))
        while (response := rename(next(names))).status_code == 200:
            pass
        for refused in (response, rename(next(names))):
            assert error_of(refused, 507) == "storage_full" and "predictions continue" in refused.text
        version = classifier.version
        assert client.predict(GREY).json()["version"] == version
        ready = client.get("/readyz")
        assert ready.status_code == 200 and ready.json()["status"] == "ok"
        assert ready.json()["detail"].startswith("read-only: ") and "No space left" in ready.json()["detail"]
        assert client.get("/healthz").json() == {"status": "ok", "detail": ""}
        assert "iosr_fast_read_only 1.0" in client.get("/metrics").text
        database.execute(f"PRAGMA max_page_count={most}")
        assert rename("three").json()["version"] == version + 1  # as soon as it works
        assert client.get("/readyz").json() == {"status": "ok", "detail": ""}
    classifier.close_log()
