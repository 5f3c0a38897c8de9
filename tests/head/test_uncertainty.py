"""Classifier on pictures that it does not know: rejected, scored, sets of labels; right after every change."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from iosr_fast import FewShotHead
from iosr_fast.exceptions import BadImageError, IosrFastError
from iosr_fast.head.verdict import Abstention, Rejection, judge
from iosr_fast.methods import METHODS
from iosr_fast.methods.automation import automation
from iosr_fast.methods.conformal import of_logits, sets_of_labels
from iosr_fast.methods.out_of_fold import out_of_fold
from iosr_fast.methods.unknown import fit_unknown
from iosr_fast.store.bundle import load
from iosr_fast.store.changes import RemoveClass
from iosr_fast.store.description import describe
from iosr_fast.store.head_files import fingerprint, head_from_bytes, head_to_bytes
from tests.store.live_parts import PixelEncoder, engine_folder, pictures, small_classifier, unfitted

CLASSES = 6  # known; the motifs from there on are unknown
GDA: dict[str, Any] = {"classes": CLASSES, "shots": 4, "method": "gda", "alpha": 1.0, "beta": None}


@pytest.fixture
def queries(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    return pictures(rng, CLASSES + 4, 5)


def test_pictures_of_other_classes_are_rejected(queries: tuple[np.ndarray, np.ndarray]) -> None:
    images, labels = queries
    classifier = small_classifier(**{**GDA, "method": "gda++"})
    scores = classifier.unknown_score(images)
    fitted = fit_unknown(classifier.support_, classifier.snapshot().folds, adapted=True)
    assert scores == pytest.approx(fitted.score(PixelEncoder().encode(images)))
    out, plain = scores > classifier.unknown_.threshold(0.9), classifier.predict(images)
    answers = classifier.predict(images, unknown="reject", keep=0.9)
    assert answers.tolist() == [None if one else name for one, name in zip(out, plain.tolist(), strict=True)]
    assert out[labels >= CLASSES].mean() > 0.9 and out[labels < CLASSES].mean() < 0.3
    worded = classifier.predict(images, unknown="reject", unknown_label="other", keep=0.9)
    assert ((worded == "other") == out).all() and worded.dtype.kind == "U"
    assert classifier.predict(images[:0], unknown="reject", keep=0.9).shape == (0,)
    explained = classifier.explain(images, unknown="reject", keep=0.9)
    for plainly, one, score, rejected in zip(classifier.explain(images), explained, scores, out, strict=True):
        assert plainly.unknown is None and one.unknown == Rejection(pytest.approx(score), bool(rejected))
        named = {"label": None, "class_id": None} if rejected else {}
        assert one == replace(plainly, unknown=one.unknown, **named)
        assert json.loads(json.dumps(one.to_dict()))["unknown"] == vars(one.unknown)


def test_labels_that_need_a_look_are_withheld_by_a_promise(queries: Any, tmp_path: Path) -> None:
    images = queries[0]
    classifier = small_classifier(engine_folder(tmp_path / "engine"), **{**GDA, "shots": 10})
    head, rows = classifier.snapshot(), classifier.encoder.encode(images)
    curve = classifier.automation()
    assert curve.images == 10 * CLASSES and str(round(100 * curve.smallest, 1)) in str(curve)
    sure = classifier.predict_proba(images).max(1) >= curve.thresholds[curve.max_errors == 0.1] * (1 - 1e-6)
    assert 0.2 < sure.mean() < 0.9 and (judge(head, rows, Abstention(max_error=0.1)).accepted == sure).all()
    plain, answers = classifier.predict(images), classifier.predict(images, max_error=0.1)
    assert answers.tolist() == [name if one else None for name, one in zip(plain.tolist(), sure, strict=True)]
    assert [one.accepted for one in classifier.explain(images, max_error=0.1)] == sure.tolist()
    both = classifier.predict(images, "reject", "other", max_error=0.1)
    rejected = classifier.unknown_score(images) > classifier.unknown_.threshold()
    assert ((both == "other") == rejected).all() and ((both == plain) == (sure & ~rejected)).all()
    explained = classifier.explain(images, unknown="reject", max_error=0.1)
    assert [one.accepted for one in explained] == (sure & ~rejected).tolist()
    classifier.save(tmp_path / "bundle")
    saved = load(tmp_path / "bundle").head
    assert str(automation(saved.judged, notes=saved.doubts)) == str(curve)


@pytest.mark.parametrize("per_class", [False, True])
def test_sets_and_calibration_are_those_of_left_out_images(queries: Any, per_class: bool) -> None:
    classifier, images = small_classifier(**{**GDA, "shots": 10, "look_alikes": False}), queries[0]
    head, classes = classifier.snapshot(), classifier.classes_ if per_class else None
    left = out_of_fold(METHODS["gda"], head.support, head.folds, None, head.config.parameters, head.config.factor)
    left_out = of_logits(left.logits / np.float32(head.temperature), left.labels, units=left.units)
    logits = head.calibrated(head.score(PixelEncoder().encode(images)))
    sets = classifier.predict_sets(images, 0.6, per_class)
    expected = sets_of_labels(classifier.classes_, logits, left_out.sets(logits, 0.6, classes))
    assert [one.tolist() for one in sets] == [one.tolist() for one in expected]
    assert classifier.predict_sets(images[:0], per_class=per_class) == []
    assert classifier.calibration().accuracy == left_out.reliability.accuracy
    classifier.remove_examples(classifier.examples("motif 2")[:2])
    if per_class:
        with pytest.raises(IosrFastError, match=r"got fewer of 'motif 2 \(8\)': give more pictures of these classes"):
            classifier.predict_sets(images, per_class=True)


def test_promises_rest_on_calibration_images_which_are_saved_and_follow_changes(queries: Any, tmp_path: Path) -> None:
    images, labels, names = *queries, [f"motif {c}" for c in queries[1]]
    classifier = small_classifier(engine_folder(tmp_path / "engine"), **GDA | {"method": "auto", "alpha": None})
    scores, accuracy = classifier.unknown_score(images[:30]), classifier.tuned_.accuracy
    assert classifier.calibrate_on(images[:30], names[:30]).version == classifier.version == 2
    classifier.unknown_score(images)
    classifier.save(tmp_path / "bundle")
    for head in (classifier.snapshot(), load(tmp_path / "bundle").head):
        expected = of_logits(head.calibrated(head.score(PixelEncoder().encode(images[:30]))), labels[:30])
        np.testing.assert_allclose(head.judged.label_odds, expected.label_odds, rtol=1e-5)
        np.testing.assert_allclose(head.unknown.left_out, -scores, atol=1e-4)
        assert not head.evidence.stale and head.evidence.accuracy == accuracy  # evidence of the same fit
        for text in (head.summary(), head.unknown.summary(0.9), head.judged.reliability):
            assert "30 images of calibrate_on" in str(text)
    assert "30 images of calibrate_on" in str(classifier.automation()) + describe(tmp_path / "bundle")
    classifier.open_log(tmp_path / "log.db")
    with pytest.raises(IosrFastError, match="a log has no fit, engine or calibrate_on"):
        classifier.calibrate_on(images[:30], names[:30])
    classifier.remove_class("motif 0")
    classifier.add_class("motif 7", images[labels == 7])
    classifier.close_log()
    assert classifier.calibration().n_images == 25 == len(classifier.unknown_.left_out)
    logged = small_classifier(**GDA)
    logged._fit = replace(logged._fit, head=load(tmp_path / "bundle").head)
    logged.open_log(tmp_path / "log.db")
    logged.close_log()
    assert fingerprint(logged.snapshot()) == fingerprint(classifier.snapshot())
    for message, call in {
        "at least 99 images of calibrate_on, got 25": lambda: classifier.predict_sets(images, 0.99),
        "at least 9 images of calibrate_on that the classifier has not seen, got 5: ": lambda: classifier.calibrate_on(
            images[5:10], names[5:10]
        ),
        "the labels 'motif 0', .* are not among": lambda: classifier.calibrate_on(images, names),
        "can't read image number 1": lambda: classifier.calibrate_on([images[6], b"no picture"], names[6:8]),
        "this classifier has images of calibrate_on: fit again": lambda: classifier.optimize([], []),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()


def test_images_to_calibrate_on_count_if_they_are_new(queries: Any) -> None:
    """Not near duplicates of support images; repeated ones, and those of a group, once."""
    images, names = queries[0][:30], [f"motif {c}" for c in queries[1][:30]]
    support, motifs = pictures(np.random.default_rng(0), CLASSES, 4)
    classifier, own = small_classifier(**GDA), [f"motif {c}" for c in motifs]
    with pytest.raises(IosrFastError, match="got 0 beside 24 near duplicates of support images: give more"):
        classifier.calibrate_on(support, own)
    with pytest.raises(IosrFastError, match=r"got 100 \(effective sample size 1: look-"):
        classifier.calibrate_on(np.repeat(images[:1], 100, 0), names[:1] * 100)
    with pytest.raises(IosrFastError, match=r"got 30 \(effective sample size 3:"):
        classifier.calibrate_on(images, names, groups=np.arange(30) // 10)
    classifier.calibrate_on(np.concatenate([support[:4], images]), own[:4] + names)
    curve, head = classifier.automation(), classifier.snapshot()
    assert curve.images == 30 and "4 near duplicates of support images are left out of calibrate_on" in str(curve)
    classifier.add_examples("motif 1", images[5:6])  # which is no new picture any more
    assert classifier.automation().images == 29 and head.judged.count <= 30
    classifier.add_class("other", queries[0][-5:])
    told = "1 of 7 classes have none of the images of calibrate_on: nothing is promised of 'other'"
    assert told in str(classifier.automation()) and told in classifier.snapshot().summary()


def test_probabilities_are_calibrated_on_pictures_that_are_right_less_often(rng: np.random.Generator) -> None:
    """Production has pictures that are harder than the support's: the labels stay, the probabilities become right."""
    rows = rng.standard_normal((8, 32)).repeat(220, 0) + 0.5 * rng.standard_normal((1760, 32))
    labels, hard = np.arange(8).repeat(220), rows + 4.0 * rng.standard_normal(rows.shape)
    head = FewShotHead(method="gda").fit(rows[::22], labels[::22])
    before = head.predict_proba(hard[1::2]).max(1).mean(), head.predict(hard[1::2])
    accuracy = float((before[1] == labels[1::2]).mean())
    head.calibrate_on(hard[::8], labels[::8])
    assert (head.predict(hard[1::2]) == before[1]).all() and accuracy < before[0] - 0.05
    assert head.predict_proba(hard[1::2]).max(1).mean() == pytest.approx(accuracy, abs=0.05)
    assert head.calibration().error < 0.1


