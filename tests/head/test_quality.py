"""Classifier.evaluate: its figures against scikit-learn's and the classifier's own answers; what it refuses."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import binomtest
from sklearn import metrics

from iosr_fast import Classifier, IosrFastError
from iosr_fast.exceptions import BadImageError
from iosr_fast.files import evaluate
from iosr_fast.head.calibration import Beside
from iosr_fast.head.quality import Evaluation
from iosr_fast.methods.automation import Automation
from iosr_fast.methods.conformal import Judged
from iosr_fast.methods.judgement import accuracy_at, difference_of_shares, judge_promises
from iosr_fast.reports.evaluation_report import evaluation_page
from tests.store.live_parts import PixelEncoder, pictures, small_classifier, with_tree

COVERAGE, KEEP = 0.8, 0.85


@pytest.fixture(scope="module")
def measured() -> tuple[Classifier, np.ndarray, np.ndarray, np.ndarray, Evaluation]:
    """A classifier that is often wrong, noisy images of 5 classes with their names, others, and the evaluation."""
    classifier = small_classifier(shots=6, alpha=4.0, look_alikes=False)  # drawn independently
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
    assert 5 < found.wrong < 50 and found.accuracy == metrics.accuracy_score(names, predicted)
    interval = binomtest(60 - found.wrong, 60).proportion_ci(method="wilson")
    assert np.allclose(found.interval, (interval.low, interval.high), atol=1e-4)
    assert np.isclose(found.reliability.log_loss, metrics.log_loss(names, proba, labels=classifier.classes_), rtol=1e-4)
    assert (found.confusion == metrics.confusion_matrix(names, predicted, labels=found.classes)).all()
    options = {"labels": found.classes, "zero_division": math.nan}
    precision, recall, _, support = metrics.precision_recall_fscore_support(names, predicted, **options)
    results = found.class_results
    assert [one.images for one in results] == support.tolist()
    assert np.allclose([one.recall for one in results], recall, equal_nan=True)
    assert np.allclose([one.precision for one in results], precision, equal_nan=True)
    off_diagonal = found.confusion - np.diag(np.diag(found.confusion))
    assert sum(one.mistaken for one in found.mixups) == off_diagonal.sum() == found.wrong
    assert found.mixups[0].mistaken == off_diagonal.max() and found.mixups[0].images == 12
    frame = found.to_frame()
    assert frame.image[: found.wrong].tolist() == [one.image for one in found.mistakes]
    ordered = frame.sort_values("image")
    assert ordered.label.tolist() == names.tolist() and ordered.predicted.tolist() == predicted.tolist()
    assert np.allclose(ordered.probability, proba.max(axis=1)) and frame.right.sum() == 60 - found.wrong


def test_promises_are_checked_as_the_classifier_keeps_them(measured: Any) -> None:
    classifier, images, names, others, found = measured
    sets = classifier.predict_sets(images, COVERAGE)
    assert found.sets.covered == np.mean([name in one for name, one in zip(names, sets, strict=True)])
    assert (found.sets.size, found.sets.empty) == (np.mean([*map(len, sets)]), np.mean([not len(one) for one in sets]))
    kept, others_kept = (classifier.predict(each, "reject", keep=KEEP) != None for each in (images, others))  # noqa: E711
    assert found.unknown.kept == kept.mean() and found.unknown.rejected == 1 - others_kept.mean()
    scores = np.concatenate([classifier.unknown_score(each) for each in (others, images)])
    assert np.isclose(found.unknown.auroc, metrics.roc_auc_score(np.arange(80) < 20, scores))
    promised, counts = found.automation, {}
    assert (found.expected_automation.shares == classifier.automation().shares).all() and 0.09 < promised.smallest < 0.1
    for most, *held in zip(promised.max_errors, promised.shares, promised.errors, strict=True):
        given = classifier.predict(images, max_error=most) if most > promised.smallest else np.full(60, None)
        kept = given != np.array(None)
        wrong = (given != names)[kept].mean() if kept.any() else math.nan
        assert held == pytest.approx([kept.mean(), wrong], nan_ok=True)
        counts[most] = int(kept.sum()), int((given != names)[kept].sum())
    judged = {one.promised: (one.accepted, one.wrong) for one in found.promises}
    assert judged == {most: both for most, both in counts.items() if both[0]} and len(judged) > 1
    accepted = [row for row in np.argsort(scores[:20]).tolist() if others_kept[row]]
    assert [one.image for one in found.unknown.accepted] == accepted


def test_answers_with_nodes_of_a_tree_are_judged_together_and_shown_by_level(measured: Any) -> None:
    """A node is right above the label; mistakes stay those of classes."""
    _, images, names, _, flat = measured
    paths = [("low",), ("low",), ("high", "odd"), ("high", "odd"), ("high",)]
    in_tree = with_tree(small_classifier(shots=6, alpha=4.0, look_alikes=False), paths)
    found, above = in_tree.evaluate(images, names), dict(zip(in_tree.classes_, paths, strict=True))
    assert (found.wrong, len(found.mistakes)) == (flat.wrong, flat.wrong) and found.by_level and not flat.by_level
    for one, levels in zip(found.promises, found.by_level, strict=True):
        answers = in_tree.predict(images, max_error=one.promised)
        level = [{"odd": 1, "low": 2, "high": 2}.get(answer, 0) for answer in answers]
        right = [answer == name or answer in above[name] for answer, name in zip(answers, names, strict=True)]
        given = [(np.array(level) == k) & (answers != np.array(None)) for k in range(3)]
        assert (one.accepted, one.wrong) == (sum(map(sum, given)), sum((~np.array(right))[sum(given) > 0]))
        assert [share for share, _ in levels] == [mask.mean() for mask in given] and min(map(sum, given)) > 0
        assert [wrong for _, wrong in levels] == [1 - np.array(right)[mask].mean() for mask in given]
        checked = in_tree.check(answers, names, 0.2)
        assert (checked.checks, checked.wrong) == (one.accepted, one.wrong)
    assert found.to_dict()["automation"]["level_shares"] == found.automation.level_shares.tolist()
    shares = " + ".join(f"{share:.1%} ({wrong:.1%})" for share, wrong in found.by_level[0])
    assert f"accepted at level 0 + 1 + ... (of them wrong): {shares} for 15%" in found.summary()
    page = evaluation_page(found, lambda _: None, "title")
    assert all(f">{100 * share:.1f}% ({wrong:.1%} wrong)</td>" in page for share, wrong in found.by_level[0])
    assert "level 0" in page and "level 0" not in evaluation_page(flat, lambda _: None, "title") + flat.summary()


@pytest.mark.parametrize(
    ("accepted", "wrong", "said"),
    [
        (
            (30, 60, 60),
            (6, 12, 13),
            "the promise of 5% broke: 6 of 30 accepted labels are wrong (20.0%); up to 4 wrong would still agree "
            "with the promise of 5%; the same goes for 10%",
        ),
        (
            (10, 60, 60),
            (0, 4, 4),
            "the promise of 10% held: 4 of 60 accepted labels are wrong (6.7%); up to 11 wrong would still agree "
            "with the promise of 10%; the same goes for 20%",
        ),
        (
            (60, 60, 60),
            (4, 4, 5),
            "the promise of 5% is not refuted: 4 of 60 accepted labels are wrong (6.7%); up to 7 wrong would still "
            "agree with the promise of 5%",
        ),
        (
            (0, 10, 12),
            (0, 0, 0),
            "the promise of 10% cannot be judged: 0 of 10 accepted labels are wrong; a judgement needs 29 accepted "
            "labels",
        ),
        (
            (0, 0, 0),
            (0, 0, 0),
            "no label is accepted: 500 left-out support images can promise errors of 7.2% and more with 95% confidence "
            "(0.6% if all were right)",
        ),
    ],
)
def test_the_strictest_promise_that_broke_is_named(measured: Any, accepted: Any, wrong: Any, said: str) -> None:
    counts, of_these, promised = np.array(accepted), np.array(wrong), np.array([0.05, 0.1, 0.2])
    shares = counts / 60
    errors = np.where(counts > 0, of_these / np.maximum(counts, 1), np.nan)
    curves = np.full(3, 0.5), shares, errors, shares[:, None], errors[:, None]
    curve = Automation(500, 500.0, 0.006, 0.072, promised, *curves)
    both = np.stack([counts, of_these], 1)
    promises, accuracy = judge_promises(promised.tolist(), both, both.astype(float)), measured[-1].accuracy
    found = replace(measured[-1], automation=curve, promises=promises, expected_at_sizes=(accuracy, 30.0))
    assert said in found.summary() and "small enough to be chance" in found.summary().splitlines()[1]
    assert bool(found.advice) == ("broke" in said) == ("give groups" in found.summary())


def test_an_accuracy_below_the_expected_one_says_what_to_do(measured: Any) -> None:
    measures = {"expected_images": 500}
    below, above = (
        replace(measured[-1], expected=share, expected_at_sizes=(share, 500.0), **measures) for share in (0.9, 0.1)
    )
    assert (below.accuracy_judgement, above.accuracy_judgement) == ("below", "above")
    assert "90.0% were expected from 500 left-out support images: 36.7 points more than are right" in below.summary()
    assert "calibrate_on" in below.advice and "43.3 points less than are right" in above.summary()


def test_an_accuracy_is_compared_with_the_one_expected_at_its_class_sizes(measured: Any) -> None:
    """Three quarters of these images are of the class that is hardest; nothing else differs."""
    classifier, images, names, _, _ = measured
    classes, left_out = classifier.classes_, classifier.snapshot().judged
    recall = [left_out.right[:, 0][left_out.labels == c].mean() for c in range(5)]
    hardest = classes[int(np.argmin(recall))]
    of_hardest = names == hardest
    rows = np.concatenate([np.flatnonzero(of_hardest), np.flatnonzero(~of_hardest)[::12]])
    found = classifier.evaluate(images[rows], names[rows])
    shares = np.array([np.mean(names[rows] == name) for name in classes])
    expected, count = found.expected_at_sizes
    assert expected == pytest.approx(shares @ recall) and expected < found.expected - 0.005
    assert count == pytest.approx(1 / (shares**2 / 6).sum()) and count < found.expected_images == 30
    said = f"{found.expected:.1%} were expected from 30 left-out support images, {expected:.1%} at the class sizes of"
    assert said in found.summary() and found.to_dict()["expected_accuracy_at_class_sizes"] == expected
    assert found.difference == difference_of_shares(found.accuracy, len(rows), expected, count)
    assert "at the class sizes" not in measured[-1].summary()  # 12 images of each class, as of the support


def test_answers_of_one_picture_count_less_at_class_sizes_too() -> None:
    """As answers count at their own sizes: two pictures of two answers each are two, not four."""
    right, zeros = np.array([[True], [True], [False], [True]]), np.zeros(4)
    alone = Judged(zeros, zeros[:, None], right, zeros, np.array([0, 0, 1, 1]))
    accuracy, count = accuracy_at(alone, np.array([3, 1]))
    assert accuracy_at(replace(alone, units=np.array([0, 1, 0, 1])), np.array([3, 1])) == (accuracy, count / 2)


def test_pictures_of_a_burst_count_once_in_intervals_and_judgements(measured: Any) -> None:
    """Counts of pictures stay: users count them."""
    classifier, images, names, _, once = measured
    found = classifier.evaluate(np.repeat(images, 4, axis=0), np.repeat(names, 4))
    assert found.accuracy == once.accuracy and found.wrong == 4 * once.wrong and found.count == once.count == 60
    assert (found.confusion == 4 * once.confusion).all()
    assert found.interval == pytest.approx(once.interval) and found.difference == pytest.approx(once.difference)
    for four, one in zip(found.promises, once.promises, strict=True):
        assert (four.accepted, four.wrong, four.explained) == (4 * one.accepted, 4 * one.wrong, 4 * one.explained)
        assert four.judgement == one.judgement and four.share == pytest.approx(one.share)
    said = f"{once.accuracy:.1%} of 240 images (effective sample size 60: look-alikes are not independent) are right, "
    assert found.summary().startswith(f"{said}{once.accuracy:.1%} if a burst counts once (95%: ")
    assert found.to_dict()["effective_images"] == 60
    page = evaluation_page(found, lambda _: None, "title")
    assert f"{once.accuracy:.1%} if a burst counts once; of such images" in page
    uneven = classifier.evaluate([*images, *[images[0]] * 90], [*names, *[names[0]] * 90])
    assert uneven.accuracy != pytest.approx(once.accuracy, abs=0.1) and uneven.interval == pytest.approx(once.interval)


def test_siblings_of_support_images_are_counted_and_warned_of(measured: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    classifier, images, names, _, plain = measured
    found = Beside(np.arange(60) < 3, np.arange(60) >= 20, np.arange(60) // 2)
    monkeypatch.setattr("iosr_fast.files.evaluate.compare_with_support", lambda *_: found)
    siblings = classifier.evaluate(images, names)
    assert (siblings.copies, siblings.siblings, siblings.count) == (3, 40, 30) and plain.siblings == 0
    assert siblings.warnings == found.warning and "40 of 60 labelled pictures are siblings" in siblings.summary()
    written, page = siblings.to_dict(), evaluation_page(siblings, lambda _: None, "title")
    assert written["siblings"] == 40 and written["warnings"] == list(found.warning)
    assert "3 are near duplicates of support images and 40 are siblings of support images: these say little" in page
    assert f"<b>{found.warning[0]}" in page


def test_mistakes_are_explained_the_most_probable_first(measured: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    classifier, images, names, _, found = measured
    shares = [one.probability for one in found.mistakes]
    assert len(shares) == found.wrong and shares == sorted(shares, reverse=True)
    worst, (expected,) = found.mistakes[0], classifier.explain(images[found.mistakes[0].image], nearest=3)
    assert worst.label == names[worst.image] != worst.predicted == expected.label
    assert np.isclose(worst.probability, expected.probability)
    assert [one.example_id for one in worst.nearest] == [one.example_id for one in expected.nearest]
    monkeypatch.setattr(evaluate, "MISTAKES", 2)
    fewer = classifier.evaluate(images, names)
    assert [one.image for one in fewer.mistakes] == [one.image for one in found.mistakes[:2]]
    assert fewer.wrong == found.wrong and (fewer.predicted == found.predicted).all()


def test_the_result_is_json_and_text(measured: Any) -> None:
    classifier, images, names, others, found = measured
    written = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert written["confusion"] == found.confusion.tolist() and written["wrong"] == found.wrong
    assert written["classes"][0]["label"] == "motif 0" and len(written["calibration"]["counts"]) == 10
    lines = found.summary().splitlines()
    assert len(lines) == 9 and lines[0].startswith(f"{found.accuracy:.1%} of 60 images are right (95%: ")
    assert lines[1].endswith("30 left-out support images: 26.7 points more than are right, beyond chance")
    assert lines[2].startswith("the promise of ") and lines[3] == found.advice
    assert "(0.8 promised)" in lines[5] and "0.85 promised" in lines[7] and "20 images of no class" in lines[8]
    assert re.fullmatch(
        r"accepted labels \(of them wrong\): .*%\) with max_error 15%, .*%\) with max_error 20%", lines[6]
    )
    assert written["accuracy_judgement"] == "below" and len(written["accuracy_difference"]) == 2
    assert [one["judgement"] for one in written["promises"]] == [one.judgement for one in found.promises]
    assert written["automation"]["errors"][0] is None and written["expected_automation"]["images"] == 30
    few = small_classifier(shots=1).evaluate(images, names, others)  # too few support images for a promise
    assert "needs at least 9 left-out support images" in few.sets.reason and math.isnan(few.expected)
    assert "no label is accepted: 0 left-out support images can promise nothing" in few.summary()
    assert few.accuracy_judgement == few.against_expected == few.advice == ""
    assert "needs at least 19" in few.unknown.reason and math.isnan(few.unknown.kept)
    assert 0 <= few.unknown.auroc <= 1 and few.to_dict()["sets"]["covered"] is None
    support, labels = pictures(np.random.default_rng(0), 5, 6)
    mixed = classifier.evaluate([*support[3:9], 255 - support[0]], [*(f"motif {k}" for k in labels[3:9]), "motif 0"])
    assert mixed.copies == 6 and "say little about new ones: 6" in mixed.summary()


def test_unreadable_images_count_nowhere_and_wrong_arguments_are_refused_first(
    measured: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    classifier, images, names, _, _ = measured
    (bad := tmp_path / "bad.png").write_bytes(b"no picture")
    mixed, truth = [bad, *images[:9]], [names[0], *names[:9]]
    with pytest.raises(BadImageError, match=r"bad\.png"):
        classifier.evaluate(mixed, truth)
    found = classifier.evaluate(mixed, truth, [bad, *images[:2] // 9], skip_bad=True)
    assert len(found.errors) == 2 and found.unknown.images == 2 and len(found.images) == 9
    assert "unreadable and left out: 2" in found.summary() and found.to_dict()["unreadable"] == 2
    with pytest.raises(IosrFastError, match="none of which can be read"):
        classifier.evaluate(mixed[:1], truth[:1], skip_bad=True)
    monkeypatch.setattr(PixelEncoder, "encode", lambda *_: pytest.fail("encoded"))
    with pytest.raises(IosrFastError, match="labels 'motif 9' are not among"):
        classifier.evaluate(images[:2], ["motif 0", "motif 9"])
    with pytest.raises(IosrFastError, match="expected coverage above 0"):
        classifier.evaluate(images, names, coverage=90)
    with pytest.raises(IosrFastError, match="expected images to evaluate on, got 0"):
        classifier.evaluate([], [])
