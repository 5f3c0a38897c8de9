"""Classifier with several labels a picture: fit, answers, bundles, folders and tables; what it refuses, and when."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save
from sklearn.metrics import average_precision_score, log_loss, precision_recall_fscore_support

from iosr_fast import score
from iosr_fast.classifier import Classifier
from iosr_fast.exceptions import IosrFastError
from iosr_fast.files.stream import Reader, ReadOptions
from iosr_fast.files.tables import CsvTable, row_of
from iosr_fast.files.work import Classify
from iosr_fast.head.labelled_images import labelled_images
from iosr_fast.head.predictions import predict
from iosr_fast.head.support_images import SupportSettings
from iosr_fast.head.verdict import Abstention
from iosr_fast.methods.config import Config
from iosr_fast.methods.tune import tune
from iosr_fast.reports.evaluation_report import evaluation_page
from iosr_fast.store.bundle import load
from iosr_fast.store.bundle_schema import HeadFacts
from iosr_fast.store.description import describe
from iosr_fast.store.head_files import fingerprint, head_from_files, head_to_files
from tests.store.live_parts import engine_folder, pictures, unfitted

NAMES = [f"motif {c}" for c in range(5)]


def several(seed: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Pictures (n, 8, 8, 3), each the mean of the motifs that it has, or noise alone; and an indicator (n, 5)."""
    rng = np.random.default_rng(seed)
    motifs, _ = pictures(np.random.default_rng(3), 5, 1)
    labels = rng.random((n, 5)) < 0.35
    labels[:10] = np.tile(np.eye(5, dtype=bool), (2, 1))[:n]
    means = (labels @ motifs.reshape(5, -1)) / np.maximum(labels.sum(1), 1)[:, None]
    means = np.where(labels.any(1)[:, None], means, 127) + rng.normal(0, 15, means.shape)
    return np.clip(means, 0, 255).astype(np.uint8).reshape(n, 8, 8, 3), labels


def sets_of(labels: np.ndarray) -> list[set[str]]:
    return [{NAMES[c] for c in np.flatnonzero(row)} for row in labels]


def fitted(folder: Path | None = None, **parameters: Any) -> Classifier:
    images, labels = several(0, 40)
    return unfitted(folder or Path("none"), **parameters).fit(images, sets_of(labels))


@pytest.mark.parametrize("method", ["auto", "zero-shot"])
def test_answers_are_those_of_the_plan(method: str) -> None:
    classifier = fitted(method=method)
    images, labels = several(1, 60)
    logits, probabilities = classifier.decision_function(images), classifier.predict_proba(images)
    np.testing.assert_allclose(logits, score(classifier.plan_, classifier.encoder.encode(images)), atol=1e-4)
    np.testing.assert_allclose(probabilities, 1 / (1 + np.exp(-logits.astype(np.float64))), atol=1e-6)
    config, *_ = tune(Config(method=method), classifier.support_)
    assert classifier.tuned_.average_precision == config.evidence.average_precision
    answers = classifier.predict(images)
    assert answers.shape == (60,) and [set(one) for one in answers] == sets_of(probabilities >= classifier.thresholds_)
    expected = average_precision_score(labels, logits, average="macro")
    assert classifier.score(images, sets_of(labels)) == pytest.approx(expected)
    assert expected > 0.9 or method == "zero-shot"  # names of this text encoder say nothing
    counts = several(0, 40)[1].sum(0).tolist()
    assert [one.examples for one in classifier.classes()] == counts
    assert len(classifier.examples("motif 2")) == counts[2] and classifier.picture(classifier.examples("motif 2")[0])


