"""Files of embeddings for a saved head: the folder that `iosr-fast embed` writes, .npy and .npz."""

from __future__ import annotations

import hashlib
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from iosr_fast.encoders.encoder import are_usable
from iosr_fast.encoders.rows import KeyedRow
from iosr_fast.exceptions import IosrFastError
from iosr_fast.files.embedding_files import read_embeddings
from iosr_fast.files.source import Source
from iosr_fast.sealed.outputs import check_utf8
from iosr_fast.store.bundle import SavedHead

FORMS = "a folder of `iosr-fast embed`, .npy (N, D), or .npz with x (N, D) and perhaps keys (N,) and y (N,); no objects"


def read_rows(places: Sequence[str | Path], head: SavedHead) -> tuple[Source, list[str], str]:
    """The rows of all files in order, their labels (none where a file has no y), and the SHA-256 of the numbers.

    Rows without keys are named by their positions. One that is not finite, or holds zeros, is as an image that can't be
    read. Raises FileNotFoundError, and IosrFastError for another form or width.
    """
    rows, labels, digest = list[KeyedRow](), list[str](), hashlib.sha256()
    for place in map(Path, places):
        numbers, keys, reasons, y = _read(place, head)
        if numbers.dtype.kind not in "fiu" or numbers.ndim != 2 or numbers.shape[1] != head.width:
            got = f"{numbers.dtype} of shape {numbers.shape}"
            raise IosrFastError(f"expected rows of {head.width} numbers in {place}, as the head takes them, got {got}")
        finite, usable = np.isfinite(numbers).all(axis=1), are_usable(numbers, head.adapted)
        faults = np.where(finite, np.where(usable, "", "it holds zeros"), "it holds other numbers than finite ones")
        said = [reason or fault for reason, fault in zip(reasons or [""] * len(numbers), faults.tolist(), strict=True)]
        named = [str(i) for i in range(len(numbers))] if keys is None else [str(key) for key in keys]
        if len(named) != len(numbers) or (y is not None and len(y) != len(numbers)):
            raise IosrFastError(f"expected keys and y for each of the {len(numbers)} rows of {place}, got others")
        rows += map(KeyedRow.of, named, numbers, said)
        labels += [] if y is None else [str(label) for label in y]
        digest.update(np.ascontiguousarray(numbers).data)
    if not rows:
        raise IosrFastError(f"expected embeddings, found none: {FORMS}")
    check_utf8(rows)
    return Source([*rows], [*rows]), labels if len(labels) == len(rows) else [], digest.hexdigest()


def _read(place: Path, head: SavedHead) -> tuple[np.ndarray, Any, Any, Any]:
    """Numbers, keys or None, reasons or None, labels or None."""
    if place.is_dir():
        part = read_embeddings(place)
        plain, adapted = part.embeddings.plain, part.embeddings.adapted
        both = np.hstack([plain, adapted]) if head.adapted and adapted is not None else plain
        return both, part.keys, part.errors, None
    try:
        loaded = np.load(place, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return loaded, None, None, None
        with loaded as file:
            keys, y = (file[name].ravel().tolist() if name in file else None for name in ("keys", "y"))
            return file["x"], keys, None, y
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise IosrFastError(f"{place} is damaged, or of another form than expected: {FORMS}") from error
