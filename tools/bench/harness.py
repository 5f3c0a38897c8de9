"""Interleaved timing, and rows that carry what a number needs to be believed."""

from __future__ import annotations

import csv
import ctypes
import gc
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from iosr_fast.utils.machine import cpu_model, package_version, usable_threads
from tools.bench.ceilings import (  # noqa: F401 (a bench needs one module)
    best_gemm,
    gemm_ceiling_flops,
    memory_bandwidth,
    torch_threads,
)

ROOT = Path(__file__).resolve().parents[2]


# The threads of an OpenMP pool, and ONNX Runtime's, spin on for a while after their last call, on cores that the next
# candidate needs: after a pause of 0.02 s small batches took three times as long as after one of 0.1 s.
PAUSE_S = 0.2
# Calls shorter than this are timed in bursts: what is wanted is the time of one among many, with threads awake.
BURST_S = 0.02
GEMMS_A_TURN = 8  # a quarter of a second on two cores: as long as what it is compared with


def measure(candidates: Mapping[str, Callable[[], object]], repeats: int, warmup: int = 1) -> dict[str, list[float]]:
    """Milliseconds a call, `repeats` a candidate, round-robin: a slow spell of the machine meets all alike.

    Before each turn the process sleeps for PAUSE_S, so that no candidate is timed against another's spinning threads. A
    turn is one call; where that is shorter than BURST_S, one untimed call and then the mean of as many as fill it.
    """
    if repeats < 1:
        raise ValueError(f"expected repeats >= 1, got {repeats}")
    burst: dict[str, int] = {}
    for name, run in candidates.items():
        for _ in range(warmup):
            run()
        start = time.perf_counter()
        run()
        burst[name] = max(1, int(BURST_S / max(time.perf_counter() - start, 1e-6)))
    runtimes_ms: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(repeats):
        for name, run in candidates.items():
            time.sleep(PAUSE_S)
            if burst[name] > 1:
                run()
            start = time.perf_counter()
            for _ in range(burst[name]):
                run()
            runtimes_ms[name].append((time.perf_counter() - start) * 1e3 / burst[name])
    return runtimes_ms


def measure_beside_gemm(
    candidates: Mapping[str, Callable[[], object]], repeats: int, threads: int
) -> tuple[dict[str, list[float]], float, str]:
    """As measure, with a GEMM's turn in every round: milliseconds a call, the FLOP/s of its best turn, its library.

    A ceiling that is taken before or after is one of other minutes, which on a shared machine differ by a tenth. The
    best turn, because a ceiling is what the machine can do.
    """
    gemm = best_gemm(threads)
    runtimes_ms = measure({**candidates, "": lambda: [gemm.call() for _ in range(GEMMS_A_TURN)]}, repeats)
    return runtimes_ms, GEMMS_A_TURN * gemm.flops / min(runtimes_ms.pop("")) * 1e3, gemm.library


def extra_memory_mb(run: Callable[[], object]) -> float | None:
    """MB by which one call raises the process's peak of resident memory above what it held before; None off Linux."""
    reset, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")

    def kilobytes(field: str) -> int:
        return int(next(line for line in status.read_text().splitlines() if line.startswith(field)).split()[1])

    try:
        gc.collect()
        # Else memory that the allocator has kept from an earlier call would not be seen to be taken again.
        ctypes.CDLL(None).malloc_trim(0)
        before = kilobytes("VmRSS")
        reset.write_text("5")  # sets the peak, VmHWM, back to what is held now
        run()
        return max(0, kilobytes("VmHWM") - before) * 1024 / 1e6
    except (OSError, AttributeError, StopIteration):  # not Linux, or not glibc
        return None


