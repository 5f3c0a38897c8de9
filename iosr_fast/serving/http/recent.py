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
        self._last: deque[Prediction] = deque(maxlen=WINDOW)
        self.strangers = Strangers()

    def add(self, prediction: Prediction) -> None:
        """Count an answer. Whether its picture is strange is known where `max_error` is promised, which rests on the
        same left-out images."""
        self._last.append(prediction)
        if prediction.accepted is None:
            return
        before, p = self.strangers.noted, prediction.top[0].probability
        odds = math.log(p / (1.0 - p)) if 0.0 < p < 1.0 else math.copysign(math.inf, p - 0.5)
        self.strangers.add(odds <= self._classifier.snapshot().require_single_label("the HTTP API").strange_odds)
        if self.strangers.noted != before:
            log("strangers", level=logging.WARNING if self.strangers.noted else logging.INFO, note=self.strangers.note)

    @property
    def median_probability(self) -> float:
        """Of the labels; NaN before the first."""
        return median([one.probability for one in list(self._last)] or [math.nan])

    @property
    def accepted_share(self) -> float:
        """Of the answers that were judged by a promise; NaN before the first."""
        judged = [one.accepted for one in list(self._last) if one.accepted is not None]
        return sum(judged) / len(judged) if judged else math.nan
