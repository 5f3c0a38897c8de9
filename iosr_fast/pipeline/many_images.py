"""What a classifier does with many images: folders, what to label next, and its evaluation."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from iosr_fast.encoders.opened_clip import OpenedClip
from iosr_fast.head.evaluation import Evaluation
from iosr_fast.head.fit import Fit
from iosr_fast.images.preprocess import as_image_list
from iosr_fast.methods.conformal import COVERAGE
from iosr_fast.methods.promise import check_share
from iosr_fast.methods.unknown import KEEP
from iosr_fast.pipeline.evaluate import evaluate_images
from iosr_fast.pipeline.folder import FolderPredictions, predict_folder
from iosr_fast.pipeline.reader import Reader
from iosr_fast.pipeline.rejecting import UNKNOWN_LABEL, check_rejecting
from iosr_fast.pipeline.suggest import FolderSuggestions, suggest_from_folder
from iosr_fast.store.uncertainty import Uncertainty
from iosr_fast.utils.numbers import check_integer
from iosr_fast.utils.progress import progress


class ManyImages(Uncertainty):
    """The part of Classifier that decodes images while others are encoded."""

    exif_orientation: bool
    progress: bool

    @abstractmethod
    def _open(self) -> OpenedClip:
        """The CLIP that the parameters name."""

    def predict_folder(
        self,
        folder: str | Path,
        batch: int | None = None,
        skip_bad: bool = False,
        threads: int | None = None,
        decoder: str = "cpu",
        joint: bool = False,
        unknown: Literal["reject"] | None = None,
        unknown_label: str = UNKNOWN_LABEL,
        keep: float = KEEP,
    ) -> FolderPredictions:
        """Classify all images in a folder and below, in the order of their paths: paths, labels, probabilities, errors.

        Pictures are decoded while others are encoded, few at a time, so that any number fits; what the folder holds
        beside them is counted in a warning (images.listing). A JPEG 6 times larger than the encoder's pictures is
        decoded at a fraction of its size, which changes its pixels by about 1 level or less on average, and a label
        that was as good as tied; the `decoder` "cpu-exact" gives the pixels of `predict`.
        `batch` images are encoded at a time (None: 16 on a CPU, 64 on a GPU); `threads` are the cores to use on a CPU
        (None: all). All is of one version of the classifier.

        `joint` classifies all pictures together, as `predict_jointly` does, once all are encoded; their embeddings and
        all probabilities are then in memory. unknown="reject" gives `unknown_label` to pictures of none of the classes,
        with `keep` as for `predict`; with `joint` they are left out before the others are classified together.

        Raises FileNotFoundError without the folder, BadImageError for the first unreadable image unless `skip_bad`,
        IosrFastError for an unknown decoder, numbers below 1, a class named `unknown_label` or too few support images
        for `keep`, all before an image is read.
        """
        rejecting = check_rejecting(unknown, unknown_label, keep)
        fit = self._fitted()
        reader = self._reader(fit, batch=batch, skip_bad=skip_bad, threads=threads, decoder=decoder)
        return predict_folder(fit.head, reader, folder, joint, rejecting)

    def suggest(
        self,
        folder: str | Path,
        n: int,
        batch: int | None = None,
        skip_bad: bool = False,
        threads: int | None = None,
        decoder: str = "cpu",
    ) -> FolderSuggestions:
        """The n images of a folder and below to label next: diverse, and uncertain for this classifier, those that look
        like a class of their own first (methods.suggest). Before a fit, diverse alone.

        All images are encoded; the other arguments and the errors are those of `predict_folder`, and IosrFastError for
        n below 1 and for a folder without a readable image.
        """
        fit, n = self._fit, check_integer("n", n, 1)
        if fit is not None:
            fit.head.one_label("suggest")
        reader = self._reader(fit, batch=batch, skip_bad=skip_bad, threads=threads, decoder=decoder)
        return suggest_from_folder(None if fit is None else fit.head, reader, folder, n)

    def evaluate(
        self,
        images: Any,
        labels: Sequence[Any] | np.ndarray,
        unknown_images: Any = None,
        coverage: float = COVERAGE,
        keep: float = KEEP,
        batch: int | None = None,
        skip_bad: bool = False,
        threads: int | None = None,
        decoder: str = "cpu",
    ) -> Evaluation:
        """Measure the classifier on labelled images that are not its support images: accuracy with its interval, each
        class, confusions, log-loss and calibration, the most probable mistakes with their nearest support images, and
        what the promises of `predict_sets` (`coverage`) and of `predict(unknown="reject")` (`keep`) are worth.

        Labels are those of `score`. `unknown_images` belong to none of the classes. Each image is encoded once; print
        the result's `summary()`. `batch`, `threads`, `decoder` and errors as in `predict_folder`; `skip_bad` lists
        unreadable images in `errors` and counts them nowhere.

        Raises IosrFastError, before an image is read, for labels without a class and without images.
        """
        coverage, keep = check_share("coverage", coverage), check_share("keep", keep)
        fit, listed = self._fitted(), as_image_list(images)
        fit.head.one_label("evaluate", "score gives the mean average precision")
        ids = fit.class_ids(listed, labels)
        others = [] if unknown_images is None else as_image_list(unknown_images)
        reader = self._reader(fit, batch=batch, skip_bad=skip_bad, threads=threads, decoder=decoder)
        with progress("encode", len(listed) + len(others), shown=bool(self.progress)) as advance:
            return evaluate_images(fit.head, reader, listed, ids, others, coverage=coverage, keep=keep, advance=advance)

    def _reader(self, fit: Fit | None, **options: Any) -> Reader:
        """The reader of a fit's queries; without a fit, that of the CLIP that the parameters name."""
        if fit is None:
            clip = self._open()
            return Reader.of(clip.encoder, clip.engine, self.exif_orientation, **options)
        return Reader.of(fit.encoder, fit.clip.engine, fit.views.exif_orientation, **options)
