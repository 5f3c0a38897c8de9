"""The demo's few-shot tasks: support and queries never share a picture, and queries choose no parameter."""

from __future__ import annotations

import numpy as np
import pytest

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.evaluation.demo import evaluate_few_shot
from iosr_fast.evaluation.tasks import Encoded
from tests.conftest import unit_rows


def clustered(rng: np.random.Generator, classes: int = 8, pictures: int = 6, width: int = 24) -> Encoded:
    """Pictures around a centre of their class; the adapted embedding is closer to it than the plain one."""
    labels = np.repeat(np.arange(classes), pictures)
    centres = unit_rows(rng, classes, width)[labels]

    def near(noise: float) -> np.ndarray:
        rows = centres + noise * unit_rows(rng, len(labels), width)
        unit: np.ndarray = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
        return unit

    return Encoded(Embeddings(near(1.6), near(0.6)), labels, unit_rows(rng, classes, width), 10.0)


def test_support_and_queries_share_nothing(rng: np.random.Generator) -> None:
    encoded = clustered(rng)
    queries = []
    for shots in (1, 2, 4):
        task = encoded.task(shots, seed=3)
        assert len(task.support.embeddings) == 8 * shots and len(task.queries) == len(task.labels) == 8 * 2
        assert (task.support.embeddings.plain @ task.queries.plain.T).max() < 0.9999
        queries.append(task.queries.plain)
    np.testing.assert_array_equal(queries[0], queries[2])
    assert not np.array_equal(encoded.task(1, seed=4).queries.plain, queries[0])
    with pytest.raises(ValueError, match=r"shots from 1 to 4, .* got 5"):
        encoded.task(5, seed=0)


def test_queries_choose_no_parameter(rng: np.random.Generator) -> None:
    encoded = clustered(rng)
    asked = np.ones(len(encoded.labels), bool)  # pictures that are a query for every seed
    for seed in (0, 1):
        support = encoded.task(2, seed).support.embeddings.plain
        asked &= ~(encoded.embeddings.plain[:, None] == support[None]).all(2).any(1)
    assert asked.any()
    plain, adapted = encoded.embeddings.plain.copy(), encoded.embeddings.adapted
    assert adapted is not None
    moved = adapted.copy()
    moved[asked] = unit_rows(rng, int(asked.sum()), plain.shape[1])
    other = Encoded(Embeddings(plain, moved), encoded.labels, encoded.text, encoded.tau)
    first, second = (evaluate_few_shot(one, "tip-adapter++", "none", [2], [0, 1])[2] for one in (encoded, other))
    assert [draw.tuned.parameters for draw in first.draws] == [draw.tuned.parameters for draw in second.draws]
    assert first.mean != second.mean and first.protocol == "loo"
