"""Answers to many images: one after another as they are read, or to all together."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.exceptions import BadImageError, IosrFastError
from iosr_fast.files.reader import Reader
from iosr_fast.files.stream import Errors
from iosr_fast.files.tables import Answered, TableRow
from iosr_fast.head.abstention import NONE_WITHHELD, Abstention
from iosr_fast.head.predictions import AnyHead, predict_any, predict_jointly
from iosr_fast.head.verdict import Rejection, unknown_scores
from iosr_fast.methods.joint import JointPrediction
from iosr_fast.scoring.reference import softmax

Answer: TypeAlias = Answered | BadImageError


def classify(
    head: AnyHead, reader: Reader, sources: Sequence[Any], top: int = 1, abstention: Abstention = NONE_WITHHELD
) -> Generator[list[Answer], None, None]:
    """For each batch of sources, in order, the Prediction (of `top` and `abstention`) or the error of each source; a
    MultiLabelPrediction where pictures may have several labels. Raises BadImageError unless `skip_bad`."""

    def use(rows: Embeddings) -> Sequence[Answered]:
        return predict_any(head, rows, top, abstention)

    with closing(reader.read(sources, use)) as batches:
        for errors, predictions in batches:
            remaining = iter(predictions or ())
            yield [next(remaining) if error is None else error for error in errors]


class Together(NamedTuple):
    """The result of `classify_jointly`, of B readable images and C classes.

    errors         of each image
    joint          of the images that are classified together: those that are not rejected
    probabilities  (B, C) float32, of all; of rejected images each alone
    rejections     of each readable image; None without `abstention.keep`
    """

    errors: Errors
    joint: JointPrediction
    probabilities: np.ndarray
    rejections: list[Rejection] | None

    def rows(self, keys: Sequence[str], top: int) -> Iterator[TableRow]:
        """A row of `top` classes for each image."""
        names, read = self.joint.classes, 0
        for key, error in zip(keys, self.errors, strict=True):
            if error is not None:
                yield TableRow(key, error=error.reason)
                continue
            probabilities = self.probabilities[read]
            best = np.argsort(-probabilities, kind="stable")[:top]
            classes = [[str(names[c]), float(probabilities[c])] for c in best]
            yield TableRow(key, classes, None if self.rejections is None else self.rejections[read])
            read += 1


def classify_jointly(
    head: AnyHead,
    reader: Reader,
    sources: Sequence[Any],
    abstention: Abstention,
    advance: Callable[[int], None] = lambda images: None,
) -> Together:
    """Pictures of none of the classes are rejected first, so that they don't move the means of the classes.

    Raises BadImageError unless the reader skips bad images, and IosrFastError for `abstention.max_error`.
    """
    if abstention.max_error is not None:
        raise IosrFastError(
            "expected no max_error (--max-error) with joint (--joint): the promise rests on support images that are "
            "classified alone; leave one of both out"
        )
    single = head.require_single_label("classifying together")
    errors, queries = reader.embed(sources, advance)
    if queries is None:
        queries = single.examples.embeddings[:0]
    classes = np.array(single.class_names, str)
    if abstention.keep is None:
        joint = predict_jointly(single, queries, classes)
        return Together(errors, joint, joint.probabilities, None)
    scores, rejected = unknown_scores(single, queries, abstention.keep)
    joint = predict_jointly(single, queries[~rejected], classes)
    probabilities = np.empty((len(queries), len(classes)), np.float32)
    probabilities[~rejected] = joint.probabilities
    probabilities[rejected] = softmax(single.score(queries[rejected]))
    return Together(errors, joint, probabilities, list(map(Rejection, scores.tolist(), rejected.tolist())))
