"""Choosing a method and its parameters on labelled images that are held out.

For fixed beta and gamma a sample is right on one interval of alphas, so the alpha that makes most samples right is
found by sorting the intervals' ends (search.sweep): no grid of alphas is needed. The other parameters are tried on the
public grid's values and then, more finely, around the best (parameter_search).
"""

from __future__ import annotations

import logging
import time
from dataclasses import replace

import numpy as np

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.exceptions import IosrFastError
from iosr_fast.methods import METHODS, check_parameters, fit_method_reducer, unavailable_reason, unknown_method
from iosr_fast.methods.method import MAX_ALPHA, Method
from iosr_fast.methods.support_set import SupportSet
from iosr_fast.methods.tuning.calibration import full_factor, usual_factor
from iosr_fast.methods.tuning.held_out import HeldOutSet, zero_shot_logits
from iosr_fast.methods.tuning.log_loss import fit_factor, spread
from iosr_fast.methods.tuning.parameter_search import ParameterSearch, is_level
from iosr_fast.methods.tuning.plan_check import (
    check_stack,
    left_out_note,
    negligible_term,
    right_by_plan,
    single_label,
)
from iosr_fast.methods.tuning.stack_weights import StackFit, better_alone, fit_stack
from iosr_fast.methods.tuning.tuned import Protocol, Tuned
from iosr_fast.scoring.reducers import Reducer, check_reducer
from iosr_fast.scoring.score import score

AUTO = "auto"
TUNE_SECONDS = 20.0
MAX_TUNE_SECONDS = 1e6
_log = logging.getLogger("iosr_fast")


def check_choice(method: str, reducer: str | None, tuning: str | None, **parameters: float | None) -> dict[str, float]:
    """The parameters that are not None. Raises ValueError if they, method, reducer and tuning don't go together."""
    if reducer is not None:
        check_reducer(reducer)
    if tuning not in (None, "loo", "none"):
        raise IosrFastError(f"expected tune to be 'loo' or 'none', got {tuning!r}")
    if method != AUTO:
        if method not in METHODS:
            raise unknown_method(method, (AUTO, *METHODS))
        values = check_parameters(method, **parameters)
        if METHODS[method].weighted and reducer not in (None, "none"):
            raise IosrFastError(f"{method} takes no reducer, got {reducer!r}")
        if values and tuning == "loo":
            raise IosrFastError(f"expected parameters or tune={tuning!r}, got both; leave {', '.join(values)} out")
        return values
    named = [name for name, value in {**parameters, "reducer": reducer}.items() if value is not None]
    if named or tuning == "none":
        extra = ", ".join(named) or f"tune={tuning!r}"
        raise IosrFastError(f"method 'auto' chooses by leave-one-out: leave {extra} out, or name a method")
    return {}


