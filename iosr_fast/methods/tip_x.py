"""Tip-X (Udandarao et al., ICCV 2023, equations 5 to 7), and Tip-X++ (Kravets & Namboodiri, BMVC 2024)."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from iosr_fast.methods.method import BETAS, ROUNDING, Method
from iosr_fast.methods.support_set import SupportSet, class_weights, image_rows
from iosr_fast.scoring.numpy_scorer import text_distribution
from iosr_fast.scoring.plan import ScoringPlan, Which
from iosr_fast.scoring.reducers import Reducer

TEMPERATURE = 0.5
_TILE = 1 << 23  # elements of a block of products: 64 MB


def tip_x(
    support: SupportSet,
    which: Which = "plain",
    reducer: Reducer | None = None,
    alpha: float = 1.0,
    beta: float = 5.5,
    gamma: float = 1.0,
) -> ScoringPlan:
    """Tip-Adapter's logits + gamma * w_c sum_{j of class c} -scale(KL(s[b] || S[j])), (B, C), w_c as there.

    s (B, C) and S (N, C) are softmax(<plain, text> / 0.5) of queries and keys; scale takes the range of the divergences
    to that of the cosines between images. alpha, beta and gamma >= 0 have no units; `support` has text. With H = sum of
    s log(C s), the sum over a class collapses to a linear term over [s, H]:

        sum_j KL(s || S[j]) = n_c H - <s, sum_j log(C S[j])>

    The factor C affects only the rounding: both terms are as small as the divergences, instead of differences of large
    entropies.

    The public code takes both ranges over the whole test set, so that a label depends on its batch. Here the ranges are
    those over all pairs of different support images, frozen in the plan (with a single image the term is not scaled).
    tests/methods/tip_x_reference.py has the literal form.

    Raises IosrFastError for values that a plan can't have (ScoringPlan).

    Sources: Tip-X (Udandarao et al., ICCV 2023, equations 5 to 7); with adapted embeddings Kravets & Namboodiri, BMVC
    2024.

    >>> import numpy as np
    >>> from iosr_fast import Embeddings, score
    >>> from iosr_fast.methods.support_set import make_support_set
    >>> images = Embeddings(np.float32([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]]))
    >>> support = make_support_set(images, labels=np.array([0, 0, 1]), text=np.eye(2), tau=10.0)
    >>> score(tip_x(support, alpha=2.0, beta=1.0, gamma=0.5), images).round(2)
    array([[12.77,  0.5 ],
           [10.76,  7.81],
           [ 1.19, 13.09]], dtype=float32)
    """
    keys = image_rows(support.embeddings, which, reducer)
    log_s, slope, offset = divergences(support, keys)
    weights = class_weights(support.counts)
    counts = weights * support.counts
    summed = weights[:, None] * np.stack([log_s[a:b].sum(0) for a, b in pairwise(support.class_offsets)])
    return ScoringPlan(
        n_classes=support.n_classes,
        text=support.text,
        tau=support.tau,
        keys=keys,
        class_offsets=support.class_offsets,
        weights=support.key_weights,
        query=which,
        reducer=reducer,
        alpha=alpha,
        beta=beta,
        linear=gamma * slope * np.concatenate([summed, -counts[:, None]], axis=1),
        bias=-gamma * offset * counts,
        feature="text-distribution",
        temperature=TEMPERATURE,
    )


def divergences(support: SupportSet, keys: np.ndarray) -> tuple[np.ndarray, float, float]:
    """log(C S) (N, C) of the support images, and (slope, offset) with scale(KL) = slope * KL + offset."""
    assert support.text is not None  # guaranteed by compile_method
    cosines = support.embeddings.plain.astype(np.float64) @ support.text.T.astype(np.float64)
    s = text_distribution(cosines, TEMPERATURE)
    log_s = np.log(support.n_classes * s[:, :-1])
    least, most = pair_range(-log_s, s[:, :-1], s[:, -1:])
    low, high = pair_range(keys, keys)
    # Divergences that differ by no more than their rounding in float32 have no usable range.
    resolved = most - least > ROUNDING * float(np.abs(log_s).max(initial=0.0))
    slope = (high - low) / (most - least) if resolved else 1.0
    return log_s, slope, low - slope * least


def pair_range(rows: np.ndarray, others: np.ndarray, offset: np.ndarray | float = 0.0) -> tuple[float, float]:
    """The least and the largest of offset[i] + <others[i], rows[j]> over i != j; (0, 0) for fewer than two rows.

    rows, others (N, D), offset (N, 1) or a number; in blocks of bounded memory.

    >>> rows = np.array([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    >>> pair_range(rows, rows)
    (0.0, 0.8)
    """
    n_rows = len(rows)
    if n_rows < 2:
        return 0.0, 0.0
    low, high = np.inf, -np.inf
    offsets = np.broadcast_to(offset, (n_rows, 1))
    step = max(1, _TILE // n_rows)
    for begin in range(0, n_rows, step):
        products = others[begin : begin + step] @ rows.T
        products += offsets[begin : begin + step]
        itself = (np.arange(len(products)), np.arange(begin, begin + len(products)))
        products[itself] = np.inf
        low = min(low, float(products.min()))
        products[itself] = -np.inf
        high = max(high, float(products.max()))
    return low, high


METHOD = Method(
    "tip-x",
    tip_x,
    parameters={"alpha": 1.0, "beta": 5.5, "gamma": 1.0},
    scales="cache",
    axes={"beta": BETAS, "gamma": tuple(np.linspace(0.0, 30.0, 50).tolist())},
    needs_text=True,
    multi_label="it compares distributions over texts, of which an image with several labels has no single one",
)
