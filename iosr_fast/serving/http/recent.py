"""What the last answers look like: how sure they are, and whether pictures have become stranger."""

from __future__ import annotations

import logging
import math
from collections import deque
from statistics import median
from typing import TYPE_CHECKING

from iosr_fast.head.predictions import Prediction
from iosr_fast.methods.checks import WINDOW, Strangers
from iosr_fast.serving.http.logs import log

if TYPE_CHECKING:
    from iosr_fast.classifier import Classifier


class Recent:
    """The last WINDOW answers. `add` is for one thread, what is read for any."""

    def __init__(self, classifier: Classifier) -> None:
        self._classifier = classifier
        # Of each answer the probability of each label, and whether it is accepted; None where nothing is promised.
        self._last: deque[list[tuple[float, bool | None]]] = deque(maxlen=WINDOW)
        self.strangers = Strangers()

    def add(self, prediction: Prediction) -> None:
        """Count an answer. Whether its picture is strange is known where `max_error` is promised, which rests on the
        same left-out images."""
        head, labels, accepted = self._classifier.snapshot(), prediction.top, prediction.accepted
        if not head.is_multi_label:
            self._last.append([(prediction.probability, accepted)])  # type: ignore[list-item]  # no tuple
        else:
            judged = accepted if isinstance(accepted, tuple) else [None] * len(labels)
            self._last.append([(one.probability, ok) for one, ok in zip(labels, judged, strict=True)])
        if accepted is None:
            return
        before, p = self.strangers.noted, (labels[0] if labels else prediction).probability
        odds = math.log(p / (1.0 - p)) if 0.0 < p < 1.0 else math.copysign(math.inf, p - 0.5)
        self.strangers.add(odds <= head.strange_odds)
        if self.strangers.noted != before:
            log("strangers", level=logging.WARNING if self.strangers.noted else logging.INFO, note=self.strangers.note)

    @property
    def median_probability(self) -> float:
        """Of the labels; NaN before the first."""
        return median([p for answer in list(self._last) for p, _ in answer] or [math.nan])

    @property
    def accepted_share(self) -> float:
        """Of the labels that were judged by a promise; NaN before the first."""
        judged = [accepted for answer in list(self._last) for _, accepted in answer if accepted is not None]
        return sum(judged) / len(judged) if judged else math.nan