def tune(
    method: str,
    support: SupportSet,
    queries: Embeddings | None = None,
    labels: np.ndarray | None = None,
    reducer: str = "none",
    seconds: float = TUNE_SECONDS,
) -> Tuned:
    """The best parameters of `method` on a validation set, or without one by leave-one-out on the support set; for
    "auto" also the method (`tune_auto`; `reducer` is not used). `seconds` is the budget of a stack's regressions on one
    core, spent by a count of operations: the same data gives the same choice on every machine.

    On a validation set (`queries`, `labels`) the highest accuracy wins, then the widest plateau of alphas. By
    leave-one-out (HeldOutSet.leave_one_out) the images are few: settings within two standard errors of the best
    (is_level) count as equal, and the lowest log-loss among them wins. Alpha is searched from 0 to MAX_ALPHA.
    If each class has one image, nothing can be left out, and one_shot_parameters decides. The accuracy that is
    reported is that of images that did not choose (Tuned.accuracy), on a validation set as by leave-one-out.

    Raises IosrFastError for an unknown method or reducer, labels that don't fit, or if the support set lacks what the
    method needs; RuntimeError if the compiled plan disagrees with the search (plan_check).

    >>> import numpy as np
    >>> from iosr_fast import Embeddings
    >>> from iosr_fast.methods.support_set import make_support_set
    >>> labels = np.repeat([0, 1], 8)
    >>> rows = np.random.default_rng(0).normal(size=(16, 4)) + 4 * np.eye(2, 4)[labels]
    >>> rows = Embeddings((rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32))
    >>> support = make_support_set(rows, labels, text=None, tau=100.0, n_classes=2)
    >>> tuned = tune("gda", support)
    >>> tuned.protocol, tuned.scored, sorted(tuned.parameters)
    ('loo', 16, ['alpha'])
    >>> plan = tuned.compile(support)
    """
    if method == AUTO:
        return tune_auto(support, queries, labels, seconds)
    started = time.perf_counter()
    if method not in METHODS:
        raise unknown_method(method, (AUTO, *METHODS))
    if (reason := unavailable_reason(method, support)) is not None:
        raise IosrFastError(reason)
    entry = METHODS[method]
    validated = queries is not None
    held_out = _held_out(entry, support, queries, labels, fit_method_reducer(entry, reducer, support))
    if entry.weighted:
        return _tune_weighted(held_out, fit_stack(held_out, seconds), started)
    fitted = held_out.reducer
    protocol: Protocol = "validation" if validated else "loo"
    if not entry.needs_support:
        return replace(_without_parameters(held_out, protocol), seconds=time.perf_counter() - started)
    if not len(held_out.rows):
        parameters = one_shot_parameters(entry, support, fitted)
        factor = usual_factor(entry, support, fitted, parameters)
        tuned = Tuned(method, reducer, parameters, float("nan"), 0, "one-shot", factor=factor)
        return replace(tuned, note=left_out_note(held_out), seconds=time.perf_counter() - started)
    search = ParameterSearch(held_out)
    best, right = search.choose()
    parameters = {"alpha": best.alpha, **best.setting}
    right_by_search = right_by_plan(held_out, parameters, best.factor, best.right_at(best.alpha))
    base, slope = best.spreads or (spread(part) for part in held_out.logits(best.setting))
    tuned = Tuned(
        method=method,
        reducer=reducer,
        parameters=parameters,
        accuracy=float(right.mean()),
        scored=len(right),
        protocol=protocol,
        search_accuracy=float(right_by_search.mean()),
        alpha_range=best.alpha_range,
        log_loss=best.log_loss,
        factor=full_factor(held_out, parameters, best.factor),
        settings=len(search.tried),
        seconds=time.perf_counter() - started,
        right=right,
    )
    notes = (
        negligible_term(base, slope, best.alpha, support.text is not None),
        single_label(tuned.compile(support), support, search.labels[right_by_search]),
        left_out_note(held_out),
    )
    return replace(tuned, note="; ".join(filter(None, notes)))


def _tune_weighted(held_out: HeldOutSet, fit: StackFit, started: float) -> Tuned:
    """The result for a method whose weights are fitted by log-loss."""
    check_stack(held_out, fit)
    method, support, choice, scored = held_out.method, held_out.support, fit.choice, len(fit.right)
    adapted = choice.shares["adapter"] > 0
    name = method.name if adapted else method.name.removesuffix("++")
    parameters = choice.parameters()
    notes = [
        f"{part} add nothing: {effect}"
        for part, effect, used in (
            ("texts", "class names do not matter here", support.text is None or choice.shares["text"] > 0),
            ("adapted embeddings", "the plain engine does", adapted or not method.needs_adapter),
        )
        if not used
    ]
    labels = held_out.labels[held_out.rows]
    search_accuracy = float((fit.judged.logits.argmax(1) == labels).mean()) if scored else float("nan")
    protocol: Protocol = "validation" if held_out.folds is None else "loo" if scored else "one-shot"
    return Tuned(
        method=name,
        reducer="none",
        parameters={key: parameters.get(key, 0.0) for key in METHODS[name].parameters},
        accuracy=float(fit.right.mean()) if scored else float("nan"),
        scored=scored,
        protocol=protocol,
        search_accuracy=search_accuracy,
        log_loss=choice.loss if scored else None,
        settings=fit.settings,
        seconds=time.perf_counter() - started,
        note="; ".join(filter(None, (*notes, left_out_note(held_out)))),
        shares=choice.shares,
        right=fit.right,
    )


