"""What a run makes of its images: embeddings by an engine, or predictions by a saved classifier.

Plain values, which another machine can open for itself; `facts` tell whether it has the same engine and classifier.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain, repeat
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, TypeAlias

import numpy as np

from iosr_fast import __version__
from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.encoders.engine_folder import ENGINE_KIND
from iosr_fast.encoders.runtimes import open_engine
from iosr_fast.files.detections import DetectionsTable
from iosr_fast.files.embedding_files import KIND, Part, encode_part
from iosr_fast.files.joint import classify_jointly
from iosr_fast.files.stream import Reader, ReadOptions
from iosr_fast.files.tables import PROMISE, TREE_PROMISE, CsvTable, ParquetTable, TableRow, row_of
from iosr_fast.head.head import Head
from iosr_fast.head.predictions import Prediction, predict
from iosr_fast.head.support_images import SupportSettings
from iosr_fast.head.verdict import NONE_WITHHELD, Abstention
from iosr_fast.images.detector_files import OURS
from iosr_fast.sealed.manifest import read_manifest
from iosr_fast.store.bundle import Bundle, load
from iosr_fast.store.head_files import fingerprint
from iosr_fast.utils.progress import say

UPRIGHT = SupportSettings(exif_orientation=True)


class Counts(NamedTuple):
    """How many `images` there are, how many of them are unreadable, how many belong to none of the classes, and how
    many labels are accepted."""

    images: int
    errors: int = 0
    rejected: int = 0
    accepted: int = 0


@dataclass(frozen=True)
class Embed:
    """Embeddings of the engine in a folder, float32 or float16, of images read by `settings`.

    Of each work `kind` is the manifest's, `verb` names it in a bar, and `readable` is its word for readable images.
    `facts` (JSON values) determine the parts beside the images. `use` gives the result of a batch, in several threads
    at once; `encode` gives the bytes of a part by the results of its batches, and how many images are rejected and how
    many labels accepted: `errors` say why an image can't be read, `first` is whether it is the first part.
    """

    folder: str
    dtype: str = "float32"
    settings: SupportSettings = UPRIGHT
    kind: ClassVar[str] = KIND
    verb: ClassVar[str] = "embed"
    readable: ClassVar[str] = "embedded"
    suffix: ClassVar[str] = ".safetensors"

    @cached_property
    def facts(self) -> dict[str, Any]:
        manifest = read_manifest(self.folder, ENGINE_KIND, verify=False)
        names = {"engine": "fingerprint", "image_size": "image_size", "width": "width"}
        adapted = manifest["first_adapted_block"] is not None
        facts = {**{name: manifest[key] for name, key in names.items()}, "adapted": adapted, "dtype": self.dtype}
        return facts | ({"margin": margin} if (margin := self.settings.margin) else {})

    def open(self, options: ReadOptions) -> Reader:
        encoder = open_engine(self.folder, options.runtime, threads=options.threads)
        return Reader(encoder, Path(self.folder), self.settings, options)

    def use(self, embeddings: Embeddings) -> Embeddings:
        return embeddings.to_numpy()

    def encode(
        self, keys: list[str], results: list[Embeddings], errors: list[str | None], first: bool
    ) -> tuple[bytes, int, int]:
        readable = np.flatnonzero([error is None for error in errors])
        rows = {}
        for name in ("plain", "adapted")[: 1 + self.facts["adapted"]]:
            rows[name] = np.full((len(keys), self.facts["width"]), np.nan, self.dtype)
            if results:
                rows[name][readable] = np.concatenate([getattr(result, name) for result in results])
        return encode_part(Part(keys, Embeddings(rows["plain"], rows.get("adapted")), errors)), 0, 0


@dataclass(frozen=True)
class Classify:
    """Predictions of the classifier in a folder, with the `top` classes of each image, as a table of this `form`.

    "parts" is a folder of Parquet files. Rejected pictures have the label of `abstention`. `joint` classifies all
    images together, in one part. The classes of `detections` are written into their file.
    """

    folder: str
    form: Literal["csv", "parquet", "parts", "json"] = "csv"
    top: int = 1
    abstention: Abstention = NONE_WITHHELD
    joint: bool = False
    detections: DetectionsTable | None = None
    kind: ClassVar[str] = "classifications"
    verb: ClassVar[str] = "classify"
    readable: ClassVar[str] = "classified"

    @cached_property
    def bundle(self) -> Bundle:
        return load(self.folder)

    @property
    def head(self) -> Head:
        return self.bundle.head

    def check(self) -> None:
        """Raise IosrFastError, before an image is read, for what this classifier can't do."""
        if self.joint or self.abstention != NONE_WITHHELD:
            self.abstention.check(self.head, joint=self.joint)

    @cached_property
    def table(self) -> CsvTable | ParquetTable | DetectionsTable:
        if self.detections is not None:
            name = f"{OURS}{__version__} classifier {fingerprint(self.head)[:12]}"
            return replace(self.detections, classifier=name)
        label, promise = self.abstention.label, tuple[str, ...]()
        if self.abstention.max_error is not None:
            promise = PROMISE if self.head.paths is None else TREE_PROMISE
        multi_label = self.head.is_multi_label
        if self.form == "csv":
            return CsvTable(min(self.top, len(self.head.class_names)), label, multi_label, promise)
        return ParquetTable(label, promise, multi_label)

    @property
    def suffix(self) -> str:
        return self.table.suffix

    @cached_property
    def facts(self) -> dict[str, Any]:
        head = self.head
        return {
            "engine": self.bundle.encoder_fingerprint,
            "classifier": fingerprint(head),
            "classes": len(head.class_names),
            "method": head.config.method,
            "exif_orientation": self.bundle.settings.exif_orientation,
            "form": self.form,
            "top": self.top,
            "unknown_label": self.abstention.label,
            "keep": self.abstention.keep,
            "max_error": self.abstention.max_error,
            "joint": self.joint,
            **({"margin": margin} if (margin := self.bundle.settings.margin) else {}),
            **({} if self.detections is None else {"document": self.detections.sha256}),
        }

    def open(self, options: ReadOptions) -> Reader:
        fit = self.bundle.open(options.runtime, options.threads, 1)
        return Reader(fit.encoder, fit.clip.engine, fit.settings, options)

    def use(self, embeddings: Embeddings) -> Embeddings | Sequence[Prediction]:
        if self.joint:
            return embeddings.to_numpy()
        return predict(self.head, embeddings, self.top, abstention=self.abstention)

    def encode(
        self, keys: list[str], results: list[Any], errors: list[str | None], first: bool
    ) -> tuple[bytes, int, int]:
        readable = [key for key, error in zip(keys, errors, strict=True) if error is None]
        if self.joint:
            queries = Embeddings.concatenate(results) if results else None
            together, answers = classify_jointly(self.head, queries, self.abstention, self.top)
            say(together.summary())
        else:
            answers = list(chain.from_iterable(results))
        made = map(row_of, readable, answers, repeat(self.table.fields))
        rows = [TableRow(key, error=error) if error else next(made) for key, error in zip(keys, errors, strict=True)]
        rejected = sum(row.unknown is not None and row.unknown.rejected for row in rows)
        accepted = sum(sum(one) if isinstance(one := row.accepted, tuple) else bool(one) for row in rows)
        return self.table.encode(rows, first), rejected, accepted


Work: TypeAlias = Embed | Classify
