"""Answers to embeddings by either kind of head: one label with its reasons, or a set of labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.head.head import Head
from iosr_fast.head.multi_label import MultiLabelHead
from iosr_fast.head.predictions import Prediction, predict

AnyHead: TypeAlias = Head | MultiLabelHead


@dataclass(frozen=True)
class LabelSet:
    """The labels of one image that may have several, or none, and their probabilities, most likely first.

    >>> LabelSet(("cat", "sofa"), (0.9, 0.7)).labels
    ('cat', 'sofa')
    """

    labels: tuple[str, ...]
    probabilities: tuple[float, ...]
    unknown = None  # no picture is rejected

    @property
    def pairs(self) -> list[tuple[str, float]]:
        """(label, probability) of each label."""
        return list(zip(self.labels, self.probabilities, strict=True))


def predict_any(
    head: AnyHead, embeddings: Embeddings, top: int, keep: float | None = None
) -> Sequence[Prediction | LabelSet]:
    """For each query a Prediction (predictions.predict), or by a MultiLabelHead a LabelSet."""
    if isinstance(head, Head):
        return predict(head, embeddings, top, keep=keep)
    logits = head.score(embeddings)
    sets = []
    for row, chosen in zip(head.probabilities(logits), head.members(logits), strict=True):
        classes = np.flatnonzero(chosen)
        classes = classes[np.argsort(-row[classes], kind="stable")]
        sets.append(LabelSet(tuple(head.class_names[c] for c in classes), tuple(row[classes].tolist())))
    return sets


def label_columns(head: AnyHead, answers: Sequence[Prediction | LabelSet]) -> tuple[np.ndarray, np.ndarray]:
    """The labels (B,) of `predict_any`'s answers, of the most likely class, and their probabilities (B,) float32; by a
    MultiLabelHead frozensets of labels, and dicts of each of these and its probability, of dtype object."""
    if isinstance(head, Head):
        best = [answer.top[0] for answer in answers if isinstance(answer, Prediction)]
        labels = np.array([one.label for one in best], dtype=str)
        return labels, np.array([one.probability for one in best], np.float32)
    sets = [answer for answer in answers if isinstance(answer, LabelSet)]
    labels, probabilities = np.empty(len(sets), object), np.empty(len(sets), object)
    labels[:] = [frozenset(one.labels) for one in sets]
    probabilities[:] = [dict(one.pairs) for one in sets]
    return labels, probabilities
