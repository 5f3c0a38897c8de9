"""The work of Classifier.suggest: the images of a folder to label next."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from iosr_fast.encoders.rows import KeyedRow
from iosr_fast.exceptions import BadImageError, IosrFastError
from iosr_fast.files.source import Source
from iosr_fast.files.stream import Reader
from iosr_fast.head.labels import SEPARATOR
from iosr_fast.head.predictions import predict
from iosr_fast.images.listing import Listing, Skipped, list_images
from iosr_fast.methods.suggest import suggest
from iosr_fast.methods.support_set import image_rows
from iosr_fast.utils.numbers import check_integer
from iosr_fast.utils.result import Result

if TYPE_CHECKING:
    from iosr_fast.head.head import Head


@dataclass(frozen=True, repr=False)
class FolderSuggestions(Result):
    """The n images of a folder to label next, the most useful first.

    paths          of the n images
    stands         (n,) int64, how many images of the folder each one stands for, itself included
    labels         (n,) what the classifier takes them for, joined by ";" where these may be several; "" before a fit
    probabilities  (n,) float32, of the most likely class; 0 before a fit
    images         how many readable images the folder has
    errors         a BadImageError for each unreadable image
    skipped        counts by reason of other files

    Iterating gives (path, label, probability) of each image.

    >>> from iosr_fast import Classifier
    >>> suggestions = Classifier("demo").suggest("photos", 3)
    >>> len(suggestions), int(suggestions.stands.sum()) == suggestions.images
    (3, True)
    """

    paths: list[Path]
    stands: np.ndarray
    labels: np.ndarray
    probabilities: np.ndarray
    images: int
    errors: list[BadImageError]
    skipped: Skipped

    def __len__(self) -> int:
        return len(self.paths)

    def __iter__(self) -> Iterator[tuple[Path, str, float]]:
        return zip(self.paths, self.labels.tolist(), self.probabilities.tolist(), strict=True)

    def _columns(self) -> dict[str, Any]:
        paths = [*map(str, self.paths)]
        return {"path": paths, "guess": self.labels, "probability": self.probabilities, "stands_for": self.stands}


def suggest_from_folder(head: Head | None, reader: Reader, folder: str | Path | Source, n: int) -> FolderSuggestions:
    """As Classifier.suggest; `head` is None before a fit. Embeddings are named by their keys."""
    n = check_integer("n", n, 1)
    listing = Listing(folder.paths, Skipped()) if isinstance(folder, Source) else list_images(folder)
    readable, errors, queries = reader.embed(listing.paths)
    if queries is None:
        raise IosrFastError("expected images to choose from, found none that can be read")
    rows = image_rows(queries, "plain" if head is None else head.config.which, None)
    if head is None:
        best = suggest(rows, n)
        labels, probabilities = np.full(len(best.rows), ""), np.zeros(len(best.rows), np.float32)
    else:
        logits = head.score(queries)
        best = suggest(rows, n, head.link.entropy(head.calibrated(logits)))
        answers = predict(head, queries[best.rows], logits=logits[best.rows])
        labels = np.array([SEPARATOR.join(label for label, _ in one.pairs) for one in answers], str)
        probabilities = np.array([one.probability for one in answers], np.float32)
    chosen = [listing.paths[readable[row]] for row in best.rows]
    paths: Any = [path if isinstance(path, KeyedRow) else Path(path) for path in chosen]
    return FolderSuggestions(paths, best.stands, labels, probabilities, len(readable), errors, listing.skipped)
