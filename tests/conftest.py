"""Shared by the tests: plans and embeddings to score, and a clean choice of implementation for each test."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from iosr_fast import dispatch
from iosr_fast.encoder import Embeddings
from iosr_fast.precision import Precision
from iosr_fast.scoring import ScoringPlan
from tools.source_tree import use_source_tree

use_source_tree()  # so that the tests run where nothing is installed, too

TERMS = ("text", "cache", "linear")


def unit_rows(rng: np.random.Generator, n: int, width: int) -> np.ndarray:
    """n random unit rows, float32."""
    rows = rng.standard_normal((n, width))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def random_plan(
    rng: np.random.Generator,
    counts: list[int],
    width: int,
    terms: tuple[str, ...] = TERMS,
    *,
    weighted: bool = True,
    query: str = "adapted",
    feature: str = "plain",
    alpha: float = 1.7,
    beta: float = 5.5,
    precision: Precision = "fp32",
) -> ScoringPlan:
    """A plan with counts[c] keys in class c, stored in `precision`, and the given terms."""
    n_classes, n_keys = len(counts), sum(counts)
    parts: dict[str, np.ndarray] = {}
    if "text" in terms:
        parts["text"] = unit_rows(rng, n_classes, width)
    if "cache" in terms:
        parts["keys"] = unit_rows(rng, n_keys, width)
        parts["class_offsets"] = np.concatenate([[0], np.cumsum(counts)])
        if weighted:
            parts["weights"] = rng.uniform(0.1, 3.0, n_keys)
    if "linear" in terms:
        parts["linear"] = rng.standard_normal((n_classes, width))
        parts["bias"] = rng.standard_normal(n_classes)
    plan = ScoringPlan(n_classes, query=query, feature=feature, alpha=alpha, beta=beta, **parts)  # type: ignore[arg-type]
    return plan.with_key_precision(precision) if "cache" in terms else plan


def random_embeddings(rng: np.random.Generator, n: int, width: int) -> Embeddings:
    return Embeddings(unit_rows(rng, n, width), unit_rows(rng, n, width))


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(2409_11338)


@pytest.fixture(autouse=True)
def _free_choice(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No implementation is forced from outside, and none is remembered from another test."""
    monkeypatch.delenv("IOSR_FAST_IMPL", raising=False)
    monkeypatch.delenv("IOSR_FAST_SIMD", raising=False)
    dispatch._best.cache_clear()
    yield
    dispatch._best.cache_clear()
