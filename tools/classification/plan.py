"""The plan of a run that classifies: tools.embedding.plan's, and which classifier it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

from iosr_fast.state.bundle import Bundle
from iosr_fast.state.state_files import fingerprint
from tools.classification.parts import COLUMNS, KIND, read_answers
from tools.embedding.items import Chunk, Source
from tools.embedding.plan import Plan, make_plan


@dataclass(frozen=True, kw_only=True)
class ClassifyPlan(Plan):
    """`bundle` is the fingerprint of the classifier's state (State.fingerprint): parts of two classifiers never mix,
    whatever their folders are called. `top` classes are told of each image."""

    kind: ClassVar[str] = KIND
    counted: ClassVar[str] = "classified"

    bundle: str
    classes: int
    method: str
    top: int

    def read(self, path: Path) -> Any:
        return read_answers(path)

    def unfit(self, part: Any) -> str | None:
        kept = self.input.get("keep_columns", [])
        if part.table.column_names == [*COLUMNS, *kept]:
            return None
        return f"expected the columns {[*COLUMNS, *kept]}, got {part.table.column_names}"


def classify_plan(
    source: Source,
    chunks: Sequence[Chunk],
    bundle: Bundle,
    engine: dict[str, Any],
    runtime: str,
    *,
    chunk: int,
    batch: int,
    top: int,
) -> ClassifyPlan:
    """`engine` is the manifest of the bundle's engine, `runtime` what will execute it."""
    common = make_plan(
        source,
        chunks,
        engine,
        runtime,
        chunk=chunk,
        batch=batch,
        dtype="float32",
        file_format="parquet",
        exif_orientation=bundle.views.exif_orientation,
    )
    return ClassifyPlan(
        **{field.name: getattr(common, field.name) for field in fields(common)},
        bundle=fingerprint(bundle.state),
        classes=len(bundle.state.uids),
        method=bundle.state.config.method,
        top=top,
    )
