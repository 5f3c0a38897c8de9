"""What a search says of held-out images is what the compiled plans do: looked at after every search."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.methods.support_set import SupportSet
from iosr_fast.methods.tuning.held_out import HeldOutSet, in_order_of_folds, plans
from iosr_fast.scoring.plan import ScoringPlan
from iosr_fast.scoring.reducers import Reducer
from iosr_fast.scoring.score import score

# A term whose logits spread over classes this many times less than the other's decides nothing but ties.
_NOTHING = 1e-4


def right_by_plan(
    held: HeldOutSet,
    name: str,
    reducer: Reducer | None,
    parameters: Mapping[str, float],
    factor: float,
    found: np.ndarray,
) -> np.ndarray:
    """(V,) bool: the held-out images, in the order of folds, that the compiled plans (held_out.plans) get right.

    `found` (V,) bool is what the search says; it stays for images whose fold has no plan of its own. The two may differ
    only where the label's logit and its best rival's are one up to float32 (`rounding`). Raises RuntimeError where they
    differ elsewhere, or a logit isn't finite: a fault of this package, never of the images.
    """
    right = found.copy()
    place = np.full(len(held.labels), -1)
    place[in_order_of_folds(held)] = np.arange(len(found))
    for rows, plan in plans(held, name, reducer, parameters):
        plan, queries, labels = plan.scaled(factor), held.queries[rows], held.labels[rows]
        logits = score(plan, queries)
        right[place[rows]] = logits.argmax(1) == labels
        off = np.flatnonzero(right[place[rows]] != found[place[rows]])
        own = logits[off, labels[off]]
        logits[off, labels[off]] = -np.inf
        clear = np.abs(own - logits[off].max(1)) > rounding(plan, queries[off]) if len(off) else np.zeros(0)
        logits[off, labels[off]] = own
        if clear.any() or not np.isfinite(logits).all():
            raise RuntimeError(
                f"expected the compiled plan of {name} at {dict(parameters)}, factor {factor:g}, to do as the search "
                f"says, got {right.mean():.4f} right where the search has {found.mean():.4f}"
                f"{'' if np.isfinite(logits).all() else ', and logits that are not finite'}; please report this: "
                "until it is mended, give the parameters or tune on validation images"
            )
    return right


def rounding(plan: ScoringPlan, queries: Embeddings) -> np.ndarray:
    """(B,): how far logits may be from the formula's, and the search's from both: 256 roundings of float32 at the
    largest sum of the terms' sizes, and 16 of each exponent, which beta multiplies."""
    size = np.full(len(queries), abs(plan.tau) if plan.text is not None else 0.0)
    if plan.keys is not None:
        sizes = {part: np.abs(array) for part in ("weights", "values") if (array := getattr(plan, part)) is not None}
        cache = replace(plan, text=None, linear=None, bias=None, feature="plain", **sizes)
        size += np.abs(score(cache, queries)).max(1)
    if plan.linear is not None:
        feature = 1.0 if plan.feature != "text-distribution" else np.hypot(1.0, np.log(plan.n_classes))
        size += feature * np.linalg.norm(plan.linear, axis=1).max()
    size += 0.0 if plan.bias is None else np.abs(plan.bias).max()
    return (256 + 16 * plan.beta) * float(np.finfo(np.float32).eps) * size


def weighing(base: float, slope: float, alpha: float, texts: bool) -> str:
    """What there is to say of logits base + alpha * slope, by the spreads of both, where one decides nothing; else "".
    `texts` is whether there are any."""
    images = alpha * slope
    if texts and base <= _NOTHING * images:
        return f"alpha {alpha:.3g}: the texts don't count"
    return f"alpha {alpha:.3g}: similarity to support images doesn't count" if images <= _NOTHING * base else ""


def one_label(plan: ScoringPlan, support: SupportSet, right: np.ndarray) -> str:
    """What there is to say where a plan has one label for all of the support images, and the search had more of them
    right, `right` being the classes (R,) of those: the images can't be told apart."""
    labels = np.unique(score(plan, support.queries or support.embeddings).argmax(1))
    if len(labels) > 1 or len(np.unique(right)) < 2:
        return ""
    return f"all {len(support.labels)} support images get the label of class {labels[0]}: the encoder finds them alike"
