"""The audit of a support set: wrong labels, duplicates, confusions, and what to label next."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.exceptions import IosrFastError
from iosr_fast.methods import METHODS
from iosr_fast.methods.folds import make_folds
from iosr_fast.methods.label_noise import fit_label_noise, fit_missing_labels
from iosr_fast.methods.links import Platt, Softmax
from iosr_fast.methods.out_of_fold import OutOfFold, out_of_fold
from iosr_fast.methods.suggest import suggest
from iosr_fast.methods.support_audit import SupportAudit, audit_support
from iosr_fast.methods.support_set import SupportSet, make_support_set
from tests.methods.support_sets import Clusters, unit

WORLD = Clusters(10, width=32)


def left_out(support: SupportSet) -> OutOfFold:
    return out_of_fold(METHODS["gda"], support, make_folds(support), None, {"alpha": 1.0})


def rows_of(shots: int, seed: int = 0, world: Clusters = WORLD) -> tuple[np.ndarray, np.ndarray]:
    images, labels = world.queries(shots, seed)
    return images.plain.copy(), labels


def audit_of(rows: np.ndarray, labels: np.ndarray, text: np.ndarray | None = None) -> SupportAudit:
    """Images are named by their position in `rows`."""
    support = make_support_set(Embeddings(rows), labels, text, 100.0, int(labels.max()) + 1)
    return audit_support(support, left_out(support), images=np.argsort(labels, kind="stable"))


@pytest.mark.parametrize(("share", "factor"), [(0.1, 1.0), (0.02, 0.5), (0.3, 3.0)])
def test_share_and_factor_of_label_noise_are_those_it_was_drawn_from(share: float, factor: float) -> None:
    rng = np.random.default_rng(3)
    logits, wrong = 4.0 * rng.standard_normal((6000, 8)), rng.random(6000) < share
    right = (logits + rng.gumbel(size=(6000, 8))).argmax(1)  # drawn from the softmax
    labels = np.where(wrong, (right + rng.integers(1, 8, 6000)) % 8, right)
    noise = fit_label_noise(logits / factor, labels)
    assert noise.share == pytest.approx(share, abs=0.015) and noise.factor == pytest.approx(factor, rel=0.07)
    assert noise.wrong.sum() == pytest.approx(wrong.sum(), rel=0.2)
    p = np.exp(-noise.surprise)
    by_error = noise.share * (1 - p) / 7
    np.testing.assert_allclose(noise.wrong, by_error / (by_error + (1 - noise.share) * p))  # Bayes' rule


def test_a_classifier_that_guesses_accuses_nobody() -> None:
    rng = np.random.default_rng(0)
    assert (fit_label_noise(rng.standard_normal((200, 20)), rng.integers(20, size=200)).wrong <= 0.5).all()
    assert (fit_label_noise(np.zeros((6, 2)), np.arange(6) % 2).wrong <= 0.5).all()
    assert np.isnan(fit_label_noise(np.zeros((0, 2)), np.zeros(0, np.int64)).share)


def test_exchanged_labels_are_found_with_their_own_and_the_nearest_neighbours() -> None:
    rows, right = rows_of(8)
    labels = right.copy()
    labels[[3, 20, 41]] = right[[20, 41, 3]]
    audit = audit_of(rows, labels)
    found = {one.image: one for one in audit.likely_wrong}
    assert set(found) == {3, 20, 41} and audit.expected_wrong == pytest.approx(3, abs=0.7)
    for image, suspect in found.items():
        assert (suspect.label, suspect.suggested) == (labels[image], right[image])
        of_class = np.flatnonzero(labels == right[image])
        nearest = of_class[np.argsort(-(rows[of_class] @ rows[image]), kind="stable")]
        assert suspect.neighbours == tuple(nearest[:3])
    assert set(list(audit.suspicion)[:3]) == {3, 20, 41} and len(audit.suspicion) == 80
    assert audit.basis == "left-out images" and "likely wrong: 3;" in audit.summary()
    assert not audit_of(rows, right).likely_wrong


def test_near_duplicates_within_and_across_classes() -> None:
    rows, labels = rows_of(5)
    rows, labels = np.vstack([rows, unit(rows[2:3] + 0.01 * rows[30:31]), rows[7:8]]), np.r_[labels, 0, 9]
    audit = audit_of(rows, labels)
    pairs = {(one.image, one.other): (one.label, one.other_label) for one in audit.duplicates}
    assert pairs == {(2, 50): (0, 0), (7, 51): (1, 9)}
    assert audit.duplicates[0].cosine == pytest.approx(1.0, abs=1e-6)
    assert [one.distinct for one in audit.classes] == [5] * 9 + [6] and audit.classes[0].images == 6
    twice = audit_of(np.vstack([rows[:50], rows[25:30]]), np.append(labels[:50], labels[25:30]))
    advice = [one.advice for one in twice.classes]
    assert advice[5].startswith("look-alikes: 10 images are 5 groups; new ones may be right less often: add images of")
    assert not any(advice[:5] + advice[6:])


def test_confused_classes_are_those_that_lie_together(rng: np.random.Generator) -> None:
    rows, labels = rows_of(12, world=Clusters(10, width=32, noise=0.5))
    rows[labels == 7] = unit((rows[labels == 3] + 0.02 * rng.standard_normal((12, 32)))[rng.permutation(12)])
    (confusion,) = audit_of(rows, labels).confusions
    assert (confusion.label, confusion.other) == (3, 7) and confusion.images <= 24 and 0.2 < confusion.share < 0.8
    assert [labels[image] for image in confusion.examples] == [3, 7]


def test_advice_on_few_and_alike_images() -> None:
    rows, labels = rows_of(8)
    middle = rows[labels == 4].mean(0)
    rows[labels == 4] = unit(middle + 0.3 * (rows[labels == 4] - middle))
    order = np.arange(len(labels)) % 8
    keep = ~((labels == 1) & (order > 2) | (labels == 2) & (order > 0))
    audit = audit_of(rows[keep], labels[keep])
    advice = {one.label: one.advice for one in audit.classes}
    assert "few images: 3 where 8 are usual" in advice[1] and "nothing can be left out" in advice[2]
    assert "alike" in advice[4] and not any(advice[c] for c in (0, 3, 5, 6, 7, 8, 9))
    scored = {one.label: one.scored for one in audit.classes}
    assert scored[2] == 0 and scored[1] == 3 and all(one.right <= one.scored for one in audit.classes)


def test_one_image_a_class_is_judged_by_class_names_or_not_at_all() -> None:
    rows, labels = rows_of(1)
    rows[[2, 5]] = rows[[5, 2]]
    audit = audit_of(rows, labels, unit(WORLD.centres))
    assert audit.basis == "class names" and {one.image for one in audit.likely_wrong} == {2, 5}
    assert json.loads(json.dumps(audit.to_dict(), allow_nan=False))["classes"][0]["variety"] is None
    blind = audit_of(rows, labels)
    assert blind.basis == "nothing" and not blind.suspects and np.isnan([*blind.suspicion.values()]).all()


def scenes(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """n rows that show two or three of ten things each, and their labels (n, 10)."""
    rng = np.random.default_rng(seed)
    truth = rng.random((n, 10)).argsort(1) < rng.integers(2, 4, (n, 1))
    return unit(truth @ WORLD.centres + 0.5 * rng.standard_normal((n, 32))), truth


def audit_of_sets(rows: np.ndarray, labels: np.ndarray, text: np.ndarray | None = None) -> SupportAudit:
    support = make_support_set(Embeddings(rows), labels, text, 100.0)
    found = out_of_fold(
        METHODS["stack"], support, make_folds(support), None, {"regression": 1.0, "beta": 1.0, "ridge": 0.1}
    )
    platt = Platt.fit(found.logits, labels, found.folds.distinct > 1)
    return audit_support(support, replace(found, logits=platt.logits(found.logits).astype(np.float32)))


@pytest.mark.parametrize(("wrong", "missing", "factor"), [(0.1, 0.1, 1.0), (0.02, 0.3, 0.5), (0.3, 0.01, 2.0)])
def test_shares_of_wrong_and_missing_labels_are_those_they_were_drawn_from(
    wrong: float, missing: float, factor: float
) -> None:
    rng = np.random.default_rng(3)
    logits = 4.0 * rng.standard_normal((4000, 8)) - 5.0
    truth = rng.random(logits.shape) < 1 / (1 + np.exp(-logits))
    added = wrong * truth.sum() * (1 - missing) / (1 - wrong) / (~truth).sum()
    labels = np.where(truth, rng.random(truth.shape) >= missing, rng.random(truth.shape) < added)
    noise = fit_missing_labels(logits / factor + 1.0, labels)  # a bias of no meaning
    assert noise.share == pytest.approx(wrong, rel=0.1) and noise.missing == pytest.approx(missing, abs=0.03)
    assert noise.factor == pytest.approx(factor, rel=0.07)
    for there in (labels, ~labels):
        assert noise.wrong[there].sum() == pytest.approx((labels != truth)[there].sum(), rel=0.2, abs=20)
        order = np.argsort(noise.surprise[there])
        assert (np.diff(noise.wrong[there][order]) >= 0).all()


def test_of_several_labels_a_classifier_that_guesses_accuses_nobody() -> None:
    rng = np.random.default_rng(0)
    noise = fit_missing_labels(rng.standard_normal((200, 20)), rng.random((200, 20)) < 0.1)
    assert (noise.wrong <= 0.5).all() and noise.wrong.sum() < 40
    for labels in (np.zeros((5, 3), bool), np.ones((5, 3), bool), np.zeros((0, 3), bool)):
        assert not fit_missing_labels(np.zeros(labels.shape), labels).wrong.any()


def test_wrong_and_missing_labels_of_several_are_found_each_with_its_picture() -> None:
    rows, truth = scenes(120)
    rows = np.vstack([rows, rows[:2]])  # copies, the first with another set of labels
    labels = np.vstack([truth, truth[:2]])
    changed = [(5, np.flatnonzero(truth[5])[0]), (31, np.flatnonzero(truth[31])[1]), (120, np.flatnonzero(truth[0])[0])]
    changed += [(5, np.flatnonzero(~truth[5])[3]), (77, np.flatnonzero(~truth[77])[3])]
    labels[tuple(np.transpose(changed))] ^= True
    audit = audit_of_sets(rows, labels)
    found = {(one.image, one.suggested if one.label is None else one.label): one for one in audit.likely_wrong}
    assert set(found) == set(changed) and audit.expected_wrong == pytest.approx(5, abs=1.5)
    for (image, c), one in found.items():
        assert (one.label, one.suggested) == ((c, None) if labels[image, c] else (None, c))
        others = np.setdiff1d(np.flatnonzero(labels[:, c]), image)
        assert one.neighbours == tuple(others[np.argsort(-(rows[others] @ rows[image]), kind="stable")[:3]])
        assert one.finding == f"{c} is {'wrong' if labels[image, c] else 'missing'}"
    assert set(list(audit.suspicion)[:4]) == {5, 31, 77, 120} and len(audit.suspicion) == 122
    right = np.vstack([truth, truth[:2]])
    assert {image: set(own) for image, own in audit.corrected.items()} == {
        image: set(np.flatnonzero(right[image])) for image in (5, 31, 77, 120)
    }
    assert "likely wrong: 2, likely missing: 3;" in audit.summary() and "pairs, 1 under two labels" in audit.summary()
    assert [(one.image, one.other) for one in audit.duplicates[:2]] == [(0, 120), (1, 121)]
    assert audit.duplicates[0].label == tuple(np.flatnonzero(truth[0])) != audit.duplicates[0].other_label
    for c, one in enumerate(audit.classes):
        assert one.images == one.scored == labels[:, c].sum() and 0.8 * one.scored < one.right <= one.scored
        assert one.images - 4 < one.distinct <= one.images - (labels[:, c] & (np.arange(122) > 120)).sum()
        assert not one.advice
    assert len(audit_of_sets(rows[:120], truth).likely_wrong) <= 1


def test_confused_classes_of_several_labels_are_those_that_look_the_same(rng: np.random.Generator) -> None:
    rows, labels = scenes(200)
    assert not audit_of_sets(rows, labels).confusions
    assert not audit_of_sets(unit(rng.standard_normal((200, 32))), labels).confusions  # a classifier that guesses
    one = np.flatnonzero(labels[:, 3] != labels[:, 7])
    taken = one[rng.random(len(one)) < 0.5]
    labels[taken[:, None], [3, 7]] ^= True
    (confusion,) = audit_of_sets(rows, labels).confusions
    assert (confusion.label, confusion.other) == (3, 7) and confusion.images == len(one)
    assert [labels[image, [3, 7]].tolist() for image in confusion.examples] == [[True, False], [False, True]]


def test_of_several_labels_those_of_single_images_are_judged_by_class_names() -> None:
    labels = np.eye(10, dtype=bool)[:5] | np.eye(10, dtype=bool)[5:]
    rows = unit(labels @ WORLD.centres)
    blind = audit_of_sets(rows, labels)
    assert blind.basis == "nothing" and not blind.suspects and np.isnan([*blind.suspicion.values()]).all()
    labels[:2] = labels[:2][:, [0, 1, 2, 3, 4, 6, 5, 7, 8, 9]]
    audit = audit_of_sets(rows, labels, unit(WORLD.centres))
    assert audit.basis == "class names" and len(audit.likely_wrong) == 4
    assert audit.corrected == {0: (0, 5), 1: (1, 6)}
    assert all((one.probability < 0.5) == (one.suggested is None) for one in audit.likely_wrong)
    assert json.loads(json.dumps(audit.to_dict(), allow_nan=False))["label_sets"]["1"] == [1, 5]


def test_classes_that_no_known_class_explains_come_first() -> None:
    images, labels = Clusters(10, width=32, noise=0.5).queries(20)
    known = images.plain[labels < 5][::20]
    first = labels[suggest(images.plain, 10, Softmax().entropy(30.0 * images.plain @ known.T)).rows[:5]]
    assert (first >= 5).all() and len(np.unique(first)) >= 3


def look_alikes(clusters: str, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """800 rows of 40 classes whose clusters are not the classes: five families, one of which scatters seven times as
    much as the others; or eight poses, to which some classes add less than others."""
    labels = np.repeat(np.arange(40), 20)
    classes, noise = rng.standard_normal((40, 48)), rng.standard_normal((800, 48))
    if clusters == "families":
        scale = np.where(np.arange(40) % 5 == 0, 4.0, 0.6)[:, None]
        rows = (3 * rng.standard_normal((5, 48))[np.arange(40) % 5] + scale * classes)[labels]
        rows += 1.2 * scale[labels] * noise
    else:
        rows = 2 * rng.standard_normal((8, 48))[rng.integers(8, size=800)] + 0.4 * noise
        rows += (np.linspace(0.1, 0.6, 40)[:, None] * classes)[labels]
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32), labels


@pytest.mark.parametrize(("clusters", "gain"), [("families", 8), ("poses", -1)])
@pytest.mark.parametrize("each", [1, 2])
def test_suggestions_never_lose_to_chance_where_clusters_are_not_the_classes(
    clusters: str, gain: int, each: int
) -> None:
    found, at_random = [], []
    for seed in range(5):
        rng = np.random.default_rng(seed)
        rows, labels = look_alikes(clusters, rng)
        found.append(len(np.unique(labels[suggest(rows, 40 * each).rows])))
        at_random += [len(np.unique(labels[rng.permutation(800)[: 40 * each]])) for _ in range(20)]
    assert np.mean(found) >= np.mean(at_random) + gain / each


@pytest.mark.parametrize("weighted", [False, True])
def test_a_burst_is_suggested_once(rng: np.random.Generator, weighted: bool) -> None:
    rows = Clusters(20, width=32, noise=0.5).queries(20)[0].plain
    burst = rows[:1] + 0.01 * rng.standard_normal((100, 32))
    rows = np.concatenate([rows, burst / np.linalg.norm(burst, axis=1, keepdims=True)])
    chosen = suggest(rows, 50, 0.5 + rng.random(500) if weighted else None)
    assert ((chosen.rows >= 400) | (chosen.rows == 0)).sum() == 1
    assert chosen.stands.sum() == 500 and chosen.stands.max() >= 101


def test_edges() -> None:
    rows = Clusters(10).queries(3)[0].plain
    assert sorted(suggest(rows, 1000).rows) == list(range(30)) and len(suggest(rows[:0], 5).rows) == 0
    assert len(set(suggest(np.tile(rows[:1], (7, 1)), 4).rows)) == 4
    np.testing.assert_array_equal(suggest(rows, 7).rows, suggest(rows, 7).rows)
    assert len(suggest(rows, 3, np.zeros(30)).rows) == 3
    for odd in (rows[:, :1], rows.astype(np.float16), rows.astype(np.float64), np.zeros((30, 4))):
        chosen = suggest(odd, 29, np.eye(30)[0])
        assert len(set(chosen.rows)) == 29 and chosen.stands.sum() == 30
    with pytest.raises(IosrFastError, match="expected n of at least 1, got 0"):
        suggest(rows, 0)
