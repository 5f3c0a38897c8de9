"""A plan as a GPU holds it: in half precision by default, where that keeps the labels."""

from __future__ import annotations

import logging
import threading

import numpy as np

from iosr_fast.scoring.backends.torch import affinity_sums
from iosr_fast.scoring.device_plan import as_tensor, device_plan
from iosr_fast.scoring.plan import ScoringPlan
from iosr_fast.utils.require import require

JUDGED = 200
_lock = threading.Lock()
_log = logging.getLogger("iosr_fast")


def half_plan(plan: ScoringPlan) -> ScoringPlan:
    """`plan` with its float32 keys and values in float16, if it is `half_on_gpu` and that keeps the labels; chosen once
    for a plan.

    It keeps them if, of up to JUDGED keys that are left out in turn, at most one in a hundred, or one, has another
    label by the sum over all other keys; otherwise the plan stays as it is, with a warning.
    """
    if not plan.half_on_gpu or plan.key_precision != "fp32" or plan.query_transform is not None:
        return plan
    with _lock:
        if "_half" not in vars(plan):
            vars(plan)["_half"] = _checked_half(plan)
        half: ScoringPlan = vars(plan)["_half"]
        return half


def _checked_half(plan: ScoringPlan) -> ScoringPlan:
    half = plan.with_key_precision("fp16")
    assert plan.keys is not None
    rows = np.linspace(0, len(plan.keys) - 1, min(JUDGED, len(plan.keys))).round().astype(np.int64)
    labels = [_left_out_labels(one, plan.keys[rows], rows) for one in (plan, half)]
    changed = int(np.count_nonzero(labels[0] != labels[1]))
    if changed <= max(1, len(rows) // 100):
        return half
    _log.warning(
        "keys stay in float32 on the GPU: float16 changes %d of %d labels of left-out keys", changed, len(rows)
    )
    return plan


def _left_out_labels(plan: ScoringPlan, queries: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The labels of the keys `rows`, as float32 `queries`, by the sums over all other keys."""
    logits = require("torch", "cpu").zeros(len(rows), plan.n_classes)
    affinity_sums(device_plan(plan, "cpu"), as_tensor(queries), logits)
    own: np.ndarray
    if plan.values is not None:
        own = plan.values[rows].astype(np.float32)
    else:
        assert plan.class_offsets is not None
        own = np.eye(plan.n_classes, dtype=np.float32)[plan.class_offsets.searchsorted(rows, side="right") - 1]
    weights = 1.0 if plan.weights is None else plan.weights[rows, None]
    labels: np.ndarray = (logits.numpy() - plan.alpha * weights * own).argmax(axis=1)
    return labels
