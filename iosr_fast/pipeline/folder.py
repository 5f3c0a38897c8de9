"""The work of Classifier.predict_folder: the images of a folder with their labels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from iosr_fast.exceptions import BadImageError
from iosr_fast.images.decoders import choose_decoder
from iosr_fast.images.listing import Skipped, list_images
from iosr_fast.methods.joint import JointPrediction
from iosr_fast.pipeline.job import Job
from iosr_fast.pipeline.joint import classify_jointly
from iosr_fast.pipeline.stream import choose_batch

if TYPE_CHECKING:
    from iosr_fast.encoders.encoder import Encoder
    from iosr_fast.state.state import State


@dataclass(frozen=True)
class FolderPredictions:
    """The images of a folder, in the order of their paths, with their labels.

    paths          of the B readable images
    labels         (B,) class names
    probabilities  (B,) float32, of the labels
    errors         a BadImageError for each unreadable image, in order, with its path and the reason
    skipped        counts by reason of other files: not images, hidden, linked twice, ...
    joint          of images that are classified together, the JointPrediction with all probabilities; its `refused`
                   says why they are classified alone after all. None if `joint` was not asked for

    Iterating gives (path, label, probability) of each readable image.

    >>> from pathlib import Path
    >>> from tempfile import TemporaryDirectory
    >>> from PIL import Image
    >>> from iosr_fast import Classifier
    >>> from iosr_fast.clip.demo.pictures import load_pictures
    >>> pictures = load_pictures("held-out", min_styles=5)
    >>> images, labels = pictures.images[:20], [pictures.names[c] for c in pictures.concepts[:20]]
    >>> classifier = Classifier("demo", method="tip-adapter++", alpha=100, beta=20).fit(images, labels)
    >>> with TemporaryDirectory() as folder:
    ...     Image.fromarray(images[0]).save(Path(folder, "a.png"))
    ...     results = classifier.predict_folder(folder)
    >>> [(path.name, label == labels[0]) for path, label, probability in results], results.errors
    ([('a.png', True)], [])
    """

    paths: list[Path]
    labels: np.ndarray
    probabilities: np.ndarray
    errors: list[BadImageError]
    skipped: Skipped
    joint: JointPrediction | None = None

    def __len__(self) -> int:
        return len(self.paths)

    def __iter__(self) -> Iterator[tuple[Path, str, float]]:
        """(path, label, probability) of each image."""
        return zip(self.paths, self.labels.tolist(), self.probabilities.tolist(), strict=True)


def predict_folder(
    state: State,
    encoder: Encoder,
    engine: Path,
    folder: str | Path,
    *,
    exif_orientation: bool,
    batch: int | None,
    skip_bad: bool,
    threads: int | None,
    decoder: str,
    joint: bool = False,
) -> FolderPredictions:
    """As Classifier.predict_folder. `engine` is `encoder`'s folder."""
    batch = choose_batch(encoder, batch)
    chosen = choose_decoder(decoder, encoder.runtime, exif_orientation)
    listing = list_images(folder)
    job = Job(state, encoder, engine, chosen, listing.paths, batch, 1, threads, skip_bad)
    if joint:
        unread, together = classify_jointly(job, lambda images: None)
        return FolderPredictions(
            [Path(path) for path, error in zip(listing.paths, unread, strict=True) if error is None],
            together.labels,
            together.probabilities.max(1),
            [error for error in unread if error is not None],
            listing.skipped,
            together,
        )
    readable, labels, probabilities, errors = [], [], [], []
    with closing(job.answers(0, lambda images: None)) as batches:
        for path, answer in zip(listing.paths, chain.from_iterable(batches), strict=True):
            if isinstance(answer, BadImageError):
                errors.append(answer)
            else:
                readable.append(Path(path))
                labels.append(answer.label)
                probabilities.append(answer.probability)
    return FolderPredictions(
        readable, np.array(labels, dtype=str), np.array(probabilities, np.float32), errors, listing.skipped
    )