@pytest.mark.parametrize(("method", "precision"), [("auto", "int8"), ("zero-shot", "fp32")])
def test_a_bundle_is_what_was_saved(method: str, precision: str, tmp_path: Path) -> None:
    made = fitted(engine_folder(tmp_path / "engine"), method=method, key_precision=precision)
    made.save(tmp_path / "bundle")
    head, loaded = made.snapshot(), load(tmp_path / "bundle").head
    assert fingerprint(loaded) == fingerprint(head) and loaded.counts.tolist() == head.counts.tolist()
    rows = made.encoder.encode(several(1, 9)[0])
    np.testing.assert_array_equal(loaded.score(rows), head.score(rows))
    np.testing.assert_array_equal(loaded.thresholds, head.thresholds)
    assert "several labels a picture" in describe(tmp_path / "bundle")
    others = head.examples.labelled(~head.support.indicator, head.uids)
    assert fingerprint(replace(head, examples=others)) != fingerprint(head)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("thresholds", None, "labels, thresholds together"),
        ("thresholds", np.full(5, 1.5, np.float32), "thresholds from 0 to 1"),
        ("labels", np.full((40, 5), 2, np.uint8), "labels from 0 to 1, got 2"),
    ],
)
def test_a_damaged_bundle_is_refused(name: str, value: np.ndarray | None, message: str) -> None:
    facts, files = head_to_files(fitted().snapshot())
    support = {**files["support.safetensors"], name: value}
    files["support.safetensors"] = {key: array for key, array in support.items() if array is not None}
    with pytest.raises(IosrFastError, match=message):
        head_from_files(msgspec.convert(facts, HeadFacts), lambda file: save(files[file]) if file in files else None)


def test_folders_and_tables_have_the_labels_of_each_picture(tmp_path: Path) -> None:
    classifier = fitted()
    noise = np.random.default_rng(0).integers(0, 256, (300, 8, 8, 3), np.uint8)
    images = np.append(several(1, 12)[0], noise[[not answer for answer in classifier.predict(noise)]], axis=0)
    for i, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"{i:02d}.png")
    answers, probabilities = classifier.predict(images), classifier.predict_proba(images)
    results = classifier.predict_folder(tmp_path)
    assert results.labels.tolist() == answers.tolist() and {0, 2} <= set(map(len, answers))
    for row, found in zip(probabilities, results.probabilities, strict=True):
        assert [*found.values()] == sorted(found.values(), reverse=True)
        np.testing.assert_allclose([*found.values()], [row[NAMES.index(name)] for name in found], atol=1e-5)
    paths, head = [str(path) for path in results.paths], classifier.snapshot()
    table = CsvTable(multi_label=True)
    reader = Reader(classifier.encoder, Path("none"), SupportSettings(), ReadOptions(5))
    answered = chain.from_iterable(reader.read(paths, partial(predict, head))[2])
    rows = [row_of(path, answer, table.fields) for path, answer in zip(paths, answered, strict=True)]
    (tmp_path / "out.csv").write_bytes(table.encode(rows, first=True))
    again, labels, names, *_ = labelled_images(tmp_path / "out.csv")  # what classify writes, fit reads
    assert labels == answers.tolist() and [str(path) for path in again] == paths
    assert names == sorted(set().union(*answers))


@pytest.fixture(scope="module")
def promising() -> tuple[Classifier, np.ndarray, np.ndarray]:
    """A classifier that can promise errors, and 90 noisy pictures with their labels."""
    support, labels = several(0, 250)
    classifier = unfitted(look_alikes=False).fit(blurred(support, 0.4), sets_of(labels))
    images, truth = several(1, 90)
    return classifier, blurred(images, 0.25), truth


def blurred(images: np.ndarray, least: float) -> np.ndarray:
    """The images under noise, from a share `least` of them to 0.7, where none are near duplicates yet."""
    share = np.linspace(least, 0.7, len(images))[:, None, None, None]
    noise = np.random.default_rng(len(images)).integers(0, 256, images.shape)
    return (share * images + (1 - share) * noise).astype(np.uint8)


def test_a_folder_says_which_labels_are_accepted(promising: Any, tmp_path: Path) -> None:
    classifier, images, _ = promising
    for i, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"{i:02d}.png")
    found = classifier.predict_folder(tmp_path, max_error=0.2)
    assert found.labels.tolist() == classifier.predict(images, max_error=0.2).tolist()
    given = classifier.predict(images).tolist()
    assert [*map(set, found.probabilities)] == [*map(set, found.accepted)] == given
    for labels, accepted in zip(found.labels, found.accepted, strict=True):
        assert {name for name, passes in accepted.items() if passes} == labels
    assert 0 < sum(map(len, found.labels)) < sum(map(len, given)) and len(found.to_frame()) == 90
    assert classifier.predict_folder(tmp_path).accepted is None


