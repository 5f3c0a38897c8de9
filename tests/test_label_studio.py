"""examples/label_studio: tasks, events and answers as Label Studio 1.23 exchanges them, checked by its SDK."""

from __future__ import annotations

import asyncio
import functools
import json
import operator
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from examples.label_studio import backend as module
from examples.label_studio.backend import LOCAL, MAX_BODY, Backend, Picture, make_app
from iosr_fast import Classifier, IosrFastError, labelled_images
from iosr_fast.backbones.demo.pictures import load_pictures
from iosr_fast.images.limits import DecodeLimits
from tests.pictures import encode

CLASSES, EACH = 20, 5
CONFIG = '<View><Image name="img" value="$photo"/><Choices name="kind" toName="img">{}</Choices></View>'


class Project:
    """100 tasks of a project with pictures of the demo; `truth` has their labels."""

    def __init__(self, folder: Path) -> None:
        sdk = pytest.importorskip("label_studio_sdk.label_interface", reason="label-studio-sdk is not installed")
        pictures = load_pictures("held-out", min_styles=EACH + 1)
        chosen = np.linspace(0, len(pictures.names) - 1, CLASSES).astype(int)
        rows = np.concatenate([np.flatnonzero(pictures.concepts == concept)[:EACH] for concept in chosen])
        self.folder, self.photos = folder, folder / "root" / "my photos"
        self.truth = [pictures.names[concept] for concept in pictures.concepts[rows]]
        self.photos.mkdir(parents=True)
        for i, row in enumerate(rows):
            Image.fromarray(pictures.images[row]).save(self.photos / f"{i}.png")
        self.config = CONFIG.format("".join(f'<Choice value="{name}"/>' for name in dict.fromkeys(self.truth)))
        self.interface = sdk.LabelInterface(self.config)

    def start(self) -> None:
        self.backend = Backend(self.folder / "bundle", self.photos.parent, "demo")
        self.client = TestClient(make_app(self.backend), base_url="http://localhost")

    def post(self, route: str, **body: Any) -> Any:
        answer = self.client.post(route, json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def task(self, i: int) -> Any:
        return {"id": i, "data": {"photo": f"{LOCAL}my%20photos/{i}.png"}, "project": 1}

    def event(self, action: str, i: int, label: str | list[str] = "", skipped: bool = False) -> None:
        self.post("/webhook", **self.body(action, i, label, skipped))

    def body(self, action: str, i: int, label: str | list[str] = "", skipped: bool = False) -> Any:
        value = {"choices": label if isinstance(label, list) else [label or self.truth[i]]}
        region = {"from_name": "kind", "to_name": "img", "type": "choices", "value": value}
        annotation = {"id": 1000 + i, "result": [region], "was_cancelled": skipped, "task": i, "project": 1}
        assert self.interface.validate_annotation(annotation) and self.interface.validate_task(self.task(i))
        body = {"annotation": annotation, "task": self.task(i)}
        if action == "ANNOTATIONS_CREATED":
            body = {name: [value] for name, value in body.items()}
        if action == "ANNOTATIONS_DELETED":
            body = {"annotations": [{"id": 1000 + i}]}
        return {"action": action, "project": {"id": 1, "label_config": self.config}, **body}

    def predict(self, tasks: list[int]) -> list[Any]:
        body = {"tasks": [*map(self.task, tasks)], "label_config": self.config, "project": "1.1"}
        results = self.post("/predict", **body)["results"]
        assert [self.interface.validate_prediction(one, return_errors=True) for one in results] == [[]] * len(tasks)
        return results

    def right(self, tasks: list[int]) -> int:
        """How many predictions are."""
        results = zip(tasks, self.predict(tasks), strict=True)
        return sum(one["result"][0]["value"]["choices"] == [self.truth[i]] for i, one in results)

    def examples(self) -> dict[str, int]:
        return {one.name: one.examples for one in self.backend.classifier.classes()}


@pytest.fixture
def project(tmp_path: Path, demo_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    monkeypatch.setenv("IOSR_FAST_CACHE", str(demo_cache))
    return Project(tmp_path)


@pytest.mark.slow
def test_corrected_tasks_make_the_labels_of_others_better(project: Project) -> None:
    first, rest = [*range(0, 100, EACH)], [i for i in range(100) if i % EACH]
    classifier = Classifier("demo", runtime="onnxruntime")
    classifier.fit([project.photos / f"{i}.png" for i in first], [project.truth[i] for i in first])
    classifier.save(project.folder / "bundle")
    project.start()
    assert project.post("/setup", project="1.1", schema=project.config) == {"model_version": "bundle 1"}
    scores = {i: one["score"] for i, one in zip(rest, project.predict(rest), strict=True)}
    unsure = sorted(rest, key=scores.__getitem__)[:20]  # as uncertainty sampling shows them
    others = sorted({*rest} - {*unsure})
    before = project.right(others)
    for i in unsure:
        project.event("ANNOTATION_CREATED", i)
        project.event("ANNOTATION_CREATED", i)  # by another webhook
    assert project.backend.classifier.version == 21
    assert project.right(others) >= before + 3


@pytest.mark.slow
def test_a_project_is_followed_from_its_first_annotations(project: Project) -> None:
    a, b, c = project.truth[: 3 * EACH : EACH]
    project.start()
    assert [one["result"] for one in project.predict([0])] == [[]]
    for i in (0, 1, 2, EACH):
        project.event("ANNOTATION_CREATED", i)
    project.event("ANNOTATIONS_CREATED", 2 * EACH)
    assert project.examples() == {a: 3, b: 1, c: 1}
    project.event("ANNOTATION_UPDATED", 1, label=b)
    project.event("ANNOTATION_UPDATED", 2, skipped=True)
    project.event("ANNOTATIONS_DELETED", 2 * EACH)
    assert project.examples() == {a: 1, b: 2}
    assert len(project.client.get("/suggest?n=7&key=photo").json()) == 7

    project.backend._follow = lambda pictures: None  # type: ignore[method-assign]  # a crash before the change
    project.event("ANNOTATION_CREATED", 3)
    project.event("ANNOTATIONS_DELETED", 0)
    for _ in range(2):
        project.backend.classifier.close_log()
        project.start()
        assert project.examples() == {a: 1, b: 2}
    before = project.backend.classifier.version
    project.post("/webhook", action="START_TRAINING", project={"id": 1, "label_config": project.config})
    assert project.backend.classifier.version == before + 1

    for i in range(50):
        project.event("ANNOTATION_CREATED", i)
    project.backend.max_error = 0.5
    answers = project.backend.classifier.explain([project.photos / f"{i}.png" for i in range(100)], max_error=0.5)
    words = [["accepted"] if one.accepted else ["needs a look"] for one in answers]
    assert 0 < words.count(["accepted"]) < 100
    assert [one["result"][0]["meta"]["text"] for one in project.predict([*range(100)])] == words


@pytest.mark.slow
def test_choices_that_are_multiple_come_and_go(project: Project, tmp_path: Path) -> None:
    """What is annotated is learned, is predicted, and is read again from an export."""
    names = [*dict.fromkeys(project.truth)][:3]
    project.config = project.config.replace('toName="img"', 'toName="img" choice="multiple"')
    project.config = project.config.replace("</Choices>", '<Choice value="early"/><Choice value="late"/></Choices>')
    project.interface = type(project.interface)(project.config)
    labels = {i: [project.truth[i], *["early"] * (i % EACH < 2)] for i in range(3 * EACH - 1)}
    project.start()
    for i, label in labels.items():
        project.event("ANNOTATION_CREATED", i, label)
    counts = {name: sum(name in label for label in labels.values()) for name in (*names, "early")}
    assert project.examples() == counts and project.backend.classifier.snapshot().is_multi_label
    project.event("ANNOTATION_UPDATED", 0, ["late", names[1]])  # a new class, and one that is there
    project.event("ANNOTATION_UPDATED", 1, [])
    project.event("ANNOTATION_UPDATED", 2, skipped=True)
    project.event("ANNOTATION_CREATED", 3 * EACH - 1, ["late"])
    counts = {names[0]: 2, names[1]: EACH + 1, names[2]: EACH - 1, "early": 4, "late": 2}
    assert project.examples() == counts and len(project.backend.classifier.snapshot().examples) == 3 * EACH - 1
    project.backend.classifier.close_log()
    project.start()
    assert project.examples() == counts
    predicted = [one["result"] for one in project.predict([*range(3 * EACH)])]
    chosen = [result[0]["value"]["choices"] if result else [] for result in predicted]
    expected = project.backend.classifier.predict([project.photos / f"{i}.png" for i in range(3 * EACH)])
    assert [{*one} for one in chosen] == expected.tolist() and max(map(len, chosen)) > 1
    single = project.client.post("/setup", json={"schema": project.config.replace(' choice="multiple"', "")})
    assert single.status_code == 422 and "the classifier has several labels" in single.text
    labels |= {0: ["late", names[1]], 1: [], 3 * EACH - 1: ["late"]}
    del labels[2]
    tasks = [{**project.task(i), "annotations": [project.body("", i, one)["annotation"]]} for i, one in labels.items()]
    (tmp_path / "export.json").write_text(json.dumps(tasks))
    found = labelled_images(tmp_path / "export.json", root=project.photos.parent)
    assert {path.name: {*one} for path, one in zip(found.paths, found.labels, strict=True)} == {
        f"{i}.png": {*one} for i, one in labels.items()
    }


def test_other_pictures_interfaces_hosts_and_users_are_refused(project: Project) -> None:
    project.start()
    for place in ("/data/upload/1/a.png", "https://a.b/c", *(f"{LOCAL}{path}" for path in ("../a", "/etc/a", "%00"))):
        body = {"tasks": [{"id": 1, "data": {"photo": place}}], "label_config": project.config}
        assert project.client.post("/predict", json=body).status_code == 422, place
    assert "expected a labelling interface" in project.client.post("/setup", json={"schema": "<View/>"}).text
    assert project.client.get("/health", headers={"host": "evil.example"}).status_code == 400
    closed = TestClient(make_app(project.backend, "Basic dXNlcjp3b3Jk"), base_url="http://backend")
    assert [closed.get("/health", auth=("user", word)).status_code for word in ("", "other", "word")] == [401, 401, 200]


def test_a_picture_that_takes_for_ever_delays_no_event_and_no_start(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "DecodeLimits", functools.partial(DecodeLimits, timeout_s=0.5))
    slow = encode(Image.new("RGB", (1000, 1000)), "JPEG", progressive=True)
    slow = slow[:-2] + slow[slow.rindex(b"\xff\xda") : -2] * 10_000 + slow[-2:]
    annotated, (a, b) = (0, 1, 2, EACH, 50), project.truth[1 : 2 * EACH : EACH]
    for i in (0, 50):
        (project.photos / f"{i}.png").write_bytes(slow)
    project.start()
    for i in annotated:
        project.event("ANNOTATION_CREATED", i)
    assert project.examples() == {a: 2, b: 1}
    project.backend.classifier.close_log()
    project.start()
    assert project.examples() == {a: 2, b: 1}
    assert [len(one["result"]) for one in project.predict([0, 1])] == [0, 1]
    suggested = {task["data"]["photo"] for task in project.client.get("/suggest?n=1000&key=photo").json()}
    assert suggested == {project.task(i)["data"]["photo"] for i in range(100) if i not in annotated}


def test_only_regular_files_below_the_root_are_read(project: Project) -> None:
    project.start()
    Image.new("RGB", (9, 9)).save(project.folder / "outside.png")
    os.mkfifo(project.photos / "fifo.png")
    (project.photos / "folder.png").mkdir()
    (project.photos / "link.png").symlink_to(project.folder / "outside.png")
    (project.photos / "circle.png").symlink_to("circle.png")
    for name in ("fifo", "folder", "link", "circle"):
        with pytest.raises(IosrFastError, match="expected a regular file"):
            np.asarray(Picture(project.backend.decoders, project.photos / f"{name}.png"))
    circle = {"data": {"photo": f"{LOCAL}my%20photos/circle.png"}}
    assert project.post("/predict", tasks=[circle], label_config=project.config)["results"][0]["result"] == []


def test_odd_requests_are_refused_and_change_nothing(project: Project) -> None:
    project.start()
    client = TestClient(project.client.app, base_url="http://localhost", raise_server_exceptions=False)

    def status(route: str, body: Any, kind: str = "application/json") -> int:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return client.post(route, content=data, headers={"content-type": kind}).status_code

    long = "a" * 600
    odd_values = [
        None,
        True,
        -1,
        1.5,
        2**63,
        10**30,
        "",
        long,
        "\0",
        "\ud800",
        float("nan"),
        [],
        [[]],
        ["a", 1],
        {},
        {"a": 1},
    ]
    regions = "annotation result", "annotation result 0", "annotation result 0 value choices"
    fine = {"action": ["", long, "\0"], regions[0]: [[]], regions[1]: [{}, {"a": 1}], regions[2]: [[]]}
    places = "action,project,project label_config,task,task id,task data,task data photo,annotation,annotation id"
    for place in (*places.split(","), "annotation task", *regions, f"{regions[1]} value", f"{regions[2]} 0"):
        for odd in odd_values:
            body = project.body("ANNOTATION_CREATED", 2)
            *steps, last = [int(step) if step.isdigit() else step for step in place.split()]
            functools.reduce(operator.getitem, steps, body)[last] = odd
            assert status("/webhook", body) == (200 if odd in fine.get(place, []) else 422), (place, odd)
    for odd in odd_values:
        expected = 200 if odd == [] else 422
        assert status("/predict", {"tasks": odd, "label_config": project.config}) == expected, odd
        assert status("/webhook", {"action": "ANNOTATIONS_DELETED", "annotations": odd}) == expected, odd
        assert status("/webhook", {"action": "ANNOTATIONS_DELETED", "annotations": [{"id": odd}]}) == 422, odd
        assert status("/setup", {"schema": odd}) == 422, odd
    deep = b"[" * 100_000 + b"]" * 100_000
    for data in (
        b"",
        b"null",
        b"[NaN]",
        b'"\\ud800"',
        b"\xff",
        deep,
        b'{"schema": %b}' % deep,
        b'{"action": %b}' % deep,
    ):
        assert {status(route, data) for route in ("/setup", "/predict", "/webhook")} == {422}, data[:50]
    assert status("/webhook", {"action": "START_TRAINING"}, "text/plain") == 415  # a page of another site can send it
    for n in ("0", "-1", "1001", "1.5", "", "a", "9" * 5000):
        assert client.get("/suggest", params={"n": n}).status_code == 422, n
    assert set(project.backend.db.execute("SELECT label FROM annotations")) <= {None}


def test_no_more_of_a_body_is_read_than_the_limit(project: Project) -> None:
    project.start()
    chunk, taken, sent = bytes(1 << 20), 0, list[Any]()

    async def receive() -> Any:  # a body of unknown length
        nonlocal taken
        taken += len(chunk)
        return {"type": "http.request", "body": chunk, "more_body": taken < 8 * MAX_BODY}

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "query_string": b"", "headers": headers}
    for path in ("/setup", "/predict", "/webhook"):
        taken = 0
        asyncio.run(make_app(project.backend)(scope | {"path": path}, receive, send))
        assert sent[-2]["status"] == 413 and taken <= MAX_BODY + len(chunk)
