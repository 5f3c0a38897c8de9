"""Classes and examples over HTTP: lists, changes while it serves, the token, refusals."""

from __future__ import annotations

import threading
from concurrent.futures import CancelledError
from dataclasses import replace
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
from tests.serving import http_client
from tests.serving.http_client import AUTHORISED, CLASSES, SHOTS, TOKEN, Client, error_of, fields, form, load, serving
from tests.waiting import wait_until

MAGENTA = encode(np.full((64, 64, 3), (250, 10, 250), np.uint8))


def change(client: Client, method: str, path: str, **options: Any) -> Any:
    """The answer to a request with the token."""
    return client.ask(method, f"/v1{path}", **{**options, "headers": {**AUTHORISED, **options.get("headers", {})}})


def test_classes_and_examples_are_listed(shared: Client) -> None:
    classifier = shared.served.classifier
    body = shared.get("/v1/classes").json()
    assert [one["name"] for one in body["classes"]] == classifier.classes_.tolist()
    assert all(one["examples"] == SHOTS for one in body["classes"]) and body["version"] == classifier.version
    path, ids = "/v1/classes/~1/examples", classifier.examples("~1")
    for query, expected, following in (
        ("", ids, None),
        ("limit=2", ids[:2], ids[1]),
        (f"after={ids[1]}", ids[2:], None),
    ):
        page = shared.get(f"{path}?{query}").json()
        assert (page["class_id"], page["example_ids"], page["next"]) == ("~1", expected, following)
    picture = shared.get(f"/v1/examples/{ids[0]}/picture")
    assert picture.status_code == 200 and picture.headers["Content-Type"] == "image/webp"
    assert picture.content == classifier.picture(ids[0])
    assert error_of(shared.get("/v1/classes/nobody/examples"), 404) == "no_class"
    assert error_of(shared.get("/v1/examples/e99999/picture"), 404) == "no_example"


def test_many_classes_are_listed_page_by_page() -> None:
    classifier, count = load(), 100_000
    head = classifier.snapshot()
    names = (*head.class_names, *(f"class {number}" for number in range(CLASSES, count)))
    uids = (*head.uids, *range(2 * CLASSES, 2 * count, 2))[:count]  # as after removals
    with serving(classifier) as client:
        classifier._fit = replace(classifier._fit, head=replace(head, class_names=names, uids=uids))
        body = client.get("/v1/classes").json()
        assert len(body["classes"]) == 1_000 and body["total"] == count
        assert body["next"] == body["classes"][-1]["class_id"] == f"~{uids[999]}"
        for query, expected in (
            (f"limit=1&after=~{uids[999]}", names[1000:1001]),
            (f"limit=999&after=~{uids[50] + 1}", names[51:1050]),  # of a class that was removed in the meantime
            (f"after=~{uids[-3]}", names[-2:]),
        ):
            page = client.get(f"/v1/classes?{query}").json()
            assert [one["name"] for one in page["classes"]] == list(expected)
            assert (page["next"] is None) == (expected[-1] == names[-1])
        for limit in ("0", "1001", "x"):
            assert error_of(client.get(f"/v1/classes?limit={limit}"), 422) == "invalid_parameters"


