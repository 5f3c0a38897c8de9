"""Embeddings that exist already in the place of images: the encoder of a head that comes without one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from iosr_fast.encoders.encoder import Embeddings, Encoder, are_usable
from iosr_fast.exceptions import BadImageError, IosrFastError
from iosr_fast.images.geometry import Geometry
from iosr_fast.images.preprocess import DecodedBatch


class Rows(Encoder):
    """Takes rows of `width` numbers in the place of pixels, and scales them to unit length (Embeddings.of_rows)."""

    image_size, fingerprint, runtime = 1, "none", "none"

    def __init__(self, width: int, adapted: bool) -> None:
        self.width, self.adapted = width, adapted

    @classmethod
    def like(cls, embeddings: Embeddings) -> Rows:
        """Of rows that become such embeddings: D numbers, or 2 D where they are plain and adapted side by side."""
        adapted = embeddings.adapted is not None
        return cls(embeddings.plain.shape[1] * (1 + adapted), adapted)

    def read(self, rows: Any) -> np.ndarray:
        """Rows (n, width) float64 of an array, one row (width,) or many (n, width), or of an iterable of rows. Raises
        IosrFastError for another form, and naming the row for numbers that are not finite and for zeros, which have no
        direction."""
        expected = f"expected rows of {self.width} numbers, as this head takes them"
        try:
            read = np.array(rows if isinstance(rows, np.ndarray) else [*rows], np.float64)
        except (TypeError, ValueError) as error:
            raise IosrFastError(f"{expected}: {error}") from error
        if read.size and (read.ndim not in (1, 2) or read.shape[-1] != self.width):
            raise IosrFastError(f"{expected}, got an array of shape {read.shape}")
        read = read.reshape(-1, self.width)
        wrong = np.flatnonzero(~(np.isfinite(read).all(1) & are_usable(read, self.adapted)))
        if len(wrong):
            raise IosrFastError(f"{expected}, finite and not all zeros, got others in row {wrong[0]}")
        return read

    def keyed(self, rows: Any) -> list[KeyedRow]:
        """KeyedRows as they are; the keys of other rows (`read`) are their positions."""
        rows = rows if isinstance(rows, np.ndarray) else [*rows]
        if all(isinstance(row, KeyedRow) for row in rows):
            return list(rows)
        return [KeyedRow.of(str(i), row, "") for i, row in enumerate(self.read(rows))]

    def accepts(self, image: Any) -> bool:
        return isinstance(image, np.ndarray) and image.shape == (self.width,)

    def blank(self, count: int) -> np.ndarray:
        return np.ones((count, self.width))

    def encode(self, pixels: np.ndarray) -> Embeddings:
        return Embeddings.of_rows(pixels, self.adapted)


class KeyedRow(str):
    """The key of an embedding with its numbers (width,), as a path has an image, or the reason why there are none."""

    numbers: np.ndarray
    reason: str

    @classmethod
    def of(cls, key: str, numbers: np.ndarray, reason: str) -> KeyedRow:
        row = cls(key)
        row.numbers, row.reason = numbers, reason
        return row


def decode_rows(sources: Sequence[Any], geometry: Geometry, start: int = 0) -> DecodedBatch:
    """As preprocess.decode_batch, the numbers of KeyedRows of one width."""
    errors = [BadImageError(Path(row), start + i, row.reason) if row.reason else None for i, row in enumerate(sources)]
    rows = [row.numbers for row in sources if not row.reason]
    return DecodedBatch(list(errors), np.stack(rows) if rows else None)
