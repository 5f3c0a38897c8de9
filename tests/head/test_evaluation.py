"""Classifier.evaluate: its figures against scikit-learn's and the classifier's own answers; what it refuses."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy.stats import binomtest
from sklearn import metrics

from iosr_fast import Classifier, IosrFastError
from iosr_fast.exceptions import BadImageError
from iosr_fast.files import evaluate
from iosr_fast.head.evaluation import Evaluation
from tests.store.live_parts import PixelEncoder, pictures, small_classifier

COVERAGE, KEEP = 0.8, 0.85


@pytest.fixture(scope="module")
def measured() -> tuple[Classifier, np.ndarray, np.ndarray, np.ndarray, Evaluation]:
    """A classifier that is often wrong, noisy images of 5 classes with their names, others, and the evaluation."""
    classifier = small_classifier(shots=4, alpha=4.0)
    rng = np.random.default_rng(1)
    images, labels = pictures(rng, 5, 12)
    share = np.linspace(0.1, 0.9, 12).repeat(5).reshape(12, 5).T.reshape(60, 1, 1, 1)
    blurred = (share * images + (1 - share) * rng.integers(0, 256, images.shape)).astype(np.uint8)
    others = rng.integers(0, 256, (20, 8, 8, 3)).astype(np.uint8)
    names = np.array([f"motif {label}" for label in labels])
    found = classifier.evaluate(blurred, names, others, COVERAGE, KEEP, batch=7)
    return classifier, blurred, names, others, found


def test_figures_are_those_of_scikit_learn(measured: Any) -> None:
    classifier, images, names, _, found = measured
    predicted, proba = classifier.predict(images), classifier.predict_proba(images)
    assert (
        5 < found.wrong < 50
        and 0 < found.unknown.kept < 1
        and found.accuracy == metrics.accuracy_score(names, predicted)
    )
    interval = binomtest(60 - found.wrong, 60).proportion_ci(method="wilson")
    assert np.allclose(found.interval, (interval.low, interval.high), atol=1e-4)
    assert np.isclose(found.reliability.log_loss, metrics.log_loss(names, proba, labels=classifier.classes_), rtol=1e-4)
    assert (found.confusion == metrics.confusion_matrix(names, predicted, labels=found.classes)).all()
    precision, recall, _, support = metrics.precision_recall_fscore_support(
        names, predicted, labels=found.classes, zero_division=math.nan
    )
    results = found.class_results
    assert [one.images for one in results] == support.tolist()
    assert np.allclose([one.recall for one in results], recall, equal_nan=True)
    assert np.allclose([one.precision for one in results], precision, equal_nan=True)
    off_diagonal = found.confusion - np.diag(np.diag(found.confusion))
    assert sum(one.mistaken for one in found.mixups) == off_diagonal.sum() == found.wrong
    assert found.mixups[0].mistaken == off_diagonal.max() and found.mixups[0].images == 12
    bins = np.ceil(found.confidence * 10).clip(1, 10)
    gaps = [abs((predicted == names)[bins == k].sum() - found.confidence[bins == k].sum()) for k in range(1, 11)]
    assert np.isclose(found.reliability.error, sum(gaps) / 60)


def test_promises_are_checked_as_the_classifier_keeps_them(measured: Any) -> None:
    classifier, images, names, others, found = measured
    sets = classifier.predict_sets(images, COVERAGE)
    assert found.sets.covered == np.mean([name in one for name, one in zip(names, sets, strict=True)])
    assert found.sets.size == np.mean([len(one) for one in sets])
    assert found.sets.empty == np.mean([not len(one) for one in sets])
    assert found.expected == classifier.calibration().accuracy
    kept, others_kept = (classifier.predict(each, "reject", keep=KEEP) != None for each in (images, others))  # noqa: E711
    assert found.unknown.kept == kept.mean() and found.unknown.rejected == 1 - others_kept.mean()
    scores = np.concatenate([classifier.unknown_score(each) for each in (others, images)])
    assert np.isclose(found.unknown.auroc, metrics.roc_auc_score(np.arange(80) < 20, scores))
    assert [one.image for one in found.unknown.accepted] == [
        row for row in np.argsort(scores[:20]).tolist() if others_kept[row]
    ]


def test_mistakes_are_explained_the_most_probable_first(measured: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    classifier, images, names, _, found = measured
    shares = [one.probability for one in found.mistakes]
    assert len(shares) == found.wrong and shares == sorted(shares, reverse=True)
    worst, (expected,) = found.mistakes[0], classifier.explain(images[found.mistakes[0].image], nearest=3)
    assert worst.label == names[worst.image] != worst.predicted == expected.label
    assert np.isclose(worst.probability, expected.probability)
    assert [one.example_id for one in worst.nearest] == [one.example_id for one in expected.nearest]
    (proba,) = classifier.predict_proba(images[worst.image])
    assert np.isclose(worst.label_probability, proba[found.classes.index(worst.label)], rtol=1e-4)
    monkeypatch.setattr(evaluate, "MISTAKES", 2)
    monkeypatch.setattr(evaluate, "_BLOCK", 7)
    fewer = classifier.evaluate(images, names)
    assert [one.image for one in fewer.mistakes] == [one.image for one in found.mistakes[:2]]
    assert fewer.wrong == found.wrong and (fewer.predicted == found.predicted).all()


def test_the_result_is_json_and_text(measured: Any) -> None:
    found = measured[-1]
    written = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert written["confusion"] == found.confusion.tolist() and written["wrong"] == found.wrong
    assert written["classes"][0]["label"] == "motif 0" and len(written["calibration"]["counts"]) == 10
    assert written["mistakes"][0]["nearest"][0]["label"].startswith("motif")
    lines = found.summary().splitlines()
    assert len(lines) == 5 and lines[0].startswith(f"{found.accuracy:.1%} of 60 images are right (95%: ")
    assert "0.8: " in lines[2] and "0.85 promised" in lines[3] and "20 images of no class" in lines[4]


def test_each_image_is_encoded_once_and_unreadable_ones_count_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    classifier, encoded = small_classifier(), []
    monkeypatch.setattr(
        PixelEncoder,
        "encode",
        lambda self, pixels, plain=PixelEncoder.encode: encoded.append(len(pixels)) or plain(self, pixels),
    )
    images, labels = pictures(np.random.default_rng(2), 5, 2)
    paths = [tmp_path / f"{i}.png" for i in range(10)]
    for path, image in zip(paths, images, strict=True):
        Image.fromarray(image).save(path)
    paths[3].write_bytes(b"no picture")
    names = [f"motif {label}" for label in labels]
    with pytest.raises(BadImageError, match=r"3\.png"):
        classifier.evaluate(paths, names)
    encoded.clear()
    found = classifier.evaluate(paths, names, paths[3:6], skip_bad=True)
    assert sum(encoded) == 9 + 2 and len(found.errors) == 2 and found.unknown.images == 2
    assert len(found.images) == 9 and paths[3] not in found.images and found.accuracy == 1.0
    assert "unreadable and left out: 2" in found.summary() and found.to_dict()["unreadable"] == 2
    with pytest.raises(IosrFastError, match="none of which can be read"):
        classifier.evaluate(paths[3:4], names[3:4], skip_bad=True)


def test_images_that_the_classifier_was_fitted_on_are_counted(measured: Any) -> None:
    classifier, _, _, _, found = measured
    support, labels = pictures(np.random.default_rng(0), 5, 4)
    mixed = classifier.evaluate([*support[3:9], 255 - support[0]], [*(f"motif {k}" for k in labels[3:9]), "motif 0"])
    assert found.copies == 0 and "near duplicates" not in found.summary()
    assert mixed.copies == 6 and "say little about new ones: 6" in mixed.summary()


def test_too_few_images_for_a_promise_are_a_reason(measured: Any) -> None:
    _, images, names, others, _ = measured
    found = small_classifier(shots=1).evaluate(images, names, others)
    assert "too few" not in found.sets.reason and "needs at least 9 support images" in found.sets.reason
    assert "needs at least 19" in found.unknown.reason and math.isnan(found.unknown.kept)
    assert 0 <= found.unknown.auroc <= 1 and math.isnan(found.expected) and "expected by" not in found.summary()
    json.dumps(found.to_dict(), allow_nan=False)
    by_names = small_classifier(method="zero-shot", alpha=None, beta=None, shots=1).evaluate(images, names)
    assert by_names.to_dict()["sets"]["covered"] is None


def test_mistakes_are_refused_before_an_image_is_read(measured: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    classifier, images, names, _, _ = measured
    monkeypatch.setattr(PixelEncoder, "encode", lambda *_: pytest.fail("encoded"))
    with pytest.raises(IosrFastError, match="labels 'motif 9' are not among"):
        classifier.evaluate(images[:2], ["motif 0", "motif 9"])
    with pytest.raises(IosrFastError, match="expected coverage above 0"):
        classifier.evaluate(images, names, coverage=90)
    with pytest.raises(IosrFastError, match="expected images to evaluate on, got 0"):
        classifier.evaluate([], [])
