"""Embeddings on disk: part files that verify themselves, and the folder of parts that `iosr-fast embed` writes.

A part is one file, `part-00000.safetensors`, written atomically: tensors "plain" and, with an adapter, "adapted", both
(n, D) float32 or float16. Keys, errors and facts are JSON in the metadata entry "iosr_fast" (a single entry, because
safetensors does not order several, and the same embeddings must give the same bytes).

An unreadable image keeps its row: its error has the reason, its embeddings are NaN. The facts include a SHA-256 of all
this, which reading verifies.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.exceptions import DamagedFileError, IosrFastError
from iosr_fast.utils.files import new_file
from iosr_fast.utils.manifest import read_manifest

KIND = "embeddings"  # of the manifest
DTYPES = ("float32", "float16")
_ENTRY = "iosr_fast"


@dataclass(frozen=True)
class Part:
    """One file of embeddings: those of n images.

    keys        identify the images: their paths, for example
    embeddings  NumPy arrays (n, D), float32 or float16; NaN for unreadable images
    errors      the reason for each unreadable image; None for readable ones
    facts       JSON values of the writer

    >>> part = Part(["a.jpg"], Embeddings(np.ones((1, 4), np.float32) / 2), [None])
    >>> part.embeddings.plain.shape
    (1, 4)
    """

    keys: list[str]
    embeddings: Embeddings
    errors: list[str | None]
    facts: dict[str, Any] | None = None


def write_part(path: Path, part: Part) -> None:
    """Write a part atomically; the same part gives the same bytes. Raises ValueError for wrong lengths or dtypes."""
    from safetensors.numpy import save_file

    _check(part)
    facts = {**(part.facts or {}), "sha256": _digest(part)}
    entry = json.dumps({"facts": dict(sorted(facts.items())), "keys": part.keys, "errors": part.errors})
    arrays = {name: np.ascontiguousarray(array) for name, array in _arrays(part).items()}
    with new_file(path) as temporary:
        save_file(arrays, temporary, metadata={_ENTRY: entry})


def read_part(path: str | Path) -> Part:
    """Read and verify one part. Raises FileNotFoundError, ValueError if it is damaged or not a part of iosr_fast."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"expected a part with embeddings at {path}, found no such file")
    try:
        part, expected = _read(path)
        actual = _digest(part)
    except Exception as error:  # the error of a damaged file depends on the damaged bytes
        raise DamagedFileError(f"{path} is damaged or not a part of iosr_fast ({error}); compute it again") from error
    if actual != expected:
        raise DamagedFileError(f"{path} is damaged: its content differs from what was written; compute it again")
    return part


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
    1 of 1 images in 1 parts in ..., after ... s
    [['a.png']]
    """
    folder = Path(folder)
    manifest = read_manifest(folder, KIND, verify)
    for name in manifest["parts"]:
        yield read_part(folder / name)


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
    1 of 1 images in 1 parts in ..., after ... s
    (1, 128)
    """
    parts = list(iterate_parts(folder, verify))
    adapted = [part.embeddings.adapted for part in parts if part.embeddings.adapted is not None]
    return Part(
        [key for part in parts for key in part.keys],
        Embeddings(
            np.concatenate([part.embeddings.plain for part in parts]), np.concatenate(adapted) if adapted else None
        ),
        [error for part in parts for error in part.errors],
    )


def _check(part: Part) -> None:
    rows = {"keys": len(part.keys), "errors": len(part.errors)}
    for name, array in _arrays(part).items():
        if array.ndim != 2 or str(array.dtype) not in DTYPES or array.shape != part.embeddings.plain.shape:
            raise IosrFastError(f"expected {name} (n, D) of {' or '.join(DTYPES)}, got {array.shape} of {array.dtype}")
        rows[name] = len(array)
    if len(set(rows.values())) != 1:
        raise IosrFastError(f"expected the same number of rows in each, got {rows}")


def _arrays(part: Part) -> dict[str, np.ndarray]:
    plain, adapted = part.embeddings.plain, part.embeddings.adapted
    return {"plain": plain} if adapted is None else {"plain": plain, "adapted": adapted}


def _digest(part: Part) -> str:
    digest = hashlib.sha256(json.dumps([part.keys, part.errors, part.facts or {}], sort_keys=True).encode())
    for name, array in _arrays(part).items():
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def _read(path: Path) -> tuple[Part, str]:
    """A part and its SHA-256."""
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        entry = json.loads(file.metadata()[_ENTRY])
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    facts = dict(entry["facts"])
    expected = facts.pop("sha256")
    embeddings = Embeddings(arrays["plain"], arrays.get("adapted"))
    return Part(entry["keys"], embeddings, entry["errors"], facts), expected
