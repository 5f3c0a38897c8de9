"""The work of Classifier.predict_folder: the images of a folder with their labels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from iosr_fast.exceptions import BadImageError
from iosr_fast.files.joint import classify_jointly
from iosr_fast.files.stream import Reader
from iosr_fast.head.head import Head
from iosr_fast.head.predictions import Prediction, predict
from iosr_fast.head.verdict import NONE_WITHHELD, Abstention, Rejection, replaced
from iosr_fast.images.listing import Skipped, list_images
from iosr_fast.methods.joint import JointPrediction
from iosr_fast.utils.result import Result


@dataclass(frozen=True, repr=False)
class FolderPredictions(Result):
    """The images of a folder, in the order of their paths, with their labels.

    paths          of the B readable images
    labels         (B,) class names, or with `max_error` those of nodes of a tree; the label of unknown pictures for
                   those that are rejected
    probabilities  (B,) float32, of the label, if rejected of the most likely class
    errors         a BadImageError for each unreadable image, in order, with its path and the reason
    skipped        counts by reason of other files: not images, hidden, linked twice, ...
    joint          of images that are classified together, which are all that are not rejected, the JointPrediction
                   with all probabilities; its `refused` says why they are classified alone after all. None if `joint`
                   was not asked for
    rejections     B Rejections, each with the unknown score and whether it rejects the picture. None if `unknown` was
                   not asked for
    accepted       (B,) bool, whether nobody needs to look at the label. None if `max_error` was not asked for

    Where pictures may have several labels, `labels` (B,) are frozensets, with `max_error` of those that are accepted,
    as in `predict`. `probabilities` and `accepted` (B,) of dtype object are dicts of all labels that a picture has: of
    each its probability, and whether it is accepted.

    Iterating gives (path, label, probability) of each readable image.

    >>> from iosr_fast import Classifier
    >>> classifier = Classifier("demo").fit_folder("support")  # a sub-folder of images for each class
    >>> results = classifier.predict_folder("photos")
    >>> [(path.name, label) for path, label, probability in results][2], len(results.errors)
    (('carrot-5.jpg', 'carrot'), 0)
    """

    paths: list[Path]
    labels: np.ndarray
    probabilities: np.ndarray
    errors: list[BadImageError]
    skipped: Skipped
    joint: JointPrediction | None = None
    rejections: list[Rejection] | None = None
    accepted: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.paths)

    def __iter__(self) -> Iterator[tuple[Path, str, float]]:
        """(path, label, probability) of each image."""
        return zip(self.paths, self.labels.tolist(), self.probabilities.tolist(), strict=True)

    def _columns(self) -> dict[str, Any]:
        columns = {"path": [*map(str, self.paths)], "label": self.labels, "probability": self.probabilities}
        columns |= {} if self.rejections is None else {"unknown_score": [one.score for one in self.rejections]}
        return columns | ({} if self.accepted is None else {"accepted": self.accepted})


def predict_folder(
    head: Head, reader: Reader, folder: str | Path, joint: bool, abstention: Abstention
) -> FolderPredictions:
    """As Classifier.predict_folder."""
    listing = list_images(folder)
    if joint or abstention != NONE_WITHHELD:
        abstention.check(head, joint=joint)
    together, rejections = None, None
    answers: Sequence[Prediction]
    if joint:
        readable, errors, queries = reader.embed(listing.paths)
        together, answers = classify_jointly(head, queries, abstention)
    else:
        readable, errors, batches = reader.read(listing.paths, lambda rows: predict(head, rows, abstention=abstention))
        answers = list(chain.from_iterable(batches))
    labels, probabilities, accepted = _columns_of(head, answers, abstention.max_error is not None)
    if abstention.keep is not None:
        rejections = [one.unknown for one in answers if one.unknown is not None]
        labels = replaced(labels, np.array([one.rejected for one in rejections], bool), abstention.label)
    return FolderPredictions(
        [Path(listing.paths[position]) for position in readable],
        labels,
        probabilities,
        errors,
        listing.skipped,
        together,
        rejections,
        accepted,
    )


def _columns_of(
    head: Head, answers: Sequence[Prediction], promised: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """The labels, probabilities and accepted (B,) of a FolderPredictions."""
    if not head.is_multi_label:
        labels, shares = zip(*(one.answer for one in answers), strict=True) if answers else ((), ())
        accepted = np.array([one.accepted for one in answers], bool) if promised else None
        return np.array(labels, str), np.array(shares, np.float32), accepted
    sets, probabilities, passes = (np.empty(len(answers), object) for _ in range(3))
    probabilities[:] = [dict(one.pairs) for one in answers]
    if not promised:
        sets[:] = [frozenset(one) for one in probabilities]
        return sets, probabilities, None
    sets[:] = [frozenset(one.accepted_labels) for one in answers]
    passes[:] = [{label: label in own for label in one} for one, own in zip(probabilities, sets, strict=True)]
    return sets, probabilities, passes