def rows(
    bench: str,
    case: str,
    runtimes_ms: Mapping[str, Sequence[float]],
    *,
    rivals: Iterable[str],
    threads: int | Mapping[str, int],
    precision: str | Mapping[str, str] = "fp32",
    flops: float | Mapping[str, float] | None = None,
    ceiling_flops: float | None = None,
    packages: Iterable[str] = ("numpy",),
    device: str | None = None,
    rates: Mapping[str, float] | None = None,
    rate_unit: str = "GFLOP/s",
    ceiling: float | Mapping[str, float] | None = None,
    extra: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[dict[str, Any]]:
    """One row an implementation, JSON-ready.

    runtime_ms is the median of `repeats`, runtime_ms_spread the 10th and 90th percentile. ratios holds rival's median /
    own median (above 1: this row is the faster one), for those of `rivals` that were timed. rate is work done in a
    second, in rate_unit, and share_of_ceiling its share of `ceiling`, what the machine reaches in the same run: of
    `rates` and `ceiling`, or in GFLOP/s of `flops` and `ceiling_flops`, where `flops` is the work that the case asks
    for, however much an implementation does, or what each one does. They are None where they are not known. `threads`,
    `precision`, `flops` and `ceiling` are one for all, or one for each implementation. `extra` has further fields.
    """
    medians = {name: statistics.median(times) for name, times in runtimes_ms.items()}
    if rates is None:
        each = flops if isinstance(flops, Mapping) else dict.fromkeys(medians, flops)
        rates = {
            name: work / medians[name] / 1e6 for name, work in each.items() if work is not None and name in medians
        }
        ceiling = None if ceiling_flops is None else ceiling_flops / 1e9
    common = {
        "device": device or cpu_description(),
        "versions": {
            "iosr_fast": package_version("iosr_fast"),
            "python": platform.python_version(),
            **{name: package_version(name) for name in packages},
        },
        "commit": commit(),
    }
    made = []
    for name, times in runtimes_ms.items():
        rate, top = rates.get(name), ceiling.get(name) if isinstance(ceiling, Mapping) else ceiling
        made.append(
            {
                "bench": bench,
                "case": case,
                "impl": name,
                "precision": precision if isinstance(precision, str) else precision[name],
                "runtime_ms": round(medians[name], 4),
                "runtime_ms_spread": [round(float(np.percentile(times, q)), 4) for q in (10, 90)],
                "repeats": len(times),
                "ratios": {
                    rival: round(medians[rival] / medians[name], 3)
                    for rival in rivals
                    if rival != name and rival in medians
                },
                "rate": None if rate is None else round(rate, 3),
                "rate_unit": None if rate is None else rate_unit,
                "ceiling": None if rate is None or top is None else round(top, 3),
                "share_of_ceiling": None if rate is None or top is None else round(rate / top, 4),
                "threads": threads if isinstance(threads, int) else threads[name],
                **common,
                **(extra or {}).get(name, {}),
            }
        )
    return made


def print_rows(made: Sequence[Mapping[str, Any]]) -> None:
    """The rows as a table, with what they have in common above it."""
    from rich.console import Console
    from rich.table import Table

    if not made:
        return
    first = made[0]
    versions = ", ".join(f"{name} {found}" for name, found in first["versions"].items())
    console = Console(width=None if Console().is_terminal else 160)
    console.print(f"{first['device']}; {versions}; {first['commit']}")
    rivals = list(dict.fromkeys(rival for row in made for rival in row["ratios"]))
    heads = (
        "impl",
        "threads",
        "runtime_ms",
        "p10..p90",
        *(f"{rival} / this" for rival in rivals),
        "rate",
        "of ceiling",
    )
    table = Table(*heads)
    case = None
    for row in made:
        if row["case"] != case:
            case = row["case"]
            table.add_section()
            table.add_row(f"[bold]{case}[/bold]")
        low, high = row["runtime_ms_spread"]
        ratios = [_ratio(row, rival) for rival in rivals]
        rate = "" if row.get("rate") is None else f"{row['rate']:.4g} {row['rate_unit']}"
        share = "" if row["share_of_ceiling"] is None else f"{row['share_of_ceiling']:.0%}"
        runtime = (f"{row['runtime_ms']:.2f}", f"{low:.2f}..{high:.2f}")
        table.add_row(row["impl"], str(row["threads"]), *runtime, *ratios, rate, share)
    console.print(table)


def _ratio(row: Mapping[str, Any], rival: str) -> str:
    return f"{row['ratios'][rival]:.2f}" if rival in row["ratios"] else "1" if row["impl"] == rival else ""


def write_json(path: Path, made: Sequence[Mapping[str, Any]]) -> None:
    """The rows as a JSON list, one row a line."""
    lines = ",\n".join(json.dumps(row) for row in made)
    path.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def write_csv(path: Path, made: Sequence[Mapping[str, Any]]) -> None:
    """The rows as a table: a column a field, of dictionaries and lists one for each of their entries."""
    flat = [dict(_flattened(row)) for row in made]
    columns = list(dict.fromkeys(name for row in flat for name in row))
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(flat)


def _flattened(row: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in row.items():
        if isinstance(value, list):
            value = dict(zip(map(str, range(len(value))), value, strict=True))
        if isinstance(value, Mapping):
            yield from _flattened(value, f"{before}{name}.")
        else:
            yield f"{before}{name}", value


def cpu_description() -> str:
    return f"{cpu_model()}, {usable_threads()} hardware threads"


def commit() -> str:
    """The checked-out commit, with +dirty where tracked or new files differ from it; "unknown" outside a repository.

    benchmarks/ isn't looked at: it is what a run writes.
    """

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        return done.stdout.strip()

    head = git("rev-parse", "--short=12", "HEAD")
    if head is None:
        return "unknown"
    return head + ("+dirty" if git("status", "--porcelain", "--", ".", ":!benchmarks") else "")