def _without_parameters(held_out: HeldOutSet, protocol: Protocol) -> Tuned:
    """The result for a method without support images, of which only the factor is fitted."""
    method, labels = held_out.method, held_out.labels
    if not len(labels):
        raise IosrFastError("expected support images or validation images to calibrate by, got none")
    base = score(method.compile(held_out.support), held_out.queries)
    fit = fit_factor(base, np.zeros_like(base), labels, 0.0)
    right = right_by_plan(held_out, {}, fit.factor, (base.argmax(1) == labels)[held_out.rows])
    accuracy = float(right.mean()) if len(right) else float("nan")
    result = Tuned(method.name, "none", {}, accuracy, len(right), protocol, accuracy, settings=1, right=right)
    return replace(result, log_loss=fit.loss, factor=fit.factor, note=left_out_note(held_out))


def one_shot_parameters(method: Method, support: SupportSet, reducer: Reducer | None) -> dict[str, float]:
    """The method's defaults, with an alpha that gives images more weight the less accurate the texts are.

    With a the zero-shot accuracy on the support images (with at least one, and at most all but one, counted as right):

        alpha = (1 - a) / a * spread(zero-shot logits) / spread(the term that alpha multiplies)

    where spread is the mean over the images of the standard deviation over the other classes. alpha stays the default
    if either spread is mere rounding (with two classes there is only one other class). A method with a `ridge` (the
    proximal weight of its closed form) keeps alpha and takes ridge = 3 a^2. This is a rule of thumb; nothing is fitted.
    """
    parameters = dict(method.parameters)
    if support.text is None:
        return parameters
    queries = support.as_queries
    right = int((zero_shot_logits(support, queries).argmax(1) == support.labels).sum())
    n_images = len(support.embeddings)
    accuracy = min(max(right, 1), max(n_images - 1, 1)) / n_images
    if "ridge" in parameters:
        return {**parameters, "ridge": 3.0 * accuracy**2}
    setting = {name: value for name, value in parameters.items() if name != "alpha"}
    base, slope = HeldOutSet.validation(method, reducer, support, queries, support.labels).logits(setting)
    # A query may be its own key, which favours its own class: that class is left out of both spreads.
    others = np.arange(support.n_classes)[None, :] != support.labels[:, None]
    parts = [part[others].reshape(len(part), -1) for part in (base, slope)]
    if not all(spread(part) for part in parts):
        return parameters
    spreads = [float(np.std(part, axis=1).mean()) for part in parts]
    return {**parameters, "alpha": min((1 - accuracy) / accuracy * spreads[0] / spreads[1], MAX_ALPHA)}


def tune_auto(
    support: SupportSet,
    queries: Embeddings | None = None,
    labels: np.ndarray | None = None,
    seconds: float = TUNE_SECONDS,
) -> Tuned:
    """method="auto": the stack, on plain and, if there are any, on adapted embeddings; or a single method that is right
    more often by more than noise (`is_level`) on the images that are left out, or on a validation set if one is given.

    Without support images "zero-shot". Raises IosrFastError if there are no text embeddings either.
    """
    started = time.perf_counter()
    if not len(support.embeddings):
        if support.text is None:
            raise IosrFastError("expected support images or text embeddings, got neither")
        (name,) = (name for name, method in METHODS.items() if not method.needs_support)
        return Tuned(name, "none", {}, float("nan"), 0, "none")
    adapted = support.embeddings.adapted is not None
    (stacked,) = (method for method in METHODS.values() if method.weighted and method.needs_adapter is adapted)
    held_out = _held_out(stacked, support, queries, labels, None)
    fit = fit_stack(held_out, seconds)
    stack = _tune_weighted(held_out, fit, started)
    rivals = [tune(rival, support, queries, labels) for rival in better_alone(fit, held_out.labels[held_out.rows])]
    best = max(rivals, key=lambda tuned: tuned.accuracy, default=stack)
    for result in (stack, *rivals):
        _log.info("auto: %s: %.4f on %d images", result.method, result.accuracy, result.scored)
    chosen = stack if is_level(stack.right, best.right) else best
    return replace(chosen, seconds=time.perf_counter() - started)


def _held_out(
    method: Method,
    support: SupportSet,
    queries: Embeddings | None,
    labels: np.ndarray | None,
    reducer: Reducer | None,
) -> HeldOutSet:
    if queries is None and not method.needs_support and len(support.embeddings):  # it has seen none of the images
        queries, labels = support.as_queries, support.labels
    if queries is not None:
        return HeldOutSet.validation(method, reducer, support, queries, np.asarray(labels))
    return HeldOutSet.leave_one_out(method, reducer, support)
