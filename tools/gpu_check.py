"""Everything that needs an NVIDIA GPU, on the machine's own Python: build, tests, parity, timings, into one JSON file.

    python tools/gpu_check.py --out benchmarks/results

Ends within 8 minutes. Makes no environment and fetches nothing; what is missing is named and skipped. Each part runs in
a process of its own with a time limit (tools/gpu/parts.py); the file is whole after each of them. Exits with 1 where a
part failed or was stopped at its limit.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tools.gpu.parts import BUDGET_S, PARTS, Part, run_parts  # noqa: E402
from tools.gpu.report import write_whole  # noqa: E402


class Results:
    """The JSON file: rows of all parts together, and of each part how it went and whatever else it found."""

    def __init__(self, folder: Path, trial: bool) -> None:
        self.folder, self.trial = folder, trial
        self.path: Path | None = None
        self.found: dict[str, Any] = {"kind": "gpu-check", "trial": trial, "complete": False}
        self.found |= {"started": datetime.now(UTC).isoformat(timespec="seconds"), "device": None}
        self.found |= {"missing": [], "skipped": [], "failed": [], "rows": [], "parts": {}}

    def add(self, name: str, result: dict[str, Any]) -> bool:
        """Note a part's result; False where there is no GPU, and so nothing to go on with."""
        facts = result.get("facts", {})
        self.found["rows"] += result.pop("rows", [])
        self.found["skipped"] += [f"{name}: {why.removeprefix(f'{name}: ')}" for why in result.get("skipped", [])]
        if not result.pop("good"):
            self.found["failed"].append(name)
        self.found["parts"][name] = result
        if name == "machine":
            self.found["device"], self.found["missing"] = facts.get("device"), facts.get("missing", [])
            self.found["commit"] = facts.get("commit")
            if self.found["device"] is None:
                return False
        if self.path is None:
            slug = re.sub(r"[^a-z0-9]+", "-", str(self.found["device"]).lower()).strip("-")
            self.path = self.folder / f"{'trial' if self.trial else 'gpu-check'}-{slug}.json"
            self.folder.mkdir(parents=True, exist_ok=True)
        self.write()
        return True

    def write(self) -> None:
        assert self.path is not None
        write_whole(self.path, self.found)


def main(arguments: Sequence[str] | None = None, parts: Sequence[Part] = PARTS) -> None:
    """`parts` begin with "machine". Raises SystemExit with what went wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, help="folder of the JSON file; benchmarks/results, of a trial build/gpu-check"
    )
    parser.add_argument("--budget", type=float, default=BUDGET_S, help="seconds for all parts together")
    parser.add_argument("--only", nargs="+", metavar="PART", help=f"of {', '.join(part.name for part in parts)}")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a trial with tiny shapes")
    given = parser.parse_args(arguments)
    trial = given.device == "cpu"
    chosen = [part for part in parts if given.only is None or part.name in ("machine", *given.only)]
    if unknown := set(given.only or ()) - {part.name for part in parts}:
        parser.error(
            f"expected parts out of {', '.join(part.name for part in parts)}, got {', '.join(sorted(unknown))}"
        )
    if (refusal := parts[0].unavailable_reason()) is not None:
        raise SystemExit(f"gpu-check needs PyTorch with CUDA: {refusal}")
    started = time.monotonic()
    folder = ROOT / "build" / "gpu-check" if trial else ROOT / "benchmarks" / "results"
    results = Results(given.out or folder, trial)
    with tempfile.TemporaryDirectory(prefix="iosr-fast-gpu-check-", ignore_cleanup_errors=True) as work:
        run_parts(chosen, given.device, trial, Path(work), given.budget, results.add)
    found = results.found
    if results.path is None:
        lines = "\n".join(found["parts"]["machine"].get("last_lines", found["skipped"]))
        raise SystemExit(f"{lines}\ngpu-check needs an NVIDIA GPU that PyTorch sees; `make test` is for other machines")
    found["complete"], found["seconds"] = True, round(time.monotonic() - started, 1)
    results.write()
    print(f"{found['device']}; not installed: {', '.join(found['missing']) or 'nothing'}")
    print(f"{len(found['rows'])} rows, {len(found['skipped'])} things skipped, in {found['seconds']} s")
    print(f"wrote {results.path}")
    if found["failed"]:
        raise SystemExit(f"failed: {', '.join(found['failed'])}; the JSON file has what was wrong and the last lines")


if __name__ == "__main__":
    main()
