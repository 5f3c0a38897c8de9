"""Two commits beside each other: `python tools/benchmark.py compare COMMIT SUBJECT`.

The commit is checked out and its compiled module built in a folder of its own. Each side runs its own
tools/benchmark.py in turns, and of each row that both have, the ratio of the times is the median over the turns: above
1, this tree is faster. It is slower where the ratio is below FLOOR and no turn shows otherwise. Absolute times of two
days say nothing, as machines differ from day to day.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.show import table
from iosr_fast.exceptions import IosrFastError

ROOT = Path(__file__).resolve().parents[1]
FLOOR, TURNS = 0.97, 3
Times = Mapping[tuple[str, str], float]


def compare(commit: str, subject: str, words: Sequence[str] = (), turns: int = TURNS) -> list[list[str]]:
    """Print a table of case, implementation and ratio; returns the lines of what became slower.

    Raises IosrFastError for an unknown commit, and for a run that fails."""
    with tempfile.TemporaryDirectory() as name:
        other = Path(name, "tree")
        git("worktree", "add", "--detach", str(other), commit)
        try:
            built(other)
            made: dict[str, list[Times]] = {"this": [], "other": []}
            for turn in range(turns):
                for side in ("this", "other")[:: 1 if turn % 2 == 0 else -1]:
                    root = ROOT if side == "this" else other
                    made[side].append(measured(root, subject, words, Path(name, f"{side}-{turn}.json")))
        finally:
            git("worktree", "remove", "--force", str(other))
    lines = ratios(made["this"], made["other"])
    print("\n".join(table(("case", "implementation", f"times of {commit} over this tree's", "spread"), lines)))
    if not lines:
        raise IosrFastError(f"expected rows of {subject} that both trees have, got none")
    return [line for line in lines if float(line[2]) < FLOOR and float(line[3].split()[-1]) < 1.0]


def git(*words: str) -> None:
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise IosrFastError(f"git {words[0]}: {done.stderr.strip()}")


def built(root: Path) -> None:
    """The tree's compiled module, beside its sources."""
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    if done.returncode:
        raise IosrFastError(f"expected a tree that compiles: {done.stderr[-2000:]}")


def measured(root: Path, subject: str, words: Sequence[str], out: Path) -> Times:
    """The medians by case and implementation, rivals left out, of a run of a tree's own benchmark."""
    command = [sys.executable, str(root / "tools" / "benchmark.py"), subject, *words, "--json", str(out)]
    done = subprocess.run(
        command, cwd=root, env={**os.environ, "PYTHONPATH": str(root)}, capture_output=True, text=True
    )
    if not out.exists():
        raise IosrFastError(f"expected rows of {' '.join(command[1:])}: {done.stderr[-2000:]}")
    rows = json.loads(out.read_text(encoding="utf-8"))
    rivals = {name for row in rows for name in row["ratios"]}
    return {(row["case"], row["impl"]): row["runtime_ms"] for row in rows if row["impl"] not in rivals}


def ratios(ours: Sequence[Times], theirs: Sequence[Times]) -> list[list[str]]:
    """Case, implementation, median and range of their times over ours."""
    lines = []
    for place in ours[0]:
        pairs = zip(ours, theirs, strict=True)
        found = [other[place] / own[place] for own, other in pairs if place in own and place in other]
        if found:
            lines.append([*place, f"{statistics.median(found):.3f}", f"{min(found):.3f} to {max(found):.3f}"])
    return lines
