"""Rows of a load test: counts, latencies, ratios to a rival, and what no row may have."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import chain
from statistics import median
from typing import Any

import numpy as np

from tools.serving_load.client import Answer
from tools.serving_load.contenders import Contender, Facts, Round

COMPARED = {"p50": "p50_ms", "p99": "p99_ms", "rps": "ok_rps", "change": "change_p50_ms"}


def make_rows(contenders: Sequence[Contender]) -> list[Facts]:
    """A row for each measurement and contender, with the medians of the rounds' ratios to the last contender."""
    rows = []
    for case, share in contenders[0].rounds:
        for each in contenders:
            if not (rounds := each.rounds.get((case, share))):
                continue
            row: Facts = {"case": case, "load": share, "server": each.name, **row_of(rounds)}
            row |= {"server_options": list(each.options), "commit": each.commit}
            lone = row_of(each.rounds.get(("lone", None), []))
            if share is not None and row["p99_ms"] and lone["p50_ms"]:
                row["p99_of_lone"] = round(row["p99_ms"] / lone["p50_ms"], 2)
            if case == "all" and row["p50_ms"] and lone["p50_ms"]:
                row["of_one"] = round(row["p50_ms"] / lone["p50_ms"], 3)
            theirs = contenders[-1].rounds.get((case, share), []) if each is not contenders[-1] else []
            pairs = [(row_of([one]), row_of([other])) for one, other in zip(rounds, theirs, strict=False)]
            for name, key in COMPARED.items():
                if made := [one[key] / other[key] for one, other in pairs if one.get(key) and other.get(key)]:
                    row[f"{name}_of_rival"] = round(median(made), 3)
            rows.append({name: value for name, value in row.items() if value is not None})
    return rows


def percentile_ms(seconds: Sequence[float], q: float) -> float | None:
    """In milliseconds; None without values."""
    return round(float(np.percentile(seconds, q)) * 1e3, 3) if len(seconds) else None


def rps(answers: Sequence[Answer]) -> float | None:
    """Good answers a second: the slope of their number over time, so that neither the wait for the first batch nor half
    a batch at the end counts."""
    done = np.sort([answer.done for answer in answers if answer.outcome == "ok"])
    return round(float(np.polyfit(done - done[0], np.arange(len(done)), 1)[0]), 2) if len(done) > 1 else None


def row_of(rounds: Sequence[Round]) -> Facts:
    """Counts and latencies of all rounds together: sent = ok + refused + errors. What was measured beside them is
    summed where it is counts or lists, else the median.

    Latencies count from when a request was due; `send_lag_p99_ms` is how late it was sent.
    """
    answers = list(chain.from_iterable(made for made, _ in rounds))
    outcomes = Counter(answer.outcome for answer in answers)
    latencies = [answer.latency_s for answer in answers if answer.outcome == "ok"]
    ok, refused = outcomes.pop("ok", 0), outcomes.pop("refused", 0)
    return {
        "rounds": len(rounds),
        "sent": len(answers),
        "ok": ok,
        "refused": refused,
        "errors": outcomes.total(),
        "wrong": sum(answer.wrong for answer in answers),
        "error_kinds": dict(outcomes),
        **{name: percentile_ms(latencies, q) for name, q in {"p50_ms": 50, "p99_ms": 99, "max_ms": 100}.items()},
        "refusal_p99_ms": percentile_ms([answer.latency_s for answer in answers if answer.outcome == "refused"], 99),
        "send_lag_p99_ms": percentile_ms([answer.sent - answer.due for answer in answers], 99),
        "ok_rps": _merged([rps(made) for made, _ in rounds]),
        **{name: _merged([facts[name] for _, facts in rounds]) for _, beside in rounds[:1] for name in beside},
    }


def _merged(values: Sequence[Any]) -> Any:
    if not values or None in values:
        return None
    return sum(values, type(values[0])()) if isinstance(values[0], int | list) else round(median(values), 3)


def problems_of(row: Mapping[str, Any]) -> str:
    """What no row may have, in words; "" where it has none of it."""
    counted = ["wrong", "errors", "torn", "changes_failed", "changes_lost"]
    counted += ["late", "refused"] if row.get("load", 0) < 1 else []
    found = [f"{name}: {row[name]}" for name in counted if row.get(name)]
    label = " ".join(str(row[name]) for name in ("server", "case", "load") if name in row)
    return f"{label}: {'; '.join(found)}; {row['error_kinds'] or row.get('change_errors', '')}" if found else ""
