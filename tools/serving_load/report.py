"""Rows of the report from answers, and the goals of the measured values."""

from __future__ import annotations

import json
import operator
import os
import platform
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from iosr_fast.utils.machine import package_version
from iosr_fast.utils.provenance import commit, cpu_description
from tools.serving_load.client import Answer

if TYPE_CHECKING:
    from rich.console import Console

_PACKAGES = ("iosr_fast", "numpy", "onnxruntime", "openvino", "fastapi", "uvicorn", "uvloop", "h11", "aiohttp")
_REFUSAL_GOAL_MS = 50.0


def provenance() -> dict[str, Any]:
    """Device, versions and commit of a measurement."""
    versions = {"python": platform.python_version(), **{name: package_version(name) for name in _PACKAGES}}
    load = [round(value, 2) for value in os.getloadavg()] if hasattr(os, "getloadavg") else None
    return {"device": cpu_description(), "versions": versions, "commit": commit(), "load_average_at_start": load}


def percentile_ms(seconds: Sequence[float] | np.ndarray, q: float) -> float | None:
    """In milliseconds; None without values."""
    return round(float(np.percentile(seconds, q)) * 1e3, 3) if len(seconds) else None


def row_of(answers: Sequence[Answer], deadline_s: float) -> dict[str, Any]:
    """Counts and latencies of an open loop: sent = ok + refused + errors.

    `late` counts answers of 200 after their deadline, `wrong` those with another label than the classifier's own.
    Latencies count from when a request was due; `send_lag_p99_ms` is how late it was sent.
    """
    accepted = [answer.latency_s for answer in answers if answer.ok]
    refused = [answer.latency_s for answer in answers if answer.refused]
    kinds = Counter(answer.error for answer in answers if answer.error)
    seconds = max(answer.due for answer in answers) - min(answer.due for answer in answers)
    finished = max(answer.done for answer in answers) - min(answer.due for answer in answers)
    return {
        "sent": len(answers),
        "ok": len(accepted),
        "refused": len(refused),
        "errors": sum(kinds.values()),
        "p50_ms": percentile_ms(accepted, 50),
        "p99_ms": percentile_ms(accepted, 99),
        "refusal_p99_ms": percentile_ms(refused, 99),
        "refusal_p50_ms": percentile_ms(refused, 50),
        "p999_ms": percentile_ms(accepted, 99.9),
        "max_ms": percentile_ms(accepted, 100),
        "late": sum(latency > deadline_s for latency in accepted),
        "wrong": sum(answer.wrong for answer in answers),
        "error_kinds": dict(kinds),
        "sent_rps": round((len(answers) - 1) / seconds, 2) if seconds > 0 else None,
        "ok_rps": round(len(accepted) / finished, 2),
        "send_lag_p99_ms": percentile_ms([answer.sent - answer.due for answer in answers], 99),
    }


def goals(report: dict[str, Any]) -> list[dict[str, Any]]:
    """The goals of the measured parts of a report: {"goal", "limit", "measured", "met"}."""
    rows: list[dict[str, Any]] = []

    def add(goal: str, limit: float, measured: float | None, meets: Callable[[Any, Any], bool] = operator.le) -> None:
        met = None if measured is None else meets(measured, limit)
        rows.append({"goal": goal, "limit": limit, "measured": measured, "met": met})

    limit_ms = round(3 * report["lone_ms"] + report["max_wait_ms"], 3)
    for run in report["runs"]:
        at = f"at {run['load']:g} x capacity"
        if run["load"] < 1:
            add(f"p99_ms <= 3 lone_ms + max_wait_ms {at}", limit_ms, run["p99_ms"])
            add(f"nothing refused {at}", 0, run["refused"])
        else:
            add(f"refusal_p99_ms <= {_REFUSAL_GOAL_MS:g} {at}", _REFUSAL_GOAL_MS, run["refusal_p99_ms"])
        add(f"no error {at}", 0, run["errors"])
        add(f"no answer after its deadline {at}", 0, run["late"])
        add(f"no label but the classifier's own {at}", 0, run["wrong"])
    if "throughput" in report:
        add("throughput ratio >= 0.9", 0.9, report["throughput"]["ratio"], operator.ge)
    if "churn" in report:
        add("no change failed", 0, report["churn"]["failed"])
        add("no torn answer", 0, report["churn"]["torn"])
        add("the log restores the same state", True, report["churn"]["rebuilt"], operator.eq)
    return rows


def peer_goals(report: dict[str, Any], least: dict[str, float]) -> list[dict[str, Any]]:
    """The goals of a comparison: the ratios of `least`, and for these servers the latency at 0.8 of their capacity."""
    rows = []
    for row in report["servers"]:
        if row["server"] in least:
            ratio, limit = report["ratios"][row["server"]], least[row["server"]]
            goal = f"{row['server']}: pictures/s of the peer's >= {limit}"
            rows.append({"goal": goal, "limit": limit, "measured": ratio, "met": ratio >= limit})
            limit = round(3 * row["lone_ms"] + report["max_wait_ms"], 3)
            for run in row["runs"]:
                goal = f"{row['server']}: p99_ms <= 3 lone_ms + max_wait_ms at {run['load']:g} x capacity"
                met = run["p99_ms"] is not None and run["p99_ms"] <= limit
                rows.append({"goal": goal, "limit": limit, "measured": run["p99_ms"], "met": met})
    return rows


def print_peers(report: dict[str, Any]) -> None:
    from rich.table import Table

    console = _console()
    _print_origin(console, report)
    shown = ("pictures_per_s", "pictures_per_s_spread", "p50_ms", "p99_ms", "lone_ms", "client_cpu_share")
    loads = [run["load"] for run in report["servers"][0]["runs"]]
    heads = (f"p50, p99 ms at {load:g} of capacity" for load in loads)
    table = Table("server", "engine", "precision", *shown, "x peer", *heads)
    for row in report["servers"]:
        ratio = report["ratios"].get(row["server"], "")
        tails = (f"{run['p50_ms']}, {run['p99_ms']}" for run in row["runs"])
        table.add_row(
            f"{row['server']} {row['version']}", row["engine"], row["precision"], *(str(row[k]) for k in shown),
            str(ratio), *tails,
        )  # fmt: skip
    console.print(table)
    _print_goals(console, report)


def write(report: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def print_report(report: dict[str, Any]) -> None:
    from rich.table import Table

    console = _console()
    _print_origin(console, report)
    for name in ("lone_ms", "max_wait_ms", "capacity_rps", "memory", "throughput", "churn", "error"):
        if name in report:
            console.print(f"{name}: {report[name]}", markup=False)
    shown = (
        *("load", "sent", "ok", "refused", "errors", "late", "wrong", "p50_ms", "p99_ms", "max_ms", "refusal_p99_ms"),
        *("rss_mb_end", "client_cpu_share", "server_cpu_share", "others_cpu_share"),
    )
    table = Table(*shown)
    for run in report.get("runs", []):
        table.add_row(*(str(run[name]) for name in shown))
    console.print(table)
    _print_goals(console, report)


def _console() -> Console:
    from rich.console import Console

    return Console(width=None if Console().is_terminal else 150)


def _print_origin(console: Console, report: dict[str, Any]) -> None:
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    console.print(f"{report['device']}; {versions}; {report['commit']}; load average {report['load_average_at_start']}")


def _print_goals(console: Console, report: dict[str, Any]) -> None:
    for goal in report.get("goals", []):
        result = {None: "not measured", True: "met", False: "NOT MET"}[goal["met"]]
        console.print(f"{result}: {goal['goal']} (limit {goal['limit']}, measured {goal['measured']})", markup=False)
