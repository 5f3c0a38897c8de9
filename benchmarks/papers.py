"""The logits of a Tip-Adapter as the papers' code computes them, on tensors. Importing it imports nothing else."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from iosr_fast.scoring.plan import ScoringPlan


def papers_arrays(plan: ScoringPlan) -> dict[str, Any]:
    """What `papers_logits` takes after the embeddings, and last the shift of the plan's reducer."""
    import numpy as np

    assert plan.text is not None and plan.keys is not None and plan.class_offsets is not None
    shift = None if plan.reducer is None else plan.reducer.shift
    return {
        "text": plan.text,
        "keys": plan.keys,
        "onehot": np.repeat(np.eye(plan.n_classes, dtype=np.float32), np.diff(plan.class_offsets), axis=0),
        "scales": np.array([plan.tau, plan.alpha, plan.beta], np.float32),
        "shift": np.zeros(plan.keys.shape[1], np.float32) if shift is None else shift,
    }


def centred(adapted: Any, shift: Any) -> Any:
    """The queries of a plan whose reducer is a shift: unit rows."""
    rows = adapted - shift
    return rows / rows.norm(dim=-1, keepdim=True)


def papers_logits(plain: Any, query: Any, text: Any, keys: Any, onehot: Any, scales: Iterable[float]) -> Any:
    """tau * plain @ text' + alpha * exp(-(beta - beta * query @ keys')) @ onehot, (B, C); scales: tau, alpha, beta."""
    tau, alpha, beta = map(float, scales)
    affinity = ((-1) * (beta - beta * (query @ keys.T))).exp()
    return tau * plain @ text.T + alpha * (affinity @ onehot)