def test_an_evaluation_is_of_the_labels_given(promising: Any) -> None:
    classifier, images, truth = promising
    found, names = classifier.evaluate(images, sets_of(truth)), np.array(NAMES)
    proba, answers = classifier.predict_proba(images), classifier.predict(images)
    given = np.array([[name in one for name in NAMES] for one in answers])
    assert found.average_precision == classifier.score(images, sets_of(truth))
    assert (found.labels == truth).all() and (found.predicted == given).all() and found.answers == given.sum()
    precision, recall, _, support = precision_recall_fscore_support(truth, given)
    micro = precision_recall_fscore_support(truth, given, average="micro")
    assert (found.accuracy, found.found) == pytest.approx(micro[:2]) and min(micro[:2]) < 1
    assert [one.precision for one in found.class_results] == pytest.approx(precision.tolist())
    assert [(one.recall, one.images) for one in found.class_results] == [
        (pytest.approx(share), number) for share, number in zip(recall, support, strict=True)
    ]
    assert found.reliability.accuracy == pytest.approx(micro[0]) and found.reliability.counts.sum() == given.sum()
    assert found.reliability.log_loss == pytest.approx(log_loss(truth[given], proba[given]), rel=1e-4)
    assert 0 < found.count < given.sum(), "labels of one picture count less"
    assert len(found.promises) > 1
    for one, share in zip(found.promises, found.promises_found, strict=True):
        accepted = classifier.predict(images, max_error=one.promised)
        marked = np.array([[name in labels for name in NAMES] for labels in accepted])
        assert (one.accepted, one.wrong) == (marked.sum(), (marked & ~truth).sum())
        assert share == (marked & truth).sum() / truth.sum()
        sizes = marked.sum(1)
        assert one.count == pytest.approx(sizes.sum() ** 2 / (sizes @ sizes)), "no two pictures look alike"
        checked = classifier.check(accepted, sets_of(truth), one.promised)
        assert (checked.checks, checked.wrong) == (one.accepted, one.wrong)
    assert (found.confusion, found.sets, found.unknown, found.mixups) == (None, None, None, [])
    wrong = [(one.image, one.predicted, one.probability) for one in found.mistakes if one.predicted is not None]
    missed = [(one.image, one.label, one.label_probability) for one in found.mistakes if one.predicted is None]
    assert (len(wrong), len(missed)) == (found.wrong, found.missed) and min(found.wrong, found.missed) > 0
    for mistakes, of in ((wrong, given & ~truth), (missed, truth & ~given)):
        assert {(i, name) for i, name, _ in mistakes} == {(i, names[c]) for i, c in np.argwhere(of)}
        shares = [proba[i, NAMES.index(name)] for i, name, _ in mistakes]
        assert [share for *_, share in mistakes] == pytest.approx(shares)
    assert sorted(found.wrong_confidence) == pytest.approx(sorted(share for *_, share in wrong))
    surest = [one.probability if one.predicted else 1 - one.label_probability for one in found.mistakes]
    assert surest == sorted(surest, reverse=True)
    (expected,) = classifier.explain(images[found.mistakes[0].image], nearest=3)
    assert [one.label for one in found.mistakes[0].nearest] == [one.label for one in expected.nearest]


