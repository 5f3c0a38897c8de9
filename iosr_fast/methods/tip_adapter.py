"""Tip-Adapter (Zhang et al., ECCV 2022, equations 4 to 6), and Tip-Adapter++ (Kravets & Namboodiri, BMVC 2024)."""

from __future__ import annotations

from typing import Literal

from iosr_fast.cache import SupportSet
from iosr_fast.scoring import ScoringPlan


def tip_adapter(support: SupportSet, alpha: float = 1.0, beta: float = 5.5) -> ScoringPlan:
    """logits[b, c] = tau <plain[b], text[c]> + alpha * sum_{j of class c} exp(-beta (1 - <plain[b], plain_key[j]>)).

    alpha (residual ratio) and beta (sharpness) default to the paper's values for ImageNet.
    """
    return _plan(support, "plain", alpha, beta)


def tip_adapter_plus_plus(support: SupportSet, alpha: float = 1.0, beta: float = 5.5) -> ScoringPlan:
    """Tip-Adapter with adapted embeddings where image meets image: <adapted[b], adapted_key[j]> in the cache term."""
    return _plan(support, "adapted", alpha, beta)


def _plan(support: SupportSet, query: Literal["plain", "adapted"], alpha: float, beta: float) -> ScoringPlan:
    return ScoringPlan(
        n_classes=support.n_classes,
        text=support.text,
        tau=support.tau,
        keys=getattr(support.embeddings, query),
        class_offsets=support.class_offsets,
        query=query,
        alpha=alpha,
        beta=beta,
    )
