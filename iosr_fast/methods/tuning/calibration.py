"""The factor of the logits of a method whose parameters are given, or that has one image of each class."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from iosr_fast.methods.method import MAX_ALPHA, Method
from iosr_fast.methods.support_set import SupportSet
from iosr_fast.methods.tuning.held_out import HeldOutSet
from iosr_fast.methods.tuning.log_loss import fit_factor, spread
from iosr_fast.methods.tuning.stack_parts import HeldOutParts, spread_of_others
from iosr_fast.methods.tuning.stack_weights import one_shot_weights
from iosr_fast.scoring.reducers import Reducer
from iosr_fast.scoring.score import score

# Images that are left out: one number is fitted.
_ENOUGH = 1000
# Beyond these numbers of support images leaving some out takes more than seconds.
_MOST = 100_000
_MOST_SOLVED = 3000


def calibrate(
    method: Method, support: SupportSet, reducer: Reducer | None, parameters: Mapping[str, float]
) -> tuple[float, float | None]:
    """The factor of the logits at all parameters, and the log-loss of left-out support images with it, in nats.

    It minimises that log-loss (log_loss.fit_factor), of about 1,000 images at most. If none can be left out, or if that
    takes more than seconds, the factor is `usual_factor`, and no log-loss is known.
    """
    if len(support.embeddings) <= (_MOST_SOLVED if _solves(method) else _MOST):
        held_out = HeldOutSet.leave_one_out(method, reducer, support, _ENOUGH)
        if len(held_out.rows):
            labels = held_out.labels[held_out.rows]
            if method.weighted:
                logits = np.zeros((len(held_out.labels), support.n_classes), np.float32)
                for rows, plan in held_out.plans(parameters):
                    logits[rows] = score(plan, held_out.queries[rows])
                base, slope, alpha = logits[held_out.rows], np.zeros_like(logits[held_out.rows]), 0.0
            else:
                alpha = parameters["alpha"]
                base, slope = held_out.logits({name: v for name, v in parameters.items() if name != "alpha"})
            fit = fit_factor(base, slope, labels, alpha)
            return full_factor(held_out, parameters, fit.factor), fit.loss
    return usual_factor(method, support, reducer, parameters), None


def _solves(method: Method) -> bool:
    """Whether compiling it solves a system of all support images."""
    return method.max_support is not None or method.weighted


def full_factor(held_out: HeldOutSet, parameters: Mapping[str, float], factor: float) -> float:
    """The factor of the plan that is fitted with all support images, from that of plans without a fold: the spread of
    logits changes with the number of images (Part.full_unit), so that of scaled logits is kept. Measured on the images
    of the first fold, over the classes that are not their own. Ridge regression keeps its factor: it interpolates, so
    its logits of images that it has seen have another spread."""
    method = held_out.method
    if held_out.folds is None or not method.needs_support or _solves(method):
        return factor
    rows, without = held_out.splits[0]
    spreads = []
    for support in (without, held_out.support):
        logits = score(method.compile(support, method.which, held_out.reducer, **parameters), held_out.queries[rows])
        if not spread(logits):
            return factor
        spreads.append(spread_of_others(logits, held_out.labels[rows]))
    return min(factor * spreads[0] / spreads[1], MAX_ALPHA / max(1.0, parameters.get("alpha", 1.0)))


def usual_factor(
    method: Method, support: SupportSet, reducer: Reducer | None, parameters: Mapping[str, float]
) -> float:
    """The factor that gives the logits of the support images the spread that a stack's have at one image a class:
    t + g, with its weights t of the texts and g of the images (stack_weights.one_shot_weights), over the
    classes that are not an image's own. 1 if the logits are constant over classes.
    """
    rows = np.zeros(len(support.embeddings), bool)
    rows[support.class_offsets[:-1][support.counts > 0]] = True
    queries, labels = support.as_queries[rows], support.labels[rows]
    logits = score(method.compile(support, method.which, reducer, **parameters), queries)
    if not spread(logits):
        return 1.0
    parts = HeldOutParts(HeldOutSet.leave_one_out(method, reducer, support.only(rows)))
    weights = one_shot_weights(parts, ["plain"])
    images = weights["regression" if support.text is None else "discriminant"]
    return (weights.get("text", 0.0) + images) / spread_of_others(logits, labels)
