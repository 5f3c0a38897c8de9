"""What a head has beside its plan where pictures may have several labels each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from iosr_fast.exceptions import IosrFastError
from iosr_fast.methods.tuning.binary_loss import sigmoid
from iosr_fast.scoring.reference import softmax


def members(logits: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """(B, C) bool, the classes of each image whose probability reaches their threshold (C,)."""
    reached: np.ndarray = sigmoid(logits.astype(np.float64)) >= thresholds
    return reached


def decision(logits: np.ndarray, several: bool) -> np.ndarray:
    """`decision_function` of logits (B, C): where an image has one label and C is 2, (B,), the second class's logit
    minus the first one's."""
    return logits[:, 1] - logits[:, 0] if logits.shape[1] == 2 and not several else logits


def probabilities(logits: np.ndarray, several: bool) -> np.ndarray:
    """`predict_proba` of logits (B, C): each class by itself where an image may have several labels."""
    return sigmoid(logits) if several else softmax(logits)


@dataclass(frozen=True, eq=False)
class MultiLabels:
    """labels (N, C) bool, the classes of each support image, in their order; thresholds (C,) float32, the probability
    from which a picture has a class."""

    labels: np.ndarray
    thresholds: np.ndarray

    def members(self, logits: np.ndarray) -> np.ndarray:
        """(B, C) bool, the classes of each image."""
        return members(logits, self.thresholds)

    def arrays(self) -> dict[str, np.ndarray]:
        """As a bundle has them."""
        return {"labels": self.labels.astype(np.uint8), "thresholds": self.thresholds}

    @classmethod
    def of_arrays(cls, arrays: Mapping[str, np.ndarray]) -> MultiLabels | None:
        """None where pictures have one label each. Raises IosrFastError for what no fit gives."""
        labels, thresholds = arrays.get("labels"), arrays.get("thresholds")
        if labels is None and thresholds is None:
            return None
        if labels is None or thresholds is None:
            raise IosrFastError("expected labels and thresholds together, got one without the other")
        if labels.max(initial=0) > 1:
            raise IosrFastError(f"expected labels of 0 and 1, got {labels.max()}")
        if not ((thresholds >= 0) & (thresholds <= 1)).all():
            raise IosrFastError("expected thresholds from 0 to 1, got others")
        return cls(labels.astype(bool), thresholds)
