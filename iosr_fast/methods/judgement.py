"""Whether labelled images bear out what left-out ones had let expect: an accuracy, and promises of accepted labels."""

from __future__ import annotations

import math
from dataclasses import dataclass

from iosr_fast.methods.automation import explained_by_chance, images_needed_for
from iosr_fast.methods.config import wilson


@dataclass(frozen=True)
class PromiseResult:
    """A promise that at most a share `promised` of accepted labels is wrong: of `accepted` labels `wrong` are.

    explained  the most wrong labels that chance explains where the promise holds (automation.explained_by_chance)
    judgement  "broke" where more are wrong, by a one-sided binomial test at 5% for independent images; "too few" where
               these labels, were all right, would not confirm the promise (automation.images_needed_for); else "held"

    >>> [PromiseResult.of(0.01, *counts).judgement for counts in ((596, 42), (596, 10), (12, 0))]
    ['broke', 'held', 'too few']
    """

    promised: float
    accepted: int
    wrong: int
    explained: int
    judgement: str

    @classmethod
    def of(cls, promised: float, accepted: int, wrong: int) -> PromiseResult:
        """The promise, judged by these counts."""
        explained = explained_by_chance(accepted, promised)
        kept = "held" if accepted >= images_needed_for(promised) else "too few"
        return cls(promised, accepted, wrong, explained, "broke" if wrong > explained else kept)

    def __str__(self) -> str:
        counts = f"{self.wrong:,} of {self.accepted:,} accepted labels are wrong"
        if self.judgement == "too few":
            return f"{counts}, and {images_needed_for(self.promised):,} are needed"
        return f"{counts} ({self.wrong / self.accepted:.1%}; chance explains {self.explained:,})"


def difference_of_shares(share: float, count: int, other: float, other_count: int) -> tuple[float, float]:
    """The 95% interval of the difference share - other of two shares of independent images, (-1, 1); they differ beyond
    chance where it leaves 0 out.

    With the intervals (l, u) of `share` and (l', u') of `other` (config.wilson), from d - sqrt((share - l)^2 +
    (u' - other)^2) to d + sqrt((u - share)^2 + (other - l')^2), d = share - other (Newcombe, Statistics in Medicine 17,
    1998, method 10): sound for small counts and for shares of 0 and 1.

    >>> [round(end, 3) for end in difference_of_shares(56 / 70, 70, 48 / 80, 80)]
    [0.052, 0.334]
    """
    (low, high), (other_low, other_high) = wilson(share, count), wilson(other, other_count)
    difference = share - other
    below = math.hypot(share - low, other_high - other)
    return difference - below, difference + math.hypot(high - share, other - other_low)
