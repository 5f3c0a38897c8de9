"""The parts of iosr_fast.serving.ray without Ray running: what is sent again, and what one replica does."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

pytest.importorskip("ray.serve", reason="ray.serve comes with the ray extra")

from ray.exceptions import ActorDiedError, ActorUnavailableError, RayTaskError

from iosr_fast.cli import app
from iosr_fast.exceptions import BadImageError
from iosr_fast.head.predictions import Prediction
from iosr_fast.images.geometry import Geometry
from iosr_fast.serving.batching.item import Query
from iosr_fast.serving.http.metrics import Metrics
from iosr_fast.serving.http.settings import Settings
from iosr_fast.serving.ray import Scale, build_app, from_config, replica
from iosr_fast.serving.ray.deployment import code_version
from iosr_fast.serving.ray.ingress import make_app
from iosr_fast.serving.ray.messages import Facts, Reply, Source
from iosr_fast.serving.ray.remote import MAX_DEATHS, MAX_REFUSALS, Remote
from iosr_fast.serving.ray.replica import ClassifierReplica
from tests.pictures import GREY
from tests.serving.http_client import CLASSES, Client, Gate, bundle, load, queries
from tests.serving.ray_load import error_of, save_broken, save_renamed

pytestmark = pytest.mark.slow

FACTS = Facts("r1", 1, "here", Source("b", "c"), 3, Geometry(64), 2)


def reply(status: str, **fields: Any) -> Reply:
    return Reply(status, FACTS, **fields)


def answer(label: str) -> Reply:
    made = Prediction(label, "~0", 0.5, 1.0, 0.5, 0.5, 0.0, (), (), 3)
    return reply("ok", results=[made])


class Replicas:
    """What Remote calls: gives or raises one of `script` after another, then `otherwise`."""

    def __init__(self, *script: Any, otherwise: Any = None) -> None:
        self.script, self.otherwise = list(script), otherwise
        self.calls: list[tuple[Any, ...]] = []
        self.cancelled = 0

    async def __call__(self, method: str, *values: Any) -> Any:
        if method == "describe":
            return FACTS
        self.calls.append((method, *values))
        made = self.script.pop(0) if self.script else self.otherwise
        if isinstance(made, float):
            try:
                await asyncio.sleep(made)
            except asyncio.CancelledError:
                self.cancelled += 1
                raise
            return answer("late")
        if isinstance(made, Exception):
            raise made
        return made


@contextmanager
def ingress(replicas: Replicas, **settings: Any) -> Iterator[Client]:
    made, metrics = Settings(**settings), Metrics()
    remote = Remote(replicas, made.max_deadline_ms / 1e3, metrics)
    asyncio.run(remote.describe())
    client = Client(make_app(remote, made, metrics))
    try:
        yield client
    finally:
        client.close()


# --- requests that are sent again ---


def test_what_a_replica_had_when_it_died_is_sent_to_another_one() -> None:
    replicas = Replicas(ActorDiedError(), ActorUnavailableError("away", b"0" * 16), ActorDiedError(), answer("cat"))
    with ingress(replicas) as client:
        response = client.predict(GREY, query="?top=2&nearest=1&deadline_ms=3000")
        assert response.status_code == 200 and response.json()["predictions"][0]["label"] == "cat"
    lefts = [call[-1] for call in replicas.calls]
    assert [call[:-1] for call in replicas.calls] == [("classify", [GREY], Query(2, 1, 3.0, "127.0.0.1"))] * 4
    assert 3.0 >= lefts[0] > lefts[1] > lefts[2] > lefts[3] > 2.0, "each is told what is left of the deadline"


def test_a_request_that_kills_replicas_is_given_up() -> None:
    replicas = Replicas(otherwise=ActorDiedError())
    with ingress(replicas) as client:
        assert error_of(client.predict(GREY), 500) == "replicas_died"
    assert len(replicas.calls) == MAX_DEATHS


@pytest.mark.parametrize(
    ("refusal", "code", "retry"),
    [
        (reply("full", message="full", retry_after_s=6.5), "queue_full", "7"),
        (reply("closed", message="closed"), "closed", "1"),
        (reply("failed", message="CUDA error"), "engine_failed", "5"),
    ],
)
def test_what_one_replica_refuses_is_offered_to_others(refusal: Reply, code: str, retry: str) -> None:
    replicas = Replicas(refusal, answer("cat"))
    with ingress(replicas) as client:
        assert client.predict(GREY).status_code == 200 and len(replicas.calls) == 2
        replicas.otherwise, replicas.calls = refusal, []
        response = client.predict(GREY)
        assert error_of(response, 503) == code and response.headers["Retry-After"] == retry
        assert "CUDA" not in response.text and len(replicas.calls) == MAX_REFUSALS


def test_a_query_that_is_refused_is_not_sent_again() -> None:
    replicas = Replicas(reply("refused", message="a promise needs at least 19 support images, got 3"))
    with ingress(replicas) as client:
        response = client.predict(GREY, query="?unknown=reject&keep=0.9")
        assert error_of(response, 422) == "no_promise" and "got 3" in response.text
    assert [call[2].keep for call in replicas.calls] == [0.9]


def test_the_soonest_of_several_refusals_is_told() -> None:
    full = [reply("full", message="full", retry_after_s=seconds) for seconds in (9.0, 3.5, 20.0)]
    with ingress(Replicas(*full)) as client:
        response = client.predict(GREY)
        assert error_of(response, 503) == "queue_full" and response.headers["Retry-After"] == "4"


def test_without_replicas_a_request_ends_with_its_deadline() -> None:
    with ingress(Replicas(otherwise=ActorUnavailableError("away", b"0" * 16))) as client:
        assert error_of(client.predict(GREY, query="?deadline_ms=200"), 504) == "deadline_exceeded"


def test_a_request_that_is_given_up_is_cancelled_at_the_replica() -> None:
    replicas = Replicas(30.0)
    with ingress(replicas) as client:
        assert error_of(client.predict(GREY, query="?deadline_ms=100"), 504) == "deadline_exceeded"
        until = time.monotonic() + 10
        while not replicas.cancelled and time.monotonic() < until:
            time.sleep(0.005)
    assert replicas.cancelled == 1


def test_a_mistake_in_a_replica_is_a_500_and_not_repeated() -> None:
    replicas = Replicas(RayTaskError("classify", "Traceback: secret", ZeroDivisionError("division by zero")))
    with ingress(replicas) as client:
        response = client.predict(GREY)
        assert error_of(response, 500) == "internal" and "secret" not in response.text
    assert len(replicas.calls) == 1


def test_bad_images_are_errors_in_their_places() -> None:
    made = answer("cat").results[0]
    replicas = Replicas(reply("ok", results=[made, BadImageError(None, 1, "cut off")]))
    with ingress(replicas) as client:
        told = client.predict(GREY, b"<svg/>", GREY).json()["predictions"]
    assert [one.get("label") or one["error"]["code"] for one in told] == ["cat", "unsupported_type", "bad_image"]


def test_changes_are_refused_with_the_way_to_make_them() -> None:
    with ingress(Replicas()) as client:
        for method, path, allowed in (
            ("POST", "/v1/classes", "GET"),
            ("PATCH", "/v1/classes/~0", ""),
            ("DELETE", "/v1/classes/~0", ""),
            ("POST", "/v1/classes/~0/examples", "GET"),
            ("DELETE", "/v1/examples/e0", ""),
            ("POST", "/v1/retune", ""),
        ):
            response = client.ask(method, path)
            assert error_of(response, 405) == "changes_elsewhere" and response.headers["Allow"] == allowed
            assert "deploy the bundle" in response.json()["error"]["message"]


# --- one replica ---


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replica, "_replica_name", lambda: "r1")


def test_a_replica_takes_a_new_bundle_and_keeps_the_old_one_where_it_can_not(alone: None, tmp_path: Path) -> None:
    settings = Settings(runtime="onnxruntime", max_batch=4)
    images = queries()[:3]
    labels = load().predict(images).tolist()

    async def lives() -> None:
        one = ClassifierReplica(settings, 1)
        with pytest.raises(ValueError, match="expected a user_config"):
            await one.reconfigure({"bundel": "x"})
        with pytest.raises(ValueError, match="does not match its manifest"):
            await one.reconfigure({"bundle": str(save_broken(tmp_path / "first"))})  # there is no old one

        async def told() -> list[str]:
            made = await one.classify(images, Query(1), 30.0)
            assert made.status == "ok"
            return [result.label for result in made.results]

        await one.reconfigure(asdict(Source.of(str(bundle()))))
        assert await told() == labels and (await one.describe()).refused == ""
        broken = save_broken(tmp_path / "broken")
        assert "does not match its manifest" in await one.try_bundle({"bundle": str(broken)})
        await one.reconfigure({"bundle": str(broken)})
        facts = await one.describe()
        assert await told() == labels and facts.source.bundle == str(bundle())
        assert str(broken) in facts.refused and "does not match its manifest" in facts.refused
        # A folder that is not the one that was rolled out.
        new = save_renamed(tmp_path / "new", "new ")
        await one.reconfigure({"bundle": str(new), "checksum": Source.of(str(bundle())).checksum})
        assert await told() == labels and "it was replaced" in (await one.describe()).refused
        assert await one.try_bundle(asdict(Source.of(str(new)))) == ""
        await one.reconfigure(asdict(Source.of(str(new))))
        assert await told() == [f"new {label}" for label in labels]
        assert await one.describe() == Facts(
            "r1", os.getpid(), socket.gethostname(), Source.of(str(new)), 1 + CLASSES, Geometry(64), CLASSES
        )
        one.check_health()
        one.__del__()
        assert (await one.classify(images, Query(1), None)).status == "closed"

    asyncio.run(lives())


def test_a_replica_says_why_another_one_should_be_asked(alone: None, monkeypatch: pytest.MonkeyPatch) -> None:
    classifier = load()
    gate = Gate(classifier)
    monkeypatch.setattr(Source, "load", lambda self, *_: (self, classifier))

    async def lives() -> None:
        one = ClassifierReplica(Settings(max_batch=2, max_queue=2, max_images=2), 1)
        await one.reconfigure({"bundle": "b", "checksum": "c"})
        assert (await one.classes())["classes"][0]["class_id"] == "~0"
        assert (await one.examples("~0"))["example_ids"][0] == "e0" and await one.examples("~99") is None
        asked = await one.classify([GREY], Query(1, keep=0.9), None)
        assert asked.status == "ok" and asked.results == classifier.explain([GREY], 1, unknown="reject", keep=0.9)
        assert (await one.classify([GREY], Query(1, keep=0.999), None)).status == "refused"
        assert (await one.overview(0.999))["unknown"]["promised"] is False
        assert (await one.picture("e0"))[:4] == b"RIFF" and await one.picture("e999") is None
        gate.shut()
        first = asyncio.create_task(one.classify([GREY, GREY], Query(1), None))
        await asyncio.sleep(0.05)
        full = await one.classify([GREY], Query(1), None)
        assert full.status == "full" and full.retry_after_s > 0
        gate.open()
        assert (await first).status == "ok"
        bad = await one.classify([b"\x89PNG"], Query(1), None)
        assert bad.status == "ok" and isinstance(bad.results[0], BadImageError)
        gate.error = RuntimeError("out of luck")
        failed = await one.classify([GREY], Query(1), None)
        assert failed.status == "failed" and "out of luck" in failed.message
        with pytest.raises(RuntimeError, match="the engine failed: out of luck"):
            one.check_health()
        gate.error = None
        assert (await one.classify([GREY], Query(1), None)).status == "ok"
        one.check_health()
        one.__del__()

    asyncio.run(lives())


# --- what is refused before anything starts ---


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"replicas": 0}, "expected replicas to be `int` >= 1, got 0"),
        ({"cpus": -1}, "expected cpus to be `float` >= 0.0, got -1"),
        ({"min_replicas": 3, "max_replicas": 2}, "expected max_replicas of at least min_replicas, got 2 and 3"),
        ({"health_period_s": 0}, "expected health_period_s to be `float` >= 0.001, got 0"),
    ],
)
def test_a_scale_that_can_not_be_is_refused(fields: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        Scale(**fields)


def test_an_application_is_built_or_says_why_not(tmp_path: Path) -> None:
    assert Scale(cpus=0.5).threads_each == 1 and Scale(cpus=2.5).threads_each == 3
    assert Scale(max_replicas=4, target_ongoing_requests=8).replica_options() == {
        "autoscaling_config": {"min_replicas": 1, "max_replicas": 4, "target_ongoing_requests": 8}
    }
    versions = [code_version(settings, Scale()) for settings in (Settings(), Settings(port=1), Settings(max_batch=1))]
    assert versions[0] == versions[1] != versions[2], "what Ray Serve listens on restarts no replica"
    assert from_config({"bundle": str(bundle()), "settings": {"max_batch": 8}, "scale": {"max_replicas": 4}})
    with pytest.raises(ValueError, match="expected args with bundle"):
        from_config({"bundel": "x"})
    with pytest.raises(ValueError, match="without token and log"):
        build_app(bundle(), Settings(token="a-token-for-tests-only"))
    with pytest.raises(FileNotFoundError, match=r"expected a folder with a manifest\.json"):
        build_app(tmp_path)
    refused = CliRunner().invoke(app, ["serve-ray", str(save_broken(tmp_path / "broken"))])
    assert refused.exit_code == 2 and "does not match its manifest" in refused.output


@pytest.mark.parametrize(
    ("failure", "said"),
    [
        (RayTaskError("ready", "Traceback", RuntimeError("Failed to bind to '127.0.0.1:80'.")), "Failed to bind"),
        (ActorDiedError(), "died"),
        (TimeoutError("HTTP proxies not available after 60s."), "not available after 60s; choose a free --port"),
    ],
)
def test_a_proxy_that_does_not_start_is_an_error_in_words(
    failure: Exception, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(**_: object) -> None:
        raise failure.as_instanceof_cause() if isinstance(failure, RayTaskError) else failure  # as ray.get raises it

    monkeypatch.setattr("iosr_fast.utils.ray_cluster.joined", lambda *_: nullcontext())
    monkeypatch.setattr("ray.serve.start", start)
    refused = CliRunner().invoke(app, ["serve-ray", str(bundle()), "--address", "auto", "--port", "80"])
    assert refused.exit_code == 2 and said in refused.output
    assert "start at 127.0.0.1:80" in refused.output and "RAY_worker_niceness=0" in refused.output
