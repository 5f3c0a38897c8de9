"""Zero-shot CLIP (Radford et al., ICML 2021)."""

from __future__ import annotations

from iosr_fast.methods.method import Method
from iosr_fast.methods.support_set import SupportSet
from iosr_fast.scoring.plan import ScoringPlan, Which
from iosr_fast.scoring.reducers import Reducer


def zero_shot(support: SupportSet, which: Which = "plain", reducer: Reducer | None = None) -> ScoringPlan:
    """logits[b, c] = tau * <plain[b], text[c]>. The support images, `which` and `reducer` are not used."""
    return ScoringPlan(n_classes=support.n_classes, text=support.text, tau=support.tau)


METHOD = Method("zero-shot", zero_shot, needs_text=True, additive=True, one_shot=True)
