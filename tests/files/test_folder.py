"""Classifier.predict_folder on the demo: what predict says of the same files, in order, bad ones told."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from benchmarks.photographs import write_photographs
from iosr_fast.classifier import Classifier
from iosr_fast.encoders.encoder import Encoder
from iosr_fast.exceptions import BadImageError
from iosr_fast.files.stream import Reader, ReadOptions, Stage
from iosr_fast.head.support_images import SupportSettings

pytestmark = pytest.mark.slow


def test_unreadable_images_are_raised_or_told(bundle: Path, tmp_path: Path) -> None:
    classifier = Classifier.load(bundle)
    paths = write_photographs(tmp_path, 12)
    paths[3].write_bytes(b"no picture")
    paths[9].write_bytes(paths[9].read_bytes()[:9000])
    before = threading.active_count()
    with pytest.raises(BadImageError, match=str(paths[3])):
        classifier.predict_folder(tmp_path, batch=4)
    assert threading.active_count() == before
    found = classifier.predict_folder(tmp_path, batch=4, skip_bad=True)
    assert [error.path for error in found.errors] == [paths[3], paths[9]]
    assert found.paths == [path for i, path in enumerate(paths) if i not in (3, 9)]
    assert (found.labels == classifier.predict(found.paths)).mean() >= 0.9


def test_many_images_on_several_cores_are_encoded_side_by_side(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    classifier = Classifier.load(bundle, threads=2)
    encoder, engine = classifier.encoder, classifier.engine_

    def stage(encoder: Encoder, images: int) -> Stage:
        return Reader(encoder, engine, SupportSettings(), ReadOptions(32, threads=8)).stage(images)

    side_by_side = stage(encoder, 1024)
    assert side_by_side.callers == 8 and side_by_side.encoder is not encoder
    for opened_before in (side_by_side.encoder, encoder):
        assert stage(opened_before, 1024).encoder is side_by_side.encoder
    assert stage(encoder, 1000) == Stage(encoder, 1, 2)
    monkeypatch.setattr(encoder, "parallel", False)
    assert stage(encoder, 10_000) == Stage(encoder, 1, 2)


def test_wrong_options_are_refused_and_an_empty_folder_has_no_labels(bundle: Path, tmp_path: Path) -> None:
    classifier = Classifier.load(bundle)
    name = str(classifier.classes_[0])
    for options, message in (
        ({"threads": 0}, "expected threads of at least 1, got 0"),
        ({"batch": 0}, "expected batch of at least 1, got 0"),
        ({"unknown": "yes"}, "expected unknown to be 'reject' or None, got 'yes'"),
        ({"max_error": 0.01}, "at most 0.01 wrong labels needs at least 299 left-out support images"),
        ({"max_error": 0.3, "joint": True}, "expected no max_error .* with joint"),
        ({"unknown": "reject", "unknown_label": None}, "expected unknown_label to be a text"),
        ({"unknown": "reject", "unknown_label": name}, f"that no class has, got '{name}'; choose another word"),
    ):
        with pytest.raises(ValueError, match=message):
            classifier.predict_folder(tmp_path, **options)
    nothing = classifier.predict_folder(tmp_path)
    assert len(nothing) == 0 and list(nothing) == [] and nothing.probabilities.shape == (0,)
