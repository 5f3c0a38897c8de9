"""Answers to images that are classified together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.exceptions import IosrFastError
from iosr_fast.files.tables import TableRow
from iosr_fast.head.abstention import Abstention
from iosr_fast.head.head import Head
from iosr_fast.head.predictions import predict_jointly
from iosr_fast.head.verdict import Rejection, unknown_scores
from iosr_fast.methods.joint import JointPrediction
from iosr_fast.scoring.reference import softmax


class Together(NamedTuple):
    """The result of `classify_jointly`, of B images and C classes.

    joint          of the images that are classified together: those that are not rejected
    probabilities  (B, C) float32, of all; of rejected images each alone
    rejections     of each image; None without `abstention.keep`
    """

    joint: JointPrediction
    probabilities: np.ndarray
    rejections: list[Rejection] | None

    def rows(self, keys: Sequence[str], top: int) -> Iterator[TableRow]:
        """A row of `top` classes for each image."""
        names = self.joint.classes
        rejections: Sequence[Rejection | None] = self.rejections or [None] * len(keys)
        for key, probabilities, rejection in zip(keys, self.probabilities, rejections, strict=True):
            best = np.argsort(-probabilities, kind="stable")[:top]
            yield TableRow(key, [[str(names[c]), float(probabilities[c])] for c in best], rejection)


def check_joint(head: Head, abstention: Abstention, joint: bool) -> None:
    """`Abstention.check`, before an image is read. Raises IosrFastError for a promise about pictures together, too."""
    if joint and abstention.max_error is not None:
        raise IosrFastError(
            "expected no max_error (--max-error) with joint (--joint): the promise rests on support images that are "
            "classified alone; leave one of both out"
        )
    abstention.check(head)


def classify_jointly(head: Head, queries: Embeddings | None, abstention: Abstention) -> Together:
    """Pictures of none of the classes are rejected first, so that they don't move the means of the classes. `queries`
    (B, D), None for no image."""
    if queries is None:
        queries = head.examples.embeddings[:0]
    classes = np.array(head.class_names, str)
    if abstention.keep is None:
        joint = predict_jointly(head, queries, classes)
        return Together(joint, joint.probabilities, None)
    scores, rejected = unknown_scores(head, queries, abstention.keep)
    joint = predict_jointly(head, queries[~rejected], classes)
    probabilities = np.empty((len(queries), len(classes)), np.float32)
    probabilities[~rejected] = joint.probabilities
    probabilities[rejected] = softmax(head.score(queries[rejected]))
    return Together(joint, probabilities, list(map(Rejection, scores.tolist(), rejected.tolist())))
