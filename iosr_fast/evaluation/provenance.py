"""Facts for rows of measurements, the processor and the commit; and writing of such rows."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from iosr_fast.sealed.files import new_file
from iosr_fast.utils.machine import cpu_model, usable_threads

ROOT = Path(__file__).resolve().parents[2]


def cpu_description() -> str:
    return f"{cpu_model()}, {usable_threads()} hardware threads"


def commit(root: Path = ROOT) -> str:
    """The checked-out commit of the source tree `root`, with +dirty if tracked or new files differ from it.

    benchmarks/results is ignored, because a run writes there. Without its own repository it is IOSR_FAST_COMMIT, or as
    in an installed package the version, such as "version 0.2.0".
    """

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        return done.stdout.strip()

    # An installed package may lie in the repository of another project.
    top, head = git("rev-parse", "--show-toplevel"), git("rev-parse", "--short=12", "HEAD")
    if top is None or head is None or not os.path.samefile(top, root):
        from iosr_fast import __version__

        return os.environ.get("IOSR_FAST_COMMIT") or f"version {__version__}"
    return head + ("+dirty" if git("status", "--porcelain", "--", ".", ":!benchmarks/results") else "")


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the rows as a JSON list, one row per line; whole or not at all."""
    lines = ",\n".join(json.dumps(row) for row in rows)
    with new_file(path) as temporary:
        temporary.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
