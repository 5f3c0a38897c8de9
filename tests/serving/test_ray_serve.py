"""iosr_fast.serving.ray on Ray, under load: nothing that was accepted is lost, whoever dies, and a bundle is taken by
all replicas or by none. tests/serving/test_ray_remote.py has what needs no Ray running."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("ray.serve", reason="ray.serve comes with the ray extra")

import ray
from PIL import Image

from iosr_fast.classifier import Classifier
from iosr_fast.serving.http.settings import Settings
from iosr_fast.serving.ray import Scale, deploy, rollout
from iosr_fast.utils.manifest import seal
from iosr_fast.utils.ray_cluster import joined
from tests.pictures import GREY, encode
from tests.serving.http_client import bundle, form, httpx, queries
from tests.serving.ray_load import COMMAND, Load, error_of, save_renamed, served, wait_for

pytestmark = pytest.mark.slow

SETTINGS = Settings(runtime="onnxruntime", max_batch=8)
SCALE = Scale(min_replicas=2, max_replicas=3, target_ongoing_requests=100, cpus=0.5, health_period_s=1.0)
OPTIONS = [
    "--runtime",
    "onnxruntime",
    "--max-batch",
    "8",
    "--min-replicas",
    "2",
    "--max-replicas",
    "3",
    "--cpus",
    "0.5",
]
OPTIONS += ["--target-ongoing-requests", "100", "--health-period", "1"]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """Two replicas behind `iosr-fast serve-ray`, whose Ray this process joins: the URL, and Ray's address."""
    said = tmp_path_factory.mktemp("serve") / "said"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")  # whether the user has a token of Ray's lying about must not matter
        with served(said, str(bundle()), *OPTIONS) as (url, address), joined(address, 0):
            yield url, address
    assert not ray.is_initialized(), "no thread of a handle's was to join again"


@pytest.fixture
def url(service: tuple[str, str]) -> str:
    return service[0]


@pytest.fixture(scope="module")
def truth() -> list[str]:
    return [str(label) for label in Classifier.load(bundle()).predict(queries())]


def test_the_api_on_replicas(url: str, truth: list[str]) -> None:
    with httpx.Client(base_url=url, timeout=60) as client:
        files = [("images", (f"{i}.png", image, "image/png")) for i, image in enumerate(queries())]
        body = client.post("/v1/predict?top=8&nearest=2", files=files).json()
        assert [made["label"] for made in body["predictions"]] == truth
        probabilities = Classifier.load(bundle()).predict_proba(queries())
        for made, row in zip(body["predictions"], probabilities, strict=True):
            assert made["probability"] == pytest.approx(row.max(), abs=1e-5) and len(made["nearest"]) == 2
        rejecting = client.post("/v1/predict?unknown=reject&keep=0.5&deadline_ms=60000", files=files).json()
        expected = Classifier.load(bundle()).explain(queries(), unknown="reject", keep=0.5)
        assert [made["label"] for made in rejecting["predictions"]] == [one.label for one in expected]
        assert error_of(client.post("/v1/predict?unknown=reject&keep=0.999", content=GREY), 422) == "no_promise"
        assert client.get("/v1/classifier").json()["model"] == "demo"
        listed = client.get("/v1/classes").json()["classes"]
        assert [one["name"] for one in listed] == Classifier.load(bundle()).classes_.tolist()
        examples = client.get(f"/v1/classes/{listed[0]['class_id']}/examples").json()["example_ids"]
        picture = client.get(f"/v1/examples/{examples[0]}/picture")
        assert picture.headers["Content-Type"] == "image/webp" and picture.content[:4] == b"RIFF"
        assert client.get("/v1/classes/~99/examples").status_code == 404
        assert client.get("/healthz").json() == client.get("/readyz").json() == {"status": "ok", "detail": ""}
        assert client.get("/").headers["Content-Type"].startswith("text/html")
        assert error_of(client.post("/v1/retune"), 405) == "changes_elsewhere"
        assert error_of(client.post("/v1/predict", content=b""), 400) == "no_image"
        damaged = client.post("/v1/predict", content=GREY[:60], headers={"Content-Type": "image/png"})
        assert damaged.status_code == 422 and damaged.json()["predictions"][0]["error"]["code"] == "bad_image"


