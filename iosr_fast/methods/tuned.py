"""The result of a search for a method and its parameters, and its evidence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from iosr_fast.methods import compile_method
from iosr_fast.methods.support_set import SupportSet
from iosr_fast.scoring.plan import ScoringPlan

Protocol = Literal["loo", "validation", "one-shot", "none"]
_QUANTILE = 1.959964  # of the standard normal distribution: 95% lie within


@dataclass(frozen=True, eq=False)
class Tuned:
    """The result of a search and its evidence.

    parameters       all of the method's, alpha included
    accuracy         the share of `scored` held-out images that are right if one half of them is judged with what the
                     other half chooses, parameters or weights, both ways: not the best of many tries. A stack at one
                     or two images a class is judged as fitted without an image of each, so at one less
    search_accuracy  the share that the parameters get right which all of these images chose: optimistic
    alpha_range      the widest plateau of best alphas for these other parameters; by leave-one-out alpha may lie beside
                     it
    log_loss         of the held-out images at these parameters, in nats, with logits multiplied by `factor` (None if it
                     was not computed)
    right            (scored,) bool, which images `accuracy` counts; None for a classifier that was loaded
    protocol         "validation", "loo" (one image of each class left out at a time, near duplicates together),
                     "one-shot" (nothing can be left out: one_shot_parameters), "none"
    settings         combinations of the other parameters that were tried, with every alpha for each
    note             what a user has to know of the choice: texts or images that have no effect; or ""
    shares           of a stack: what texts, pictures and the adapter contribute to the logits; the sum is 1
    version, stale   the version of the classifier that was tuned, and whether the classifier has changed since

    >>> tuned = Tuned("gda", "none", {"alpha": 0.5}, accuracy=0.9, scored=40, protocol="loo")
    >>> tuned.summary()
    '90.0% of 40 left-out images right (95%: 77% to 96%)'
    """

    method: str
    reducer: str
    parameters: dict[str, float]
    accuracy: float
    scored: int
    protocol: Protocol
    search_accuracy: float = float("nan")
    alpha_range: tuple[float, float] | None = None
    log_loss: float | None = None
    factor: float = 1.0
    settings: int = 0
    seconds: float = 0.0
    note: str = ""
    shares: Mapping[str, float] = field(default_factory=dict)
    right: np.ndarray | None = field(default=None, repr=False)
    version: int = 1
    stale: bool = False

    @property
    def interval(self) -> tuple[float, float] | None:
        """Where the accuracy lies with 95% confidence (`wilson`); None if no image was scored."""
        return wilson(self.accuracy, self.scored) if self.scored else None

    def compile(self, support: SupportSet) -> ScoringPlan:
        """The plan with these parameters, its logits multiplied by `factor`, which calibrates probabilities."""
        return compile_method(self.method, support, reducer=self.reducer, **self.parameters).scaled(self.factor)

    def summary(self) -> str:
        """The evidence in one line."""
        if self.interval is None:
            text = "a rule of thumb: nothing could be left out to judge it"
        else:
            low, high = self.interval
            kind = "validation" if self.protocol == "validation" else "left-out"
            text = f"{self.accuracy:.1%} of {self.scored} {kind} images right (95%: {low:.0%} to {high:.0%})"
        stale = f"as of version {self.version}; the classifier has changed since" if self.stale else ""
        return "; ".join(filter(None, (text, self.note, stale)))


def wilson(share: float, count: float) -> tuple[float, float]:
    """The 95% interval of a share of `count` independent trials.

    (p + z^2 / 2n +- z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n), z = 1.96 (Wilson, 1927): sound for small
    counts and for shares of 0 and 1.

    >>> [round(end, 3) for end in wilson(1.0, 10)]
    [0.722, 1.0]
    """
    z2 = _QUANTILE**2 / count
    centre = (share + z2 / 2) / (1 + z2)
    half = (share * (1 - share) * z2 + z2 * z2 / 4) ** 0.5 / (1 + z2)
    return max(0.0, centre - half), min(1.0, centre + half)


def describe_shares(shares: Mapping[str, float]) -> str:
    """Tuned.shares in words, without a part that a classifier does not have.

    >>> describe_shares({"text": 0.25, "pictures": 0.75, "adapter": 0.0})
    'texts 25%, pictures 75%'
    """
    words = {"text": "texts", "pictures": "pictures", "adapter": "adapter"}
    return ", ".join(f"{words[name]} {share:.0%}" for name, share in shares.items() if share > 0)
