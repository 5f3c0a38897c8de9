"""Zero-shot CLIP (Radford et al., ICML 2021)."""

from __future__ import annotations

from iosr_fast.methods.method import Method
from iosr_fast.methods.support_set import SupportSet
from iosr_fast.scoring.plan import ScoringPlan, Which
from iosr_fast.scoring.reducers import Reducer


def zero_shot(support: SupportSet, which: Which = "plain", reducer: Reducer | None = None) -> ScoringPlan:
    """logits[b, c] = tau * <plain[b], text[c]>, (B, C).

    text (C, D) and tau are those of `support`. Its images, `which` and `reducer` are not used.

    Source: CLIP (Radford et al., ICML 2021).

    >>> import numpy as np
    >>> from iosr_fast import Embeddings, score
    >>> from iosr_fast.methods.support_set import make_support_set
    >>> images = Embeddings(np.eye(4, dtype=np.float32)[:3])
    >>> support = make_support_set(images, labels=np.array([0, 0, 1]), text=np.eye(2, 4), tau=10.0)
    >>> score(zero_shot(support), images)
    array([[10.,  0.],
           [ 0., 10.],
           [ 0.,  0.]], dtype=float32)
    """
    return ScoringPlan(n_classes=support.n_classes, text=support.text, tau=support.tau)


METHOD = Method("zero-shot", zero_shot, needs_text=True, additive=True, multi_label=lambda *_: {})
