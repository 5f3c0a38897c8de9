"""Answers to images that are classified together."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.head.head import Head
from iosr_fast.head.ids import class_id
from iosr_fast.head.predictions import ClassScore, Prediction, predict_jointly
from iosr_fast.head.verdict import Abstention, Rejection, unknown_scores
from iosr_fast.methods.joint import JointPrediction

_NOT_EXPLAINED = (math.nan,) * 4  # logit, and the parts of it


def classify_jointly(
    head: Head, queries: Embeddings | None, abstention: Abstention, top: int = 1
) -> tuple[JointPrediction, list[Prediction]]:
    """The result for the pictures that are classified together, and a Prediction of each picture (B, D; None for no
    picture) with its `top` classes, not explained.

    Pictures of none of the classes are rejected first, so that they don't move the means of the classes; each of these
    is classified alone.
    """
    if queries is None:
        queries = head.examples.embeddings[:0]
    rejected = np.zeros(len(queries), bool)
    rejections: Sequence[Rejection | None] = [None] * len(queries)
    if abstention.keep is not None:
        scores, rejected = unknown_scores(head, queries, abstention.keep)
        rejections = list(map(Rejection, scores.tolist(), rejected.tolist()))
    joint = predict_jointly(head, queries[~rejected], np.array(head.class_names, str))
    probabilities = np.empty((len(queries), len(head.uids)), np.float32)
    probabilities[~rejected] = joint.probabilities
    probabilities[rejected] = head.probabilities(head.score(queries[rejected]))
    ids = [class_id(uid) for uid in head.uids]
    answers = []
    for row, rejection in zip(probabilities, rejections, strict=True):
        best = np.argsort(-row, kind="stable")[:top].tolist()
        classes = tuple(ClassScore(head.class_names[c], ids[c], float(row[c]), *_NOT_EXPLAINED) for c in best)
        answers.append(Prediction(**vars(classes[0]), top=classes, nearest=(), version=head.version, unknown=rejection))
    return joint, answers
