"""A plan in parts: the text term of all classes, and one cache term for each segment of the support images."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from iosr_fast.encoders.encoder import Array, Embeddings
from iosr_fast.scoring.device_plan import share_copies
from iosr_fast.scoring.plan import ScoringPlan
from iosr_fast.scoring.scorer import Scorer
from iosr_fast.scoring.validation import frozen


@dataclass(frozen=True, eq=False)
class SegmentedPlan:
    """logits[b, c] = head's logits[b, c] + sum over parts p with column c: the logits of p for it.

    `head` has the C classes; a part is a cache term over its own c classes, and `columns` (c,) int64 are their indices
    among the C, -1 for a removed class. Parts are added in their order, so logits don't depend on timing.
    """

    head: ScoringPlan
    parts: tuple[tuple[ScoringPlan, np.ndarray], ...]

    @property
    def n_classes(self) -> int:
        return self.head.n_classes


class SegmentedScorer:
    """A SegmentedPlan bound to an implementation: `scorer(embeddings)` gives the logits (B, C) float32."""

    def __init__(self, plan: SegmentedPlan, impl: str = "auto") -> None:
        self._head = Scorer(plan.head, impl)
        self._parts = []
        self._uploaded: dict[tuple[int, Any], tuple[Any, Any]] = {}
        for part, columns in plan.parts:
            active = columns >= 0
            whole = np.array_equal(columns, np.arange(plan.n_classes))
            self._parts.append((Scorer(part, impl), slice(None) if whole else columns[active], active))

    def __call__(self, embeddings: Embeddings) -> Array:
        logits = self._head(embeddings)
        for scorer, columns, active in self._parts:
            # The head's score has checked the norms of the embeddings.
            part = scorer(embeddings, check=False)
            if isinstance(columns, slice):
                logits += part
            elif isinstance(part, np.ndarray):
                logits[:, columns] += part[:, active]
            else:
                at, of = self._indices(columns, active, part.device)
                logits.index_add_(1, at, part.index_select(1, of))
        return logits

    def _indices(self, columns: np.ndarray, active: np.ndarray, device: Any) -> tuple[Any, Any]:
        """Columns of the logits and of the part as tensors, uploaded once a device: an index from the CPU waits."""
        from iosr_fast.scoring.device_plan import as_tensor

        key = (id(columns), device)
        if key not in self._uploaded:
            self._uploaded[key] = (as_tensor(columns).to(device), as_tensor(np.flatnonzero(active)).to(device))
        return self._uploaded[key]


def scorer_of(plan: ScoringPlan | SegmentedPlan, impl: str = "auto") -> Scorer | SegmentedScorer:
    """Either kind of plan, bound to an implementation."""
    return SegmentedScorer(plan, impl) if isinstance(plan, SegmentedPlan) else Scorer(plan, impl)


def with_arrays(plan: ScoringPlan, **changed: Any) -> ScoringPlan:
    """The plan with some fields changed, without the checks of a new plan, which read every key."""
    changed_plan = copy.copy(plan)
    for name, value in changed.items():
        if isinstance(value, np.ndarray):
            value = frozen(name, value, value.dtype.type)
        object.__setattr__(changed_plan, name, value)
    share_copies(plan, changed_plan)
    return changed_plan


def fused(head: ScoringPlan, part: ScoringPlan, columns: np.ndarray) -> ScoringPlan | None:
    """One plan for a head and its only part; None if a class of the part is removed.

    Classes have the same order in both, so a class without a key only repeats an offset.
    """
    if (columns < 0).any():
        return None
    assert part.class_offsets is not None
    counts = np.zeros(head.n_classes, np.int64)
    counts[columns] = np.diff(part.class_offsets)
    offsets = np.concatenate([[0], np.cumsum(counts)])
    return with_arrays(part, n_classes=head.n_classes, text=head.text, tau=head.tau, class_offsets=offsets)


def assemble(
    head: ScoringPlan, parts: Sequence[ScoringPlan], columns: Sequence[np.ndarray]
) -> ScoringPlan | SegmentedPlan:
    """The head with its parts, as one plan if that copies no key."""
    if not parts:
        return head
    if len(parts) == 1:
        plan = fused(head, parts[0], columns[0])
        if plan is not None:
            return plan
    return SegmentedPlan(head, tuple(zip(parts, columns, strict=True)))


def columns_of(classes: np.ndarray, uids: np.ndarray) -> np.ndarray:
    """(c,) index of each class in `uids`, which rise; -1 for a class that is not among them."""
    at = np.minimum(np.searchsorted(uids, classes), len(uids) - 1)
    columns: np.ndarray = np.where(uids[at] == classes, at, -1)
    return columns
