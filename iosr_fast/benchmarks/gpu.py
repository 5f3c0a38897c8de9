"""make gpu-check: the GPU's tests, parity, tuning and benches (gpu_parts), one after another; one JSON file a call.

Each part is a process with a time limit, so that a crash or a hang costs its own part only; the file is whole after
each. Nothing is installed or fetched: packages and modules come from build/gpu-bundle (gpu_bundle) if it is there, and
what is missing is named.
"""

from __future__ import annotations

import csv
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from iosr_fast.benchmarks import gpu_bundle, gpu_parts
from iosr_fast.benchmarks.gpu_parts import BENCHMARK, ROOT, Part
from iosr_fast.exceptions import IosrFastError, UnavailableError
from iosr_fast.utils.provenance import commit, cpu_description

BUDGET_S = 460.0  # of 8 minutes
LEAST_S = 5.0  # no part starts with less
KILL_S = 5.0
PACKAGES = ("torch", "triton", "numpy", "open_clip", "safetensors", "PIL", "onnxruntime", "pytest", "xdist", "pybind11")
DRIVER = ("driver_version", "memory.total", "power.limit", "clocks.max.sm", "clocks.max.memory", "temperature.gpu")
# What a tool prints where it isn't allowed or can't work, whatever it runs.
REFUSALS = {
    "ERR_NVGPUCTRPERM": "ncu may not read the GPU's counters (ERR_NVGPUCTRPERM): run as root, or load the driver with "
    "NVreg_RestrictProfilingToAdminUsers=0",
    "Failed to initialize the profiler": "ncu can't start its profiler on this machine",
    "Device not supported": "compute-sanitizer does not support this device or its virtual machine",
}
TEST_LINE = re.compile(r"^(?:\[gw\d+\]|\S+::).*?\b(PASSED|FAILED|SKIPPED|ERROR|XFAIL)\b")


def machine(device: str) -> dict[str, Any]:
    """{"facts"} about the GPU, its driver, the host and the packages. Raises RuntimeError where PyTorch sees no GPU."""
    import torch

    facts: dict[str, Any] = {
        "device": cpu_description(),
        "commit": commit(),
        "host": {"cpu": cpu_description(), "platform": platform.platform()},
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda},
        "missing": [name for name in PACKAGES if find_spec(name) is None],
    }
    if device == "cuda":
        if not torch.cuda.is_available():
            raise RuntimeError(
                f"gpu-check needs an NVIDIA GPU, and PyTorch {torch.__version__} sees none; "
                "`make test` is for other machines"
            )
        properties = torch.cuda.get_device_properties(0)
        names = ("total_memory", "multi_processor_count", "L2_cache_size", "major", "minor")
        facts["device"] = torch.cuda.get_device_name()
        facts["gpu"] = {name: getattr(properties, name, None) for name in names}
        query = ["nvidia-smi", f"--query-gpu={','.join(DRIVER)}", "--format=csv,noheader", "-i", "0"]
        try:
            answer = subprocess.run(query, capture_output=True, text=True, check=True, timeout=10).stdout
            facts["driver"] = dict(zip(DRIVER, (value.strip() for value in answer.split(",")), strict=True))
        except (OSError, subprocess.SubprocessError, ValueError) as error:
            print(f"left out: the driver's facts: nvidia-smi gave none ({error})")
    return {"facts": facts}


