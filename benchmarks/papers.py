"""The logits of a Tip-Adapter as the papers' code computes them."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch

from iosr_fast.scoring.plan import ScoringPlan


def papers_arrays(plan: ScoringPlan) -> list[torch.Tensor]:
    """What `papers_logits` takes after the embeddings: text, keys, one-hot labels (N, C), and (tau, alpha, beta)."""
    assert plan.class_offsets is not None
    onehot = np.repeat(np.eye(plan.n_classes, dtype=np.float32), np.diff(plan.class_offsets), axis=0)
    scales = np.array([plan.tau, plan.alpha, plan.beta], np.float32)
    return [torch.tensor(array) for array in (plan.text, plan.keys, onehot, scales)]


def papers_logits(
    plain: torch.Tensor,
    query: torch.Tensor,
    text: torch.Tensor,
    keys: torch.Tensor,
    onehot: torch.Tensor,
    scales: Iterable[float],
) -> torch.Tensor:
    """tau * plain @ text' + alpha * exp(-(beta - beta * query @ keys')) @ onehot, (B, C); scales: tau, alpha, beta."""
    tau, alpha, beta = map(float, scales)
    affinity = ((-1) * (beta - beta * (query @ keys.T))).exp()
    return tau * plain @ text.T + alpha * (affinity @ onehot)
