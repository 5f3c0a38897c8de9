"""The plan of a run that writes part files: everything that determines their bytes, except the images themselves.

An interrupted run resumes only with the same plan, and the same plan gives the same files.
"""

from __future__ import annotations

import hashlib
import json
import socket
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

import numpy as np

from iosr_fast import __version__
from iosr_fast.encoders.encoder import Encoder
from iosr_fast.encoders.runtimes import open_engine
from iosr_fast.files import embedding_files, prediction_files
from iosr_fast.files.embedding_files import Part
from iosr_fast.files.source import Chunk, Source
from iosr_fast.head.head import Head
from iosr_fast.head.predictions import Prediction, predict
from iosr_fast.head.rejecting import Rejecting
from iosr_fast.images.pixels import VERSION
from iosr_fast.store.bundle import Bundle, load_bundle
from iosr_fast.store.head_files import fingerprint

SCHEMA = 1
WritePart: TypeAlias = Callable[[Path, Part], None]  # writes a part file of a chunk's embeddings atomically
Opened: TypeAlias = tuple[Encoder, WritePart]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Embeddings of `images` images in `chunks` parts. `engine` is a fingerprint."""

    kind: ClassVar[str] = embedding_files.KIND  # of the manifest
    verb: ClassVar[str] = "embed"
    suffix: ClassVar[str] = "safetensors"
    counted: ClassVar[str] = "embedded"  # the manifest's name for the number of readable images

    input: dict[str, Any]
    images: int
    keys_sha256: str
    chunk: int
    chunks: int
    batch: int
    engine: str
    runtime: str
    image_size: int
    width: int
    adapted: bool
    dtype: str
    exif_orientation: bool = True
    pixels: int = VERSION
    schema: int = SCHEMA

    def digest(self) -> str:
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2)

    def part_name(self, number: int) -> str:
        return f"part-{number:0{max(5, len(str(self.chunks - 1)))}d}.{self.suffix}"

    def part_facts(self, chunk: Chunk) -> dict[str, Any]:
        """The facts that a part of this plan stores, the same on every machine."""
        return {
            "plan": self.digest(),
            "part": chunk.number,
            "chunk": chunk.digest(),
            "engine": self.engine,
            "iosr_fast": __version__,
        }

    def open(self, folder: str | Path, threads: int) -> Opened:
        """The encoder, and the writer of parts. Raises RuntimeError if `folder` has another engine than the plan."""
        encoder = open_engine(folder, self.runtime, threads=threads)
        if encoder.fingerprint != self.engine:
            raise RuntimeError(
                f"expected one engine on all machines, but {socket.gethostname()} has another in {folder}"
            )
        return encoder, self.writer(None)

    def writer(self, bundle: Bundle | None) -> WritePart:
        return embedding_files.write_part

    def check_part(self, path: Path, chunk: Chunk) -> tuple[str | None, int]:
        """Why a part must be computed again (None: it is valid), and how many of its images were unreadable."""
        try:
            part = self._read(path)
        except (ValueError, OSError) as error:
            return str(error), 0
        facts, expected = part.facts or {}, self.part_facts(chunk)
        reasons = {"engine": "another engine wrote it", "plan": "it is of another plan", "part": "it is another part"}
        reasons |= {"chunk": "its images have changed since", "iosr_fast": "another version of iosr_fast wrote it"}
        for name, reason in reasons.items():
            if facts.get(name) != expected[name]:
                return reason, 0
        if part.keys != [item.key for item in chunk.items]:
            return "it holds other images", 0
        return self._content_error(part), sum(error is not None for error in part.errors)

    def count(self, parts: Sequence[Path]) -> dict[str, Any]:
        """What the manifest says of all parts beside the number of images."""
        return {}

    def _read(self, path: Path) -> Any:
        """A part with `keys`, `errors` and `facts`. Raises OSError or ValueError if it can't be read."""
        return embedding_files.read_part(path)

    def _content_error(self, part: Any) -> str | None:
        """How a part's content contradicts this plan; None if it does not."""
        plain, adapted = part.embeddings.plain, part.embeddings.adapted
        if plain.shape[1] == self.width and str(plain.dtype) == self.dtype and (adapted is not None) == self.adapted:
            return None
        return f"expected embeddings of width {self.width} and {self.dtype}, got {plain.shape[1]} and {plain.dtype}"


