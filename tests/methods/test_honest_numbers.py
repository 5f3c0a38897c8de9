"""What a search says of itself: not the best of its tries, an interval, near duplicates, probabilities that fit."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.head.method_config import MethodChoice
from iosr_fast.methods import METHODS, compile_method
from iosr_fast.methods.folds import group_near_duplicates
from iosr_fast.methods.out_of_fold import calibrate, usual_factor
from iosr_fast.methods.support_set import SupportSet, make_support_set
from iosr_fast.methods.tune import tune
from iosr_fast.methods.tuned import Tuned, wilson
from iosr_fast.methods.tuning.held_out import HeldOutSet
from iosr_fast.scoring.score import score
from tests.conftest import unit_rows

pytestmark = pytest.mark.slow


def unit(rows: np.ndarray) -> np.ndarray:
    scaled: np.ndarray = rows / np.linalg.norm(rows, axis=-1, keepdims=True)
    return scaled.astype(np.float32)


def clusters(
    rng: np.random.Generator, counts: list[int], noise: float, text: bool = True, queries: int = 400
) -> tuple[SupportSet, Embeddings, np.ndarray]:
    centres = unit_rows(rng, len(counts), 32)
    labels, asked = np.repeat(np.arange(len(counts)), counts), rng.integers(0, len(counts), queries)
    rows, others = (unit(centres[ids] + noise * unit_rows(rng, len(ids), 32)) for ids in (labels, asked))
    texts = unit(centres + unit_rows(rng, len(counts), 32)) if text else None
    return make_support_set(Embeddings(rows), labels, texts, 30.0, len(counts)), Embeddings(others), asked


def log_loss(logits: np.ndarray, labels: np.ndarray) -> float:
    exact = logits.astype(np.float64) - logits.max(1, keepdims=True)
    return float((np.log(np.exp(exact).sum(1)) - exact[np.arange(len(labels)), labels]).mean())


@pytest.mark.parametrize("method", ["tip-adapter", "tip-x", "gda", "proker", "ape", "stack"])
@pytest.mark.parametrize("validation", [False, True])
def test_random_labels_are_said_to_be_about_chance(method: str, validation: bool) -> None:
    """Four classes without any difference: over ten draws the mean is about chance."""
    said, best = [], []
    for seed in range(10):
        rng = np.random.default_rng(seed)
        rows = Embeddings(unit_rows(rng, 32, 16))
        support = make_support_set(rows, np.repeat(np.arange(4), 8), unit_rows(rng, 4, 16), 30.0)
        asked = (Embeddings(unit_rows(rng, 32, 16)), rng.integers(0, 4, 32)) if validation else ()
        tuned = tune(method, support, *asked)
        assert tuned.right is not None and tuned.accuracy == tuned.right.mean() and tuned.scored == 32
        said.append(tuned.accuracy)
        best.append(tuned.search_accuracy)
    assert abs(np.mean(said) - 0.25) < 0.09  # three standard errors of 320 images are 0.073
    assert np.mean(best) >= np.mean(said)
    if method == "tip-adapter" and validation:  # the best of its tries would not pass
        assert np.mean(best) > 0.25 + 0.09


def test_each_half_is_judged_at_what_the_other_chooses(rng: np.random.Generator) -> None:
    """On a validation set: the alpha of one half, swept over a fine grid, judged on the other."""
    support, queries, labels = clusters(rng, [4] * 5, 1.5, queries=60)
    tuned = tune("gda", support, queries, labels)
    base = score(compile_method("gda", support, alpha=0.0), queries)
    slope = score(compile_method("gda", support, alpha=1.0), queries) - base
    alphas = np.geomspace(1e-4, 1e4, 20_000)
    right = np.array([(base + a * slope).argmax(1) == labels for a in alphas.astype(np.float32)])
    even = np.arange(60) % 2 == 0
    expected = 0.0
    for half in (even, ~even):
        counts = right[:, ~half].sum(1)
        judged = right[counts == counts.max()][:, half].sum(1)  # by any alpha of a best plateau
        assert tuned.right is not None
        assert judged.min() <= tuned.right[half].sum() <= judged.max()
        expected += judged.mean()
    assert tuned.search_accuracy == pytest.approx(right.sum(1).max() / 60)


def test_the_interval_is_wilsons() -> None:
    """The ends solve |share - p| = z sqrt(p (1 - p) / n)."""
    for right, count in ((0, 5), (3, 5), (5, 5), (70, 100), (1, 1)):
        low, high = wilson(right / count, count)
        assert 0 <= low < high <= 1
        for end in (low, high):
            if 0 < end < 1:
                assert abs(right / count - end) == pytest.approx(1.959964 * np.sqrt(end * (1 - end) / count))
    tuned = Tuned("gda", "none", {}, 0.9, 10, "loo")
    assert tuned.interval == wilson(0.9, 10) and "interval=(0.5958" in repr(tuned)
    assert replace(tuned, scored=0, accuracy=float("nan")).interval is None
    assert tuned.summary() == "90.0% of 10 left-out images right (95%: 60% to 98%)"
    stale = replace(tuned, protocol="validation", note="alpha 0: nothing", stale=True, version=3).summary()
    assert stale == (
        "90.0% of 10 validation images right (95%: 60% to 98%); alpha 0: nothing; as of version 3; the classifier has "
        "changed since"
    )


def photographed_twice(rng: np.random.Generator, things: int, noise: float) -> SupportSet:
    """Classes that no fit can tell apart, of things that were each photographed twice."""
    rows = np.repeat(unit_rows(rng, 6 * things, 32), 2, axis=0)
    return make_support_set(
        Embeddings(unit(rows + noise * unit_rows(rng, len(rows), 32))),
        np.repeat(np.arange(6), 2 * things),
        None,
        30.0,
        6,
    )


def test_near_duplicates_are_left_out_together(rng: np.random.Generator) -> None:
    support = photographed_twice(rng, 4, 0.1)
    groups = group_near_duplicates(support)
    assert groups.tolist() == [0, 0, 1, 1, 2, 2, 3, 3] * 6
    held_out = HeldOutSet.leave_one_out(METHODS["gda"], None, support)
    assert held_out.folds is not None and held_out.folds.tolist() == groups.tolist()
    assert held_out.distinct.tolist() == [4] * 6 and held_out.n_duplicates == 24
    for method in ("tip-adapter", "stack"):  # with the other photograph at hand nearly all were right
        tuned = tune(method, support)
        assert tuned.accuracy < 0.4 and tuned.scored == 48
        assert "24 images are near duplicates of others of the same class" in tuned.note


def test_things_that_differ_are_no_near_duplicates(rng: np.random.Generator) -> None:
    support, _, _ = clusters(rng, [16] * 20, 0.8)
    assert HeldOutSet.leave_one_out(METHODS["gda"], None, support).n_duplicates == 0
    tight, _, _ = clusters(rng, [16] * 20, 0.05)  # all classes are, so that is usual
    assert HeldOutSet.leave_one_out(METHODS["gda"], None, tight).n_duplicates == 0


def test_a_class_of_duplicates_is_as_if_it_had_one_image(rng: np.random.Generator) -> None:
    support, _, _ = clusters(rng, [3, 3, 3, 3], 0.8)
    plain = support.embeddings.plain.copy()
    plain[3:6] = unit(plain[3] + 0.01 * unit_rows(rng, 3, 32))
    support = replace(support, embeddings=Embeddings(plain))
    held_out = HeldOutSet.leave_one_out(METHODS["gda"], None, support)
    assert held_out.distinct.tolist() == [3, 1, 3, 3]
    assert held_out.rows.tolist() == [0, 6, 9, 1, 7, 10, 2, 8, 11]  # it loses an image in each fold, as the others do
    assert [others.counts.tolist() for _, others in held_out.splits] == [[2, 2, 2, 2]] * 3
    alike = replace(support, embeddings=Embeddings(np.repeat(plain[::3], 3, axis=0)))
    for method in ("gda", "stack", "auto"):
        tuned = tune(method, alike)
        assert tuned.protocol == "one-shot" and tuned.scored == 0 and "8 images are near duplicates" in tuned.note


@pytest.mark.parametrize("method", ["gda", "timo"])
def test_one_photographed_twice_among_pairs_changes_little(method: str, rng: np.random.Generator) -> None:
    """Among classes of one image each, the pair alone would give the covariance of a fold. The texts say nothing."""
    support, queries, labels = clusters(rng, [2] * 10, 1.0)
    support = replace(support, text=unit_rows(rng, 10, 32))
    plain = support.embeddings.plain.copy()
    plain[1] = unit(plain[:1] + 0.1 * unit_rows(rng, 1, 32))[0]
    tuned = tune(method, replace(support, embeddings=Embeddings(plain)))
    assert tuned.scored == 18
    right, before = (
        (score(each.compile(support), queries).argmax(1) == labels).mean() for each in (tuned, tune(method, support))
    )
    assert right > before - 0.1 > 0.6


def test_a_large_dense_class_does_not_become_one_group(rng: np.random.Generator) -> None:
    angles = rng.uniform(0, 3, 900)
    circle = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    support = make_support_set(Embeddings(circle), np.repeat([0, 1], [700, 200]), None, 1.0, 2)
    groups = group_near_duplicates(support)
    assert groups[:700].max() > 5 and groups[700:].max() > 3
    for c in (0, 1):
        inside = groups[support.labels == c]
        assert np.array_equal(np.unique(inside), np.arange(inside.max() + 1))


@pytest.mark.parametrize("method", ["tip-adapter", "gda", "proker", "tip-x", "stack"])
@pytest.mark.parametrize("shots", [2, 6])
def test_given_parameters_keep_the_labels_and_get_a_factor(method: str, shots: int, rng: np.random.Generator) -> None:
    support, queries, labels = clusters(rng, [shots] * 8, 1.2)
    given = {"alpha": 40.0} if "alpha" in METHODS[method].parameters else {"beta": 3.0}

    def config(tuning: str | None) -> object:
        return MethodChoice(method, None, tuning, given, "fp32", 20.0).config(support)

    fitted, plain = config(None), config("none")
    assert plain.factor == 1.0 and fitted.factor != 1.0 and fitted.parameters == plain.parameters
    assert fitted.tuned is None
    logits, before = (score(each.compile(support), queries) for each in (fitted, plain))
    assert (logits.argmax(1) != before.argmax(1)).mean() < 0.01
    best = min(log_loss(before * factor, labels) for factor in np.geomspace(1e-3, 1e3, 200))
    assert log_loss(logits, labels) < max(1.35 * best, best + 0.15)
    assert log_loss(logits, labels) < log_loss(before, labels) + 0.02


def test_one_image_a_class_gets_the_usual_spread(rng: np.random.Generator) -> None:
    support, queries, labels = clusters(rng, [1] * 8, 1.8)
    for method in ("tip-adapter", "gda"):
        tuned = tune(method, support)
        assert tuned.scored == 0 and tuned.factor != 1.0
        given = {**METHODS[method].parameters, "alpha": 1e4}  # a banana is a pear at 100%
        factor, loss = calibrate(METHODS[method], support, None, given)
        assert loss is None and factor == usual_factor(METHODS[method], support, None, given)
        logits = score(compile_method(method, support, **given), queries)
        assert log_loss(factor * logits, labels) < log_loss(logits, labels) / 5
    same = replace(support, text=None, embeddings=Embeddings(np.repeat(support.embeddings.plain[:1], 8, axis=0)))
    assert usual_factor(METHODS["gda"], same, None, METHODS["gda"].parameters) == 1.0


def test_calibration_scores_about_as_many_images_as_it_needs(rng: np.random.Generator) -> None:
    for counts, enough, folds in (([16] * 50, 100, 2), ([300] * 4, 100, 2), ([16] * 4, 1000, 16), ([2] * 50, 10, 1)):
        rows = Embeddings(unit_rows(rng, sum(counts), 16))
        support = make_support_set(rows, np.repeat(np.arange(len(counts)), counts), None, 1.0, len(counts))
        held_out = HeldOutSet.leave_one_out(METHODS["gda"], None, support, enough)
        assert len(np.unique(held_out.folds[held_out.rows])) == folds
        assert min(enough, sum(counts)) / 2 <= len(held_out.rows) <= 2 * max(enough, len(counts))
