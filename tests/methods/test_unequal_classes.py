"""Classes of different sizes: a class of many images gets no more queries than its images say."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.evaluation.tasks import Source, Task, with_unequal_classes
from iosr_fast.methods import compile_method
from iosr_fast.methods.gda import mean_excess
from iosr_fast.methods.support_set import SupportSet, make_support_set
from iosr_fast.methods.tuning.tune import tune
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


@pytest.mark.parametrize(("method", "least"), [("tip-adapter", 0.8), ("gda", 0.8), ("stack", 0.75)])
def test_small_classes_keep_their_queries(method: str, least: float) -> None:
    """With sums over keys and lengths of means as they are, 53, 75 and 63% of them are right."""
    recalls = []
    for seed in range(3):
        support, queries, labels = clusters(np.random.default_rng(seed), [2] * 5 + [16] * 5, 1.2)
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
    source = Source("set", (8,), (0, 1), lambda shots, seed: Task(support, queries, labels), queries, labels)
    drawn = [with_unequal_classes(source).draw(8, seed).support for seed in (0, 1)]
    assert [sorted(one.counts) for one in drawn] == [[2, 2, 2, 8, 8, 8]] * 2
    assert not np.array_equal(drawn[0].counts, drawn[1].counts)