def test_unknown_images_teach_what_is_unknown_and_are_saved(queries: Any, tmp_path: Path) -> None:
    images, labels = queries
    support, names = pictures(np.random.default_rng(0), CLASSES, 4)
    strange = images[labels >= CLASSES + 2]
    taught = unfitted(engine_folder(tmp_path / "engine"), method="gda", alpha=1.0)
    taught.fit(support, [f"motif {c}" for c in names], unknown_images=strange)
    unknown = PixelEncoder().encode(strange)
    assert taught.unknown_.names[-1] == "nearest unknown key" and taught.unknown_.weights[-1] > 0
    assert taught.predict(images).tolist() == small_classifier(**GDA).predict(images).tolist()
    taught.add_class("new", images[labels == CLASSES])  # the change keeps them
    taught.tune(method="tip-adapter++")
    fitted = fit_unknown(taught.support_, taught.snapshot().folds, adapted=True, unknown=unknown)
    assert taught.unknown_.weights == pytest.approx(fitted.weights, abs=1e-4)
    taught.save(tmp_path / "bundle")
    loaded = load(tmp_path / "bundle").head
    assert fingerprint(loaded) == fingerprint(taught.snapshot())
    assert fingerprint(replace(loaded, unknown_images=None)) != fingerprint(loaded)
    assert fingerprint(head_from_bytes(head_to_bytes(taught.snapshot()))) == fingerprint(loaded)  # as in a log
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


