"""Interleaved timing, and rows with the facts that a reader needs to trust a number."""

from __future__ import annotations

import contextlib
import csv
import ctypes
import gc
import platform
import re
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from iosr_fast.exceptions import IosrFastError
from iosr_fast.utils.machine import package_version
from iosr_fast.utils.provenance import commit, cpu_description

# The threads of an OpenMP pool, and ONNX Runtime's, spin for a while after their last call, on cores that the next
# candidate needs: after a pause of 0.02 s small batches took three times as long as after one of 0.1 s.
PAUSE_S = 0.2
# Shorter calls are timed in bursts: the time of one call among many, with threads awake, is wanted.
BURST_S = 0.02


def measure(
    candidates: Mapping[str, Callable[[], object]], repeats: int, bursts: bool = True
) -> dict[str, list[float]]:
    """Milliseconds a call, `repeats` a candidate, round-robin: a slow spell of the machine meets all alike.

    Before each turn the process sleeps for PAUSE_S, so that no candidate is timed against another's spinning threads. A
    turn is one call; where that is shorter than BURST_S, one untimed call and then the mean of as many as fill it.
    Without `bursts`, for calls of seconds that have run once, nothing is called untimed.
    """
    if repeats < 1:
        raise IosrFastError(f"expected repeats >= 1, got {repeats}")
    burst = dict.fromkeys(candidates, 1)
    for name, run in candidates.items() if bursts else ():
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


@contextlib.contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """PyTorch's thread count for the length of a with block."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def parse_case(text: str, letters: str, example: str) -> list[int]:
    """The sizes of a case like `q256-k16000-d512-c1000`, in the order of `letters`; ValueError names `example`."""
    match = re.fullmatch("-".join(rf"{letter}(\d+)" for letter in letters), text)
    sizes = [] if match is None else [int(size) for size in match.groups()]
    if not sizes or min(sizes) < 1:
        raise IosrFastError(f"expected a case like {example}, every size at least 1, got {text!r}")
    return sizes


def extra_memory_mb(run: Callable[[], object]) -> float | None:
    """MB by which one call raises the peak of the process's resident memory; None outside Linux."""
    reset, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")

    def kilobytes(field: str) -> int:
        return int(next(line for line in status.read_text().splitlines() if line.startswith(field)).split()[1])

    try:
        gc.collect()
        # Otherwise memory that the allocator retained from an earlier call would not be counted again.
        ctypes.CDLL(None).malloc_trim(0)
        before = kilobytes("VmRSS")
        reset.write_text("5")  # resets the peak, VmHWM, to the current size
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
    threads: int,
    precision: str | Mapping[str, str] = "fp32",
    work: float | Mapping[str, float] | None = None,
    rate_unit: str = "GFLOP/s",
    ceiling: float | Mapping[str, float] | None = None,
    packages: Iterable[str] = ("numpy",),
    device: str | None = None,
    extra: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[dict[str, Any]]:
    """One row an implementation, JSON-ready.

    runtime_ms is the median of `repeats`, runtime_ms_spread the 10th and 90th percentile. ratios holds rival's median /
    own median (above 1: this row is faster), for those of `rivals` that were timed. rate is `work`, a call's GFLOP,
    images or GB, a second, in rate_unit; share_of_ceiling is its share of `ceiling`, which the machine reaches in the
    same run. Both are None where they are unknown. `precision`, `work` and `ceiling` are one for all, or one for each
    implementation. `extra` has further fields.
    """
    medians = {name: statistics.median(times) for name, times in runtimes_ms.items()}
    common = {
        "device": device or cpu_description(),
        "versions": {
            "iosr_fast": package_version("iosr_fast"),
            "python": platform.python_version(),
            **{name: package_version(name) for name in packages},
        },
        "commit": commit(),
    }
    result = []
    for name, times in runtimes_ms.items():
        amount, top = (value.get(name) if isinstance(value, Mapping) else value for value in (work, ceiling))
        rate = None if amount is None else amount / medians[name] * 1e3
        result.append(
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
                "threads": threads,
                **common,
                **(extra or {}).get(name, {}),
            }
        )
    return result


def print_rows(rows: Sequence[Mapping[str, Any]]) -> None:
    """The rows as a table, with what they have in common above it."""
    from rich.console import Console
    from rich.table import Table

    if not rows:
        return
    first = rows[0]
    versions = ", ".join(f"{name} {version}" for name, version in first["versions"].items())
    console = Console(width=None if Console().is_terminal else 160)
    console.print(f"{first['device']}; {versions}; {first['commit']}")
    rivals = list(dict.fromkeys(rival for row in rows for rival in row["ratios"]))
    ratios = (f"{rival} / this" for rival in rivals)
    table = Table("impl", "threads", "runtime_ms", "p10..p90", *ratios, "rate", "of ceiling")
    case = None
    for row in rows:
        if row["case"] != case:
            case = row["case"]
            table.add_section()
            table.add_row(f"[bold]{case}[/bold]")
        low, high = row["runtime_ms_spread"]
        rate = "" if row.get("rate") is None else f"{row['rate']:.4g} {row['rate_unit']}"
        share = "" if row["share_of_ceiling"] is None else f"{row['share_of_ceiling']:.0%}"
        runtime = (f"{row['runtime_ms']:.4g}", f"{low:.4g}..{high:.4g}")
        cells = (f"{row['ratios'][rival]:.2f}" if rival in row["ratios"] else "" for rival in rivals)
        table.add_row(row["impl"], str(row["threads"]), *runtime, *cells, rate, share)
    console.print(table)


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """The rows as a table: a column a field, and one for each entry of dictionaries and lists."""
    flat = [dict(_flattened(row)) for row in rows]
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
