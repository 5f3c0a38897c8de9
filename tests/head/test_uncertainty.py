"""Classifier on pictures that it does not know: rejected, scored, sets of labels; right after every change."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from iosr_fast.classifier import Classifier
from iosr_fast.exceptions import BadImageError, IosrFastError
from iosr_fast.head.predictions import Rejection
from iosr_fast.methods import METHODS
from iosr_fast.methods.conformal import of_logits, sets_of_labels
from iosr_fast.methods.out_of_fold import out_of_fold
from iosr_fast.methods.unknown import fit_unknown
from iosr_fast.store.bundle import load_bundle
from iosr_fast.store.bundle_arrays import LEFT_OUT
from iosr_fast.store.changes import Change
from iosr_fast.store.description import describe
from iosr_fast.store.head_files import fingerprint, head_from_bytes, head_to_bytes
from tests.store.live_parts import PixelEncoder, engine_folder, pictures, small_classifier, unfitted

CLASSES = 6  # known; the motifs from there on are unknown
GDA: dict[str, Any] = {"classes": CLASSES, "shots": 4, "method": "gda", "alpha": 1.0, "beta": None}


@pytest.fixture
def queries(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    return pictures(rng, CLASSES + 4, 5)


@pytest.mark.parametrize("method", ["gda", "gda++"])
def test_pictures_of_other_classes_are_rejected(queries: tuple[np.ndarray, np.ndarray], method: str) -> None:
    images, labels = queries
    classifier = small_classifier(**{**GDA, "method": method})
    scores = classifier.unknown_score(images)
    fitted = fit_unknown(classifier.support_, adapted=method == "gda++")
    assert scores == pytest.approx(fitted.score(PixelEncoder().encode(images)))
    out, plain = scores > classifier.unknown_.threshold(0.9), classifier.predict(images)
    answers = classifier.predict(images, unknown="reject", keep=0.9)
    assert answers.tolist() == [None if one else name for one, name in zip(out, plain.tolist(), strict=True)]
    assert out[labels >= CLASSES].mean() > 0.9 and out[labels < CLASSES].mean() < 0.3
    worded = classifier.predict(images, unknown="reject", unknown_label="other", keep=0.9)
    assert ((worded == "other") == out).all() and worded.dtype.kind == "U"
    with pytest.raises(IosrFastError, match="that no class has"):
        classifier.predict(images, unknown="reject", unknown_label="motif\xa01", keep=0.9)
    for options in ({"unknown_label": "other"}, {"keep": 0.9}):
        with pytest.raises(IosrFastError, match="only with unknown='reject', got"):
            classifier.predict(images, **options)
    assert classifier.predict(images[:0], unknown="reject", keep=0.9).shape == (0,)
    assert classifier.unknown_score(images[:0]).shape == (0,)
    explained = classifier.explain(images, unknown="reject", keep=0.9)
    for plainly, one, score, rejected in zip(classifier.explain(images), explained, scores, out, strict=True):
        assert plainly.unknown is None and one.unknown == Rejection(pytest.approx(score), bool(rejected))
        named = {"label": None, "class_id": None} if rejected else {}
        assert one == replace(plainly, unknown=one.unknown, **named)
        assert json.loads(json.dumps(one.to_dict()))["unknown"] == vars(one.unknown)


@pytest.mark.parametrize("per_class", [False, True])
def test_sets_and_calibration_are_those_of_left_out_images(queries: Any, per_class: bool) -> None:
    classifier, images = small_classifier(**{**GDA, "shots": 10}), queries[0]
    head, classes = classifier.snapshot(), classifier.classes_ if per_class else None
    left = out_of_fold(METHODS["gda"], head.support, None, head.config.parameters, head.config.factor)
    left_out, logits = of_logits(left.logits, left.labels), head.score(PixelEncoder().encode(images))
    for coverage in (0.6, 0.9):
        sets = classifier.predict_sets(images, coverage, per_class)
        expected = sets_of_labels(classifier.classes_, logits, left_out.sets(logits, coverage, classes))
        assert [one.tolist() for one in sets] == [one.tolist() for one in expected]
    assert classifier.predict_sets(images[:0], per_class=per_class) == []
    assert classifier.calibration().accuracy == left_out.reliability.accuracy
    assert "60 left-out support images" in str(classifier.calibration())
    classifier.remove_examples(classifier.examples("motif 2")[:2])
    if per_class:
        with pytest.raises(IosrFastError, match=r"got fewer of 'motif 2 \(8\)': give more pictures of these classes"):
            classifier.predict_sets(images, per_class=True)


@pytest.fixture
def taught(tmp_path: Path, queries: tuple[np.ndarray, np.ndarray]) -> Classifier:
    """Fitted with 10 pictures of two other motifs as unknown ones."""
    images, labels = pictures(np.random.default_rng(0), CLASSES, 4)
    unknown = queries[0][queries[1] >= CLASSES + 2]
    parameters = {"method": "gda", "alpha": 1.0, "views": 1}
    classifier = unfitted(engine_folder(tmp_path / "engine"), **parameters)
    return classifier.fit(images, [f"motif {c}" for c in labels], unknown_images=unknown)


def test_unknown_images_teach_what_is_unknown(taught: Classifier, queries: tuple[np.ndarray, np.ndarray]) -> None:
    images, labels = queries
    unknown = PixelEncoder().encode(images[labels >= CLASSES + 2])
    expected = fit_unknown(taught.support_, unknown=unknown)
    assert taught.unknown_.weights == pytest.approx(expected.weights, abs=1e-4)
    assert taught.unknown_.names[-1] == "nearest unknown key" and taught.unknown_.weights[-1] > 0
    assert taught.predict(images).tolist() == small_classifier(**GDA).predict(images).tolist()
    taught.add_class("new", images[labels == CLASSES])  # the change keeps them
    assert taught.unknown_.weights == pytest.approx(fit_unknown(taught.support_, unknown=unknown).weights, abs=1e-4)
    taught.tune(method="tip-adapter++")
    fitted = fit_unknown(taught.support_, adapted=True, unknown=unknown)
    assert taught.unknown_.weights == pytest.approx(fitted.weights, abs=1e-4)


def test_unknown_images_are_saved_as_embeddings(taught: Classifier, queries: Any, tmp_path: Path) -> None:
    taught.save(tmp_path / "bundle")
    loaded = load_bundle(tmp_path / "bundle").head
    assert fingerprint(loaded) == fingerprint(taught.snapshot())
    assert fingerprint(replace(loaded, unknown_images=None)) != fingerprint(loaded)
    assert "version 1, unknown images 10" in describe(tmp_path / "bundle")
    assert fingerprint(head_from_bytes(head_to_bytes(taught.snapshot()))) == fingerprint(loaded)  # as in a log
    assert loaded.computed("unknown") is None
    assert (loaded.unknown.weights == taught.unknown_.weights).all()
    rows = PixelEncoder().encode(queries[0])
    expected = taught.unknown_score(queries[0])
    taught.save(tmp_path / "used")
    used = load_bundle(tmp_path / "used").head
    assert used.computed("unknown") is not None
    np.testing.assert_array_equal(used.unknown.score(rows), expected)
    with pytest.raises(IosrFastError, match=r"with 10 unknown images: expected unknown_images.*got none"):
        taught.optimize([], [])


def test_unknown_images_are_checked_as_support_images_are() -> None:
    images, labels = pictures(np.random.default_rng(0), 3, 3)
    names = [f"motif {c}" for c in labels]
    with pytest.raises(IosrFastError, match=r"number 0 \('motif 0'\) and number 9 \('none of the classes'\)"):
        unfitted(method="gda").fit(images, names, unknown_images=images[:2])
    with pytest.raises(BadImageError, match="number 9"):
        unfitted(method="gda").fit(images, names, unknown_images=[b"no picture", images[0] // 9])
    skipping = unfitted(method="gda", skip_bad=True).fit(images, names, unknown_images=[b"no picture", images[0] // 9])
    assert skipping.skipped_ == ["number 9"] and len(skipping.snapshot().unknown_images) == 1
    with pytest.raises(IosrFastError, match="expected two or more unknown images"):
        unfitted(method="gda").fit(images, names, unknown_images=images[:1] // 9)
    with pytest.raises(FileNotFoundError, match="found no folder nowhere"):
        unfitted().fit_folder("support", unknown_images="nowhere")


def test_bad_input_is_named_before_anything_is_encoded(monkeypatch: pytest.MonkeyPatch) -> None:
    few = small_classifier(classes=4, shots=2)
    image = np.zeros((8, 8, 3), np.uint8)
    monkeypatch.setattr(PixelEncoder, "encode", lambda *_: pytest.fail("encoded"))
    with pytest.raises(IosrFastError, match="expected unknown to be 'reject' or None, got 'other'"):
        few.predict(image, unknown="other")  # type: ignore[arg-type]
    with pytest.raises(IosrFastError, match=r"0\.95 of the pictures needs at least 19 .* got 8: give more pictures"):
        few.predict(image, unknown="reject")
    with pytest.raises(IosrFastError, match=r"0\.9 of the pictures needs at least 9 .* got 8"):
        few.predict_sets(image)
    with pytest.raises(IosrFastError, match=r"expected coverage above 0 and below 1, like 0\.95, got 2"):
        few.predict_sets(image, coverage=2)


def test_what_left_out_images_answer_is_saved_and_forgotten_by_a_change(
    queries: tuple[np.ndarray, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = queries[0]
    classifier = small_classifier(engine_folder(tmp_path / "engine"), **GDA)
    classifier.save(tmp_path / "unused")
    assert not (tmp_path / "unused" / LEFT_OUT).exists()
    classifier.unknown_score(images), classifier.calibration()
    classifier.save(tmp_path / "bundle")
    head = load_bundle(tmp_path / "bundle").head
    rows = PixelEncoder().encode(images)
    with monkeypatch.context() as patch:
        patch.setattr("iosr_fast.head.head.fit_unknown", lambda *_: pytest.fail("fitted again"))
        patch.setattr("iosr_fast.head.head.out_of_fold", lambda *_: pytest.fail("computed again"))
        np.testing.assert_array_equal(head.unknown.score(rows), classifier.unknown_score(images))
        assert head.unknown.summary(0.9) == classifier.unknown_.summary(0.9)
        assert str(head.left_out_labels.reliability) == str(classifier.calibration())
        logits = head.score(rows)
        np.testing.assert_array_equal(
            head.left_out_labels.sets(logits), classifier.snapshot().left_out_labels.sets(logits)
        )
    changed = Change("remove_class", 0).apply(head)
    assert len(changed.unknown.left_out) == 4 * (CLASSES - 1) and changed.computed("out_of_fold") is None
