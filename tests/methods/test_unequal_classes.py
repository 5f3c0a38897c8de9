"""Classes of different sizes: a class of many images gets no more queries than its images say."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.evaluation.tasks import Source, Task, with_unequal_classes
from iosr_fast.methods import METHODS, compile_method
from iosr_fast.methods.gda import mean_excess
from iosr_fast.methods.stack_weights import FEW_SHOT_SETTING, fit_stack
from iosr_fast.methods.support_set import SupportSet, make_support_set
from iosr_fast.methods.tune import tune
from iosr_fast.methods.tuning.held_out import HeldOutSet
from iosr_fast.scoring.score import score

WIDTH = 32


def unit(rows: np.ndarray) -> np.ndarray:
    scaled: np.ndarray = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return scaled.astype(np.float32)


def clusters(rng: np.random.Generator, counts: list[int], noise: float) -> tuple[SupportSet, Embeddings, np.ndarray]:
    """Support images without texts, and 40 queries of each class."""
    centres = rng.standard_normal((len(counts), WIDTH))
    labels, asked = np.repeat(np.arange(len(counts)), counts), np.repeat(np.arange(len(counts)), 40)
    rows, queries = (unit(centres[ids] + noise * rng.standard_normal((len(ids), WIDTH))) for ids in (labels, asked))
    return make_support_set(Embeddings(rows), labels, None, 1.0, len(counts)), Embeddings(queries), asked


@pytest.mark.parametrize(
    ("method", "small", "least"),
    [("tip-adapter", 2, 0.8), ("gda", 2, 0.8), ("proker", 2, 0.7), ("stack", 2, 0.8), ("stack", 1, 0.5)],
)
def test_small_classes_keep_their_queries(method: str, small: int, least: float) -> None:
    """With sums over keys, lengths of means and one ridge for all, and weights from the images of large classes alone,
    53, 75, 52, 63 and 15% of them are right."""
    recalls = []
    for seed in range(3):
        support, queries, labels = clusters(np.random.default_rng(seed), [small] * 5 + [16] * 5, 1.2)
        right = score(tune(method, support).compile(support), queries).argmax(1) == labels
        recalls.append(right[labels < 5].mean())
    assert np.mean(recalls) > least


@pytest.mark.parametrize("method", ["tip-adapter", "tip-x", "ape"])
def test_without_similarity_a_larger_class_has_no_larger_logit(rng: np.random.Generator, method: str) -> None:
    support, queries, _ = clusters(rng, [1, 2, 7], 1.0)
    support = replace(support, text=unit(rng.standard_normal((3, WIDTH))))
    plan = compile_method(method, support, alpha=2.0, beta=0.0, **({} if method == "tip-adapter" else {"gamma": 0.0}))
    cache = score(plan, queries) - score(compile_method("zero-shot", support), queries)
    np.testing.assert_allclose(cache, 2.0 * 10 / 3, rtol=1e-5)


def test_copies_of_a_classs_images_change_a_regression_as_another_ridge_does(rng: np.random.Generator) -> None:
    """Copies have a share of the weight of what they are copies of: 3/4 of it in all classes, as the mean class has 8/3
    images in place of 2."""
    support, queries, _ = clusters(rng, [2, 2, 2], 1.0)
    rows = support.embeddings.plain[[0, 1, 0, 1, 2, 3, 4, 5]]
    copied = make_support_set(Embeddings(rows), np.repeat([0, 1, 2], [4, 2, 2]), None, 1.0, 3)
    expected = score(compile_method("proker", support, beta=2.0, ridge=0.3), queries)
    np.testing.assert_allclose(
        score(compile_method("proker", copied, beta=2.0, ridge=0.4), queries), expected, atol=1e-5
    )


def test_a_quarter_of_small_classes_is_enough_for_the_prior(rng: np.random.Generator) -> None:
    """Images of large classes alone are left out where the others have one."""
    for sizes, few in (([2, 1, 4, 4, 4, 4, 4, 4], True), ([2, 4, 4, 4, 4, 4, 4, 4], False)):
        support, _, _ = clusters(rng, sizes, 1.0)
        setting = fit_stack(HeldOutSet.leave_one_out(METHODS["stack"], None, support), 20.0).choice.setting
        assert ({name: setting[name] for name in FEW_SHOT_SETTING} == FEW_SHOT_SETTING) is few


@pytest.mark.parametrize("method", ["tip-adapter", "gda", "proker", "stack"])
def test_the_evidence_says_which_classes_it_leaves_out(method: str, rng: np.random.Generator) -> None:
    for sizes, said in (([1, 4, 4, 4], "1 of 4 classes has a"), ([1, 1, 4, 4], "2 of 4 classes have a"), ([4] * 4, "")):
        tuned = tune(method, clusters(rng, sizes, 1.0)[0])
        assert tuned.scored == sum(size for size in sizes if size > 1)
        assert (said in tuned.summary()) and bool(said) is ("single image, which can't be left out" in tuned.note)
    assert not tune(method, clusters(rng, [1] * 4, 1.0)[0]).note


def test_classes_of_one_size_have_the_papers_formulas(rng: np.random.Generator) -> None:
    support, _, _ = clusters(rng, [3] * 4, 1.0)
    assert support.key_weights is None and compile_method("tip-adapter", support).weights is None
    assert not mean_excess(support.counts, np.eye(3), np.eye(3)).any()


def test_the_excess_of_a_mean_is_its_expectation(rng: np.random.Generator) -> None:
    counts, copies = np.array([1, 3, 8]), 2
    precision = np.diag([2.0, 1.0, 0.5])
    centres, fixed = rng.standard_normal((3, 3)), rng.standard_normal((3, 3))
    lengths, excesses = [], []
    for _ in range(4000):
        images = [centres[c] + rng.standard_normal((n, 3)) * [1.0, 2.0, 3.0] for c, n in enumerate(counts)]
        means = np.array([(rows.sum(0) + copies * fixed[c]) / (len(rows) + copies) for c, rows in enumerate(images)])
        lengths.append(np.einsum("cd,de,ce->c", means, precision, means))
        scatter = sum((rows - rows.mean(0)).T @ (rows - rows.mean(0)) for rows in images)
        excesses.append(mean_excess(counts, scatter, precision, copies))
    expected = (counts[:, None] * centres + copies * fixed) / (counts[:, None] + copies)
    noise = np.mean(lengths, 0) - np.einsum("cd,de,ce->c", expected, precision, expected)
    np.testing.assert_allclose(np.mean(excesses, 0), noise - noise[-1], atol=0.05)


def test_half_of_the_classes_keep_a_quarter(rng: np.random.Generator) -> None:
    support, queries, labels = clusters(rng, [8] * 6, 1.0)
    source = Source("set", (8,), (0, 1), lambda shots, seed: Task(support, queries, labels))
    drawn = [with_unequal_classes(source).draw(8, seed).support for seed in (0, 1)]
    assert [sorted(one.counts) for one in drawn] == [[2, 2, 2, 8, 8, 8]] * 2
    assert not np.array_equal(drawn[0].counts, drawn[1].counts)
