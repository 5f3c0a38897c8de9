"""A detector file with the classes of its boxes: a table beside those of files.tables."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import compress
from pathlib import Path
from typing import ClassVar

from iosr_fast.exceptions import IosrFastError
from iosr_fast.files.tables import LABELS, TableRow
from iosr_fast.images.detector_files import Classes, DetectorFile, MegaDetector, Selection
from iosr_fast.sealed.files import new_file
from iosr_fast.sealed.manifest import sha256


@dataclass(frozen=True)
class DetectionsTable:
    """The document of `file` (its SHA-256 is `sha256`) with the classes of the selected boxes, by a `classifier`.

    A group has for each box a line, JSON of the (label, probability) of its classes, best first, 4 digits. A box that
    can't be read or is rejected as unknown, or whose label is not accepted, has none; of several labels it has those
    that are accepted.
    """

    file: str
    selection: Selection
    sha256: str
    classifier: str = ""
    suffix: ClassVar[str] = ".json"
    fields: ClassVar[tuple[str, ...]] = LABELS

    @classmethod
    def of(cls, file: str, selection: Selection, top: int) -> DetectionsTable:
        """Raises as DetectorFile does, and IosrFastError for a format that does not hold `top` classes of a box, and
        for a document that has no place for them."""
        document = DetectorFile(file)
        if top > 1 and not isinstance(document.format, MegaDetector):
            raise IosrFastError(f"expected --top 1 for {file}, whose format holds one class of a box, got {top}")
        for found, _ in document.boxes(selection):  # a trial, before any work
            document.add(found.record, [("", 0.0)], "")
        return cls(file, selection, sha256(Path(file)))

    def encode(self, rows: Iterable[TableRow], first: bool) -> bytes:
        """The lines of a group."""
        return "".join(f"{json.dumps(_classes(row))}\n" for row in rows).encode()

    def finish(self, groups: Path, sizes: Iterable[int], out: Path) -> None:
        """The file of all groups. Raises IosrFastError for a document that has changed since the run began."""
        if sha256(Path(self.file)) != self.sha256:
            raise IosrFastError(f"expected {self.file} as it was when the run began, got another; start again")
        document = DetectorFile(self.file)
        with groups.open("rb") as lines, new_file(out) as temporary:
            for (found, _), line in zip(document.boxes(self.selection), lines, strict=True):
                document.add(found.record, json.loads(line), self.classifier)
            document.write(temporary)
        groups.unlink()


def _classes(row: TableRow) -> Classes:
    if not row.classes or row.accepted is False or (row.unknown is not None and row.unknown.rejected):
        return []
    if isinstance(row.accepted, tuple):
        return [(label, round(share, 4)) for label, share in compress(row.classes, row.accepted)]
    best = dict(zip(LABELS, row.classes[0], strict=True)) | row.values(None)
    is_class = best["label"] == row.classes[0][0]  # not a node of a tree
    classes = row.classes if is_class else [(best["label"], best["probability"])]
    return [(label, round(share, 4)) for label, share in classes]