def test_classes_change_while_it_serves() -> None:
    with serving() as client:
        classifier, texts = client.served.classifier, ["a magenta square", "one colour"]
        embed = classifier._fit.clip.text.embed_classes
        data = {"name": " magenta ", "description": texts, "parent": ["colour", "red"]}
        made = change(client, "POST", "/classes", data=data, files=form(MAGENTA, MAGENTA))
        added = made.json()
        assert made.status_code == 201 and added["version"] == 2 and len(added["example_ids"]) == 2
        class_id, path = added["class_id"], f"/classes/{added['class_id']}"
        listed = client.get("/v1/classes").json()["classes"][-1]
        assert listed == {"class_id": class_id, "name": "magenta", "examples": 2, "path": ["colour", "red"]}
        np.testing.assert_array_equal(classifier.support_.text[-1:], embed(["magenta"], None, {"magenta": texts}))
        body = client.predict(MAGENTA).json()
        assert body["version"] == 2 and body["predictions"][0]["class_id"] == class_id
        more = change(client, "POST", f"{path}/examples", files=form(MAGENTA)).json()
        assert more["version"] == 3 and len(more["example_ids"]) == 1
        gone = change(client, "DELETE", f"/examples/{more['example_ids'][0]}").json()
        assert gone == {"version": 4, "class_id": class_id, "example_ids": more["example_ids"]}

        before = classifier.support_.text
        assert change(client, "PATCH", path, files=fields(name=" pink ", keep_text="True")).json()["version"] == 5
        assert client.predict(MAGENTA).json()["predictions"][0]["label"] == "pink"
        np.testing.assert_array_equal(classifier.support_.text, before)
        described = fields(name="pink", description=texts[:1])  # its own name is free
        assert change(client, "PATCH", path, files=described).json()["version"] == 6
        np.testing.assert_array_equal(classifier.support_.text[-1:], embed(["pink"], None, {"pink": texts[:1]}))

        for *parent, expected in (("colour", ["colour"]), ("", "a", "b", ["a", "b"]), ("", "c", ["c"]), ("", [])):
            assert change(client, "PATCH", path, files=fields(parent=parent)).status_code == 200
            assert client.get("/v1/classes").json()["classes"][-1]["path"] == expected
        version = classifier.version
        assert change(client, "POST", "/retune").json()["version"] == version + 1
        removed = change(client, "DELETE", path).json()
        assert (removed["version"], removed["class_id"]) == (version + 2, class_id)
        assert len(client.get("/v1/classes").json()["classes"]) == CLASSES


def test_wrong_changes_are_refused_and_change_nothing(shared: Client) -> None:
    name = str(shared.served.classifier.classes_[0])
    alike = name.replace("a", "\u0430").replace("e", "\u0435").replace("o", "\u043e")  # letters of Cyrillic
    good, new, first, x = form(GREY), "/classes", "/classes/~0", {"name": "x"}
    parents = ["a", ""], ["", ""], ["a", name], ["a"] * 101, ["x" * 2_000]
    texts = " ", "long " * 20, "a\0b", "a\x1b[31m", "a" + " " * 2000
    for method, path, files, status, code in (
        ("POST", new, fields(name=name) + good, 409, "name_taken"),
        ("PATCH", "/classes/~1", fields(name=name), 409, "name_taken"),
        ("PATCH", "/classes/~1", fields(name=name.upper()), 422, "refused"),
        *(("POST", new, fields(name=bad) + good, 422, "bad_name") for bad in (" ", "a\u202eb", "~3")),
        *(("POST", new, fields(name=bad) + good, 422, "refused") for bad in (alike, name.upper())),
        *(("POST", new, fields(**x, description=text) + good, 422, "refused") for text in texts),
        *(("POST", new, fields(**x, parent=bad) + good, 422, "refused") for bad in ("no node", name)),
        ("POST", new, good, 400, "missing_field"),
        ("POST", new, fields(**x), 422, "refused"),  # no images
        ("POST", new, fields(**x) + form(GREY, b"GIF89a"), 422, "unsupported_type"),
        ("POST", f"{first}/examples", form(GREY, GREY[:80]), 422, "bad_image"),
        ("POST", f"{first}/examples", None, 415, "unsupported_type"),
        ("POST", "/classes/nobody/examples", good, 404, "no_class"),
        *(("PATCH", "/classes/nobody", files, 404, "no_class") for files in (fields(**x), fields(parent="a"))),
        ("DELETE", f"/classes/{name}", None, 404, "no_class"),  # a name is no id
        ("DELETE", "/examples/e9999", None, 404, "no_example"),
        *(("PATCH", first, fields(parent=bad), 422, "refused") for bad in parents),
        ("PATCH", first, fields(**x, description="a\0b"), 422, "refused"),
        ("PATCH", first, fields(**x, keep_text="1"), 422, "invalid_parameters"),
        ("PATCH", first, fields(description="x"), 422, "invalid_parameters"),
        *(
            ("PATCH", first, fields(parent="a", **{more: "true"}), 422, "invalid_parameters")
            for more in ("name", "keep_text", "description")
        ),
        ("PATCH", first, fields(**x, more="1"), 400, "unexpected_field"),
        ("PATCH", first, fields(**x) + good, 400, "unexpected_field"),
    ):
        response = change(shared, method, path, files=files)
        assert error_of(response, status) == code, (method, path, files)
        assert code not in ("bad_image", "unsupported_type") or not files or "number 1" in response.text
    assert shared.served.classifier.version == 1


