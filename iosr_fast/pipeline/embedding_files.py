"""Embeddings on disk: part files that verify themselves, and the folder of parts that `iosr-fast embed` writes.

A part is one file, written atomically:

- `part-00000.safetensors`: tensors "plain" and, with an adapter, "adapted", both (n, D) float32 or float16. Keys,
  errors and facts are JSON in the metadata entry "iosr_fast" (a single entry, because safetensors does not order
  several, and the same embeddings must give the same bytes).
- `part-00000.parquet`: columns key (string), plain and adapted (fixed-size list of D), error (string or null), then
  the columns carried from the input; facts are JSON in the schema's metadata under "iosr_fast".

An unreadable image keeps its row: its error has the reason, its embeddings are null in Parquet and NaN in safetensors.
The facts include a SHA-256 of all this, which reading verifies; carried columns have Parquet's own checksums.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.exceptions import DamagedFileError, IosrFastError
from iosr_fast.pipeline import tables
from iosr_fast.utils.files import new_file
from iosr_fast.utils.manifest import read_manifest
from iosr_fast.utils.require import require

Format = Literal["safetensors", "parquet"]
FORMATS: tuple[Format, ...] = ("safetensors", "parquet")
KIND = "embeddings"  # of the manifest
COLUMNS = ("key", "plain", "adapted", "error")
DTYPES = ("float32", "float16")
_ENTRY = "iosr_fast"


@dataclass(frozen=True)
class Part:
    """One file of embeddings: those of n images.

    keys        identify the images: their paths, for example
    embeddings  NumPy arrays (n, D), float32 or float16; NaN for unreadable images
    errors      the reason for each unreadable image; None for readable ones
    columns     a pyarrow.Table of n rows carried from the input, or None; Parquet only
    facts       JSON values of the writer

    >>> part = Part(["a.jpg"], Embeddings(np.ones((1, 4), np.float32) / 2), [None])
    >>> part.embeddings.plain.shape
    (1, 4)
    """

    keys: list[str]
    embeddings: Embeddings
    errors: list[str | None]
    columns: Any = None
    facts: dict[str, Any] | None = None


def write_part(path: Path, part: Part, file_format: Format) -> None:
    """Write a part atomically; the same part gives the same bytes.

    Raises ValueError for wrong lengths, dtypes or format, ImportError for Parquet without pyarrow.
    """
    _check(part, file_format)
    facts = json.dumps({**(part.facts or {}), "sha256": _digest(part)}, sort_keys=True)
    with new_file(path) as temporary:
        if file_format == "parquet":
            _write_parquet(temporary, part, facts)
        else:
            _write_safetensors(temporary, part, facts)


def read_part(path: str | Path) -> Part:
    """Read and verify one part. Raises FileNotFoundError, ValueError if it is damaged or not a part of iosr_fast."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"expected a part with embeddings at {path}, found no such file")
    if path.suffix not in (".parquet", ".safetensors"):
        raise IosrFastError(f"expected a part ending in .parquet or .safetensors, got {path.name}")
    try:
        part = _read_parquet(path) if path.suffix == ".parquet" else _read_safetensors(path)
        facts = dict(part.facts or {})
        expected = facts.pop("sha256")
        part = replace(part, facts=facts)
        actual = _digest(part)
    except ImportError:
        raise
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
    columns = [part.columns for part in parts if part.columns is not None]
    adapted = [part.embeddings.adapted for part in parts if part.embeddings.adapted is not None]
    return Part(
        [key for part in parts for key in part.keys],
        Embeddings(
            np.concatenate([part.embeddings.plain for part in parts]), np.concatenate(adapted) if adapted else None
        ),
        [error for part in parts for error in part.errors],
        require("pyarrow", "parquet").concat_tables(columns) if columns else None,
    )


def _check(part: Part, file_format: str) -> None:
    if file_format not in FORMATS:
        raise IosrFastError(f"expected format {' or '.join(FORMATS)}, got {file_format!r}")
    rows = {"keys": len(part.keys), "errors": len(part.errors)}
    for name, array in _arrays(part).items():
        if array.ndim != 2 or str(array.dtype) not in DTYPES or array.shape != part.embeddings.plain.shape:
            raise IosrFastError(f"expected {name} (n, D) of {' or '.join(DTYPES)}, got {array.shape} of {array.dtype}")
        rows[name] = len(array)
    if part.columns is not None:
        if file_format != "parquet":
            raise IosrFastError("expected format parquet for a part with carried columns, got safetensors")
        if taken := sorted(set(part.columns.column_names) & set(COLUMNS)):
            raise IosrFastError(f"expected carried columns with names other than {list(COLUMNS)}, got {taken}")
        rows["columns"] = part.columns.num_rows
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


def _write_safetensors(path: Path, part: Part, facts: str) -> None:
    from safetensors.numpy import save_file

    entry = json.dumps({"facts": json.loads(facts), "keys": part.keys, "errors": part.errors})
    arrays = {name: np.ascontiguousarray(array) for name, array in _arrays(part).items()}
    save_file(arrays, path, metadata={_ENTRY: entry})


def _read_safetensors(path: Path) -> Part:
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        entry = json.loads(file.metadata()[_ENTRY])
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    embeddings = Embeddings(arrays["plain"], arrays.get("adapted"))
    return Part(entry["keys"], embeddings, entry["errors"], facts=dict(entry["facts"]))


def _write_parquet(path: Path, part: Part, facts: str) -> None:
    pa = require("pyarrow", "parquet")
    bad = np.array([error is not None for error in part.errors])
    columns = {"key": pa.array(part.keys, pa.string())}
    for name, array in _arrays(part).items():
        flat = pa.array(np.ascontiguousarray(array).reshape(-1))
        mask = pa.array(bad) if bad.any() else None
        columns[name] = pa.FixedSizeListArray.from_arrays(flat, array.shape[1], mask=mask)
    columns["error"] = pa.array(part.errors, pa.string())
    if part.columns is not None:
        columns |= {name: part.columns[name] for name in part.columns.column_names}
    dictionaries = [name for name in columns if name not in ("plain", "adapted")]
    tables.write_part(path, pa.table(columns), facts, use_dictionary=dictionaries)


def _read_parquet(path: Path) -> Part:
    table, facts = tables.read_part(path)
    arrays = {name: _rows(table[name]) for name in ("plain", "adapted") if name in table.column_names}
    carried = table.drop_columns([name for name in COLUMNS if name in table.column_names])
    return Part(
        table["key"].to_pylist(),
        Embeddings(arrays["plain"], arrays.get("adapted")),
        table["error"].to_pylist(),
        carried if carried.num_columns else None,
        facts,
    )


def _rows(column: Any) -> np.ndarray:
    """A column of fixed-size lists -> (n, D); null rows become NaN."""
    lists = column.combine_chunks()
    width, valid = lists.type.list_size, ~np.asarray(lists.is_null())
    values = lists.flatten().to_numpy(zero_copy_only=False)  # without the null lists
    rows = np.full((len(lists), width), np.nan, values.dtype)
    rows[valid] = values.reshape(-1, width)
    return rows
