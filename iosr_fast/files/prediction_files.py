"""Predictions on disk: Parquet part files that verify themselves.

Columns: key (string); label, class_id (string), probability, zero_shot and cache (float32, their sum is the logit) and
adapter (float32, of cache what comes through adapted embeddings) of the best class; top, a list of structs with the
same six fields, best first, starting with the label's own; error (string or null). An unreadable image keeps its row:
its error has the reason, the rest is null.

Where pictures of none of the classes are rejected, unknown_score (float32) stands before error; a rejected picture has
the label for these, a null as class_id, and the scores of its most likely class, top[0]. The schema's metadata entry
"iosr_fast" has the facts of the part as JSON, with a SHA-256 of them and of all columns.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from iosr_fast.exceptions import DamagedFileError
from iosr_fast.files import tables
from iosr_fast.head.predictions import Prediction
from iosr_fast.utils.files import new_file
from iosr_fast.utils.require import require

KIND = "classifications"  # of the manifest
SCORES = ("label", "class_id", "probability", "zero_shot", "cache", "adapter")
COLUMNS = ("key", *SCORES, "top", "error")
_UNKNOWN = "unknown_label"  # of the facts of a part in which unknown pictures are rejected


@dataclass(frozen=True)
class PredictionPart:
    """A part: `table` has its `columns_of`, `facts` are the writer's."""

    table: Any
    facts: dict[str, Any]

    @property
    def keys(self) -> list[str]:
        return list(self.table["key"].to_pylist())

    @property
    def errors(self) -> list[str | None]:
        return list(self.table["error"].to_pylist())


def columns_of(unknown_label: str | None) -> tuple[str, ...]:
    """A part's own columns."""
    return COLUMNS if unknown_label is None else (*COLUMNS[:-1], tables.UNKNOWN_SCORE, COLUMNS[-1])


def write_predictions(
    path: Path,
    keys: Sequence[str],
    predictions: Sequence[Prediction | None],
    errors: Sequence[str | None],
    facts: dict[str, Any],
    unknown_label: str | None = None,
) -> None:
    """Write a part atomically; the same part gives the same bytes. `unknown_label` is the label of rejected
    pictures, None if none are rejected."""
    pa = require("pyarrow", "parquet")
    classes = [
        None if prediction is None else [[getattr(one, name) for name in SCORES] for one in prediction.top]
        for prediction in predictions
    ]
    own = tables.prediction_columns(classes, SCORES)
    if unknown_label is not None:
        unknown = [None if prediction is None else prediction.unknown for prediction in predictions]
        scores = [None if one is None else one.score for one in unknown]
        rejected = [one is not None and one.rejected for one in unknown]
        own = tables.with_rejections(own, scores, rejected, unknown_label)
        facts = {**facts, _UNKNOWN: unknown_label}
    table = pa.table({"key": pa.array(keys, pa.string()), **own, "error": pa.array(errors, pa.string())})
    sealed = json.dumps({**facts, "sha256": _digest(table, facts)}, sort_keys=True)
    with new_file(path) as temporary:
        tables.write_part(temporary, table, sealed)


def read_predictions(path: str | Path) -> PredictionPart:
    """Read and verify a part. Raises FileNotFoundError, ValueError if it is damaged or not a part of iosr_fast."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"expected a part with predictions at {path}, found no such file")
    try:
        table, facts = tables.read_part(path)
        expected, actual = facts.pop("sha256"), _digest(table, facts)
    except ImportError:
        raise
    except Exception as error:  # the error of a damaged file depends on the damaged bytes
        raise DamagedFileError(f"{path} is damaged or not a part of iosr_fast ({error}); compute it again") from error
    if actual != expected:
        raise DamagedFileError(f"{path} is damaged: its content differs from what was written; compute it again")
    return PredictionPart(table, facts)


def count_rejected(path: Path, unknown_label: str) -> int:
    """How many pictures of a part are rejected. `unknown_label` is no class's name."""
    labels = require("pyarrow.parquet", "parquet").read_table(path, columns=["label"])["label"]
    return int(labels.to_pylist().count(unknown_label))


def _digest(table: Any, facts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps([table.to_pydict(), facts], sort_keys=True).encode()).hexdigest()
