"""The config of a support set: parameters that are chosen on labelled images that are held out, the weights of the
stack all together (stack_weights), those of a named method by search (search), by a rule where nothing can be held out;
or parameters that are given."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from msgspec.structs import replace

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.exceptions import IosrFastError
from iosr_fast.methods.config import AUTO, Config, Evidence, Protocol
from iosr_fast.methods.folds import make_folds
from iosr_fast.methods.log_loss import MAX_ALPHA, fit_factor, spread
from iosr_fast.methods.models.model import Term
from iosr_fast.methods.multi_label import fit_multi_label
from iosr_fast.methods.out_of_fold import HeldOut, spread_of_others
from iosr_fast.methods.papers import Method
from iosr_fast.methods.search import ParameterSearch
from iosr_fast.methods.stack_weights import fit_stack, one_shot_weights, text_accuracy
from iosr_fast.methods.support_set import SupportSet
from iosr_fast.scoring.key_precision import KeyPrecision, check_precision
from iosr_fast.scoring.plan import ScoringPlan
from iosr_fast.scoring.reducers import Reducer, check_reducer
from iosr_fast.scoring.validation import check_number

Tuning = Literal["loo", "none"] | None
TUNE_SECONDS = 20.0
MAX_TUNE_SECONDS = 1e6
# Images that are left out to calibrate: one number is fitted.
_ENOUGH = 1000
# Beyond these numbers of support images leaving some out takes more than seconds.
_MOST = 100_000
_MOST_SOLVED = 3000
_log = logging.getLogger("iosr_fast")


def asked_config(
    method: str,
    reducer: str | None = None,
    tune: Tuning = None,
    tune_seconds: float = TUNE_SECONDS,
    key_precision: KeyPrecision | None = None,
    look_alikes: bool = True,
    alpha: float | None = None,
    beta: float | None = None,
    gamma: float | None = None,
    ridge: float | None = None,
    **_: Any,
) -> Config:
    """The config that the parameters of an estimator ask for (Classifier says what each means; others are ignored).
    Raises IosrFastError for one that is unknown, out of range, given where it is to be chosen, or none of the method's.

    >>> asked_config("tip-adapter", beta=3).parameters
    {'beta': 3.0}
    """
    given = {"alpha": alpha, "beta": beta, "gamma": gamma, "ridge": ridge}
    values = {name: value for name, value in given.items() if value is not None}
    if reducer is not None:
        check_reducer(reducer)
    if tune not in (None, "loo", "none"):
        raise IosrFastError(f"expected tune to be 'loo' or 'none', got {tune!r}")
    config = Config(method=method, parameters=values, reducer=reducer or "none")
    if method == AUTO:
        named = [*values] if reducer is None else [*values, "reducer"]
        if named or tune == "none":
            extra = ", ".join(named) or f"tune={tune!r}"
            raise IosrFastError(f"method 'auto' chooses by leave-one-out: leave {extra} out, or name a method")
    else:
        complete = config.complete
        values = {name: complete.parameters[name] for name in values}
        if values and tune == "loo":
            raise IosrFastError(f"expected parameters or tune={tune!r}, got both; leave {', '.join(values)} out")
    if not isinstance(look_alikes, bool):
        raise IosrFastError(f"expected look_alikes to be True or False, got {look_alikes!r}")
    precision = None if key_precision is None else check_precision(key_precision)
    check_number("tune_seconds", tune_seconds, 0.0, MAX_TUNE_SECONDS)
    return replace(config, parameters=values, key_precision=precision, look_alikes=look_alikes)


def is_searched(asked: Config, tuning: Tuning) -> bool:
    """Whether a fit chooses the parameters by the images."""
    return not asked.parameters and tuning != "none"


def tune(
    asked: Config,
    support: SupportSet,
    queries: Embeddings | None = None,
    labels: np.ndarray | None = None,
    tuning: Tuning = None,
    seconds: float = TUNE_SECONDS,
) -> tuple[Config, Reducer | None, ScoringPlan]:
    """The config that is best for a support set, its fitted reducer and its plan.

    Without parameters in `asked` all are searched on a validation set (`queries`, `labels`), or without one by
    leave-one-out on the support set. Given ones stay, others take their defaults, and the factor alone is fitted
    (`calibrate`). `tuning` = "none" takes all as they are.

    Images with any number of labels each: the weights are always fitted, by leave-one-out (multi_label).

    "auto" is the stack, on plain and, if there are any, on adapted embeddings; without support images "zero-shot" (a
    fit refuses it).
    `seconds` is the budget of a stack's regressions on one core, spent by a count of operations: the same data gives
    the same choice on every machine.

    On a validation set the highest accuracy wins, then the widest plateau of alphas. By leave-one-out
    (folds.make_folds) the images are few: settings within two standard errors of the best (is_level) count as equal,
    and the lowest log-loss among them wins. Alpha is searched from 0 to MAX_ALPHA. If each class has one image, nothing
    can be left out, and one_shot_parameters decides. The accuracy that is reported is that of images that did not
    choose (Evidence.accuracy), on a validation set as by leave-one-out.

    Raises IosrFastError for an unknown method, parameter or reducer, a value out of range, labels that don't fit, or if
    the support set lacks what the method needs.

    >>> import numpy as np
    >>> from iosr_fast import Embeddings
    >>> from iosr_fast.methods.support_set import make_support_set
    >>> labels = np.repeat([0, 1], 8)
    >>> rows = np.random.default_rng(0).normal(size=(16, 4)) + 4 * np.eye(2, 4)[labels]
    >>> rows = Embeddings((rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32))
    >>> support = make_support_set(rows, labels, text=None, tau=100.0, n_classes=2)
    >>> config, reducer, plan = tune(Config(method="gda"), support)
    >>> config.evidence.protocol, config.evidence.scored, sorted(config.parameters), plan.linear.shape
    ('loo', 16, ['alpha'], (2, 4))
    """
    if asked.method == AUTO:
        stack = "stack" if support.embeddings.adapted is None else "stack++"
        asked = replace(asked, method=stack if len(support.embeddings) else "zero-shot")
    complete = asked.complete
    searched = is_searched(asked, tuning) and (len(support.embeddings) > 0 or queries is not None)
    config = asked if searched else complete
    if (reason := config.unavailable_reason(support)) is not None:
        raise IosrFastError(reason)
    reducer = config.fit_reducer(support)
    if not searched and support.owners is None:
        if asked.parameters and tuning != "none":
            config = replace(config, factor=calibrate(config, support, reducer))
        return config, reducer, config.compile(support, reducer)
    started = time.perf_counter()
    held_out = _held_out(config.entry, support, queries, labels)
    plan: ScoringPlan | None = None
    if support.owners is not None:
        config, plan = fit_multi_label(held_out, config, searched, seconds)
    elif config.entry.is_stack:
        config, plan = fit_stack(held_out, config, seconds)
    elif not config.entry.needs_support:
        config = _scaled(config, held_out, "loo" if queries is None else "validation")
    elif len(held_out.labels):
        config = ParameterSearch(config, held_out, reducer).result()
    else:
        config = replace(config, parameters=one_shot_parameters(config.entry, support, reducer))
        factor = usual_factor(config, support, reducer)
        config = replace(config, factor=factor, evidence=Evidence(protocol="one-shot"))
    assert config.evidence is not None
    _log.info("%s: %s", config.method, config.evidence.summary())
    plan = config.compile(support, reducer) if plan is None else config.with_keys(plan)
    evidence = replace(config.evidence, seconds=time.perf_counter() - started)
    return replace(config, evidence=evidence), reducer, plan


def _held_out(method: Method, support: SupportSet, queries: Embeddings | None, labels: np.ndarray | None) -> HeldOut:
    """The images that choose. A method without support images has seen none of them: all are as new ones."""
    if queries is not None:
        return HeldOut.validation(support, queries, np.asarray(labels))
    if not method.needs_support and support.owners is None:
        return HeldOut.validation(support, support.as_queries, support.labels)
    return HeldOut.of_support(support, make_folds(support))


def _scaled(config: Config, held_out: HeldOut, protocol: Protocol) -> Config:
    """Of a method without parameters and reducer: its factor alone is fitted."""
    logits = held_out.logits(config.entry.terms(held_out.support, None, {}))
    factor, loss = fit_factor(logits, held_out.labels)
    accuracy = float((logits.argmax(1) == held_out.labels).mean())
    evidence = Evidence(accuracy=accuracy, scored=len(logits), protocol=protocol, log_loss=loss, settings=1)
    return replace(config, reducer="none", factor=factor, evidence=evidence)


def calibrate(config: Config, support: SupportSet, reducer: Reducer | None) -> float:
    """The factor of the logits at all parameters. It minimises the log-loss of left-out support images
    (log_loss.fit_factor), of about 1,000 at most. If none can be left out, or if that takes more than seconds, it is
    `usual_factor`.
    """
    method = config.entry
    if len(support.embeddings) <= (_MOST if method.max_support is None else _MOST_SOLVED):
        held_out = HeldOut.of_support(support, make_folds(support).first(_ENOUGH))
        if len(held_out.labels):
            return fit_factor(held_out.logits(method.terms(support, reducer, config.parameters)), held_out.labels)[0]
    return usual_factor(config, support, reducer)


def usual_factor(config: Config, support: SupportSet, reducer: Reducer | None) -> float:
    """The factor that gives the logits of the support images the spread that a stack's have at one image a class:
    t + g, with its weights t of the texts and g of the images (stack_weights.one_shot_weights), over the
    classes that are not an image's own. 1 if the logits are constant over classes.
    """
    rows = np.zeros(len(support.embeddings), bool)
    rows[support.class_offsets[:-1][support.counts > 0]] = True
    logits = _sum(config.entry.terms(support, reducer, config.parameters), support.as_queries[rows])
    if not spread(logits):
        return 1.0
    weights = one_shot_weights(support.only(rows), ["plain"])
    images = weights["regression" if support.text is None else "discriminant"]
    return (weights.get("text", 0.0) + images) / spread_of_others(logits, support.labels[rows])


def one_shot_parameters(method: Method, support: SupportSet, reducer: Reducer | None) -> dict[str, float]:
    """The method's defaults, with an alpha that gives images more weight the less accurate the texts are.

    With a the zero-shot accuracy on the support images (with at least one, and at most all but one, counted as right):

        alpha = (1 - a) / a * spread(zero-shot logits) / spread(the term that alpha multiplies)

    where spread is `spread_of_others`. alpha stays the default if either spread is mere rounding. A method with a
    `ridge` (the proximal weight of its closed form) keeps alpha and takes ridge = 3 a^2. This is a rule of thumb;
    nothing is fitted.
    """
    parameters = dict(method.parameters)
    if support.text is None:
        return parameters
    queries = support.as_queries
    least = 1 / len(support.embeddings)
    accuracy = min(max(text_accuracy(support), least), max(1 - least, least))
    if "ridge" in parameters:
        return {**parameters, "ridge": 3.0 * accuracy**2}
    *others, images = method.terms(support, reducer, {**parameters, "alpha": 1.0})
    base = _sum(others, queries)
    slope = _sum([images], queries)
    if support.n_classes < 3 or not spread(base) or not spread(slope):
        return parameters
    spreads = [spread_of_others(part, support.labels) for part in (base, slope)]
    return {**parameters, "alpha": min((1 - accuracy) / accuracy * spreads[0] / spreads[1], MAX_ALPHA)}


def _sum(terms: Sequence[Term], queries: Embeddings) -> np.ndarray:
    """The logits (B, C) of weighted terms."""
    return np.sum([weight * model.scores(queries) for weight, model in terms], axis=0)
