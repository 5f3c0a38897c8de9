"""Verdict: what a head decides about queries. Every label that a caller sees is read from one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.head.abstention import NONE_WITHHELD, Abstention
from iosr_fast.head.head import Head


@dataclass(frozen=True)
class Rejection:
    """Whether a picture belongs to none of the classes: `score` (Classifier.unknown_score) is above the threshold.

    >>> Rejection(score=3.2, rejected=True).rejected
    True
    """

    score: float
    rejected: bool


@dataclass(frozen=True, eq=False)
class Verdict:
    """What is decided about B queries.

    logits         (B, C) float32
    labels         (B,) int64, the class with the largest logit, of equal ones the first, by its position
    accepted       (B,) bool, whether nobody needs to look at the label; None where no promise was asked for
    unknown_score  (B,) float64, how unlike all classes the query is; None where nothing is rejected
    rejected       (B,) bool, whether it belongs to none of them, and its label, if any, is not accepted; None likewise
    """

    logits: np.ndarray
    labels: np.ndarray
    accepted: np.ndarray | None = None
    unknown_score: np.ndarray | None = None
    rejected: np.ndarray | None = None

    @property
    def rejections(self) -> list[Rejection] | None:
        """A Rejection for each query; None where nothing is rejected."""
        if self.unknown_score is None or self.rejected is None:
            return None
        return list(map(Rejection, self.unknown_score.tolist(), self.rejected.tolist()))

    def named(self, classes: np.ndarray, word: Any) -> np.ndarray:
        """The label (B,) of each query out of `classes` (C,): None where it is not accepted, `word` where the query is
        rejected."""
        labels = classes[self.labels]
        if self.accepted is not None:
            labels = replaced(labels, ~self.accepted, None)
        return labels if self.rejected is None else replaced(labels, self.rejected, word)


def judge(
    head: Head, queries: Embeddings, abstention: Abstention = NONE_WITHHELD, logits: np.ndarray | None = None
) -> Verdict:
    """The Verdict of embeddings (B, D), which are scored where they are, on a GPU too; `logits` of queries that are
    scored already. What promises rest on is computed at its first use; raises as Abstention.check."""
    logits = head.score(queries) if logits is None else logits
    accepted, scores, rejected = None, None, None
    if abstention.max_error is not None:
        accepted = head.accepts(logits, abstention.max_error)
    if abstention.keep is not None:
        scores, rejected = unknown_scores(head, queries.to_numpy(), abstention.keep)
        accepted = None if accepted is None else accepted & ~rejected
    return Verdict(logits, logits.argmax(1), accepted, scores, rejected)


def unknown_scores(head: Head, queries: Embeddings, keep: float | None) -> tuple[np.ndarray, np.ndarray]:
    """How unlike all classes queries (B, D) are, (B,) float64, and which are rejected, (B,) bool, where a share `keep`
    of pictures of the classes is not: none with None. Raises as Unknown.threshold."""
    threshold = np.inf if keep is None else head.unknown.threshold(keep)
    scores = head.unknown.score(queries)
    return scores, scores > threshold


def replaced(labels: np.ndarray, where: np.ndarray, word: Any) -> np.ndarray:
    """Labels (B,) with `word` in some places (B,) bool; an array of objects unless it and the labels are strings.

    >>> replaced(np.array(["cat", "dog"]), np.array([False, True]), None)
    array(['cat', None], dtype=object)
    """
    if isinstance(word, str) and labels.dtype.kind == "U":
        return np.where(where, word, labels)
    result = labels.astype(object)
    result[where] = word
    return result
