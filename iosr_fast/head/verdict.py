"""Verdict: what a head decides about queries. Every label that a caller sees is read from one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.head.abstention import NONE_WITHHELD, Abstention
from iosr_fast.head.head import Head
from iosr_fast.methods.tree import Path
from iosr_fast.utils.short_repr import short_repr


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
    labels         (B,) int64, the class with the largest logit, of equal ones the first, by its position; where a
                   promise accepts a node of the tree, that node
    accepted       (B,) bool, whether nobody needs to look at the label; None where no promise was asked for
    unknown_score  (B,) float64, how unlike all classes the query is; None where nothing is rejected
    rejected       (B,) bool, whether it belongs to none of them, and its label, if any, is not accepted; None likewise
    """

    logits: np.ndarray
    labels: np.ndarray
    accepted: np.ndarray | None = None
    unknown_score: np.ndarray | None = None
    rejected: np.ndarray | None = None
    __repr__ = short_repr

    @property
    def rejections(self) -> list[Rejection] | None:
        """A Rejection for each query; None where nothing is rejected."""
        if self.unknown_score is None or self.rejected is None:
            return None
        return list(map(Rejection, self.unknown_score.tolist(), self.rejected.tolist()))

    def named(self, nodes: np.ndarray, word: Any) -> np.ndarray:
        """The label (B,) of each query out of the `nodes` (C + M,): None where it is not accepted, `word` where the
        query is rejected."""
        labels = nodes[self.labels]
        if self.accepted is not None:
            labels = replaced(labels, ~self.accepted, None)
        return labels if self.rejected is None else replaced(labels, self.rejected, word)


def judge(
    head: Head, queries: Embeddings, abstention: Abstention = NONE_WITHHELD, logits: np.ndarray | None = None
) -> Verdict:
    """The Verdict of embeddings (B, D), which are scored where they are, on a GPU too; `logits` of queries that are
    scored already. What promises rest on is computed at its first use; raises as Abstention.check."""
    logits = head.score(queries) if logits is None else logits
    labels, accepted, scores, rejected = logits.argmax(1), None, None, None
    if abstention.keep is not None:
        scores, rejected = unknown_scores(head, queries.to_numpy(), abstention.keep)
    if abstention.max_error is not None:
        labels, accepted = head.promised(logits, abstention.max_error, rejected)
    return Verdict(logits, labels, accepted, scores, rejected)


def node_labels(head: Head, labels: np.ndarray) -> np.ndarray:
    """(C + M,) what answers call the nodes of the tree: the `labels` (C,) of classes, then the names of inner nodes."""
    names = head.node_names[len(labels) :]
    both = np.array([*labels.tolist(), *names], None if labels.dtype.kind == "U" else object)
    return both if names else labels


def nodes_above(head: Head, labels: np.ndarray) -> dict[Any, Path]:
    """The names of the nodes above each of the `node_labels`, from the root down."""
    return {label: head.tree.path_of(node) for node, label in enumerate(node_labels(head, labels).tolist())}


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
