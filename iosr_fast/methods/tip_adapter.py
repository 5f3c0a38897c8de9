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
    """logits[b, c] = tau <plain[b], text[c]> + alpha * sum_{j of class c} exp(-beta (1 - <x[b], key[j]>)), (B, C).

    x (B, D) and the keys (N, D), the images of `support`, are the plain embeddings if `which` is "plain", or the
    adapted ones (Tip-Adapter++); the reducer moves both. Without text the first term is left out. alpha >= 0 (residual
    ratio) and beta >= 0 (sharpness) have no units; the defaults are the paper's values for ImageNet.

    Raises IosrFastError for values that a plan can't have (ScoringPlan).

    Sources: Tip-Adapter (Zhang et al., ECCV 2022, equations 4 to 6); with adapted embeddings Kravets & Namboodiri, BMVC
    2024.

    >>> import numpy as np
    >>> from iosr_fast import Embeddings, score
    >>> from iosr_fast.methods.support_set import make_support_set
    >>> images = Embeddings(np.eye(4, dtype=np.float32)[:3])
    >>> support = make_support_set(images, labels=np.array([0, 0, 1]), text=np.eye(2, 4), tau=10.0)
    >>> score(tip_adapter(support, alpha=2.0, beta=1.0), images).round(2)
    array([[12.74,  0.74],
           [ 2.74, 10.74],
           [ 1.47,  2.  ]], dtype=float32)
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
)