def run_part(part: Part, folder: Path, limit_s: float, rehearsal: bool = True) -> dict[str, Any]:
    """Run a part to its end or its limit: {"status", "seconds", "rows", "facts", "tables", "skipped", "failed", ...}.

    status is "done", "failed" (it crashed, or reports something wrong), "stopped" (killed at its limit) or "skipped"
    (the tool that runs it can't work on this machine).
    """
    out, log = folder / f"{part.name}.json", folder / f"{part.name}.log"
    command = [*part.wrapper, sys.executable, *part.command, *(["--json", str(out)] if part.writes_json else [])]
    path = os.pathsep.join([str(ROOT), *gpu_bundle.import_path(ROOT)])
    environment = {**os.environ, "PYTHONPATH": path, "IOSR_FAST_CACHE": str(folder / "cache"), **part.environment}
    # One cache for all parts and calls, where files can be written for sure; a home folder may be missing.
    environment.setdefault("TRITON_CACHE_DIR", str(ROOT / "build" / "triton-cache"))
    # NVIDIA's containers set it, which makes float32 products TF32's, whatever a program asks for.
    environment.pop("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", None)
    started = time.monotonic()
    # Into a file: a process that outlives the kill would hold a pipe open.
    with log.open("w", encoding="utf-8") as stream:
        child = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code: int | None = child.wait(limit_s)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _kill_group(child)
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    written = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}
    result = written if isinstance(written, dict) else {"rows": written}
    result |= read_log(lines)
    if counters := read_counters(lines):
        result["tables"] = {**result.get("tables", {}), "counters": counters}
    elif part.name.startswith("counters-") and not rehearsal:
        result["failed"].append("ncu counted no kernel")
    if part.name == "tests":
        result["facts"] = counts = count_tests(lines)
        if not rehearsal and not counts.get("passed"):
            result["failed"].append("no GPU test passed; a run of skips proves nothing")
    status = "stopped" if code is None else "failed" if code or result["failed"] else "done"
    if status == "failed" and part.wrapper and (reason := refusal_of_tool(lines)) is not None:
        status, result["failed"] = "skipped", []
        result["skipped"].append(reason)
    result |= {"status": status, "seconds": round(time.monotonic() - started, 1), "limit_s": round(limit_s, 1)}
    return result if status == "done" else {**result, "exit_code": code, "last_lines": lines[-25:]}


def refusal_of_tool(lines: Iterable[str]) -> str | None:
    """Why ncu or compute-sanitizer may not work on this machine, in words, if its output says so."""
    text = "\n".join(lines)
    return next((reason for sign, reason in REFUSALS.items() if sign in text), None)


def _kill_group(child: subprocess.Popen[bytes]) -> None:
    """A part and the processes that it started, compilers for example."""
    try:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait(KILL_S)
    except (ProcessLookupError, PermissionError):
        return
    except subprocess.TimeoutExpired:
        print(f"  process {child.pid} can't be killed: it waits in the driver", flush=True)


def read_log(lines: Iterable[str]) -> dict[str, list[str]]:
    """What a part left out and found wrong: a bench's lines, and the summary of pytest."""
    skipped, failed = [], []
    for line in lines:
        if line.startswith(("left out: ", "SKIPPED ")):
            skipped.append(line.removeprefix("left out: "))
        elif line.startswith(("WRONG: ", "FAILED ", "ERROR ")):
            failed.append(line.removeprefix("WRONG: "))
    return {"skipped": skipped, "failed": failed}


def read_counters(lines: Sequence[str]) -> list[dict[str, str]]:
    """The table that `ncu --csv` prints: a row a kernel and counter, without ncu's own columns."""
    begin = next((i for i, line in enumerate(lines) if line.startswith('"ID",')), len(lines))
    names = ("Kernel Name", "Grid Size", "Block Size", "Metric Name", "Metric Unit", "Metric Value")
    rows = csv.DictReader(line for line in lines[begin:] if line.startswith('"'))
    return [{name: row[name] for name in names if row.get(name) is not None} for row in rows]


def count_tests(lines: Iterable[str]) -> dict[str, int]:
    """Tests by outcome, from pytest's lines, which a killed run has too."""
    return dict(Counter(match[1].lower() for line in lines if (match := TEST_LINE.match(line))))


