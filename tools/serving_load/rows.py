"""Rows of a load test: counts, latencies, ratios to a rival, and what no row may have."""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np

from tools.serving_load.client import Answer, steady_rps

Facts = dict[str, Any]
Round = tuple[list[Answer], Facts]  # the answers of a measurement, and what was measured beside them


def percentile_ms(seconds: Sequence[float], q: float) -> float | None:
    """In milliseconds; None without values."""
    return round(float(np.percentile(seconds, q)) * 1e3, 3) if len(seconds) else None


def rps(answers: Sequence[Answer]) -> float | None:
    """Good answers a second."""
    done = [answer.done for answer in answers if answer.ok]
    return round(steady_rps(done, min(done), max(done)), 2) if len(done) > 1 else None


def row_of(rounds: Sequence[Round], deadline_s: float) -> Facts:
    """Counts and latencies of all rounds together: sent = ok + refused + errors.

    `late` counts answers of 200 after their deadline, `wrong` those with another label than the classifier's own.
    Latencies count from when a request was due; `send_lag_p99_ms` is how late it was sent.
    """
    answers = list(chain.from_iterable(made for made, _ in rounds))
    accepted = [answer.latency_s for answer in answers if answer.ok]
    refused = [answer.latency_s for answer in answers if answer.refused]
    kinds = Counter(answer.error for answer in answers if answer.error)
    return {
        "rounds": len(rounds),
        "sent": len(answers),
        "ok": len(accepted),
        "refused": len(refused),
        "errors": sum(kinds.values()),
        "late": sum(latency > deadline_s for latency in accepted),
        "wrong": sum(answer.wrong for answer in answers),
        "error_kinds": dict(kinds),
        "p50_ms": percentile_ms(accepted, 50),
        "p99_ms": percentile_ms(accepted, 99),
        "max_ms": percentile_ms(accepted, 100),
        "refusal_p99_ms": percentile_ms(refused, 99),
        "send_lag_p99_ms": percentile_ms([answer.sent - answer.due for answer in answers], 99),
        "ok_rps": _merged([rps(made) for made, _ in rounds]),
        **{name: _merged([facts[name] for _, facts in rounds]) for name in rounds[0][1]},
    }


def _merged(values: Sequence[Any]) -> Any:
    """Of several rounds: whether all are true, the sum of counts and of lists, the median of measurements."""
    if None in values:
        return None
    if isinstance(values[0], bool):
        return all(values)
    if isinstance(values[0], int):
        return sum(values)
    if isinstance(values[0], list):
        return list(chain.from_iterable(values))
    return round(statistics.median(values), 3)


def ratios(ours: Sequence[Round], theirs: Sequence[Round]) -> Facts:
    """{"p50_of_rival", ...}: the medians of the rounds' ratios, of what was measured in both."""
    pairs = defaultdict(list)
    for one, other in zip(map(_compared, ours), map(_compared, theirs), strict=False):
        for name, value in one.items():
            if value and other[name]:
                pairs[f"{name}_of_rival"].append(value / other[name])
    return {name: round(statistics.median(values), 3) for name, values in pairs.items()}


def _compared(made: Round) -> dict[str, Any]:
    answers, facts = made
    latencies = [answer.latency_s for answer in answers if answer.ok]
    p50, p99 = percentile_ms(latencies, 50), percentile_ms(latencies, 99)
    return {"p50": p50, "p99": p99, "rps": rps(answers), "change": facts.get("change_p50_ms")}


def problems_of(row: Mapping[str, Any]) -> str:
    """What no row may have, in words; "" where it has none of it."""
    counted = ["wrong", "errors", "torn", "changes_failed", *(["late", "refused"] if row.get("load", 0) < 1 else [])]
    found = [f"{name}: {row[name]}" for name in counted if row.get(name)]
    if row.get("last_classes_as_told") is False:
        found.append("not last_classes_as_told")
    label = " ".join(str(row[name]) for name in ("server", "case", "load") if name in row)
    return f"{label}: {'; '.join(found)}; {row['error_kinds']}" if found else ""
