"""How an implementation is judged: by its error against the float64 reference, next to that of the papers' code."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from iosr_fast import _C
from iosr_fast.encoder import Embeddings
from iosr_fast.precision import dequantize
from iosr_fast.reference import score_reference
from iosr_fast.scoring import ScoringPlan, score_with_path

CPP_PATHS = [f"cpp/{name}" for name, supported in _C.simd_paths() if supported]
# Every path that needs no GPU.
PATHS = ["numpy", "torch/cpu", *CPP_PATHS]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no GPU")


def tensors(embeddings: Embeddings, **to: Any) -> Embeddings:
    """The same embeddings as tensors; `to` is for Tensor.to."""
    return Embeddings(*(torch.from_numpy(array).to(**to) for array in (embeddings.plain, embeddings.adapted)))


def eager_float32(plan: ScoringPlan, embeddings: Embeddings) -> np.ndarray:
    """The papers' code in float32, on dequantized keys: the full affinity, then a product with the one-hot matrix."""
    rows = {"plain": embeddings.plain, "adapted": embeddings.adapted}
    logits = np.zeros((len(embeddings), plan.n_classes), dtype=np.float32)
    if plan.text is not None:
        logits += np.float32(plan.tau) * rows["plain"] @ plan.text.T
    if plan.keys is not None:
        logits += _eager_cache_term(plan, embeddings)
    if plan.linear is not None:
        logits += rows[plan.feature] @ plan.linear.T
    return logits if plan.bias is None else logits + plan.bias


def _eager_cache_term(plan: ScoringPlan, embeddings: Embeddings) -> np.ndarray:
    query = embeddings.plain if plan.query == "plain" else embeddings.adapted
    affinity = np.exp(-np.float32(plan.beta) * (np.float32(1) - query @ dequantize(plan).T))
    affinity *= np.float32(1) if plan.weights is None else plan.weights
    labels = np.repeat(np.arange(plan.n_classes), np.diff(plan.class_offsets))
    return np.float32(plan.alpha) * affinity @ np.eye(plan.n_classes, dtype=np.float32)[labels]


def run_path(path: str, plan: ScoringPlan, embeddings: Embeddings) -> Any:
    """Score by one path ("cpp/scalar" forces the instruction set too) and see that it is the one that ran."""
    impl, _, detail = path.partition("/")
    with pytest.MonkeyPatch.context() as patch:
        if impl == "cpp":
            patch.setenv("IOSR_FAST_SIMD", detail)
        logits, ran = score_with_path(plan, embeddings, impl)
    assert ran == path
    assert isinstance(logits, np.ndarray)
    assert logits.dtype == np.float32 and logits.shape == (len(embeddings), plan.n_classes)
    return logits


def assert_close_to_truth(paths: str | Sequence[str], plan: ScoringPlan, embeddings: Embeddings) -> None:
    """assert_as_good_as_eager for one path, or for several."""
    truth = score_reference(plan, embeddings)
    allowed = allowed_error(truth, plan, embeddings)
    for path in [paths] if isinstance(paths, str) else paths:
        assert_as_good_as_eager(run_path(path, plan, embeddings), truth, allowed, path)


def allowed_error(truth: np.ndarray, plan: ScoringPlan, embeddings: Embeddings) -> float:
    """Twice eager's error at the same key precision, and a little."""
    eager_error = np.abs(eager_float32(plan, embeddings) - truth).max(initial=0.0)
    # `tiny` is two roundings at the terms' magnitude, which Cauchy and Schwarz bound: where terms cancel, or a logit is
    # alone, eager is now and then right to the last bit by luck.
    scale = np.abs(truth).max(initial=0.0) + (plan.tau if plan.text is not None else 0.0)
    scale += np.linalg.norm(plan.linear, axis=1).max() if plan.linear is not None else 0.0
    float32 = np.finfo(np.float32)
    tiny = 2 * float32.eps * scale
    if plan.keys is not None:
        # Likewise two roundings of an exponent, whose terms are as large as beta; and affinities below the smallest
        # normal number may come out as that or as zero.
        tiny += float32.eps * plan.beta * np.abs(_eager_cache_term(plan, embeddings)).max(initial=0.0)
        weight = len(plan.keys) if plan.weights is None else np.abs(plan.weights).sum()
        tiny += float32.tiny * abs(plan.alpha) * weight
    return float(2 * eager_error + tiny)


def assert_as_good_as_eager(logits: np.ndarray, truth: np.ndarray, allowed: float, path: str = "") -> None:
    """No logit is off by more than is allowed, and the labels are the true ones where the error leaves no doubt."""
    error = np.abs(logits - truth)
    assert error.max(initial=0.0) <= allowed, path
    if truth.shape[1] > 1:
        best = np.sort(truth, axis=1)
        clear = best[:, -1] - best[:, -2] > 2 * error.max(axis=1)
        np.testing.assert_array_equal(logits.argmax(1)[clear], truth.argmax(1)[clear], path)