def run(
    out: Path,
    rehearsal: bool = False,
    only: Sequence[str] = (),
    chosen: Sequence[Part] | None = None,
    call: str = "parity",
) -> Path:
    """Run all parts of a call, or "machine" and `only`; the file's path. Tuning puts launch_configs.json beside it, for
    kernels/. Raises RuntimeError where there is no GPU, and, after all parts, where one failed or was stopped."""
    if not (ROOT / BENCHMARK[0]).is_file():
        raise UnavailableError(
            "gpu needs the source tree, for its build and its tests; parity, score and encoder run without it, with "
            "--device cuda"
        )
    chosen = gpu_parts.parts(rehearsal, call) if chosen is None else chosen
    if unknown := sorted(set(only) - {part.name for part in chosen}):
        raise IosrFastError(
            f"expected parts out of {', '.join(part.name for part in chosen)}, got {', '.join(unknown)}"
        )
    started = time.monotonic()
    content: dict[str, Any] = {"kind": "gpu-check", "call": call, "trial": rehearsal, "complete": False}
    content["bundle"] = gpu_bundle.use(ROOT)
    content |= {"started": datetime.now(UTC).isoformat(timespec="seconds"), "device": None}
    content |= {"missing": [], "skipped": [], "failed": [], "rows": [], "parts": {}}
    path: Path | None = None
    with tempfile.TemporaryDirectory(prefix="iosr-fast-gpu-check-", ignore_cleanup_errors=True) as folder:
        for part in chosen:
            left_s = BUDGET_S - (time.monotonic() - started)
            if only and part.name not in ("machine", *only):
                continue
            if reason := _left_out(part, rehearsal):
                result: dict[str, Any] = {"status": "skipped", "skipped": [reason]}
            elif left_s < LEAST_S:
                result = {"status": "skipped", "skipped": [f"{left_s:.0f} s of {BUDGET_S:.0f} are left"]}
            else:
                print(f"{part.name} (at most {min(part.limit_s, left_s):.0f} s)", flush=True)
                result = run_part(part, Path(folder), min(part.limit_s, left_s), rehearsal)
                print(f"  {result['status']} after {result['seconds']} s", *result["failed"], sep="\n  ", flush=True)
            content["rows"] += result.pop("rows", [])
            content["skipped"] += [f"{part.name}: {reason}" for reason in result.get("skipped", [])]
            content["failed"] += [part.name] if result["status"] in ("failed", "stopped") else []
            content["parts"][part.name] = result
            if path is None:
                facts = result.get("facts", {})
                if "device" not in facts:
                    raise RuntimeError("\n".join(result.get("last_lines", ["the machine's part gave no device"])[-3:]))
                content |= {name: facts[name] for name in ("device", "missing", "commit")}
                slug = re.sub(r"[^a-z0-9]+", "-", str(facts["device"]).lower()).strip("-")
                path = out / f"{'trial' if rehearsal else 'gpu-check'}-{call}-{slug}.json"
                out.mkdir(parents=True, exist_ok=True)
            write_whole(path, content)
            if part.name.startswith("tune-") and not rehearsal:
                shutil.copy(ROOT / "kernels" / "launch_configs.json", out)
    assert path is not None
    write_whole(path, content | {"complete": True, "seconds": round(time.monotonic() - started, 1)})
    print(f"{content['device']}; {len(content['rows'])} rows, {len(content['skipped'])} left out; wrote {path}")
    if content["failed"]:
        raise RuntimeError(f"failed: {', '.join(content['failed'])}; {path} has what was wrong and the last lines")
    return path


def _left_out(part: Part, rehearsal: bool) -> str | None:
    """Why a part can't or needn't run, or None."""
    if part.name == "build":
        if rehearsal:
            return "a rehearsal builds nothing"
        if gpu_parts.built():
            return "both extension modules for this Python are there"
    if part.wrapper and not Path(part.wrapper[0]).is_file():
        return f"{part.wrapper[0]} is not found on PATH or where NVIDIA's installers put it"
    return None


def write_whole(path: Path, value: Any) -> None:
    """`value` as JSON with "nan" and "inf" as words; a reader finds the old file or the new one, also after a kill."""
    content = json.loads(json.dumps(value), parse_constant=lambda constant: str(float(constant)))
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(partial, path)