@pytest.mark.parametrize(
    "digits", ["٣", "03", "+3", "-3", "3.0", "1_0", "³", "0x3", "9" * 19, "3 ", "3\n", "3\0", "", "e3"]
)
def test_another_form_of_a_number_is_no_id(shared: Client, digits: str) -> None:
    """int() takes digits of every script, signs, spaces and underscores: each would name a class or picture twice."""
    class_id, example_id = quote("~" + digits), quote("e" + digits)
    for method, path in (
        ("DELETE", f"/examples/{example_id}"),
        ("GET", f"/examples/{example_id}/picture"),
        ("DELETE", f"/classes/{class_id}"),
        ("GET", f"/classes/{class_id}/examples"),
    ):
        assert error_of(change(shared, method, path), 404) in ("no_class", "no_example"), (method, path)
    for path in (f"/v1/classes?after={class_id}", f"/v1/classes/~0/examples?after={example_id}"):
        assert error_of(shared.get(path), 422) == "invalid_parameters"
    assert shared.served.classifier.version == 1


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
OTHERS = [("PUT", "/v1/predict"), ("TRACE", "/"), ("POST", "//v1/predict"), ("POST", "/V1/PREDICT"), ("POST", "/no")]


def answer_unread(client: Client, method: str, path: str, *tokens: bytes) -> int:
    """The status of the answer to a large body, which is 500 where the body is read."""
    statuses = []

    async def receive() -> Any:
        raise AssertionError("the body is read")

    async def send(message: Any) -> None:
        statuses.append(message.get("status"))

    headers = [(b"content-type", b"multipart/form-data; boundary=x"), (b"content-length", b"31000000")]
    headers += [(b"authorization", token) for token in tokens]
    scope = {"type": "http", "http_version": "1.1", "method": method, "path": path, "raw_path": path.encode()}
    scope |= {"query_string": b"", "headers": headers, "scheme": "http", "server": ("x", 80), "client": ("y", 1)}
    client.run(client.app(scope, receive, send))
    return int(statuses[0])