def test_bad_input_is_named_before_anything_is_encoded(monkeypatch: pytest.MonkeyPatch) -> None:
    few, image = small_classifier(classes=4, shots=2), np.zeros((8, 8, 3), np.uint8)
    monkeypatch.setattr(PixelEncoder, "encode", lambda *_: pytest.fail("encoded"))
    for message, call in {
        "expected unknown to be 'reject' or None, got 'other'": lambda: few.predict(image, unknown="other"),
        r"0\.95 of the pictures needs at least 19 .* got 8: give": lambda: few.predict(image, unknown="reject"),
        "that no class has": lambda: few.predict(image, "reject", "motif\xa01", 0.5),
        "unknown_label only with unknown='reject', got": lambda: few.predict(image, unknown_label="other"),
        r"0\.1 wrong labels needs at least 29 .* got 8: give": lambda: few.predict(image, max_error=0.1),
        r"expected max_error above 0 and below 1, like 0\.01, got 1": lambda: few.explain(image, max_error=1),
        "keep only with unknown='reject', got": lambda: few.explain(image, keep=0.9),
        r"0\.9 of the pictures needs at least 9 .* got 8": lambda: few.predict_sets(image),
        r"expected coverage above 0 and below 1, like 0\.95, got 2": lambda: few.predict_sets(image, coverage=2),
    }.items():
        with pytest.raises(IosrFastError, match=message):
            call()


def test_what_left_out_images_answer_is_saved_and_forgotten_by_a_change(
    queries: tuple[np.ndarray, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = queries[0]
    classifier = small_classifier(engine_folder(tmp_path / "engine"), **GDA)
    scores, calibration = classifier.unknown_score(images), classifier.calibration()
    classifier.save(tmp_path / "bundle")
    head = load(tmp_path / "bundle").head
    with monkeypatch.context() as patch:
        patch.setattr("iosr_fast.head.head.fit_unknown", lambda *_: pytest.fail("fitted again"))
        patch.setattr("iosr_fast.head.head.out_of_fold", lambda *_: pytest.fail("computed again"))
        np.testing.assert_array_equal(head.unknown.score(PixelEncoder().encode(images)), scores)
        assert head.unknown.summary(0.9) == classifier.unknown_.summary(0.9)
        assert str(head.judged.reliability) == str(calibration)
    changed = RemoveClass(0).apply(head)
    assert len(changed.unknown.left_out) == 4 * (CLASSES - 1) and changed.computed("out_of_fold") is None
