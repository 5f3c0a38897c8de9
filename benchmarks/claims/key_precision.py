"""What do keys in fewer bits cost? `changed`: the share of test images that get another label than by float32 keys.

"gpu" is a plan as a GPU holds it by default (scoring.half_plan), computed on a CPU: keys, values, queries and
affinities in float16, all sums in float32. `moved` is the largest change of a probability, `answered` the share of test
images that are promised at most 5% errors with such keys, and `broken` the share of these that is wrong.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy.special import softmax

from benchmarks.claims.claim import Claim, Draws, Task, fit, rows_of
from iosr_fast import Embeddings, score
from iosr_fast.exceptions import IosrFastError
from iosr_fast.scoring.half_plan import half_plan
from iosr_fast.scoring.plan import ScoringPlan

PROMISED = 0.05


def draws(task: Task, method: str, seed: int) -> Draws:
    support = task.support
    given = support.embeddings, support.labels, support.text, support.tau, method
    plan = fit(*given, key_precision="fp32").plan_
    exact = score(plan, task.queries)
    of_default = fit(*given).plan_
    yield {"of": "gpu", **compared(task, exact, of_gpu(half_plan(of_default), task.queries)), **promised(task, given)}
    for precision in ("fp16", "int8"):
        narrow = plan if plan.keys is None else plan.with_key_precision(precision)
        yield {"of": precision, **compared(task, exact, score(narrow, task.queries))}


def compared(task: Task, exact: np.ndarray, narrow: np.ndarray) -> Mapping[str, float]:
    labels = exact.argmax(1), narrow.argmax(1)
    accuracy, of_narrow = (float((found == task.labels).mean()) for found in labels)
    moved = float(np.abs(softmax(exact, axis=1) - softmax(narrow, axis=1)).max())
    changed = float((labels[0] != labels[1]).mean())
    return {"changed": changed, "accuracy": accuracy, "narrow": of_narrow, "moved": moved}


def promised(task: Task, given: Any) -> Mapping[str, float | None]:
    """The share of test images that a head with keys in float16 answers, and that of wrong answers; None where there
    are too few support images for the promise."""
    try:
        answers = fit(*given, key_precision="fp16").predict(rows_of(task.queries), max_error=PROMISED)
    except IosrFastError:
        return {"answered": None, "broken": None}
    given_one = np.array([answer is not None for answer in answers])
    wrong = float((answers[given_one] != task.labels[given_one]).mean()) if given_one.any() else None
    return {"answered": float(given_one.mean()), "broken": wrong}


def of_gpu(plan: ScoringPlan, queries: Embeddings) -> np.ndarray:
    """Logits (B, C) of a half plan, with its queries and affinities in float16, too."""
    logits = score(plan, queries)
    if plan.keys is None:
        return logits
    rows = queries.plain if plan.query == "plain" else queries.adapted
    assert rows is not None
    if plan.reducer is not None:
        rows = plan.reducer(rows)
    keys, values = plan.dequantize(), plan.values
    if values is None:
        assert plan.class_offsets is not None
        values = np.repeat(np.eye(plan.n_classes, dtype=np.float32), np.diff(plan.class_offsets), axis=0)
    weights = np.float32(1.0) if plan.weights is None else plan.weights
    affinities = [weights * np.exp(plan.beta * (each @ keys.T - 1.0)) for each in (rows, half(rows))]
    moved: np.ndarray = logits + plan.alpha * ((half(affinities[1]) - affinities[0]) @ values.astype(np.float32))
    return moved


def half(array: np.ndarray) -> np.ndarray:
    """Rounded to float16, as float32."""
    return array.astype(np.float16).astype(np.float32)


CLAIM = Claim("key-precision", __doc__, draws, ("auto", "tip-adapter", "proker"))

if __name__ == "__main__":
    CLAIM.main()
