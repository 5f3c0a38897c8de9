"""Which parts there are, how long each may take, and running one so that its crash or hang loses nothing else."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
KILL_S = 5.0  # how long a killed process is waited for


@dataclass(frozen=True)
class Part:
    """`target` is "module:function" of a Report and a Setting. A part is killed after `limit_s`; `least_s` is kept for
    it while earlier parts run, and with less it isn't started. It is skipped where a module of `needs` is missing, and
    all of `one_of`. To be killed is no failure where it `may_stop`: what it takes is not for us to say."""

    name: str
    target: str
    limit_s: float
    least_s: float
    needs: tuple[str, ...] = ()
    one_of: tuple[str, ...] = ()
    may_stop: bool = False

    def unavailable_reason(self) -> str | None:
        """Which packages it lacks, or None."""
        missing = [name for name in self.needs if find_spec(name) is None]
        if self.one_of and all(find_spec(name) is None for name in self.one_of):
            missing.append(" or ".join(self.one_of))
        return f"{' and '.join(missing)} {'are' if len(missing) > 1 else 'is'} not installed" if missing else None


# In the order in which they run: what the others need, what tells whether results are right, what is worth most.
PARTS = (
    Part("machine", "tools.gpu.machine:run", 40, 40, ("torch", "numpy")),
    Part("build", "tools.gpu.build:run", 170, 75, ("torch", "pybind11", "setuptools")),
    Part("ceiling", "tools.gpu.ceiling:run", 30, 15, ("torch",)),
    Part("parity", "tools.gpu.parity:run", 110, 45, ("torch",)),
    Part("encoder", "tools.gpu.encoder:run", 80, 50, ("torch",)),
    Part("latency", "tools.gpu.latency:run", 70, 30, ("torch",)),
    Part("score", "tools.gpu.score:run", 110, 40, ("torch",)),
    Part("tests", "tools.gpu.tests:run", 150, 60, ("torch", "pytest", "hypothesis")),
    Part("tensorrt", "tools.gpu.tensorrt:run", 110, 50, ("torch", "onnx", "onnxscript"), ("tensorrt", "tensorrt_rtx")),
    Part("compile", "tools.gpu.compiled:run", 150, 40, ("torch", "triton"), may_stop=True),
)
BUDGET_S = 455.0  # what is left of 8 minutes for starting, killing and writing


def allowance(part: Part, later: Sequence[Part], left_s: float) -> float | None:
    """Seconds that a part may take of those left; None where they are too few to start it.

    What later parts need at least is kept for them, as far as this one has its own least.
    """
    if left_s < part.least_s:
        return None
    kept = sum(other.least_s for other in later if other.unavailable_reason() is None)
    return max(part.least_s, min(part.limit_s, left_s - kept))


def run_part(part: Part, device: str, tiny: bool, work: Path, limit_s: float) -> dict[str, Any]:
    """Run a part to its end or its limit; what it noted, its status, seconds and, where it failed, its last lines.

    status: "done"; "failed" (it crashed, or found something wrong); "stopped" (killed at its limit).
    """
    out, said = work / f"{part.name}.json", work / f"{part.name}.txt"
    command = [sys.executable, "-m", "tools.gpu.child", part.target, "--device", device, "--seconds", str(limit_s)]
    command += ["--work", str(work), "--out", str(out), *(["--tiny"] if tiny else [])]
    started = time.monotonic()
    # What a part keeps for later starts, kernels and plans, goes with the folder.
    environment = {**os.environ, "IOSR_FAST_CACHE": str(work / "cache")}
    # NVIDIA's containers set it, and products in float32 would be TF32's, whatever a program asks for.
    environment.pop("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", None)
    # Into a file: a process that outlives the kill would hold a pipe open.
    with said.open("w", encoding="utf-8") as log:
        child = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code: int | None = child.wait(limit_s)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _kill(child)
    noted = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}
    status = "stopped" if code is None else "failed" if code or noted.get("failed") else "done"
    result = {"status": status, "seconds": round(time.monotonic() - started, 1), "limit_s": round(limit_s, 1), **noted}
    result["good"] = status == "done" or (status == "stopped" and part.may_stop and not noted.get("failed"))
    if status != "done":
        result["exit_code"] = code
        result["last_lines"] = said.read_text(encoding="utf-8", errors="replace").splitlines()[-25:]
    for name in noted.get("planned", []):
        why = f"the part was stopped after {limit_s:.0f} s" if code is None else "the part ended before"
        result.setdefault("skipped", []).append(f"{name}: {why}")
    return result


def _kill(child: subprocess.Popen[bytes]) -> None:
    """The part and what it started; a compiler's processes may outlive the part that started them."""
    try:
        os.killpg(child.pid, signal.SIGKILL)  # its group has its own number
    except (ProcessLookupError, PermissionError):
        return
    try:
        child.wait(KILL_S)
    except subprocess.TimeoutExpired:
        print(f"  process {child.pid} can't be killed (it waits in the driver); going on without it", flush=True)


def run_parts(
    parts: Sequence[Part],
    device: str,
    tiny: bool,
    work: Path,
    budget_s: float,
    after_each: Callable[[str, dict[str, Any]], bool],
) -> None:
    """Each part in turn; `after_each(name, result)` is told at once and answers whether to go on."""
    deadline = time.monotonic() + budget_s
    for position, part in enumerate(parts):
        left, refusal = deadline - time.monotonic(), part.unavailable_reason()
        allowed = allowance(part, parts[position + 1 :], left)
        if refusal is None and allowed is None:
            refusal = f"{left:.0f} s are left, and it needs {part.least_s:.0f}"
        if refusal is not None or allowed is None:
            result: dict[str, Any] = {"status": "skipped", "good": True, "skipped": [f"{part.name}: {refusal}"]}
            print(f"{part.name}: skipped, {refusal}", flush=True)
        else:
            print(f"{part.name} (at most {allowed:.0f} s)", flush=True)
            result = run_part(part, device, tiny, work, allowed)
            print(f"  {result['status']} after {result['seconds']} s", flush=True)
        if not after_each(part.name, result):
            return
