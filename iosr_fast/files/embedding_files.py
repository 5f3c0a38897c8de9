"""Embeddings on disk: the folder of parts that `iosr-fast embed` writes.

A part is one file, `part-00000.safetensors`: tensors "plain" and, with an adapter, "adapted", both (n, D) float32 or
float16. Keys and errors are JSON in the metadata entry "iosr_fast" (a single entry, because safetensors does not order
several, and the same embeddings must give the same bytes). An unreadable image keeps its row: its error has the
reason, its embeddings are NaN. manifest.json has the SHA-256 of every part.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.exceptions import DamagedFileError
from iosr_fast.sealed.manifest import read_manifest

KIND = "embeddings"  # of the manifest
_ENTRY = "iosr_fast"


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


def write_part(path: Path, part: Part) -> None:
    """Write a part; the same part gives the same bytes."""
    from safetensors.numpy import save_file

    arrays = {"plain": part.embeddings.plain, "adapted": part.embeddings.adapted}
    tensors = {name: np.ascontiguousarray(array) for name, array in arrays.items() if array is not None}
    save_file(tensors, path, metadata={_ENTRY: json.dumps({"keys": part.keys, "errors": part.errors})})


def iterate_parts(folder: str | Path, verify: bool = True) -> Iterator[Part]:
    """The parts of a finished folder of `iosr-fast embed`, in order, one in memory at a time.

    `verify` compares every file's SHA-256 with the manifest.

    Raises FileNotFoundError without the folder or its manifest, and DamagedFileError for one that is unfinished,
    damaged or of another kind.

    >>> from tempfile import TemporaryDirectory
    >>> from PIL import Image
    >>> from iosr_fast.cli.embed import embed
    >>> with TemporaryDirectory() as folder:
    ...     Path(folder, "in").mkdir()
    ...     Image.new("RGB", (80, 60)).save(Path(folder, "in", "a.png"))
    ...     embed("demo", str(Path(folder, "in")), Path(folder, "out"), threads=1)  # iosr-fast embed --engine demo ...
    ...     [part.keys for part in iterate_parts(Path(folder, "out"))]
    [['a.png']]
    """
    folder = Path(folder)
    for name in read_manifest(folder, KIND, verify)["parts"]:
        yield _read_part(folder / name)


def read_embeddings(folder: str | Path, verify: bool = True) -> Part:
    """All parts of a finished folder of `iosr-fast embed` as one: every image once, in the order of the input.

    Raises as iterate_parts does.

    >>> from tempfile import TemporaryDirectory
    >>> from PIL import Image
    >>> from iosr_fast.cli.embed import embed
    >>> with TemporaryDirectory() as folder:
    ...     Path(folder, "in").mkdir()
    ...     Image.new("RGB", (80, 60)).save(Path(folder, "in", "a.png"))
    ...     embed("demo", str(Path(folder, "in")), Path(folder, "out"), threads=1)  # iosr-fast embed --engine demo ...
    ...     read_embeddings(Path(folder, "out")).embeddings.plain.shape
    (1, 128)
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