@dataclass(frozen=True, kw_only=True)
class ClassifyPlan(Plan):
    """Predictions, with the `top` classes of each image. `bundle` is the fingerprint of the classifier's head, so that
    parts of two classifiers never mix. `unknown_label` and `keep` are those of Rejecting, or None."""

    kind: ClassVar[str] = prediction_files.KIND
    verb: ClassVar[str] = "classify"
    suffix: ClassVar[str] = "parquet"
    counted: ClassVar[str] = "classified"

    bundle: str
    classes: int
    method: str
    top: int
    unknown_label: str | None = None
    keep: float | None = None

    def open(self, folder: str | Path, threads: int) -> Opened:
        bundle = load_bundle(folder, verify=False)
        if fingerprint(bundle.head) != self.bundle:
            raise RuntimeError(
                f"expected one classifier on all machines, but {socket.gethostname()} has another in {folder}"
            )
        source = bundle.files or bundle.engine
        encoder = open_engine(source, self.runtime, verify=False, threads=threads, adapted=self.adapted)
        return encoder, self.writer(bundle)

    def writer(self, bundle: Bundle | None) -> WritePart:
        assert bundle is not None
        return partial(self._write_predictions, bundle.head.one_label("a folder of parts"))

    def _write_predictions(self, head: Head, path: Path, part: Part) -> None:
        """Classify a chunk's embeddings, `batch` at a time, so that the result depends on the chunk alone."""
        predictions: list[Prediction | None] = [None] * len(part.keys)
        readable = np.flatnonzero([error is None for error in part.errors])
        for start in range(0, len(readable), self.batch):
            rows = readable[start : start + self.batch]
            for row, prediction in zip(
                rows, predict(head, part.embeddings[rows], self.top, keep=self.keep), strict=True
            ):
                predictions[row] = prediction
        prediction_files.write_predictions(
            path, part.keys, predictions, part.errors, part.facts or {}, self.unknown_label
        )

    def count(self, parts: Sequence[Path]) -> dict[str, Any]:
        if self.unknown_label is None:
            return {}
        return {"rejected": sum(prediction_files.count_rejected(path, self.unknown_label) for path in parts)}

    def _read(self, path: Path) -> Any:
        return prediction_files.read_predictions(path)

    def _content_error(self, part: Any) -> str | None:
        expected = list(prediction_files.columns_of(self.unknown_label))
        if part.table.column_names == expected:
            return None
        return f"expected the columns {expected}, got {part.table.column_names}"


PLANS: dict[str, type[Plan]] = {plan.kind: plan for plan in (Plan, ClassifyPlan)}


def make_plan(
    source: Source,
    chunks: Sequence[Chunk],
    engine: dict[str, Any],
    runtime: str,
    *,
    chunk: int,
    batch: int,
    dtype: str = "float32",
    bundle: Bundle | None = None,
    top: int = 1,
    rejecting: Rejecting | None = None,
) -> Plan:
    """A plan to embed or, with a `bundle`, to classify. `engine` is a manifest; `runtime` will execute that engine."""
    common: dict[str, Any] = {
        "input": source.described,
        "images": len(source.items),
        "keys_sha256": source.keys_digest(),
        "chunk": chunk,
        "chunks": len(chunks),
        "batch": batch,
        "engine": engine["fingerprint"],
        "runtime": runtime,
        "image_size": engine["image_size"],
        "width": engine["width"],
        "adapted": engine["first_adapted_block"] is not None and (bundle is None or bundle.head.needs_adapted),
        "dtype": dtype,
    }
    if bundle is None:
        return Plan(**common)
    return ClassifyPlan(
        **common,
        exif_orientation=bundle.views.exif_orientation,
        bundle=fingerprint(bundle.head),
        classes=len(bundle.head.uids),
        method=bundle.head.config.method,
        top=top,
        unknown_label=None if rejecting is None else rejecting.label,
        keep=None if rejecting is None else rejecting.keep,
    )
