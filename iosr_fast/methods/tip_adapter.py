"""Tip-Adapter (Zhang et al., ECCV 2022, equations 4 to 6), and Tip-Adapter++ (Kravets & Namboodiri, BMVC 2024)."""

from __future__ import annotations

from iosr_fast.methods.method import BETAS, Method
from iosr_fast.methods.support_set import SupportSet, image_rows
from iosr_fast.scoring.plan import ScoringPlan, Which
from iosr_fast.scoring.reducers import Reducer


def tip_adapter(
    support: SupportSet,
    which: Which = "plain",
    reducer: Reducer | None = None,
    alpha: float = 1.0,
    beta: float = 5.5,
) -> ScoringPlan:
    """logits[b, c] = tau <plain[b], text[c]> + alpha * sum_{j of class c} exp(-beta (1 - <x[b], key[j]>)).

    x and keys are the plain embeddings, or for Tip-Adapter++ the adapted ones; a reducer moves both. alpha (residual
    ratio) and beta (sharpness) default to the paper's values for ImageNet.
    """
    return ScoringPlan(
        n_classes=support.n_classes,
        text=support.text,
        tau=support.tau,
        keys=image_rows(support.embeddings, which, reducer),
        class_offsets=support.class_offsets,
        query=which,
        reducer=reducer,
        alpha=alpha,
        beta=beta,
    )


METHOD = Method(
    "tip-adapter",
    tip_adapter,
    parameters={"alpha": 1.0, "beta": 5.5},
    scales="cache",
    axes={"beta": BETAS},
    additive=True,
    one_shot=True,
)
