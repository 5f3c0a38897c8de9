"""The images of a Job, classified together: all are encoded first, and labels are written at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from iosr_fast.exceptions import BadImageError
from iosr_fast.methods.joint import JointPrediction
from iosr_fast.pipeline.job import Job, check_place, journal_path
from iosr_fast.pipeline.stream import Errors, encode_all
from iosr_fast.pipeline.tables import csv_cells, csv_writer, write_table
from iosr_fast.state.predictions import predict_jointly
from iosr_fast.utils.progress import progress


def classify_jointly(job: Job, advance: Callable[[int], None]) -> tuple[Errors, JointPrediction]:
    """Each image's error, and the prediction of the readable images. Raises BadImageError unless `job.skip_bad`."""
    errors, queries = encode_all(
        job.encoder, job.engine, job.decoder, job.paths, job.batch, job.threads, job.skip_bad, advance
    )
    return errors, predict_jointly(job.state, job.state.examples.embeddings[:0] if queries is None else queries)


def stream_jointly(job: Job, file: TextIO, log: Callable[[str], None]) -> int:
    """As Job.stream: write CSV rows, and log whether images are classified together."""
    errors, rows = _classified(job, log, not file.isatty())
    writer = csv_writer(file, job.top, errors=False)
    for path, result in zip(job.paths, rows, strict=True):
        if not isinstance(result, str):
            writer.writerow(csv_cells(path, result, job.top, errors=False))
    for error in errors:
        log(f"left out: {error}")
    return len(errors)


def write_jointly(job: Job, out: Path, log: Callable[[str], None]) -> int:
    """As Job.write, without resuming. Raises FileExistsError if `out` or a journal of it exists."""
    check_joint_place(out, job.paths)
    errors, rows = _classified(job, log, True)
    write_table(out, zip(job.paths, rows, strict=True), job.top)
    return len(errors)


def check_joint_place(out: Path, paths: Iterable[str]) -> None:
    """Raise the errors of `write_jointly` about `out` and file names, without a classifier."""
    if journal_path(out).exists():
        raise FileExistsError(
            f"{journal_path(out)} holds an interrupted run without --joint: finish that run, remove the file, or "
            "choose another name"
        )
    check_place(out, paths)


def _classified(
    job: Job, log: Callable[[str], None], shown: bool
) -> tuple[list[BadImageError], Iterator[list[list[Any]] | str]]:
    """The errors of unreadable images, and each image's row (tables.Row) without its path."""
    with progress("encode", len(job.paths), shown) as advance:
        errors, joint = classify_jointly(job, advance)
    log(joint.summary())
    return [error for error in errors if error is not None], _rows(errors, joint, job.top)


def _rows(errors: Errors, joint: JointPrediction, top: int) -> Iterator[list[list[Any]] | str]:
    readable = iter(joint.probabilities)
    for error in errors:
        if error is not None:
            yield error.reason
            continue
        probabilities = next(readable)
        best = np.argsort(-probabilities, kind="stable")[:top]
        yield [[str(joint.classes[c]), float(probabilities[c])] for c in best]
