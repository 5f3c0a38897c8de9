"""What a part is told, and what it leaves behind: a JSON file that is whole after every addition."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


def write_whole(path: Path, value: Any) -> None:
    """`value` as JSON; a reader, and whoever comes after a kill, finds the old file or the new one."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(strict(value), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(partial, path)


def strict(value: Any) -> Any:
    """`value` with "nan" and "inf" in words, which JSON has no numbers for."""
    if isinstance(value, Mapping):
        return {name: strict(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(one) for one in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


@dataclass(frozen=True)
class Setting:
    """`device`: "cuda", or "cpu" to try the program. `tiny`: shapes for that. `work`: a folder for files that may be
    lost afterwards. `deadline`: of time.monotonic(), after which the process is killed."""

    device: str
    tiny: bool
    work: Path
    deadline: float

    def left(self) -> float:
        """Seconds until this part is killed."""
        return self.deadline - time.monotonic()


class Report:
    """Rows (tools.bench.harness.rows), tables, facts; what was left out and why; what was found to be wrong.

    `plan` names what is to come, so that whoever reads of a killed part knows what is missing.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.rows: list[dict[str, Any]] = []
        self.tables: dict[str, list[dict[str, Any]]] = {}
        self.facts: dict[str, Any] = {}
        self.skipped: list[str] = []
        self.failed: list[str] = []
        self.planned: list[str] = []
        self.write()

    def write(self) -> None:
        names = ("rows", "tables", "facts", "skipped", "failed", "planned")
        write_whole(self._path, {name: getattr(self, name) for name in names})

    def add_rows(self, rows: Iterable[Mapping[str, Any]]) -> None:
        for row in rows:
            self.rows.append(dict(row))
            share = f", {row['share_of_ceiling']:.0%} of the ceiling" if row.get("share_of_ceiling") else ""
            print(f"  {row['case']} {row['impl']}: {row['runtime_ms']:.3f} ms{share}", flush=True)
        self.write()

    def add_table(self, name: str, lines: Sequence[Mapping[str, Any]]) -> None:
        self.tables.setdefault(name, []).extend(map(dict, lines))
        self.write()

    def fact(self, **facts: Any) -> None:
        self.facts |= facts
        self.write()

    def skip(self, reason: str) -> None:
        print(f"  skipped {reason}", flush=True)
        self.skipped.append(reason)
        self.write()

    def fail(self, reason: str) -> None:
        """Note what is wrong and go on: the part counts as failed."""
        print(f"  WRONG: {reason}", flush=True)
        self.failed.append(reason)
        self.write()

    def plan(self, *names: str) -> None:
        self.planned += names
        self.write()

    def reaches(self, name: str, setting: Setting, seconds: float) -> bool:
        """Whether there is time for what takes about `seconds`; else it is named, and done with."""
        left = setting.left()
        if left < seconds:
            self.skip(f"{name}: {left:.0f} s are left of the part's time, and it takes about {seconds:.0f}")
            self.done(name)
        return left >= seconds

    def done(self, name: str) -> None:
        self.planned.remove(name)
        self.write()
