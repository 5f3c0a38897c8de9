"""Classes of different size: a class of many images gets no more queries than its images say."""

from __future__ import annotations

import numpy as np
import pytest

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.evaluation.tasks import Source, Task, with_unequal_classes
from iosr_fast.methods import compile_method
from iosr_fast.methods.models.gaussian import Moments, fit_gaussians
from iosr_fast.methods.support_set import make_support_set
from iosr_fast.methods.tune import tune
from iosr_fast.scoring.score import score
from tests.conftest import unit_rows
from tests.methods.support_sets import Clusters


@pytest.mark.parametrize(
    ("method", "small", "least"),
    [("tip-adapter", 2, 0.8), ("gda", 2, 0.8), ("proker", 2, 0.7), ("stack", 2, 0.8), ("stack", 1, 0.5)],
)
def test_small_classes_keep_their_queries(method: str, small: int, least: float) -> None:
    """With sums over keys, lengths of means and one ridge for all, and weights from the images of large classes alone,
    53, 75, 52, 63 and 15% of them are right."""
    recalls = []
    for seed in range(3):
        world = Clusters(10, width=32, noise=1.2, seed=seed)
        support, (queries, labels) = world.support([small] * 5 + [16] * 5, text=False, tau=1.0), world.queries(40)
        right = score(tune(method, support).compile(support), queries).argmax(1) == labels
        recalls.append(right[labels < 5].mean())
    assert np.mean(recalls) > least


@pytest.mark.parametrize("method", ["tip-adapter", "tip-x", "ape"])
def test_without_similarity_a_larger_class_has_no_larger_logit(method: str) -> None:
    support, (queries, _) = Clusters(3).support([1, 2, 7]), Clusters(3).queries(5)
    plan = compile_method(method, support, alpha=2.0, beta=0.0, **({} if method == "tip-adapter" else {"gamma": 0.0}))
    cache = score(plan, queries) - score(compile_method("zero-shot", support), queries)
    np.testing.assert_allclose(cache, 2.0 * 10 / 3, rtol=1e-4)


def test_copies_of_a_classs_images_change_a_regression_as_another_ridge_does() -> None:
    """Copies have a share of the weight of what they are copies of: 3/4 of it in all classes, as the mean class has 8/3
    images in place of 2."""
    support, (queries, _) = Clusters(3).support([2, 2, 2], text=False, tau=1.0), Clusters(3).queries(9)
    rows = support.embeddings.plain[[0, 1, 0, 1, 2, 3, 4, 5]]
    copied = make_support_set(Embeddings(rows), np.repeat([0, 1, 2], [4, 2, 2]), None, 1.0, 3)
    expected = score(compile_method("proker", support, beta=2.0, ridge=0.3), queries)
    found = score(compile_method("proker", copied, beta=2.0, ridge=0.4), queries)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_classes_of_one_size_have_the_papers_formulas(rng: np.random.Generator) -> None:
    support = Clusters(4).support([3] * 4)
    assert support.key_weights is None and compile_method("tip-adapter", support).weights is None
    moments = Moments.of(support.embeddings.plain.astype(np.float64), support.one_hot)
    fitted = fit_gaussians(moments)
    lengths = np.einsum("cd,de,ce->c", moments.means, fitted.precision, moments.means)
    np.testing.assert_allclose(fitted.bias, -lengths / 2)  # no excess


def test_the_excess_of_a_mean_is_its_expectation(rng: np.random.Generator) -> None:
    """The length mu' P mu of a mean of few images is larger by the noise of the mean; e_c takes it off."""
    counts, copies, width = np.array([2, 4, 9]), 2.0, 3
    centres, fixed = 5 * rng.standard_normal((3, width)), unit_rows(rng, 3, width).astype(np.float64)
    labels = np.eye(3)[np.repeat(np.arange(3), counts)]
    scatter, left = 0.09 * np.diag([1.0, 4.0, 9.0]), []
    for _ in range(4000):
        rows = labels @ centres + rng.standard_normal((15, width)) @ np.sqrt(scatter)
        moments = Moments.of(rows, labels)
        fitted, means = fit_gaussians(moments, fixed, copies), moments.with_texts(fixed, copies).means
        excess = 2 * fitted.bias + np.einsum("cd,de,ce->c", means, fitted.precision, means)
        noise = np.trace(fitted.precision @ scatter) * counts / (counts + copies) ** 2
        left.append(excess - (noise - noise[-1]))
    np.testing.assert_allclose(np.mean(left, 0), 0.0, atol=0.15 * np.abs(noise - noise[-1]).max())


def test_half_of_the_classes_keep_a_quarter() -> None:
    world = Clusters(6)
    support, (queries, labels) = world.support([8] * 6), world.queries(3)
    source = Source("set", (8,), (0, 1), lambda shots, seed: Task(support, queries, labels))
    drawn = [with_unequal_classes(source).draw(8, seed).support for seed in (0, 1)]
    assert [sorted(one.counts) for one in drawn] == [[2, 2, 2, 8, 8, 8]] * 2
    assert not np.array_equal(drawn[0].counts, drawn[1].counts)