def test_an_evaluation_of_several_labels_is_text_json_and_a_page(promising: Any) -> None:
    classifier, images, truth = promising
    found = classifier.evaluate(images, sets_of(truth))
    written = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert written["found"] == found.found and written["promises_found"] == found.promises_found
    assert (written["answers"], written["labels"], written["images"]) == (found.answers, truth.sum(), 90)
    assert written["confusion"] is written["sets"] is written["unknown"] is None
    first, second, third, *rest = found.summary().splitlines()
    assert f"{found.accuracy:.1%} of {found.answers} labels given" in first and "mean average precision 0." in first
    assert "labels of left-out support images" in second and third.startswith("the promise of ")
    strictest = found.promises[0]
    shares = f"({strictest.share:.1%}; {found.promises_found[0]:.1%}) with max_error {strictest.promised:.0%}"
    assert "accepted labels (of them wrong; of all labels found): " in rest[-1] and shares in rest[-1]
    frame = found.to_frame()
    assert frame.right.sum() == (found.predicted == truth).all(1).sum() and frame.image[0] == found.mistakes[0].image
    assert all(set(one) == two for one, two in zip(frame.probability, frame.predicted, strict=True))
    page = evaluation_page(found, classifier.picture, "title")
    assert "Confusion" not in page and "Unknown pictures" not in page and "Sets of labels" not in page
    assert f"{found.missed:,} labels are missed" in page and "of labels given right" in page
    noise = np.random.default_rng(0).integers(0, 256, (300, 8, 8, 3), np.uint8)
    without = noise[[not answer for answer in classifier.predict(noise)]][:3]
    nothing = classifier.evaluate(without, [set(), set(), {"motif 0"}])
    assert "none is given, 0.0% of all 1 labels found" in nothing.summary() and nothing.answers == 0
    assert evaluation_page(nothing, classifier.picture, "title") and json.dumps(nothing.to_dict(), allow_nan=False)


IMAGES, LABELS = several(0, 12)


@pytest.mark.parametrize(
    ("labels", "parameters", "message"),
    [
        (sets_of(LABELS), {"method": "gda"}, "gda can't learn from several labels an image: .*; use 'auto'"),
        (sets_of(LABELS), {"method": "zero-shot", "reducer": "centre"}, "take no reducer"),
        ([{"a;b"}, *sets_of(LABELS)[1:]], {}, "class names without ';'"),
        (sets_of(LABELS)[1:], {}, "for each of 12 images, got 11"),
    ],
)
def test_wrong_fits_are_refused_before_a_clip_is_opened(
    labels: Any, parameters: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Classifier, "_open", lambda _: pytest.fail("a CLIP was opened"))
    with pytest.raises(IosrFastError, match=message):
        unfitted(**parameters).fit(IMAGES, labels)
    with pytest.raises(IosrFastError, match="take no unknown_images"):
        unfitted().fit(IMAGES, sets_of(LABELS), unknown_images=IMAGES[:3])


def test_a_setting_of_look_alikes_stays() -> None:
    assert not fitted(look_alikes=False).snapshot().config.look_alikes


def test_calls_for_one_label_are_refused_before_any_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    classifier, image = fitted(engine_folder(tmp_path / "engine")), IMAGES[:1]
    classifier.save(tmp_path / "bundle")
    # An engine that computes would take seconds.
    monkeypatch.setattr(Classifier, "load", lambda *_, **__: classifier)
    monkeypatch.setattr(type(classifier.encoder), "encode", lambda *_: pytest.fail("a picture was encoded"))
    calls: dict[Any, str] = {
        partial(classifier.predict_sets, image): "predict_sets",
        partial(classifier.optimize, image, []): "optimize",
        partial(classifier.predict_jointly, image): "joint",
        partial(classifier.predict_folder, tmp_path, joint=True): "joint",
        partial(classifier.predict_folder, tmp_path, unknown="reject"): "unknown",
        Classify(str(tmp_path / "bundle"), joint=True).check: "joint",
        Classify(str(tmp_path / "bundle"), abstention=Abstention(0.9, "?")).check: "unknown",
        partial(classifier.evaluate, image, sets_of(LABELS[:1]), image): "evaluate with unknown_images",
        partial(classifier.evaluate, image, sets_of(LABELS[:1]), coverage=0.8): "evaluate with .*coverage",
        partial(classifier.predict, image, unknown="reject"): "unknown",
        partial(classifier.unknown_score, image): "unknown",
        partial(getattr, classifier, "unknown_"): "unknown",
    }
    for call, name in calls.items():
        with pytest.raises(IosrFastError, match=f"^{name}.* is for one label a picture, and this"):
            call()
