"""Replicas on Ray: what is answered while replicas die and while another bundle is rolled out."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

pytest.importorskip("ray.serve", reason="ray.serve comes with the ray extra")

import ray
from ray.exceptions import ActorDiedError

from iosr_fast.cli import app
from iosr_fast.ray import build_app, digest_of, from_config
from iosr_fast.serving.http.settings import Settings
from tests.pictures import GREY
from tests.serving.http_client import bundle, error_of, httpx, load, queries
from tests.waiting import wait_until

pytestmark = pytest.mark.slow

COMMAND = (sys.executable, "-m", "iosr_fast", "serve-ray")
OPTIONS = ("--replicas", "2", "--cpus", "0.5", "--max-batch", "8", "--runtime", "onnxruntime")
# Ray's workers are niced: beside other tests they would hardly get a core. A token of the user's must not matter.
ENVIRONMENT = {**os.environ, "RAY_worker_niceness": "0", "RAY_AUTH_MODE": "disabled"}
THREADS = 6


@pytest.mark.parametrize(
    ("options", "wrong"),
    [
        (("--replicas", "0"), "num_replicas"),
        (("--cpus", "-1"), "num_cpus"),
        (("--min-replicas", "3", "--max-replicas", "2"), "max_replicas"),
    ],
)
def test_an_impossible_scale_is_refused(options: tuple[str, ...], wrong: str) -> None:
    refused = CliRunner().invoke(app, ["serve-ray", str(bundle()), *options])
    assert refused.exit_code == 2 and wrong in refused.output and "Traceback" not in refused.output


def test_replicas_scale_by_their_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    started: list[int] = []

    def joined(_: str, cores: int) -> nullcontext[Any]:
        started.append(cores)
        return nullcontext(ray)

    monkeypatch.setattr("iosr_fast.cli.serve_ray.joined", joined)
    monkeypatch.setattr("ray.serve.start", lambda **_: None)
    monkeypatch.setattr("ray.serve.run", lambda application, **_: made.append(application))
    words = ("--address", "auto", "--max-replicas", "4", "--target-ongoing-requests", "8", "--cpus", "0.5")
    assert CliRunner().invoke(app, ["serve-ray", str(bundle()), *words]).exit_code == 0
    deployment = made[0]._bound_deployment
    scaling = deployment._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas, scaling.target_ongoing_requests) == (1, 4, 8)
    assert deployment.ray_actor_options["num_cpus"] == 0.5 and started == [3], "five replicas during an update"


def test_what_no_replica_can_serve_is_refused_before_one_starts(tmp_path: Path) -> None:
    made = from_config({"bundle": str(bundle()), "settings": {"max_batch": 8}})
    assert type(made).__name__ == "Application"
    with pytest.raises(ValueError, match="expected args with bundle"):
        from_config({"bundel": "x"})
    with pytest.raises(ValueError, match="without token, log and collect"):
        build_app(bundle(), Settings(token="a-token-for-tests-only"))
    with pytest.raises(ValueError, match="digest"):
        build_app(bundle(), Settings(expected_digest=f"sha256:{'0' * 64}"))
    with pytest.raises(FileNotFoundError, match=r"expected a folder with a manifest\.json"):
        build_app(tmp_path)
    refused = CliRunner().invoke(app, ["serve-ray", str(broken(tmp_path / "broken"))])
    assert refused.exit_code == 2 and "does not match its manifest" in refused.output


def test_a_proxy_that_does_not_start_is_an_error_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(**_: object) -> None:
        raise ActorDiedError()

    monkeypatch.setattr("iosr_fast.cli.serve_ray.joined", lambda *_: nullcontext(ray))
    monkeypatch.setattr("ray.serve.start", start)
    refused = CliRunner().invoke(app, ["serve-ray", str(bundle()), "--address", "auto", "--port", "80"])
    assert refused.exit_code == 2 and "start at 127.0.0.1:80" in refused.output and "--port" in refused.output


def broken(folder: Path) -> Path:
    shutil.copytree(bundle(), folder)
    with (folder / "support.safetensors").open("r+b") as file:
        file.write(b"damaged")
    return folder


def renamed(folder: Path, prefix: str) -> Path:
    """The bundle with every class renamed, so that labels tell who answered."""
    classifier = load()
    for info in classifier.classes():
        classifier.rename_class(info.class_id, prefix + info.name, keep_text=True)
    classifier.save(folder)
    return folder


def descendants(pid: int) -> set[int]:
    """The processes that a process has started, and theirs."""
    parents: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, _, rest = stat.read_text().rpartition(")")
        except OSError:
            continue
        parents[int(name.split()[0])] = int(rest.split()[1])
    found, new = set[int](), {pid}
    while new:
        new = {child for child, parent in parents.items() if parent in new} - found
        found |= new
    return found


def alive(pids: set[int]) -> set[int]:
    return {pid for pid in pids if Path(f"/proc/{pid}/exe").exists()}


class Service:
    """`iosr-fast serve-ray` as a process. `output` is the file with what it prints."""

    def __init__(self, output: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url, self._output = f"http://127.0.0.1:{port}", output
        with output.open("w") as file:
            command = [*COMMAND, str(bundle()), *OPTIONS, "--port", str(port)]
            self.process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=ENVIRONMENT)
        self.started: set[int] = set()

    def wait(self) -> None:
        wait_until(lambda: self.process.poll() is not None or "join with" in self.output, 300, "replicas")
        assert self.process.poll() is None, self.output

    @property
    def output(self) -> str:
        return self._output.read_text()

    @property
    def replicas(self) -> set[int]:
        """Process ids."""
        self.started |= descendants(self.process.pid)
        names = {pid: Path(f"/proc/{pid}/cmdline") for pid in alive(descendants(self.process.pid))}
        return {pid for pid, name in names.items() if b"ServeReplica" in name.read_bytes()}

    def update(self, folder: Path) -> subprocess.CompletedProcess[str]:
        address = self.output.split("join with --address ")[1].split(";")[0]
        command = [*COMMAND, str(folder), *OPTIONS, "--address", address]
        return subprocess.run(command, capture_output=True, text=True, timeout=200, env=ENVIRONMENT)

    def kill(self) -> None:
        for pid in alive(self.started | {self.process.pid} | descendants(self.process.pid)):
            os.kill(pid, signal.SIGKILL)
        self.process.wait()


class Load:
    """Threads that ask for one image after another for as long as the block runs. `answers`: (image, status, label)."""

    def __init__(self, url: str) -> None:
        self.answers: list[tuple[int, int, str]] = []
        self._url, self._images, self._stopped = url, queries(), threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(i,), daemon=True) for i in range(THREADS)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        for thread in self._threads:
            thread.join(90)
        assert not any(thread.is_alive() for thread in self._threads)

    def _ask(self, number: int) -> None:
        with httpx.Client(base_url=self._url, timeout=90) as client:
            while not self._stopped.is_set():
                image = number % len(self._images)
                number += THREADS
                headers = {"Content-Type": "image/png"}
                try:
                    response = client.post(
                        "/v1/predict?top=1&deadline_ms=60000", content=self._images[image], headers=headers
                    )
                except httpx.HTTPError as error:
                    self.answers.append((image, 0, repr(error)))
                    continue
                good = response.status_code == 200
                label = response.json()["predictions"][0]["label"] if good else response.text
                self.answers.append((image, response.status_code, label))

    def wait_for_more(self, count: int) -> None:
        goal = len(self.answers) + count
        wait_until(lambda: len(self.answers) >= goal, 90, f"{count} more answers")


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    made = Service(tmp_path_factory.mktemp("ray") / "output")
    try:
        made.wait()
        yield made
        made.started |= descendants(made.process.pid)
        made.process.send_signal(signal.SIGTERM)
        assert made.process.wait(timeout=90) == 0, made.output
        wait_until(lambda: not alive(made.started), 60, "no process of Ray to be left")
    finally:
        made.kill()


@pytest.fixture(scope="module")
def truth() -> list[str]:
    return [str(label) for label in load().predict(queries())]


def test_the_api_on_replicas_is_that_of_a_server_without_changes(service: Service, truth: list[str]) -> None:
    assert digest_of(bundle()) in service.output and len(service.replicas) == 2
    with httpx.Client(base_url=service.url, timeout=60) as client:
        files = [("images", (f"{i}.png", image, "image/png")) for i, image in enumerate(queries())]
        made = client.post("/v1/predict?nearest=2&deadline_ms=60000", files=files).json()["predictions"]
        assert [one["label"] for one in made] == truth and all(len(one["nearest"]) == 2 for one in made)
        listed = client.get("/v1/classes").json()["classes"]
        assert [one["name"] for one in listed] == load().classes_.tolist()
        assert client.get("/healthz").json()["status"] == client.get("/readyz").json()["status"] == "ok"
        assert client.get("/").headers["Content-Type"].startswith("text/html")
        for method, path in (("POST", "/v1/classes"), ("DELETE", "/v1/classes/~0"), ("POST", "/v1/retune")):
            assert error_of(client.request(method, path), 403) == "changes_disabled"
        bad = client.post("/v1/predict", content=GREY[:60], headers={"Content-Type": "image/png"})
        assert bad.status_code == 422


def test_a_killed_replica_costs_only_the_requests_that_it_had(service: Service, truth: list[str]) -> None:
    with Load(service.url) as under:
        under.wait_for_more(30)
        killed = min(service.replicas)
        os.kill(killed, signal.SIGKILL)
        under.wait_for_more(30)
        wait_until(lambda: len(service.replicas - {killed}) == 2, 90, "another replica")
        before = len(under.answers)
        under.wait_for_more(60)
    failed = [(status, label) for _, status, label in under.answers if status != 200]
    print(f"{len(under.answers)} answers, {len(failed)} of them errors: {failed[:3]}")
    assert len(failed) <= THREADS and {status for status, _ in failed} <= {500}, failed
    assert all(label == truth[image] for image, status, label in under.answers if status == 200)
    assert all(status == 200 for _, status, _ in under.answers[before:])


def test_another_bundle_is_rolled_out_and_no_request_fails(service: Service, truth: list[str], tmp_path: Path) -> None:
    new, before = renamed(tmp_path / "new", "new "), service.replicas
    with Load(service.url) as under:
        under.wait_for_more(20)
        updated = service.update(new)
        assert updated.returncode == 0 and digest_of(new) in updated.stdout, updated.stderr
        wait_until(lambda: not service.replicas & before, 60, "the old replicas to stop")
        done = len(under.answers)
        under.wait_for_more(60)
        refused = service.update(broken(tmp_path / "broken"))
        assert refused.returncode == 2 and "does not match its manifest" in refused.stderr
        under.wait_for_more(30)
    assert {status for _, status, _ in under.answers} == {200}, [each for each in under.answers if each[1] != 200][:3]
    assert all(label in (truth[image], f"new {truth[image]}") for image, _, label in under.answers)
    assert under.answers[0][2] == truth[under.answers[0][0]]
    assert all(label == f"new {truth[image]}" for image, _, label in under.answers[done + THREADS :])
