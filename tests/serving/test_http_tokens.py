"""Tokens: who may change and who may predict, near misses, and the name in the log."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from iosr_fast.serving.http.tokens import read_tokens
from tests.pictures import GREY
from tests.serving.http_client import TOKEN, Client, error_of, fields, serving

ALICE, BOB, SHOP = "alices-secret-token", "bobs-secret-token-0", "shops-secret-token"
RENAME = {"files": fields(name="renamed", keep_text="true")}


@pytest.fixture(scope="module")
def guarded() -> Iterator[Client]:
    with serving(token=f"alice {ALICE}\n\nbob\t{BOB}\nshop {SHOP} predict\n") as client:
        yield client


def bearer(token: str) -> dict[str, dict[str, str]]:
    return {"headers": {"Authorization": f"Bearer {token}"}}


@pytest.mark.parametrize("token", [ALICE, BOB, SHOP])
def test_a_token_that_is_nearly_right_is_wrong(guarded: Client, token: str) -> None:
    changed = [token[:at] + "_" + token[at + 1 :] for at in range(len(token))]
    for wrong in (*changed, "x" * len(token), token[:-1], token[1:], token + "x", token.upper(), ALICE + BOB):
        for method, path in (("POST", "/v1/predict"), ("DELETE", "/v1/classes/~0")):
            refused = guarded.ask(method, path, **bearer(wrong))
            assert (error_of(refused, 401), refused.headers["WWW-Authenticate"]) == ("unauthorized", "Bearer"), wrong
    assert guarded.served.classifier.version == 1


def test_a_token_may_predict_alone_and_is_named_in_the_log(guarded: Client, caplog: pytest.LogCaptureFixture) -> None:
    assert error_of(guarded.predict(GREY), 401) == "unauthorized"
    assert guarded.get("/v1/classes").status_code == 200  # reading needs none
    for method, path in (("POST", "/v1/classes"), ("POST", "/v1/examples"), ("PATCH", "/v1/examples/e0")):
        assert error_of(guarded.ask(method, path, **RENAME, **bearer(SHOP)), 403) == "predict_only"
    assert guarded.served.classifier.version == 1
    caplog.clear()
    with caplog.at_level(logging.INFO, "iosr_fast.serving"):
        assert guarded.ask("PATCH", "/v1/classes/~0", **RENAME, **bearer(BOB)).status_code == 200
        for token in (SHOP, ALICE):
            assert guarded.ask("POST", "/v1/predict", content=GREY, **bearer(token)).status_code == 200
        guarded.ask("POST", "/v1/retune", **bearer(SHOP))
        guarded.get("/v1/classes")
    logged = [(record.msg, record.facts.get("token")) for record in caplog.records]  # type: ignore[attr-defined]
    assert logged == [("change", "bob"), *[("request", name) for name in ("bob", "shop", "alice", "shop", None)]]


def test_without_a_token_for_changes_there_are_none() -> None:
    for token in (TOKEN, "!" * 16, "~" * 16):
        assert read_tokens(f"{token}\n") == (("token", token, True),)
    with serving(token=f"shop {SHOP} predict") as client:
        assert client.ask("POST", "/v1/predict", content=GREY, **bearer(SHOP)).status_code == 200
        assert error_of(client.ask("POST", "/v1/retune", **bearer(SHOP)), 403) == "changes_disabled"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected one token, or only lines"),
        (f"{ALICE}\n{BOB}", "expected one token, or only lines"),
        (f"alice {ALICE}\nbob {BOB} change", "expected one token, or only lines"),
        (f"alice {ALICE[:15]}", "at least 16 printable ASCII characters, got 15 characters for 'alice'"),
        (f"alice {ALICE}\x7f", "printable ASCII"),
        (f"alice {ALICE}ü", "printable ASCII"),
        (f"alice {ALICE}\nalice {BOB}", "expected names that differ"),
        (f"alice {ALICE}\nbob {ALICE} predict", "expected tokens that differ"),
    ],
)
def test_a_file_in_another_form_is_refused_without_a_quote(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        read_tokens(text)
    assert "-secret-" not in str(refused.value)
