"""Predictions on disk: Parquet part files that check themselves.

Columns: key (string); label, class_id (string), probability, zero_shot and cache (float32, their sum is the logit) of
the best class; top, a list of structs with the same five fields, best first, of which the first is the label's own;
error (string or null); then whatever was carried over from the input. An image that could not be read keeps its row:
its error says why, the rest is null. The schema's metadata has, under "iosr_fast", the facts of the part as JSON with a
SHA-256 of them and of all columns but the carried ones, which have Parquet's own checksums.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from iosr_fast.state.predictions import Prediction
from iosr_fast.utils.files import new_file
from iosr_fast.utils.require import require

KIND = "classifications"  # of the manifest
SCORES = ("label", "class_id", "probability", "zero_shot", "cache")
COLUMNS = ("key", *SCORES, "top", "error")
_ENTRY = "iosr_fast"
_EXTRA = "parquet"


@dataclass(frozen=True)
class Answers:
    """A part: `table` has COLUMNS and the carried ones, `facts` what the writer wants to find again."""

    table: Any
    facts: dict[str, Any]

    @property
    def keys(self) -> list[str]:
        return list(self.table["key"].to_pylist())

    @property
    def errors(self) -> list[str | None]:
        return list(self.table["error"].to_pylist())


def write_answers(
    path: Path,
    keys: Sequence[str],
    predictions: Sequence[Prediction | None],
    errors: Sequence[str | None],
    columns: Any,
    facts: dict[str, Any],
) -> None:
    """Write a part whole or not at all; the same part gives the same bytes. `columns` is a pyarrow.Table or None."""
    pa, pq = require("pyarrow", _EXTRA), require("pyarrow.parquet", _EXTRA)
    types = dict.fromkeys(SCORES[:2], pa.string()) | dict.fromkeys(SCORES[2:], pa.float32())
    held = {"key": pa.array(keys, pa.string())}
    for name, kind in types.items():
        held[name] = pa.array([None if made is None else getattr(made, name) for made in predictions], kind)
    top = [
        None if made is None else [{name: getattr(one, name) for name in SCORES} for one in made.top]
        for made in predictions
    ]
    held["top"] = pa.array(top, pa.list_(pa.struct(list(types.items()))))
    held["error"] = pa.array(errors, pa.string())
    table = pa.table(held)
    sealed = json.dumps({**facts, "sha256": _digest(table, facts)}, sort_keys=True)
    for name in () if columns is None else columns.column_names:
        table = table.append_column(name, columns[name])
    with new_file(path) as temporary:
        pq.write_table(table.replace_schema_metadata({_ENTRY: sealed}), temporary, write_page_checksum=True)


def read_answers(path: str | Path) -> Answers:
    """Read and verify a part. Raises FileNotFoundError, ValueError where it is damaged or no part of classify.py."""
    pq = require("pyarrow.parquet", _EXTRA)
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"expected a part with predictions at {path}, found no such file")
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            table = file.read()
        facts = dict(json.loads(table.schema.metadata[_ENTRY.encode()]))
        expected, found = facts.pop("sha256"), _digest(table.select(COLUMNS), facts)
    except Exception as error:  # what a damaged file raises depends on which of its bytes are wrong
        raise ValueError(f"{path} is damaged or no part of classify.py ({error}); make it again") from error
    if found != expected:
        raise ValueError(f"{path} is damaged: what it holds is not what was written; make it again")
    return Answers(table.replace_schema_metadata(None), facts)


def check_names(names: Sequence[str]) -> None:
    """Raise ValueError where a carried column would take the place of one of a part's own."""
    if taken := sorted(set(names) & set(COLUMNS)):
        raise ValueError(
            f"expected --keep-columns without {list(COLUMNS)}, which are a part's own columns, got {taken}; rename "
            "them in the input"
        )


def _digest(table: Any, facts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps([table.to_pydict(), facts], sort_keys=True).encode()).hexdigest()