def test_a_replica_killed_under_load_loses_nothing_and_comes_back(url: str, truth: list[str]) -> None:
    assert len(rollout.running()) == 2
    pictures = [Image.open(io.BytesIO(image)).resize((1500, 1500)) for image in queries()]
    large = [encode(picture, "JPEG") for picture in pictures * 2]  # a second or two to decode, so that it can be hit
    expected = Classifier.load(bundle()).predict(large).tolist()
    with Load(url) as under, ThreadPoolExecutor(1) as pool:
        under.wait_for_more(30)
        asked = pool.submit(httpx.post, f"{url}/v1/predict?deadline_ms=60000", files=form(*large), timeout=90)
        working: list[int] = []

        def at_work() -> bool:
            working[:] = [one.pid for one in rollout.running() if one.pending > len(large) // 4]
            return bool(working)

        wait_for(at_work, 30, "a replica to be in the middle of the large request")
        killed = working[0]
        os.kill(killed, signal.SIGKILL)
        assert not asked.done()
        answered = asked.result(90)
        assert answered.status_code == 200, answered.text
        assert [made["label"] for made in answered.json()["predictions"]] == expected
        under.wait_for_more(30)

        def back() -> bool:
            now = rollout.running()
            return len(now) == 2 and killed not in {one.pid for one in now}

        wait_for(back, 60, "the replica to come back")
        under.wait_for_more(30)
    assert all(label == truth[image] for image, label in under.labels())


def test_a_bundle_is_rolled_out_under_load(url: str, truth: list[str], tmp_path: Path) -> None:
    new = save_renamed(tmp_path / "new", "new ")
    pids = {one.pid for one in rollout.running()}
    with Load(url) as under:
        under.wait_for_more(20)
        facts = deploy(new, SETTINGS, SCALE)
        updated = len(under.answers)
        under.wait_for_more(60)  # more than were on their way when the last replica swapped
    assert [one.source.bundle for one in facts] == [str(new)] * 2
    assert {one.pid for one in facts} == pids, "no replica was to be restarted"
    labels = under.labels()
    assert all(label in (truth[image], f"new {truth[image]}") for image, label in labels)
    assert labels[0] == (labels[0][0], truth[labels[0][0]])
    assert all(label == f"new {truth[image]}" for image, label in labels[updated + len(under._threads) :])


def test_a_bundle_that_can_not_be_loaded_changes_nothing(
    service: tuple[str, str], truth: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, address = service
    before = rollout.running()
    serving = {one.source for one in before}
    prefix = "new " if next(iter(serving)).bundle != str(bundle()) else ""
    # Whole by its manifest, but no replica can load it: its engine is of another export than its support set.
    broken = Path(shutil.copytree(bundle(), tmp_path / "broken"))
    manifest = json.loads((broken / "manifest.json").read_text())
    (broken / "manifest.json").write_bytes(seal({**manifest, "encoder_fingerprint": "0" * 64}))
    words = [str(broken), "--address", address, *OPTIONS]
    with Load(url) as under:
        refused = subprocess.run([*COMMAND, *words], capture_output=True, text=True, timeout=120)
        assert refused.returncode == 2, refused.stdout
        assert "a replica can't load" in refused.stderr and "nothing was changed" in refused.stderr
        # As where only some machine can't load it: it passes the look before, and replicas refuse it.
        monkeypatch.setattr(rollout, "_try", lambda *_: None)
        with pytest.raises(RuntimeError, match=r"expected 2 replicas to serve .*, got 0: .* is of another export"):
            deploy(broken, SETTINGS, SCALE)
        under.wait_for_more(30)
    after = rollout.running()
    assert {one.source for one in after} == serving and not any(one.refused for one in after)
    assert {one.pid for one in after} == {one.pid for one in before}
    assert all(label == prefix + truth[image] for image, label in under.labels())
    assert httpx.get(f"{url}/readyz").json() == {"status": "ok", "detail": ""}


def test_other_settings_restart_replicas_and_lose_nothing(url: str, truth: list[str]) -> None:
    before = rollout.running()
    current = Path(before[0].source.bundle)
    prefix = "" if current == bundle() else "new "
    with Load(url) as under:
        under.wait_for_more(20)
        after = deploy(current, replace(SETTINGS, max_batch=4), SCALE)
        under.wait_for_more(20)
    assert len(after) == 2 and not {one.pid for one in after} & {one.pid for one in before}
    assert all(label == prefix + truth[image] for image, label in under.labels())