def test_every_spelling_of_a_change_needs_the_token(shared: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = shared.get("/openapi.json").json()["paths"]
    described = [(method.upper(), path) for path, told in paths.items() for method in told if method != "get"]
    asks = {"/v1/predict", "/v1/embeddings"}  # change nothing
    assert len(described) == len(CHANGES) + len(asks) and asks < paths.keys(), "a new route is in CHANGES"
    monkeypatch.setattr(type(shared.served), "change", Mock(side_effect=ApiError(409, "reached", "a change is made")))
    token, reached = TOKEN.encode(), set()
    right = b"Bearer " + token
    near: list[list[bytes]] = [[], [right[:-1] + b"x"]]
    odd_ones = (
        b"Bearer x" + token[1:],
        b"Basic " + token,
        right[:-1],
        right + b"x",
        token,
        b"Bearer",
        b"",
        b"Bearer \xff",
    )
    wrong = [*near, *([one] for one in odd_ones), [right, right], [right, b"Bearer wrong"]]
    for method, path in (*CHANGES, *OTHERS):
        odd = ("/" + path, path + "/", path + "/.", path.upper(), path.replace("1", "%31"), path + "?x", path + "\0")
        ids = [path.replace(one, other) for one in ("~0", "e0") for other in ("", "..", "a b", "é", "\n", "x" * 999)]
        for spelled in (path, *odd, *ids, *(one + "\n" for one in (path, *ids))):
            for verb in (method, method.lower(), "PUT", "QUERY"):
                told = answer_unread(shared, verb, spelled, right)
                reached |= {spelled} if told not in (404, 405) else set()
                for tokens in wrong if spelled == path else near:
                    refused = answer_unread(shared, verb, spelled, *tokens)
                    assert refused == (told if told in (404, 405) else 401), (verb, spelled, tokens)
    assert {path for _, path in CHANGES} | {"/v1/retune\n"} <= reached and shared.served.classifier.version == 1


def test_a_body_without_images_is_small_even_with_the_token(shared: Client) -> None:
    async def parts() -> Any:
        for _ in range(70):
            yield bytes(1000)

    for body in (bytes(70_000), parts()):
        headers = {"Content-Type": "multipart/form-data; boundary=x"}
        assert error_of(change(shared, "PATCH", "/classes/~0", content=body, headers=headers), 413) == "too_large"
    assert answer_unread(shared, "PATCH", "/v1/classes/~0", b"Bearer " + TOKEN.encode()) == 413
    assert shared.served.classifier.version == 1


def test_without_a_token_nobody_changes_anything() -> None:
    with serving(token=None) as client:
        for method, path in CHANGES:
            response = client.ask(method, path, headers=AUTHORISED)
            assert error_of(response, 403) == "changes_disabled" and "--token-file" in response.text
        assert client.predict(GREY).status_code == 200


# --- many, slow and failing changes ---


def test_closing_waits_no_longer_than_it_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    settings, go_on = Settings(token=TOKEN, log=tmp_path / "changes.db"), threading.Event()
    with open_site({"": http_client.bundle()}, settings) as site:
        client = Client(site)
        monkeypatch.setattr(Store, "_ready", lambda self, head, before: go_on.wait(20) and head)
        running = client.start("DELETE", "/v1/classes/~0", headers=AUTHORISED)
        wait_until(client.served.classifier._store.lock.locked)
        waiting = client.start("DELETE", "/v1/classes/~1", headers=AUTHORISED)
        wait_until(lambda: len(client.served.unfinished) == 2)
    assert client.served.unfinished and "change_abandoned" in caplog.text, "it still runs, and has the log"
    go_on.set()
    assert running.result(20).status_code == 200 and client.served.close(20) and not client.served.unfinished
    with pytest.raises(CancelledError):
        waiting.result(20)
    client.close()


def test_few_changes_may_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("iosr_fast.serving.limits.Limits.changes", 2)
    classifier = load()
    gate = http_client.Gate(classifier)
    with serving(classifier) as client:
        gate.shut()
        path, files = "/v1/classes/~0/examples", (form(GREY), form(MAGENTA))
        waiting = [client.start("POST", path, files=each, headers=AUTHORISED) for each in files]
        wait_until(lambda: len(client.served.unfinished) == 2)
        response = change(client, "POST", "/retune")
        assert error_of(response, 503) == "busy" and int(response.headers["Retry-After"]) >= 1
        gate.open()
        assert [one.result(20).json()["version"] for one in waiting] == [2, 3]


def test_a_log_that_cannot_be_written_makes_it_read_only(tmp_path: Path) -> None:
    classifier = load()
    classifier.open_log(tmp_path / "changes.db")
    database = classifier._store.log._db
    with serving(classifier) as client:

        def rename(name: str) -> Any:
            return change(client, "PATCH", "/classes/~0", files=fields(name=name, keep_text="true"))

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
        assert ready.status_code == 200 and ready.json()["detail"].startswith("read-only: ")
        assert "No space left" in ready.text and client.get("/healthz").json() == {"status": "ok", "detail": ""}
        assert "iosr_fast_read_only 1.0" in client.get("/metrics").text
        database.execute(f"PRAGMA max_page_count={most}")
        assert rename("three").json()["version"] == version + 1  # as soon as it works
        assert client.get("/readyz").json() == {"status": "ok", "detail": ""}
    classifier.close_log()
