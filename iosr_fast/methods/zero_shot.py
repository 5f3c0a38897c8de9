"""Zero-shot CLIP (Radford et al., ICML 2021)."""

from __future__ import annotations

from iosr_fast.cache import SupportSet
from iosr_fast.scoring import ScoringPlan


def zero_shot(support: SupportSet) -> ScoringPlan:
    """logits[b, c] = tau * <plain[b], text[c]>. The support images are not used."""
    return ScoringPlan(n_classes=support.n_classes, text=support.text, tau=support.tau)
