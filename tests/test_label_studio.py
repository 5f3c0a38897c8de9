"""examples/label_studio: tasks, events and answers as Label Studio 1.23 exchanges them, checked by its SDK."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from examples.label_studio.backend import LOCAL, Backend, make_app
from iosr_fast import Classifier
from iosr_fast.clip.demo.pictures import load_pictures

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

    def event(self, action: str, i: int, label: str = "", skipped: bool = False) -> None:
        value = {"choices": [label or self.truth[i]]}
        region = {"from_name": "kind", "to_name": "img", "type": "choices", "value": value}
        annotation = {"id": 1000 + i, "result": [region], "was_cancelled": skipped, "task": i, "project": 1}
        assert self.interface.validate_annotation(annotation) and self.interface.validate_task(self.task(i))
        body = {"annotation": annotation, "task": self.task(i)}
        if action == "ANNOTATIONS_CREATED":
            body = {name: [value] for name, value in body.items()}
        if action == "ANNOTATIONS_DELETED":
            body = {"annotations": [{"id": 1000 + i}]}
        self.post("/webhook", action=action, project={"id": 1, "label_config": self.config}, **body)

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


def test_other_pictures_interfaces_hosts_and_users_are_refused(project: Project) -> None:
    project.start()
    for place in ("/data/upload/1/a.png", "https://a.b/c", *(f"{LOCAL}{path}" for path in ("../a", "/etc/a", "%00"))):
        body = {"tasks": [{"id": 1, "data": {"photo": place}}], "label_config": project.config}
        assert project.client.post("/predict", json=body).status_code == 422, place
    assert "expected a labelling interface" in project.client.post("/setup", json={"schema": "<View/>"}).text
    for shape in ({}, {"schema": 5}, {"schema": "<View"}):
        assert project.client.post("/setup", json=shape).status_code == 422
    assert project.client.get("/health", headers={"host": "evil.example"}).status_code == 400
    closed = TestClient(make_app(project.backend, "Basic dXNlcjp3b3Jk"), base_url="http://backend")
    assert [closed.get("/health", auth=("user", word)).status_code for word in ("", "other", "word")] == [401, 401, 200]
