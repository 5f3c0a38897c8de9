"""The images of a Job, classified together: all are encoded first, and labels are written at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, TextIO

import numpy as np

from iosr_fast.files.job import Counts, Job, check_place, journal_path
from iosr_fast.files.stream import Errors
from iosr_fast.files.tables import Result, csv_cells, csv_writer, write_table
from iosr_fast.head.predictions import Rejection, predict_jointly, rejections
from iosr_fast.methods.joint import JointPrediction
from iosr_fast.scoring.reference import softmax
from iosr_fast.utils.progress import progress


class Together(NamedTuple):
    """The result of `classify_jointly`, of B readable images and C classes.

    errors         of each image
    joint          of the images that are classified together: those that are not rejected
    probabilities  (B, C) float32, of all; of rejected images each alone
    rejections     of each readable image; None without `job.rejecting`
    """

    errors: Errors
    joint: JointPrediction
    probabilities: np.ndarray
    rejections: list[Rejection] | None


def classify_jointly(job: Job, advance: Callable[[int], None]) -> Together:
    """Pictures of none of the classes are rejected first, so that they don't move the means of the classes.

    Raises BadImageError unless the reader skips bad images.
    """
    errors, queries = job.reader.embed(job.paths, advance)
    head = job.head.one_label("classifying together")
    if queries is None:
        queries = head.examples.embeddings[:0]
    classes = np.array(head.class_names, str)
    if job.rejecting is None:
        joint = predict_jointly(head, queries, classes)
        return Together(errors, joint, joint.probabilities, None)
    found = rejections(head, queries, job.rejecting.keep)
    rejected = np.array([one.rejected for one in found], bool)
    joint = predict_jointly(head, queries[~rejected], classes)
    probabilities = np.empty((len(queries), len(head.uids)), np.float32)
    probabilities[~rejected] = joint.probabilities
    probabilities[rejected] = softmax(head.score(queries[rejected]))
    return Together(errors, joint, probabilities, found)


def stream_jointly(job: Job, file: TextIO, log: Callable[[str], None]) -> Counts:
    """As Job.stream: write CSV rows, and log whether images are classified together."""
    together = _classified(job, log, not file.isatty())
    writer = csv_writer(file, job.top, job.unknown_label)
    for path, result in zip(job.paths, _rows(together, job.top), strict=True):
        writer.writerow(csv_cells(path, result, job.top, job.unknown_label))
    return _counts(together)


def write_jointly(job: Job, out: Path, log: Callable[[str], None]) -> Counts:
    """As Job.write, without resuming. Raises FileExistsError if `out` or a journal of it exists."""
    check_joint_place(out, job.paths)
    together = _classified(job, log, True)
    write_table(out, zip(job.paths, _rows(together, job.top), strict=True), job.top, job.unknown_label)
    return _counts(together)


def check_joint_place(out: Path, paths: Iterable[str]) -> None:
    """Raise the errors of `write_jointly` about `out` and file names, without a classifier."""
    if journal_path(out).exists():
        raise FileExistsError(
            f"{journal_path(out)} holds an interrupted run without --joint: finish that run, remove the file, or "
            "choose another name"
        )
    check_place(out, paths)


def _classified(job: Job, log: Callable[[str], None], shown: bool) -> Together:
    with progress("encode", len(job.paths), shown) as advance:
        together = classify_jointly(job, advance)
    log(together.joint.summary())
    return together


def _counts(together: Together) -> Counts:
    rejected = sum(one.rejected for one in together.rejections or ())
    return Counts(len(together.errors) - len(together.probabilities), rejected)


def _rows(together: Together, top: int) -> Iterator[Result | str]:
    """Each image's result, or why it can't be read."""
    classes, found = together.joint.classes, together.rejections
    read = 0
    for error in together.errors:
        if error is not None:
            yield error.reason
            continue
        probabilities = together.probabilities[read]
        best = np.argsort(-probabilities, kind="stable")[:top]
        unknown = () if found is None else (found[read].score, found[read].rejected)
        yield Result([[str(classes[c]), float(probabilities[c])] for c in best], *unknown)
        read += 1
