"""The demo's table: methods on held-out concepts, with parameters chosen by leave-one-out on each support set.

Each seed draws four pictures per concept as the support pool; the others are queries (iosr_fast/evaluation/tasks.py).
Queries choose nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from iosr_fast.evaluation.accuracy import Result
from iosr_fast.evaluation.demo import in_domain
from iosr_fast.evaluation.tasks import Encoded
from iosr_fast.scoring.score import score

NARROW = ("fp16", "bf16", "int8")


def cell(result: Result) -> dict[str, Any]:
    """A result in the demo's report, with queries per seed and the parameters of each seed."""
    row = result.row()
    return {
        "mean": result.mean,
        "std": result.std,
        "se": result.se,
        "queries": result.draws[0].images,
        "seeds": len(result.draws),
        **{name: row[name] for name in ("tuned_on", "chosen", "parameters", "tune_seconds")},
    }


def changed_labels(encoded: Encoded, results: Mapping[int, Result]) -> dict[str, tuple[int, int]]:
    """(changed, all) labels for each narrow key precision, over every draw of the results (by shots)."""
    counts = dict.fromkeys(NARROW, (0, 0))
    for shots, result in results.items():
        source = in_domain(encoded, [shots], [draw.seed for draw in result.draws])
        for draw in result.draws:
            task = source.draw(shots, draw.seed)
            plan = draw.tuned.compile(task.support)
            exact = score(plan, task.queries).argmax(1)
            for precision, (changed, total) in counts.items():
                labels = score(plan.with_key_precision(precision), task.queries).argmax(1)  # type: ignore[arg-type]
                counts[precision] = (changed + int((labels != exact).sum()), total + len(exact))
    return counts
