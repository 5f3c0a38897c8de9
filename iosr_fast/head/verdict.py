"""What a head decides about queries: which labels are withheld (Abstention), and what is said of each query (Verdict).

Every label that a caller sees is read from a Verdict.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.exceptions import IosrFastError
from iosr_fast.head.head import Head
from iosr_fast.head.names import check_unknown_label
from iosr_fast.methods.automation import check_promise
from iosr_fast.methods.links import Link
from iosr_fast.methods.tree import Path
from iosr_fast.methods.unknown import KEEP
from iosr_fast.utils.numbers import check_share
from iosr_fast.utils.short_repr import short_repr

UNKNOWN_LABEL = "unknown"  # in tables


@dataclass(frozen=True)
class Abstention:
    """Which labels are withheld.

    keep       pictures that belong to none of the classes are rejected, and a share `keep` of the others is not
               (methods.unknown); None rejects none
    label      what rejected pictures get instead
    max_error  a label is accepted if of all accepted ones at most this share is wrong (methods.automation); None
               accepts all
    """

    keep: float | None = None
    label: Any = None
    max_error: float | None = None

    @classmethod
    def of(cls, unknown: str | None, label: Any, keep: float, max_error: float | None = None) -> Self:
        """The arguments of `predict`, checked. IosrFastError for wrong ones."""
        if unknown not in (None, "reject"):
            raise IosrFastError(f"expected unknown to be 'reject' or None, got {unknown!r}")
        keep = check_share("keep", keep)
        if max_error is not None:
            max_error = check_share("max_error", max_error, like=0.01)
        if unknown is not None:
            return cls(keep, label, max_error)
        if label is not None:
            raise IosrFastError(f"expected unknown_label only with unknown='reject', got {label!r} without it")
        if keep != KEEP:
            raise IosrFastError(f"expected keep only with unknown='reject', got {keep} without it")
        return cls(max_error=max_error)

    def check(self, head: Head, labels: Iterable[Any] | None = None, joint: bool = False) -> None:
        """Raise IosrFastError, before any image is read, where a node has the label of rejected pictures (one of
        `labels`, or the names), where there are too few support images for a promise (Unknown.threshold,
        automation.check_promise), and for a promise about errors of pictures that are classified together (`joint`).
        What the promises rest on is computed now."""
        if joint:
            head.require_single_label("joint (pictures that are classified together)", "classify each picture alone")
        if joint and self.max_error is not None:
            raise IosrFastError(
                "expected no max_error (--max-error) with joint (--joint): the promise rests on support images that "
                "are classified alone; leave one of both out"
            )
        if self.keep is not None:
            check_unknown_label(self.label, head.node_names if labels is None else labels)
            head.unknown.threshold(self.keep)
        if self.max_error is not None:
            check_promise(head.judged, self.max_error)


NONE_WITHHELD = Abstention()


def check_abstention(unknown: str | None, label: str, keep: float, max_error: float | None = None) -> Abstention:
    """As Abstention.of, for tables: the label is a text, and UNKNOWN_LABEL by default."""
    if not isinstance(label, str):
        raise IosrFastError(f"expected unknown_label to be a text, like {UNKNOWN_LABEL!r}, got {label!r}")
    check_unknown_label(label, ())
    return Abstention.of(unknown, None if unknown is None and label == UNKNOWN_LABEL else label, keep, max_error)


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
                   promise accepts a node of the tree, that node. (B, C) bool where pictures may have several labels:
                   the classes of each
    accepted       (B,) bool, or (B, C) of `labels`, whether nobody needs to look at the label; None where no promise
                   was asked for
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

    def named(self, link: Link, nodes: np.ndarray, word: Any) -> np.ndarray:
        """The label (B,) of each query out of the `nodes` (C + M,): None where it is not accepted, `word` where the
        query is rejected. Where pictures may have several labels, those that are accepted, as the link has them."""
        if self.labels.ndim == 2:
            return link.named(self.labels if self.accepted is None else self.accepted, nodes)
        labels = link.named(self.labels, nodes)
        if self.accepted is not None:
            labels = replaced(labels, ~self.accepted, None)
        return labels if self.rejected is None else replaced(labels, self.rejected, word)


def judge(
    head: Head, queries: Embeddings, abstention: Abstention = NONE_WITHHELD, logits: np.ndarray | None = None
) -> Verdict:
    """The Verdict of embeddings (B, D), which are scored where they are, on a GPU too; `logits` of queries that are
    scored already. What promises rest on is computed at its first use; raises as Abstention.check."""
    logits = head.score(queries) if logits is None else logits
    labels, accepted, scores, rejected = head.link.decide(logits), None, None, None
    if abstention.keep is not None:
        scores, rejected = unknown_scores(head, queries.to_numpy(), abstention.keep)
    if abstention.max_error is not None:
        least: Any = head.least_odds(abstention.max_error)
        if head.is_multi_label:
            return Verdict(logits, labels, labels & (logits.astype(np.float64) >= least))
        if rejected is not None:
            least = np.where(rejected, np.inf, least)
        labels, accepted = head.tree.answer(head.calibrated(logits), least)
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
