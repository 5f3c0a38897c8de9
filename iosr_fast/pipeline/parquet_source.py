"""Parquet files with a column of image paths."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from iosr_fast.exceptions import IosrFastError
from iosr_fast.images.listing import walk
from iosr_fast.pipeline.source import Item, Source, check_keys, stamp_of
from iosr_fast.utils.require import require

READERS = 16  # files looked up at a time: each lookup waits on a network file system


def table_source(location: Path, path_column: str = "path", keep_columns: Sequence[str] = ()) -> Source:
    """The images listed in a Parquet file, or in every .parquet file below a folder, sorted by path.

    Relative paths start at the file's folder (at `location` if it is a folder). `keep_columns` are carried to the
    output. A path without a file is an item with a fault. Raises FileNotFoundError for a folder without .parquet files,
    ValueError for a missing column, an empty or repeated path, or files with different columns.
    """
    pa, pq = require("pyarrow", "parquet"), require("pyarrow.parquet", "parquet")
    folder = location if location.is_dir() else location.parent
    files = sorted(path for path, _ in walk(location, {".parquet"})) if location.is_dir() else [str(location)]
    if not files:
        raise FileNotFoundError(f"expected files ending in .parquet in {location}, found none")
    wanted = list(dict.fromkeys([path_column, *keep_columns]))
    tables = []
    for file in files:
        try:
            names = pq.read_schema(file).names
            if missing := [name for name in wanted if name not in names]:
                raise IosrFastError(
                    f"expected columns {missing} in {file}, found {names}; --path-column names the column of paths"
                )
            tables.append(pq.read_table(file, columns=wanted, partitioning=None).replace_schema_metadata(None))
        except pa.ArrowException as error:
            raise IosrFastError(f"expected a Parquet file at {file}: {error}") from error
    try:
        table = pa.concat_tables(tables)
    except pa.ArrowInvalid as error:
        raise IosrFastError(f"expected the same types of {wanted} in every file of {location}: {error}") from error
    column = table[path_column]
    if not pa.types.is_string(column.type) and not pa.types.is_large_string(column.type):
        raise IosrFastError(f"expected strings in the column {path_column} of {location}, got {column.type}")
    if column.null_count or pa.compute.any(pa.compute.equal(column, "")).as_py():
        raise IosrFastError(f"expected a path in every row of the column {path_column} of {location}, got empty ones")
    if table.num_rows == 0:
        raise IosrFastError(f"expected rows in {location}, found none")
    table = table.sort_by(path_column)
    with ThreadPoolExecutor(READERS) as pool:
        items = list(pool.map(lambda key: _item(key, folder), table[path_column].to_pylist()))
    check_keys(items, f"the column {path_column} of {location}")
    described = {
        "kind": "parquet",
        "path": str(location),
        "path_column": path_column,
        "keep_columns": list(keep_columns),
    }
    return Source(described, items, rows=table.select(list(keep_columns)) if keep_columns else None)


def _item(key: str, folder: Path) -> Item:
    path = os.path.join(folder, key)  # an absolute key is the path
    try:
        status = os.stat(path)
    except OSError as error:
        return Item(key, path, "", fault="no such file" if isinstance(error, FileNotFoundError) else str(error))
    return Item(key, path, stamp_of(status)) if os.path.isfile(path) else Item(key, path, "", fault="it is not a file")
