"""Checks after every search: the compiled plans give the labels that the search predicts, and each term matters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.methods.support_set import SupportSet
from iosr_fast.methods.tuning.held_out import HeldOutSet
from iosr_fast.methods.tuning.stack_weights import StackFit
from iosr_fast.scoring.plan import ScoringPlan
from iosr_fast.scoring.score import score

# A term whose spread over classes is below this share of the other term's affects only ties.
_NEGLIGIBLE = 1e-4


def right_by_plan(
    held_out: HeldOutSet, parameters: Mapping[str, float], factor: float, expected: np.ndarray
) -> np.ndarray:
    """(V,) bool: which of the held-out images (HeldOutSet.rows) the compiled plans get right.

    `expected` (V,) bool is the search's result. The two may differ only where the label's logit and its best rival's
    are equal up to float32 (`rounding`). Raises RuntimeError if they differ elsewhere or a logit isn't finite: a fault
    of this package, never of the images.
    """
    right = expected.copy()
    place = np.full(len(held_out.labels), -1)
    place[held_out.rows] = np.arange(len(expected))
    for rows, plan in held_out.plans(parameters):
        plan, queries, labels, at = plan.scaled(factor), held_out.queries[rows], held_out.labels[rows], place[rows]
        logits = score(plan, queries)
        right[at] = logits.argmax(1) == labels
        off = np.flatnonzero(right[at] != expected[at])
        own = logits[off, labels[off]]
        logits[off, labels[off]] = -np.inf
        clear = np.abs(own - logits[off].max(1)) > rounding(plan, queries[off]) if len(off) else np.zeros(0)
        logits[off, labels[off]] = own
        finite = bool(np.isfinite(logits).all())
        if clear.any() or not finite:
            raise RuntimeError(
                f"expected the compiled plan of {held_out.method.name} at {dict(parameters)}, factor {factor:g}, to "
                f"agree with the search, got an accuracy of {right.mean():.4f} instead of {expected.mean():.4f}"
                f"{'' if finite else ', and logits that are not finite'}; please report this bug, and meanwhile give "
                "the parameters or tune on validation images"
            )
    return right


def check_stack(held_out: HeldOutSet, fit: StackFit) -> None:
    """Compile the judged stack for the first fold and compare its labels with those of the search, as `right_by_plan`
    does for all folds. Raises RuntimeError as it does."""
    if not len(fit.right):
        return
    method, (rows, support) = held_out.method, held_out.splits[0]
    queries, expected = held_out.queries[rows], fit.judged.logits[: len(rows)]
    plan = method.compile(support, method.which, None, **fit.judged.parameters(full=False))
    logits = score(plan, queries)
    labels, n = logits.argmax(1), np.arange(len(logits))
    off = expected.max(1) - expected[n, labels] > rounding(plan, queries)
    if off.any() or not np.isfinite(logits).all():
        raise RuntimeError(
            f"expected the compiled plan of {method.name} at {fit.judged.parameters(full=False)} to agree with the "
            f"search, got {int(off.sum())} other labels of {len(off)}; please report this bug, and meanwhile name a "
            "single method"
        )


def rounding(plan: ScoringPlan, queries: Embeddings) -> np.ndarray:
    """(B,): the tolerance between logits, the formula and the search: 256 roundings of float32 at the largest sum of
    the terms' magnitudes, and 16 of each exponent, which beta multiplies."""
    size = np.full(len(queries), abs(plan.tau) if plan.text is not None else 0.0)
    if plan.keys is not None:
        sizes = {part: np.abs(array) for part in ("weights", "values") if (array := getattr(plan, part)) is not None}
        cache = replace(plan, text=None, linear=None, bias=None, feature="plain", **sizes)
        size += np.abs(score(cache, queries)).max(1)
    if plan.linear is not None:
        norms = {"both": np.sqrt(2.0), "text-distribution": np.hypot(1.0, np.log(plan.n_classes))}
        size += norms.get(plan.feature, 1.0) * np.linalg.norm(plan.linear, axis=1).max()
    size += 0.0 if plan.bias is None else np.abs(plan.bias).max()
    return (256 + 16 * plan.beta) * float(np.finfo(np.float32).eps) * size


def negligible_term(base: float, slope: float, alpha: float, has_text: bool) -> str:
    """A note if one of the terms of base + alpha * slope has no effect, judged by the spreads of both; else ""."""
    images = alpha * slope
    if has_text and base <= _NEGLIGIBLE * images:
        return f"alpha {alpha:.3g}: the texts have no effect"
    return f"alpha {alpha:.3g}: similarity to support images has no effect" if images <= _NEGLIGIBLE * base else ""


def left_out_note(held_out: HeldOutSet) -> str:
    """A note on what HeldOutSet.leave_one_out does not judge, or judges together; "" if there is nothing."""
    single, count = int((held_out.distinct == 1).sum()), held_out.n_duplicates
    notes = []
    if held_out.folds is not None and len(held_out.rows) and single:
        classes = f"{single} of {held_out.support.n_classes} classes {'has' if single == 1 else 'have'}"
        notes.append(f"{classes} a single image, which can't be left out: no image of theirs is judged")
    if count:
        images = "1 image is a near duplicate" if count == 1 else f"{count} images are near duplicates"
        notes.append(f"{images} of others of the same class and left out together with them")
    return "; ".join(notes)


def single_label(plan: ScoringPlan, support: SupportSet, right: np.ndarray) -> str:
    """A note if the plan gives all support images one label although the search got images of several classes right
    (`right`, their classes), because the encoder can't distinguish the images; else ""."""
    labels = np.unique(score(plan, support.as_queries).argmax(1))
    if len(labels) > 1 or len(np.unique(right)) < 2:
        return ""
    return (
        f"all {len(support.labels)} support images get the label of class {labels[0]}: the encoder does not "
        "distinguish them"
    )
