"""Choosing a method and its parameters on labelled images that are held out.

For fixed beta and gamma a sample is right on one interval of alphas, so the alpha that makes most samples right is
found by sorting the intervals' ends (search.sweep): no grid of alphas is needed. The other parameters are tried on the
public grid's values and then, more finely, around the best (parameter_search).
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.exceptions import IosrFastError
from iosr_fast.methods import METHODS, check_parameters, compile_method, fit_method_reducer, unavailable_reason
from iosr_fast.methods.method import MAX_ALPHA, Method
from iosr_fast.methods.support_set import SupportSet
from iosr_fast.methods.tuning.held_out import HeldOutSet, zero_shot_logits
from iosr_fast.methods.tuning.log_loss import fit_factor, spread
from iosr_fast.methods.tuning.parameter_search import ParameterSearch, is_level
from iosr_fast.methods.tuning.plan_check import negligible_term, right_by_plan, single_label
from iosr_fast.scoring.plan import ScoringPlan
from iosr_fast.scoring.reducers import REDUCERS, Reducer, check_reducer
from iosr_fast.scoring.score import score

AUTO = "auto"
Protocol = Literal["loo", "validation", "one-shot", "none"]
_log = logging.getLogger("iosr_fast")


@dataclass(frozen=True, eq=False)
class Tuned:
    """The result of a search and its evidence.

    parameters    all of the method's, alpha included
    accuracy      of the compiled plans (plan_check.right_by_plan) on `scored` held-out images, at these parameters
    alpha_range   the widest plateau of best alphas for these other parameters; by leave-one-out alpha may lie beside it
    log_loss      on them, in nats, with logits multiplied by `factor` (None if it was not computed)
    right         (scored,) bool, which of the held-out images are right
    protocol      "validation", "loo" (one image of each class left out at a time), "one-shot" (nothing can be left out:
                  one_shot_parameters), "none"
    settings      combinations of the other parameters that were tried, with every alpha for each
    note          what a user has to know of the choice: texts or images that have no effect; else empty

    >>> from iosr_fast.methods.tuning.tune import Tuned
    >>> tuned = Tuned("gda", "none", {"alpha": 0.5}, accuracy=0.9, scored=40, protocol="loo")
    >>> f"{tuned.method}: {tuned.accuracy:.0%} of {tuned.scored} images"
    'gda: 90% of 40 images'
    """

    method: str
    reducer: str
    parameters: dict[str, float]
    accuracy: float
    scored: int
    protocol: Protocol
    alpha_range: tuple[float, float] | None = None
    log_loss: float | None = None
    factor: float = 1.0
    settings: int = 0
    seconds: float = 0.0
    note: str = ""
    right: np.ndarray | None = field(default=None, repr=False)

    def compile(self, support: SupportSet) -> ScoringPlan:
        """The plan with these parameters, its logits multiplied by `factor`, which calibrates probabilities."""
        return compile_method(self.method, support, reducer=self.reducer, **self.parameters).scaled(self.factor)


def check_choice(method: str, reducer: str | None, tuning: str | None, **parameters: float | None) -> dict[str, float]:
    """The parameters that are not None. Raises ValueError if they, method, reducer and tuning don't go together."""
    if reducer is not None:
        check_reducer(reducer)
    if tuning not in (None, "loo", "none"):
        raise IosrFastError(f"expected tune to be 'loo' or 'none', got {tuning!r}")
    if method != AUTO:
        values = check_parameters(method, **parameters)
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
) -> Tuned:
    """The best parameters of `method` on a validation set, or without one by leave-one-out on the support set; for
    "auto" also the best method and reducer (`tune_auto`; `reducer` is not used).

    On a validation set (`queries`, `labels`) the highest accuracy wins, then the widest plateau of alphas. By
    leave-one-out (HeldOutSet.leave_one_out) the images are few: settings within two standard errors of the best
    (is_level) count as equal, and the lowest log-loss among them wins. Alpha is searched from 0 to MAX_ALPHA.
    If each class has one image, nothing can be left out, and one_shot_parameters decides.

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
        return tune_auto(support, queries, labels)
    started = time.perf_counter()
    if method not in METHODS:
        raise IosrFastError(f"expected a method of {', '.join(METHODS)}, got {method!r}")
    if (reason := unavailable_reason(method, support)) is not None:
        raise IosrFastError(reason)
    entry = METHODS[method]
    fitted = fit_method_reducer(entry, reducer, support)
    validated = queries is not None
    if queries is not None:
        held_out = HeldOutSet.validation(entry, fitted, support, queries, np.asarray(labels))
    else:
        held_out = HeldOutSet.leave_one_out(entry, fitted, support)
    protocol: Protocol = "validation" if validated else "loo"
    if not entry.needs_support:
        return replace(_without_parameters(held_out, protocol), seconds=time.perf_counter() - started)
    if not len(held_out.rows):
        parameters = one_shot_parameters(entry, support, fitted)
        return Tuned(method, reducer, parameters, float("nan"), 0, "one-shot", seconds=time.perf_counter() - started)
    search = ParameterSearch(held_out)
    best = search.most_right() if validated else search.level_with_least_loss()
    parameters = {"alpha": best.alpha, **best.setting}
    right = right_by_plan(held_out, parameters, best.factor, best.right_at(best.alpha))
    base, slope = best.spreads or (spread(part) for part in held_out.logits(best.setting))
    tuned = Tuned(
        method=method,
        reducer=reducer,
        parameters=parameters,
        accuracy=float(right.mean()),
        scored=len(right),
        protocol=protocol,
        alpha_range=best.alpha_range,
        log_loss=best.log_loss,
        factor=best.factor,
        settings=len(search.tried),
        seconds=time.perf_counter() - started,
        right=right,
    )
    notes = (
        negligible_term(base, slope, best.alpha, support.text is not None),
        single_label(tuned.compile(support), support, search.labels[right]),
    )
    return replace(tuned, note="; ".join(filter(None, notes)))


def _without_parameters(held_out: HeldOutSet, protocol: Protocol) -> Tuned:
    """The result for a method without support images, of which only the factor is fitted."""
    method, labels = held_out.method, held_out.labels
    base = score(method.compile(held_out.support), held_out.queries)
    fit = fit_factor(base, np.zeros_like(base), labels, 0.0)
    right = right_by_plan(held_out, {}, fit.factor, (base.argmax(1) == labels)[held_out.rows])
    accuracy = float(right.mean()) if len(right) else float("nan")
    result = Tuned(method.name, "none", {}, accuracy, len(right), protocol, settings=1, right=right)
    return replace(result, log_loss=fit.loss, factor=fit.factor)


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
    queries = support.queries or support.embeddings
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


def tune_auto(support: SupportSet, queries: Embeddings | None = None, labels: np.ndarray | None = None) -> Tuned:
    """method="auto": method, reducer, plain or adapted embeddings and all parameters, by leave-one-out on the support
    set, or on a validation set if one is given.

    It tries every method that the support set allows, on plain and, if there are any, on adapted embeddings, without a
    reducer; then the best of them with each reducer. Among the results that are level with the most accurate one
    (is_level) the last in METHODS wins, then the lowest log-loss (on a validation set the highest accuracy). If each
    class has one image, the last method that is marked `one_shot` wins.

    Raises ValueError if there are neither support images nor text embeddings.
    """
    started = time.perf_counter()
    names = [name for name in METHODS if _worth_trying(name, support)]
    if queries is None and int(support.counts.max(initial=0)) < 2:
        suited = [name for name in names if METHODS[name].one_shot]
        if not suited:
            raise IosrFastError("expected support images or text embeddings, got neither")
        if not METHODS[suited[-1]].needs_support:
            return Tuned(suited[-1], "none", {}, float("nan"), 0, "none")
        return tune(suited[-1], support)
    tried = [tune(name, support, queries, labels) for name in names]
    best = _choose(tried)
    if METHODS[best.method].needs_support:
        reducers = [name for name in REDUCERS if name != "none"]
        tried += [tune(best.method, support, queries, labels, name) for name in reducers]
        best = _choose(tried)
    for result in tried:
        text = (result.method, result.reducer, result.accuracy, result.scored)
        _log.info("auto: %s, reducer %s: %.4f on %d images", *text)
    settings = sum(result.settings for result in tried)
    return replace(best, settings=settings, seconds=time.perf_counter() - started)


def _worth_trying(name: str, support: SupportSet) -> bool:
    reason = unavailable_reason(name, support)
    limit = METHODS[name].max_support_auto
    if reason is None and limit is not None and len(support.embeddings) > limit:
        reason = f"{name} is not tried on more than {limit} images"
    if reason is not None:
        _log.info("auto: %s", reason)
    return reason is None


def _choose(tried: list[Tuned]) -> Tuned:
    top = max(tried, key=lambda t: t.accuracy)
    families = [name.removesuffix("++") for name in METHODS]
    return min(
        (t for t in tried if is_level(t.right, top.right)),
        key=lambda t: (
            -families.index(t.method.removesuffix("++")),
            -t.accuracy if t.protocol == "validation" else t.log_loss,
        ),
    )
