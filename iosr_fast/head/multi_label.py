"""MultiLabelHead: a fitted classifier of pictures that may have several labels each, or none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NoReturn

import numpy as np

from iosr_fast.exceptions import IosrFastError
from iosr_fast.head.head import HeadData
from iosr_fast.head.labels import label_sets, read_label_sets
from iosr_fast.methods.links import Sigmoid
from iosr_fast.methods.multi_label import MultiLabelFit
from iosr_fast.methods.support_set import SupportSet, make_support_set
from iosr_fast.utils.ranking import mean_average_precision


@dataclass(frozen=True, eq=False, repr=False)
class MultiLabelHead(HeadData):
    """Logits of each class by itself (methods.multi_label), and a threshold for each class. It takes no changes. Its
    plan is set by `with_computed`; `require_single_label` refuses calls that need one label a picture.

    labels      (N, C) bool, the classes of each support image, whose class ids say nothing
    thresholds  (C,) float32, the probability from which a picture has a class
    fit         after a fit, what left-out images say of it
    """

    labels: np.ndarray
    thresholds: np.ndarray
    fit: MultiLabelFit | None = None

    @cached_property
    def support(self) -> SupportSet:
        """The support images as the fit took them."""
        rows = self.examples
        sets = self.text, self.tau, None, rows.queries, rows.groups
        return make_support_set(rows.embeddings, self.labels, *sets)

    def examples_of(self, uid: int) -> list[int]:
        """The numbers of a class's support images, rising."""
        return np.sort(self.examples.ids[self.labels[:, self.uids.index(uid)]]).tolist()

    def require_single_label(self, call: str, instead: str = "fit with one label for each picture") -> NoReturn:
        """Raises IosrFastError: `call` has no answer where pictures have several labels."""
        raise IosrFastError(
            f"{call} is for one label a picture, and this classifier was fitted with several: {instead}"
        )

    evidence = None  # weights are fitted, not searched
    unknown_images = None  # pictures of no class are support images without a label
    calibration_images = None
    paths = None

    def summary(self) -> str:
        """How it was fitted, in a line."""
        return "several labels a picture: biases and thresholds by leave-one-out"

    def members(self, logits: np.ndarray) -> np.ndarray:
        """(B, C) bool, the classes of each query whose probability reaches their threshold."""
        return Sigmoid(self.thresholds).members(logits)

    def read_labels(self, images: Sequence[Any], labels: Any, integers: bool) -> np.ndarray:
        """The classes of each image, an indicator (N, C) bool (labels.read_label_sets)."""
        return read_label_sets(labels, len(images), self.class_names)[1]

    def decision(self, logits: np.ndarray) -> np.ndarray:
        """`decision_function`: the logits (B, C)."""
        return logits

    def probabilities(self, logits: np.ndarray) -> np.ndarray:
        """The probability (B, C) of each class by itself, 1 / (1 + exp(-logit))."""
        return Sigmoid(self.thresholds).probabilities(logits)

    def answers(self, logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """A frozenset of labels for each query, (B,) of dtype object; an indicator (B, C) of int64 where the `labels`
        (C,) of the classes are integers."""
        members = self.members(logits)
        return members.astype(np.int64) if labels.dtype.kind == "i" else label_sets(labels, members)

    def quality(self, truth: np.ndarray, logits: np.ndarray) -> float:
        """The mean average precision over the classes that a query has; `truth` (B, C) bool."""
        return mean_average_precision(truth, logits)
