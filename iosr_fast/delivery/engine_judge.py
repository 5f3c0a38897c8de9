"""What is measured of a candidate engine: its times, its cosines, and its labels of left-out images."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from iosr_fast.delivery.engine_choice import OptimizeOptions, rejection_reason
from iosr_fast.delivery.fitted import FittedClassifier
from iosr_fast.encoders.encoder import Embeddings, Encoder
from iosr_fast.export.check import MIN_COSINES
from iosr_fast.export.quantize.calibration import evenly
from iosr_fast.images.crop import Sharing
from iosr_fast.images.preprocess import to_pixels
from iosr_fast.methods.folds import make_folds
from iosr_fast.methods.out_of_fold import out_of_fold
from iosr_fast.methods.support_set import make_support_set
from iosr_fast.scoring.score import score

JUDGED = 400  # images, and at least two of each class
_ROUNDS = (3, 15)  # fewest and most of a timing
_TIMING_S = 3.0
_COMPARED = 8  # pictures on which another runtime of the same precision is compared


def sample_rows(class_ids: np.ndarray, most: int) -> np.ndarray:
    """Indices of at most `most` images, evenly over the classes and within each class, rising.

    `class_ids` (N,) don't fall. Each class keeps two images, or the one that it has, even if `most` is exceeded.

    >>> sample_rows(np.array([0, 0, 0, 0, 1, 1, 2]), most=5)
    array([0, 3, 4, 5, 6])
    """
    _, starts, counts = np.unique(class_ids, return_index=True, return_counts=True)
    each = 2
    while each < counts.max(initial=0) and np.minimum(counts, each + 1).sum() <= most:
        each += 1
    parts = [start + evenly(np.arange(count), each) for start, count in zip(starts, counts, strict=True)]
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)


def pixels_by_side(fit: FittedClassifier, images: Sequence[Any], rows: np.ndarray) -> Callable[[int], np.ndarray]:
    """The `rows` of support images as pixels (n, S, S, 3) uint8, by the side S; read once for each."""
    geometry = fit.clip.encoder.geometry

    @functools.cache
    def pixels_of(side: int) -> np.ndarray:
        listed = [*Sharing(fit.settings.margin)(images[i] for i in rows)]
        return to_pixels(listed, replace(geometry, size=side), fit.settings.exif_orientation)

    return pixels_of


def time_encoders(encoders: Mapping[int, Encoder], batch: int) -> dict[int, tuple[float, float]]:
    """Median milliseconds of one picture and of a batch. The encoders take turns, in rounds, for some three seconds."""
    rng = np.random.default_rng(0)
    started = time.perf_counter()
    sizes = {encoder.image_size for encoder in encoders.values()}
    pictures = {size: rng.integers(0, 256, (batch, size, size, 3), np.uint8) for size in sizes}
    times: dict[int, list[list[float]]] = {name: [] for name in encoders}
    for done in range(_ROUNDS[1] if encoders else 0):
        if done >= _ROUNDS[0] and time.perf_counter() - started > _TIMING_S:
            break
        for name, encoder in encoders.items():
            marks = [time.perf_counter()]
            for count in (1, batch):
                encoder.encode(pictures[encoder.image_size][:count])
                marks.append(time.perf_counter())
            times[name].append([marks[1] - marks[0], marks[2] - marks[1]])
    medians = {name: np.median(rows, axis=0) * 1e3 for name, rows in times.items()}
    return {name: (float(one), float(many)) for name, (one, many) in medians.items()}


class Judge:
    """Compares candidates with the engine `reference` on some support images of `fit`: the `rows` of its examples, and
    their `pixels` by the side. `count` images are left out, one of each class at a time; `note` says why
    none is.
    """

    def __init__(
        self,
        fit: FittedClassifier,
        reference: Encoder,
        rows: np.ndarray,
        pixels: Callable[[int], np.ndarray],
        tolerance: float,
    ) -> None:
        head, examples = fit.head, fit.head.examples
        self._head, self._pixels, self._tolerance = head, pixels, tolerance
        self._fingerprint = reference.fingerprint
        self._classes = np.searchsorted(np.array(head.uids), examples.class_ids[rows])
        self._groups = None if examples.groups is None else examples.groups[rows]
        if reference.fingerprint == fit.clip.encoder.fingerprint:
            self._reference = examples.as_queries[rows]
        else:
            self._reference = reference.encode(pixels(reference.image_size))
        self._labels, self._rows = self._left_out_labels(self._reference)
        self.count = len(self._rows)
        why = "each class has one image" if len(rows) else "there are no support images"
        self.note = "" if self.count else f"{why}: nothing can be left out, so accuracy was not compared"

    def __call__(self, encoder: Encoder, precision: str, smaller_images: bool = False) -> tuple[dict[str, Any], str]:
        """The facts of an EngineCandidate, and why it is rejected; "" if it is not.

        Another runtime of the same fp32 engine gives the same embeddings up to rounding, so a few pictures are enough.
        """
        same = encoder.fingerprint == self._fingerprint and precision == "fp32"
        pixels = self._pixels(encoder.image_size)[: _COMPARED if same else None]
        if not len(pixels):
            return {}, "" if same else "there are no support images to judge it on"
        embeddings = encoder.encode(pixels)
        facts: dict[str, Any] = {"cosines": cosines(self._reference[: len(pixels)], embeddings)}
        labels = self._labels if same else self._left_out_labels(embeddings)[0]
        right, expected = ((each == self._classes)[self._rows] for each in (labels, self._labels))
        if self.count:
            facts |= {"agreement": float((labels == self._labels)[self._rows].mean()), "accuracy": float(right.mean())}
        return facts, rejection_reason(expected, right, facts["cosines"], self._tolerance, smaller_images)

    def _left_out_labels(self, embeddings: Embeddings) -> tuple[np.ndarray, np.ndarray]:
        """The label (N,) of each image by the fitted method without the image's fold, keys and queries being
        `embeddings`, and the rows that have one. A method without support images labels all."""
        head = self._head
        labels = np.full(len(self._classes), -1)
        if not len(labels):
            return labels, labels
        support = make_support_set(embeddings, self._classes, head.text, head.tau, len(head.uids), groups=self._groups)
        method = head.config.entry
        if not method.needs_support:
            return score(head.config.compile(support), embeddings).argmax(1), np.arange(len(labels))
        reducer = head.config.fit_reducer(support)
        left_out = out_of_fold(method, support, make_folds(support), reducer, head.config.parameters)
        labels[left_out.folds.rows] = left_out.logits.argmax(1)
        return labels, left_out.folds.rows


def cosines(reference: Embeddings, embeddings: Embeddings) -> dict[str, tuple[float, float]]:
    """The smallest and the mean cosine of rows, by embedding; -1 stands for what is not finite."""
    result = {}
    for name in ("plain", "adapted"):
        expected, got = getattr(reference, name), getattr(embeddings, name)
        if expected is not None and got is not None:
            each = np.nan_to_num((expected * got).sum(1), nan=-1.0, posinf=-1.0, neginf=-1.0)
            result[name] = (float(each.min()), float(each.mean()))
    return result


def reason_for_fp32(fit: FittedClassifier, images: Sequence[Any], exact: Encoder) -> str:
    """Why an engine in half precision is worse than the `exact` one in fp32, by support images; "" if it is not."""
    precision = fit.encoder.source.manifest["precision"]  # type: ignore[union-attr]
    rows = sample_rows(fit.head.examples.class_ids, JUDGED)
    judge = Judge(fit, exact, rows, pixels_by_side(fit, images, rows), OptimizeOptions().tolerance)
    facts, reason = judge(fit.encoder, precision)
    low = min((least for least, _ in facts["cosines"].values()), default=1.0)
    return reason if low >= MIN_COSINES[precision] else f"a cosine is {low:.4f}, below {MIN_COSINES[precision]}"
