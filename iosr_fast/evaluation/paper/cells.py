"""Cells: the outcome of one method at one number of shots and one seed of a data set, a JSON file each."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from iosr_fast.evaluation.comparison import Draw
from iosr_fast.exceptions import IosrFastError
from iosr_fast.sealed.files import new_file
from iosr_fast.sealed.manifest import seal
from iosr_fast.sealed.schema import facts_to_json
from iosr_fast.utils.machine import package_version

VERSION = 4  # raise it when the protocol changes: the same facts would give another number


class FileCells:
    """FOLDER/DATA/SHOTS-shots/seed-SEED/METHOD.json, sealed by a checksum.

    `data` has the fingerprint of each data set. A cell of other data or of another version is made again, as is a
    damaged one; `report` is told of both.
    """

    def __init__(self, folder: Path, data: Mapping[str, str], report: Callable[[str], None]) -> None:
        self.folder, self.data, self.report = folder, data, report

    def read(self, source: str, method: str, shots: int, seed: int) -> Draw | None:
        """The outcome; None if it has to be computed."""
        path = self._path(source, method, shots, seed)
        if not path.exists():
            return None
        try:
            content = path.read_bytes()
            cell = json.loads(content)
            if seal(cell) != content:
                raise IosrFastError("its contents are not what was written")
            if cell["facts"] != self._facts(source):
                raise IosrFastError("it is of other data or of another version")
            return msgspec.convert(cell["draw"], Draw)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            self.report(f"{path} is computed again: {error}")
            return None

    def write(self, source: str, method: str, shots: int, draw: Draw) -> None:
        """The whole file or none."""
        path = self._path(source, method, shots, draw.seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        with new_file(path) as temporary:
            temporary.write_bytes(seal({"facts": self._facts(source), "draw": facts_to_json(draw)}))

    def _path(self, source: str, method: str, shots: int, seed: int) -> Path:
        return self.folder / source / f"{shots}-shots" / f"seed-{seed}" / f"{method}.json"

    def _facts(self, source: str) -> dict[str, Any]:
        versions = {name: package_version(name) for name in ("iosr_fast", "scikit-learn")}
        return {"version": VERSION, "data": self.data[source], **versions}
