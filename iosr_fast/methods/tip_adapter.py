"""Tip-Adapter (Zhang et al., ECCV 2022, equations 4 to 6), and Tip-Adapter++ (Kravets & Namboodiri, BMVC 2024)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from iosr_fast.methods.kernel_ridge import kernel_matrix
from iosr_fast.methods.method import BETAS, Method
from iosr_fast.methods.multi_label_set import KeyTerm, MultiLabelSet
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
    """logits[b, c] = tau <plain[b], text[c]> + alpha * w_c sum_{j of class c} exp(-beta (1 - <x[b], key[j]>)), (B, C).

    x (B, D) and the keys (N, D), the images of `support`, are the plain embeddings if `which` is "plain", or the
    adapted ones (Tip-Adapter++); the reducer moves both. Without text the first term is left out. alpha >= 0 (residual
    ratio) and beta >= 0 (sharpness) have no units; the defaults are the paper's values for ImageNet. w_c
    (support_set.class_weights) is 1 where classes are equally large, as in the paper; otherwise it makes a sum as large
    as that of a class of mean size.

    Raises IosrFastError for values that a plan can't have (ScoringPlan).

    Sources: Tip-Adapter (Zhang et al., ECCV 2022, equations 4 to 6); with adapted embeddings Kravets & Namboodiri, BMVC
    2024.

    >>> import numpy as np
    >>> from iosr_fast import Embeddings, score
    >>> from iosr_fast.methods.support_set import make_support_set
    >>> images = Embeddings(np.eye(4, dtype=np.float32)[:3])
    >>> support = make_support_set(images, labels=np.array([0, 0, 1]), text=np.eye(2, 4), tau=10.0)
    >>> score(tip_adapter(support, alpha=2.0, beta=1.0), images).round(2)
    array([[12.05,  1.1 ],
           [ 2.05, 11.1 ],
           [ 1.1 ,  3.  ]], dtype=float32)
    """
    return ScoringPlan(
        n_classes=support.n_classes,
        text=support.text,
        tau=support.tau,
        keys=image_rows(support.embeddings, which, reducer),
        class_offsets=support.class_offsets,
        weights=support.key_weights,
        query=which,
        reducer=reducer,
        alpha=alpha,
        beta=beta,
    )


def multi_label(images: MultiLabelSet, which: Which, setting: Mapping[str, float]) -> dict[str, KeyTerm]:
    """Method.multi_label: the sum over the keys that have the label, as of one label. An image that is left out lacks
    one of the n keys of each of its labels, which n / (n - 1) makes up for."""
    kernel = kernel_matrix(images.rows(which, queries=True), images.rows(which), setting["beta"])
    np.fill_diagonal(kernel, 0.0)
    values, more = images.labels.astype(np.float64), np.maximum(images.counts - 1, 1)
    return {"alpha": KeyTerm(values, (kernel @ values) * np.where(images.labels, images.counts / more, 1.0))}


METHOD = Method(
    "tip-adapter",
    tip_adapter,
    parameters={"alpha": 1.0, "beta": 5.5},
    scales="cache",
    axes={"beta": BETAS},
    additive=True,
    multi_label=multi_label,
)
