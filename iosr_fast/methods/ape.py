"""APE, adaptive prior refinement (Zhu et al., ICCV 2023, equations 6 to 12), and APE++ with adapted embeddings."""

from __future__ import annotations

import numpy as np

from iosr_fast.methods.method import BETAS, Method
from iosr_fast.methods.support_set import SupportSet, image_rows
from iosr_fast.scoring.plan import ScoringPlan, Which
from iosr_fast.scoring.reducers import Reducer

CHANNEL_SHARE = 0.75
SIMILARITY_WEIGHT = 0.7
_SMALL = 1e-6  # inside the logarithm, as in the public code


def ape(
    support: SupportSet,
    which: Which = "plain",
    reducer: Reducer | None = None,
    alpha: float = 1.0,
    beta: float = 5.5,
    gamma: float = 0.1,
) -> ScoringPlan:
    """Tip-Adapter's logits on a subset of channels, with key j weighted by exp(gamma * KL(label[j] || p[j])), (B, C).

    p[j] = softmax(<key[j], text>), both restricted to the subset and normalised again. The subset is the three quarters
    of the D channels with the largest 0.3 * variance over texts - 0.7 * similarity between classes (choose_channels):
    the paper's weights for ImageNet. The paper chooses the number of channels for each data set. The text term keeps
    all channels. alpha, beta and gamma >= 0 have no units; `support` has text.

    Raises IosrFastError for values that a plan can't have (ScoringPlan).

    Source: APE (Zhu et al., ICCV 2023, equations 6 to 12).

    >>> import numpy as np
    >>> from iosr_fast import Embeddings, score
    >>> from iosr_fast.methods.support_set import make_support_set
    >>> images = Embeddings(np.eye(4, dtype=np.float32)[:3])
    >>> support = make_support_set(images, labels=np.array([0, 0, 1]), text=np.eye(2, 4), tau=10.0)
    >>> plan = ape(support, alpha=2.0, beta=1.0, gamma=0.5)
    >>> plan.reducer.projection  # the channels
    array([1., 1., 1., 0.], dtype=float32)
    >>> score(plan, images).round(2)
    array([[14.4 ,  1.21],
           [ 6.08, 11.21],
           [ 2.82,  3.3 ]], dtype=float32)
    """
    assert support.text is not None  # guaranteed by compile_method
    chosen = choose_channels(support, image_rows(support.embeddings, which, reducer))
    narrowed = Reducer(projection=chosen) if reducer is None else reducer.then(chosen)
    only = Reducer(projection=chosen)
    cosines = only(support.embeddings.plain) @ only(support.text).T
    powers = np.exp(cosines - cosines.max(1, keepdims=True)).astype(np.float64)
    own = powers[np.arange(len(powers)), support.labels] / powers.sum(1)
    divergence = np.log2((1 + _SMALL) / (own + _SMALL))
    with np.errstate(over="ignore"):  # ScoringPlan rejects weights that are too large
        weights = np.exp(gamma * divergence)
    if support.key_weights is not None:
        weights *= support.key_weights
    return ScoringPlan(
        n_classes=support.n_classes,
        text=support.text,
        tau=support.tau,
        keys=image_rows(support.embeddings, which, narrowed),
        class_offsets=support.class_offsets,
        weights=weights,
        query=which,
        reducer=narrowed,
        alpha=alpha,
        beta=beta,
    )


def choose_channels(support: SupportSet, rows: np.ndarray, share: float = CHANNEL_SHARE) -> np.ndarray:
    """(D,), 1 for chosen channels and 0 for others.

    A channel's similarity is the mean of f_i f_j over all pairs of embeddings of different classes; the embeddings of a
    class are its text and its images (`rows`). With F_c and m_c their sum and number in class c, that is
    ((sum F)^2 - sum F^2) / ((sum m)^2 - sum m^2). A channel's variance is that of the texts.

    >>> from iosr_fast import Embeddings
    >>> from iosr_fast.methods.support_set import make_support_set
    >>> images = Embeddings(np.eye(4, dtype=np.float32)[:2])
    >>> support = make_support_set(images, labels=np.array([0, 1]), text=np.eye(2, 4), tau=100.0)
    >>> choose_channels(support, images.plain, share=0.5)  # the two in which the texts differ
    array([1., 1., 0., 0.])
    """
    assert support.text is not None
    text = support.text.astype(np.float64)
    sums = text.copy()
    owned = np.flatnonzero(support.counts)  # for an empty class reduceat gives a row, not 0
    if len(owned):
        sums[owned] += np.add.reduceat(rows, support.class_offsets[owned], axis=0)
    numbers = 1 + support.counts
    similarity = (sums.sum(0) ** 2 - (sums**2).sum(0)) / max(1, numbers.sum() ** 2 - (numbers**2).sum())
    variance = text.var(0, ddof=1) if len(text) > 1 else np.zeros(text.shape[1])
    criterion = (1 - SIMILARITY_WEIGHT) * variance - SIMILARITY_WEIGHT * similarity
    channels = np.zeros(text.shape[1])
    channels[np.argsort(-criterion, kind="stable")[: max(1, round(share * len(channels)))]] = 1
    return channels


METHOD = Method(
    "ape",
    ape,
    parameters={"alpha": 1.0, "beta": 5.5, "gamma": 0.1},
    scales="cache",
    axes={"beta": BETAS, "gamma": (0.0, 0.1, 0.25, 0.5, 1.0)},
    needs_text=True,
    multi_label="it weighs each key by the one label that the key has",
)
