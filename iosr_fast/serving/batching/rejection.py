"""What recognises unknown pictures is fitted once for each head, apart from the threads that run batches."""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING, NamedTuple

from iosr_fast.encoders.encoder import Encoder

if TYPE_CHECKING:
    from iosr_fast.classifier import Classifier
    from iosr_fast.head.head import Head


class FittedState(NamedTuple):
    """A head whose `unknown` is fitted, and the encoder that it belongs to."""

    encoder: Encoder
    head: Head


class RejectionFitter:
    """Fits `Head.unknown`, which takes seconds with thousands of support images; concurrent callers share one fit."""

    def __init__(self) -> None:
        self._fitting = threading.Lock()

    def fit(self, classifier: Classifier, keep: float) -> FittedState:
        """The current head, fitted. Raises IosrFastError where it has too few support images to promise `keep`."""
        fitted = FittedState(classifier.encoder, classifier.snapshot().one_label("keep", "leave it out"))
        with self._fitting:
            unknown = fitted.head.unknown
            unknown.threshold(keep)
            unknown.scorer  # noqa: B018  computed here, not by the first batch
        return fitted

    async def fit_in_thread(self, classifier: Classifier, keep: float) -> FittedState:
        """`fit` for asyncio: in a thread, unless nothing is left to compute."""
        unknown = classifier.snapshot().computed("unknown")
        if unknown is not None and "scorer" in vars(unknown) and not self._fitting.locked():
            return self.fit(classifier, keep)
        return await asyncio.to_thread(self.fit, classifier, keep)
