"""Choices of an export of Label Studio are labels of whole pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from iosr_fast.exceptions import IosrFastError
from iosr_fast.head.labelled_images import labelled_images, labels_among


def choice(*names: str, question: str = "tags", **value: Any) -> dict[str, Any]:
    place = {"id": "x1", "from_name": question, "to_name": "image", "origin": "manual"}
    return place | {"type": "choices", "value": {"choices": [*names], **value}}


def annotation(*results: Any, **more: Any) -> dict[str, Any]:
    times = {"created_at": "2026-01-01T10:00:00.000000Z", "updated_at": "2026-01-01T10:00:00.000000Z"}
    return {
        "id": 1,
        "completed_by": 1,
        "result": [*results],
        "was_cancelled": False,
        "ground_truth": False,
        **times,
        **more,
    }


def task(name: str, *annotations: Any) -> dict[str, Any]:
    path = f"/data/local-files/?d=photos/{name}"
    predictions = [{"model_version": "m", "result": [choice("predicted")]}]
    return {"id": 1, "data": {"image": path}, "annotations": [*annotations], "predictions": predictions}


def read(folder: Path, *tasks: Any) -> dict[str, Any]:
    (folder / "export.json").write_text(json.dumps(tasks))
    found = labelled_images(folder / "export.json", root=folder)
    return {path.relative_to(folder / "photos").as_posix(): labels for path, labels in zip(*found[:2], strict=True)}


def test_choices_are_labels_of_annotated_tasks(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    new, old = ({"updated_at": f"2026-0{month}-01T10:00:00.000000Z"} for month in (3, 2))
    cancelled = annotation(choice("wrong"), was_cancelled=True)
    found = read(
        tmp_path,
        task("1.jpg", annotation(choice("cat", "dog"))),
        task("caf%C3%A9.jpg", annotation(choice("cat")), cancelled),
        task("none.jpg", annotation()),
        task("later.jpg", annotation(choice("new"), **new), annotation(choice("old"), **old)),
        task("truth.jpg", annotation(choice("new"), **new), annotation(choice("true"), ground_truth=True)),
        task("agreed.jpg", annotation(choice("cat")), annotation(choice("cat"))),
        task("to do.jpg"),
        task("skipped.jpg", cancelled),
    )
    assert found == {
        "1.jpg": {"cat", "dog"},
        "café.jpg": {"cat"},
        "none.jpg": set(),
        "later.jpg": {"new"},
        "truth.jpg": {"true"},
        "agreed.jpg": {"cat"},
    }
    left_out, differing = caplog.messages
    assert "left out 2 of 8 tasks, which have no annotation" in left_out
    assert "annotations of 2 tasks differ: the last counts" in differing


def test_one_choice_each_is_one_label_a_picture(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tasks = task("1.jpg", annotation(choice("cat"))), task("2.jpg", annotation(choice("dog")))
    assert read(tmp_path, *tasks) == {"1.jpg": "cat", "2.jpg": "dog"} and not caplog.messages
    assert read(tmp_path, *tasks, task("3.jpg", annotation())) == {"1.jpg": {"cat"}, "2.jpg": {"dog"}, "3.jpg": set()}
    assert "pictures may have several labels, as 1 of 3 have none" in caplog.text


def test_a_classifier_of_several_labels_takes_one_each_and_of_keywords_its_classes(tmp_path: Path) -> None:
    read(tmp_path, task("1.jpg", annotation(choice("cat"))), task("2.jpg", annotation(choice("dog"))))
    found = labelled_images(tmp_path / "export.json", root=tmp_path)
    assert labels_among(found, ["cat"], False, None) is found
    assert labels_among(found, ["cat", "dog"], True, None).labels == [{"cat"}, {"dog"}]
    assert labels_among(found, ["cat"], True, "tagged")[1:3] == ([{"cat"}, set()], ["cat"])
    with pytest.raises(IosrFastError, match="expected keywords among the classes, 'cow', got 'cat', 'dog'"):
        labels_among(found, ["cow"], True, "tagged")


@pytest.mark.parametrize(
    ("tasks", "words"),
    [
        ([task("1.jpg", annotation(choice("cat"), choice("sun", question="sky")))], "one question .*'sky', 'tags'"),
        ([task("1.jpg", annotation(choice("cat") | {"value": {"choices": "cat"}}))], "expected a list of choices"),
        ([task("1.jpg", annotation(choice("cat"), 3))], "not as the format has it"),
        ([task("1.jpg", annotation(choice("a"))), task("1.jpg", annotation(choice("a", "b")))], "'a'.* and .*'a', 'b'"),
        ([task("../../1.jpg", annotation(choice("cat")))], "expected pictures below"),
        ([task("1.jpg", annotation(choice("cat", points=[[1, 2]])))], "expected labelled boxes or choices in"),
        ([task("1.jpg")], "expected labelled boxes or choices in"),
    ],
)
def test_what_can_not_be_used_is_refused(tasks: list[Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(IosrFastError, match=words):
        read(tmp_path, *tasks)
