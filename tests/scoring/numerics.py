"""The yardstick: an implementation's error against the float64 reference, compared with that of the papers' code."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from iosr_fast import _C
from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.scoring.key_precision import key_rows
from iosr_fast.scoring.plan import ScoringPlan
from iosr_fast.scoring.reference import score_reference
from iosr_fast.scoring.score import score_with_path

CPP_PATHS = [f"cpp/{name}" for name, supported in _C.simd_paths() if supported]
# Every path that needs no GPU.
PATHS = ["torch/cpu", *CPP_PATHS]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no GPU")


def tensors(embeddings: Embeddings, **to: Any) -> Embeddings:
    """The same embeddings as tensors; `to` is for Tensor.to."""
    return Embeddings(*(torch.from_numpy(array).to(**to) for array in (embeddings.plain, embeddings.adapted)))


def eager_float32(plan: ScoringPlan, embeddings: Embeddings, moved: torch.dtype | None = None) -> np.ndarray:
    """The papers' code in float32, on dequantized keys: the full affinity, then a product with the one-hot matrix or
    the keys' values. Queries are rounded to `moved` after a reducer or a query transform."""
    logits = np.zeros((len(embeddings), plan.n_classes), dtype=np.float32)
    if plan.text is not None:
        logits += np.float32(plan.tau) * embeddings.plain @ plan.text.T
    if plan.keys is not None:
        affinity = _eager_affinity(plan, embeddings, moved)
        logits += (
            np.float32(plan.alpha)
            * affinity
            @ (_onehot(plan) if plan.values is None else plan.values.astype(np.float32))
        )
    if plan.linear is not None:
        logits += _eager_feature(plan, embeddings) @ plan.linear.T
    return logits if plan.bias is None else logits + plan.bias


def _rows(plan: ScoringPlan, embeddings: Embeddings, which: str) -> Any:
    rows = embeddings.plain if which == "plain" else embeddings.adapted
    return rows if plan.reducer is None else plan.reducer(rows)


def _eager_affinity(plan: ScoringPlan, embeddings: Embeddings, moved: torch.dtype | None = None) -> np.ndarray:
    query, keys = _rows(plan, embeddings, plan.query), plan.dequantize()
    if moved is not None and plan.query_transform is not None:
        query, keys = query @ plan.query_transform.T, key_rows(plan.keys, plan.key_scales, slice(None))
    if moved is not None and not (plan.reducer is None and plan.query_transform is None):
        query = torch.from_numpy(query).to(moved).float().numpy()
    affinity = np.exp(-np.float32(plan.beta) * (np.float32(1) - query @ keys.T))
    return affinity if plan.weights is None else affinity * plan.weights


def _onehot(plan: ScoringPlan) -> np.ndarray:
    labels = np.repeat(np.arange(plan.n_classes), np.diff(plan.class_offsets))
    return np.eye(plan.n_classes, dtype=np.float32)[labels]


def _eager_feature(plan: ScoringPlan, embeddings: Embeddings) -> np.ndarray:
    if plan.feature == "both":
        return np.concatenate([_rows(plan, embeddings, which) for which in ("plain", "adapted")], axis=1)
    if plan.feature != "text-distribution":
        return _rows(plan, embeddings, plan.feature)
    powers = np.exp(embeddings.plain @ plan.text.T / np.float32(plan.temperature))
    shares = powers / powers.sum(1, keepdims=True)
    return np.concatenate([shares, (shares * np.log(plan.n_classes * shares)).sum(1, keepdims=True)], axis=1)


def run_path(path: str, plan: ScoringPlan, embeddings: Embeddings) -> Any:
    """Score by one path ("cpp/scalar" forces the instruction set too) and assert that it ran."""
    impl, _, detail = path.partition("/")
    with pytest.MonkeyPatch.context() as patch:
        if impl == "cpp":
            patch.setenv("IOSR_FAST_SIMD", detail)
        logits, ran = score_with_path(plan, embeddings, impl)
    assert ran == (path if plan.keys is not None and len(embeddings) else f"{impl}/no-keys")
    assert isinstance(logits, np.ndarray)
    assert logits.dtype == np.float32 and logits.shape == (len(embeddings), plan.n_classes)
    return logits


def assert_close_to_truth(paths: str | Sequence[str], plan: ScoringPlan, embeddings: Embeddings) -> None:
    """assert_as_good_as_eager for one path, or for several."""
    truth = score_reference(plan, embeddings)
    allowed = allowed_error(truth, plan, embeddings)
    for path in [paths] if isinstance(paths, str) else paths:
        assert_as_good_as_eager(run_path(path, plan, embeddings), truth, allowed, path)


def allowed_error(
    truth: np.ndarray,
    plan: ScoringPlan,
    embeddings: Embeddings,
    moved: torch.dtype | None = None,
    eager: np.ndarray | None = None,
) -> float:
    """Twice the error of `eager`, by default eager_float32 at the same precision of the keys and of moved queries, and
    a little."""
    eager = eager_float32(plan, embeddings, moved) if eager is None else eager
    eager_error = np.abs(eager - truth).max(initial=0.0)
    # `tiny` is two roundings at the terms' magnitude, bounded by Cauchy and Schwarz: if terms cancel, or there is one
    # logit only, eager may be exact by chance.
    scale = np.abs(truth).max(initial=0.0) + (plan.tau if plan.text is not None else 0.0)
    scale += linear_size(plan)
    float32 = np.finfo(np.float32)
    tiny = 2 * float32.eps * scale
    if plan.keys is not None:
        # Likewise four roundings of an exponent and of the cosine in it, which beta multiplies, and two of a sum whose
        # signs cancel; and affinities below the smallest normal number may come out as that or as zero.
        size = cache_size(plan, embeddings)
        tiny += 2 * float32.eps * (plan.beta + (1.0 if plan.values is not None else 0.0)) * size
        weight = np.ones(len(plan.keys)) if plan.weights is None else np.abs(plan.weights)
        tiny += float32.tiny * abs(plan.alpha) * (weight @ _members(plan)).max()
    return float(2 * eager_error + tiny)


def cache_size(plan: ScoringPlan, embeddings: Embeddings) -> float:
    """The largest cache term with all values made positive: the size of the summands if signs cancel."""
    return float(abs(plan.alpha) * (_eager_affinity(plan, embeddings) @ _members(plan)).max(initial=0.0))


def _members(plan: ScoringPlan) -> np.ndarray:
    return _onehot(plan) if plan.values is None else np.abs(plan.values.astype(np.float32))


def linear_size(plan: ScoringPlan) -> float:
    """A bound of the linear term: two embeddings have a norm of sqrt(2), shares of C texts one of at most 1, and their
    entropy is at most log(C)."""
    if plan.linear is None:
        return 0.0
    feature = {"both": np.sqrt(2.0), "text-distribution": np.hypot(1.0, np.log(plan.n_classes))}.get(plan.feature, 1.0)
    return float(feature * np.linalg.norm(plan.linear, axis=1).max())


def assert_as_good_as_eager(logits: np.ndarray, truth: np.ndarray, allowed: float, path: str = "") -> None:
    """No error exceeds `allowed`, and labels are the true ones unless the error may change them."""
    error = np.abs(logits - truth)
    assert error.max(initial=0.0) <= allowed, path
    if truth.shape[1] > 1:
        best = np.sort(truth, axis=1)
        clear = best[:, -1] - best[:, -2] > 2 * error.max(axis=1)
        np.testing.assert_array_equal(logits.argmax(1)[clear], truth.argmax(1)[clear], path)
