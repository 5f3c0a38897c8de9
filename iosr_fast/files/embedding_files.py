"""Embeddings on disk: the folder of parts that `iosr-fast embed` writes; and files of embeddings for a saved head.

A part is one file, `part-00000.safetensors`: tensors "plain" and, with an adapter, "adapted", both (n, D) float32 or
float16. Keys and errors are JSON in the metadata entry "iosr_fast" (a single entry, because safetensors does not order
several, and the same embeddings must give the same bytes). An unreadable image keeps its row: its error has the
reason, its embeddings are NaN. manifest.json has the SHA-256 of every part.
"""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from iosr_fast.encoders.encoder import Embeddings, are_usable
from iosr_fast.encoders.rows import KeyedRow, Rows
from iosr_fast.exceptions import DamagedFileError, IosrFastError
from iosr_fast.files.source import Source, check_files
from iosr_fast.sealed.manifest import read_manifest
from iosr_fast.sealed.outputs import check_utf8

KIND = "embeddings"  # of the manifest
_ENTRY = "iosr_fast"
FORMS = "a folder of `iosr-fast embed`, .npy (N, D), or .npz with x (N, D) and perhaps keys (N,) and y (N,); no objects"


@dataclass(frozen=True)
class Part:
    """One file of embeddings: those of n images.

    keys        identify the images: their paths, for example
    embeddings  NumPy arrays (n, D), float32 or float16; NaN for unreadable images
    errors      the reason for each unreadable image; None for readable ones

    >>> part = Part(["a.jpg"], Embeddings(np.ones((1, 4), np.float32) / 2), [None])
    >>> part.embeddings.plain.shape
    (1, 4)
    """

    keys: list[str]
    embeddings: Embeddings
    errors: list[str | None]


def encode_part(part: Part) -> bytes:
    """The file of a part; the same part gives the same bytes."""
    from safetensors.numpy import save

    arrays = {"plain": part.embeddings.plain, "adapted": part.embeddings.adapted}
    tensors = {name: np.ascontiguousarray(array) for name, array in arrays.items() if array is not None}
    return save(tensors, metadata={_ENTRY: json.dumps({"keys": part.keys, "errors": part.errors})})


def iterate_parts(folder: str | Path, verify: bool = True) -> Iterator[Part]:
    """The parts of a finished folder of `iosr-fast embed`, in order, one in memory at a time.

    `verify` compares every file's SHA-256 with the manifest.

    Raises FileNotFoundError without the folder or its manifest, and DamagedFileError for one that is unfinished,
    damaged or of another kind.

    >>> from iosr_fast.cli.embed import embed
    >>> embed("demo", "others", Path("out"))  # iosr-fast embed --engine demo --input others --out out
    >>> [part.embeddings.plain.shape for part in iterate_parts("out")]
    [(6, 128)]
    """
    folder = Path(folder)
    for name in read_manifest(folder, KIND, verify)["parts"]:
        yield _read_part(folder / name)


def read_embeddings(folder: str | Path, verify: bool = True) -> Part:
    """All parts of a finished folder of `iosr-fast embed` as one: every image once, in the order of the input.

    Raises as iterate_parts does.

    >>> from iosr_fast.cli.embed import embed
    >>> embed("demo", "others", Path("out"))  # iosr-fast embed --engine demo --input others --out out
    >>> read_embeddings("out").embeddings.plain.shape
    (6, 128)
    """
    parts = list(iterate_parts(folder, verify))
    return Part(
        [key for part in parts for key in part.keys],
        Embeddings.concatenate([part.embeddings for part in parts]),
        [error for part in parts for error in part.errors],
    )


def _read_part(path: Path) -> Part:
    from safetensors import safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            entry = json.loads(file.metadata()[_ENTRY])
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        return Part(entry["keys"], Embeddings(arrays["plain"], arrays.get("adapted")), entry["errors"])
    except Exception as error:  # the error of a damaged file depends on the damaged bytes
        raise DamagedFileError(f"{path} is damaged or not a part of iosr_fast ({error}); compute it again") from error


def read_rows(places: Sequence[str | Path], rows: Rows, pictures: bool = False) -> tuple[Source, list[str]]:
    """The rows of all files in order, such as a head takes, and their labels (none where a file has no y).

    Rows without keys are named by their positions. One that is not finite, or holds zeros, is as an image that can't be
    read. Raises FileNotFoundError, with `pictures` also for keys that are no files, and IosrFastError for another form
    or width.
    """
    keyed, labels = list[KeyedRow](), list[str]()
    for place in map(Path, places):
        numbers, keys, reasons, y = _read(place, rows)
        if numbers.dtype.kind not in "fiu" or numbers.ndim != 2 or numbers.shape[1] != rows.width:
            got = f"{numbers.dtype} of shape {numbers.shape}"
            raise IosrFastError(f"expected rows of {rows.width} numbers in {place}, as the head takes them, got {got}")
        finite, usable = np.isfinite(numbers).all(axis=1), are_usable(numbers, rows.adapted)
        faults = np.where(finite, np.where(usable, "", "it holds zeros"), "it holds other numbers than finite ones")
        said = [reason or fault for reason, fault in zip(reasons or [""] * len(numbers), faults.tolist(), strict=True)]
        named = [str(i) for i in range(len(numbers))] if keys is None else [str(key) for key in keys]
        if len(named) != len(numbers) or (y is not None and len(y) != len(numbers)):
            raise IosrFastError(f"expected keys and y for each of the {len(numbers)} rows of {place}, got others")
        keyed += map(KeyedRow.of, named, numbers, said)
        labels += [] if y is None else [str(label) for label in y]
    if not keyed:
        raise IosrFastError(f"expected embeddings, found none: {FORMS}")
    check_utf8(keyed)
    if pictures:
        check_files(keyed, "--html shows pictures: give embeddings whose keys are paths from here, or leave it out")
    return Source([*keyed], [*keyed]), labels if len(labels) == len(keyed) else []


def _read(place: Path, rows: Rows) -> tuple[np.ndarray, Any, Any, Any]:
    """Numbers, keys or None, reasons or None, labels or None."""
    if place.is_dir():
        part = read_embeddings(place)
        plain, adapted = part.embeddings.plain, part.embeddings.adapted
        both = np.hstack([plain, adapted]) if rows.adapted and adapted is not None else plain
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
