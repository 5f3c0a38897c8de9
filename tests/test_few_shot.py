"""The demo's few-shot tasks: support and queries never share a picture, and parameters come from validation alone."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from iosr_fast.encoder import Embeddings
from iosr_fast.methods import compile_method
from iosr_fast.reference import score_reference
from tests.conftest import unit_rows
from tools.demo.few_shot import POOL, Encoded, centre, changed_labels, choose_parameters, evaluate


def clustered(rng: np.random.Generator, classes: int = 8, pictures: int = 6, width: int = 24) -> Encoded:
    """Pictures around a centre of their class; the adapted embedding is closer to it than the plain one."""
    labels = np.repeat(np.arange(classes), pictures)
    centres = unit_rows(rng, classes, width)[labels]

    def near(noise: float) -> np.ndarray:
        rows = centres + noise * unit_rows(rng, len(labels), width)
        return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)

    return Encoded(Embeddings(near(1.6), near(0.6)), labels, unit_rows(rng, classes, width), 10.0)


def test_support_and_queries_share_nothing(rng: np.random.Generator) -> None:
    encoded = clustered(rng)
    queries = []
    for shots in (1, 2, 4):
        support, query, labels = encoded.task(shots, POOL, seed=3)
        assert len(support.embeddings) == 8 * shots and len(query) == len(labels) == 8 * 2
        assert (support.embeddings.plain @ query.plain.T).max() < 0.9999
        queries.append(query.plain)
    np.testing.assert_array_equal(queries[0], queries[2])
    _, other, _ = encoded.task(1, POOL, seed=4)
    assert not np.array_equal(other.plain, queries[0])


def test_parameters_do_not_depend_on_the_test_set(rng: np.random.Generator) -> None:
    validation = clustered(rng)
    chosen = choose_parameters(validation, "tip-adapter++", 2, [0, 1], centred=False)
    for _ in range(2):
        cell = evaluate(clustered(rng), validation, "tip-adapter++", 2, [0, 1])
        assert {"alpha": cell["alpha"], "beta": cell["beta"]} == chosen
        assert cell["queries"] == 16 and cell["seeds"] == 2


def test_the_chosen_parameters_are_the_best_of_the_grid(rng: np.random.Generator) -> None:
    from tools.demo.few_shot import ALPHAS, BETAS

    validation = clustered(rng)
    chosen = choose_parameters(validation, "tip-adapter", 1, [5], centred=False)

    def accuracy(alpha: float, beta: float) -> float:
        support, queries, labels = validation.task(1, POOL - 1, 5)
        plan = compile_method("tip-adapter", support, alpha=alpha, beta=beta)
        return float((score_reference(plan, queries).argmax(1) == labels).mean())

    best = max(accuracy(alpha, beta) for alpha in ALPHAS for beta in BETAS)
    assert accuracy(**chosen) == pytest.approx(best)


def test_centring_moves_keys_and_queries_by_the_support_mean(rng: np.random.Generator) -> None:
    support, queries, _ = clustered(rng).task(2, POOL, 0)
    moved, moved_queries = centre(support, queries)
    mean = support.embeddings.plain.astype(float).mean(0)
    expected = queries.plain.astype(float) - mean
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    assert moved_queries.adapted is not None
    np.testing.assert_allclose(moved_queries.adapted, expected, atol=1e-6)
    np.testing.assert_array_equal(moved_queries.plain, queries.plain)
    np.testing.assert_array_equal(moved.embeddings.plain, support.embeddings.plain)


def test_less_noise_classifies_better(rng: np.random.Generator) -> None:
    test, validation = clustered(rng, 20), clustered(rng, 20)
    plain, adapted = (
        evaluate(test, validation, name, 2, [0, 1, 2])["mean"] for name in ("tip-adapter", "tip-adapter++")
    )
    assert adapted > plain  # type: ignore[operator]


def test_changed_labels_are_counted_over_shots_and_seeds(rng: np.random.Generator) -> None:
    test = clustered(rng, 150)
    parameters = {shots: {"alpha": 3.0, "beta": 5.5} for shots in (1, 2)}
    counted = changed_labels(test, "tip-adapter", parameters, [0, 1, 2])
    queries = len(test.task(1, POOL, 0)[1])
    assert {name: whole for name, (_, whole) in counted.items()} == dict.fromkeys(("fp16", "bf16", "int8"), 6 * queries)
    changed = 0
    for shots, seed in itertools.product((1, 2), range(3)):
        support, asked, _ = test.task(shots, POOL, seed)
        plan = compile_method("tip-adapter", support, **parameters[shots])
        labels = [score_reference(p, asked).argmax(1) for p in (plan, plan.with_key_precision("bf16"))]
        changed += int((labels[0] != labels[1]).sum())
    assert counted["bf16"][0] == changed > 0
