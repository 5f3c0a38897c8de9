"""Cells: one data set, method, reducer, shots and seed each, in a file named by all that its number depends on."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from iosr_fast.evaluation.accuracy import Draw, finite
from iosr_fast.exceptions import IosrFastError
from iosr_fast.methods.tuning.tuned import Tuned
from iosr_fast.utils.files import new_file
from iosr_fast.utils.temporaries import remove_leftovers

VERSION = 2  # raise it when the protocol changes: the same facts would give another number
LOSSES = ("log_loss", "calibration_error")


@dataclass(frozen=True, eq=False)
class Cell:
    """`facts` is what its number depends on: method, draw, keys of embeddings, hashes of labels, versions."""

    data: str
    method: str
    reducer: str
    shots: int
    seed: int
    facts: dict[str, Any]

    @property
    def key(self) -> str:
        return digest({**self.facts, **self.named})

    @property
    def named(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("data", "method", "reducer", "shots", "seed")}


def digest(facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


class Cells:
    """A folder of cells. `report` gets a message for each damaged one."""

    def __init__(self, folder: Path, report: Callable[[str], None] = lambda _: None) -> None:
        self.folder, self.report = folder, report
        remove_leftovers(folder, of=r"[0-9a-f]{32}\.json")

    def path(self, cell: Cell) -> Path:
        return self.folder / f"{cell.key[:32]}.json"

    def read(self, cell: Cell) -> Draw | None:
        """The cell's result; None if it has not run. A damaged file is reported and removed, and gives None."""
        path = self.path(cell)
        try:
            whole = json.loads(path.read_text(encoding="utf-8"))
            result = whole["found"]
            if whole["sha256"] != digest(result) or whole["cell"] != cell.named or whole["key"] != cell.key:
                raise IosrFastError("its contents are not what was written")
            tuned = dict(result["tuned"])
            tuned["accuracy"] = math.nan if tuned["accuracy"] is None else tuned["accuracy"]
            numbers = {name: result[name] for name in ("accuracy", "images", "classes", "fit_seconds")}
            losses: dict[str, Any] = {name: math.nan if result[name] is None else result[name] for name in LOSSES}
            return Draw(seed=cell.seed, tuned=Tuned(**tuned), **numbers, **losses)
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            self.report(f"cell {path.name} is damaged and is computed again: {error}")
            path.unlink(missing_ok=True)  # another run on the same folder may have removed it
            return None

    def write(self, cell: Cell, draw: Draw) -> None:
        """The whole file or none."""
        tuned = {
            name: getattr(draw.tuned, name)
            for name in ("method", "reducer", "parameters", "scored", "protocol", "factor")
        }
        tuned |= {"accuracy": finite(draw.tuned.accuracy), "seconds": draw.tuned.seconds}
        result = {name: getattr(draw, name) for name in ("accuracy", "images", "classes", "fit_seconds")}
        result |= {name: finite(getattr(draw, name)) for name in LOSSES}
        result["tuned"] = tuned
        whole = {"cell": cell.named, "key": cell.key, "depends_on": cell.facts}
        write_json(self.path(cell), {**whole, "found": result, "sha256": digest(result)})


def write_json(path: Path, content: Any) -> None:
    """Write a temporary file and rename it: an interruption leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with new_file(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
