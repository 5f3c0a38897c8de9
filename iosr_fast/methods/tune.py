"""Choosing a method's parameters on labelled images that are held out: the weights of the stack, the default, all
together (stack_weights), those of a named method by search (search.py), by a rule where nothing can be held out."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from msgspec.structs import replace

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.exceptions import IosrFastError
from iosr_fast.methods import METHODS, Method, check_parameters, fit_method_reducer, unavailable_reason, unknown_method
from iosr_fast.methods.config import Config, Evidence, Protocol
from iosr_fast.methods.folds import make_folds
from iosr_fast.methods.log_loss import MAX_ALPHA, fit_factor, spread
from iosr_fast.methods.models.model import Term
from iosr_fast.methods.out_of_fold import HeldOut, spread_of_others
from iosr_fast.methods.search import ParameterSearch
from iosr_fast.methods.stack_weights import fit_stack, one_shot_weights, text_accuracy
from iosr_fast.methods.support_set import SupportSet
from iosr_fast.scoring.key_precision import check_precision
from iosr_fast.scoring.plan import ScoringPlan
from iosr_fast.scoring.reducers import Reducer, check_reducer
from iosr_fast.scoring.validation import check_number

AUTO = "auto"
ESTIMATOR_PARAMETERS = ("alpha", "beta", "gamma", "ridge")  # of methods; the others are fitted
TUNE_SECONDS = 20.0
MAX_TUNE_SECONDS = 1e6
# Images that are left out to calibrate: one number is fitted.
_ENOUGH = 1000
# Beyond these numbers of support images leaving some out takes more than seconds.
_MOST = 100_000
_MOST_SOLVED = 3000
_log = logging.getLogger("iosr_fast")


class MethodFit(NamedTuple):
    """What a fit makes of a support set: the config, its reducer, fitted on the images, and the plan."""

    config: Config
    reducer: Reducer | None
    plan: ScoringPlan


@dataclass(frozen=True)
class Options:
    """The parameters of Classifier and FewShotHead that choose a method, checked.

    config   as they ask for it: the method may be AUTO, and parameters that are not given are missing
    tune     "loo", "none" or None
    seconds  the budget of a search
    """

    config: Config
    tune: str | None
    seconds: float

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Options:
        """From all parameters of an estimator. Raises IosrFastError for one that is unknown, out of range, given where
        it is to be chosen, or none of the method's."""
        method, reducer, tuning, look_alikes = (given[name] for name in ("method", "reducer", "tune", "look_alikes"))
        values = check_options(method, reducer, tuning, **{name: given[name] for name in ESTIMATOR_PARAMETERS})
        if not isinstance(look_alikes, bool):
            raise IosrFastError(f"expected look_alikes to be True or False, got {look_alikes!r}")
        config = Config(
            method=method,
            parameters=values,
            reducer=reducer or "none",
            key_precision=check_precision(given["key_precision"]),
            look_alikes=look_alikes,
        )
        return cls(config, tuning, check_number("tune_seconds", given["tune_seconds"], 0.0, MAX_TUNE_SECONDS))

    @property
    def searched(self) -> bool:
        """Whether a fit chooses parameters on the support images."""
        config = self.config
        return config.method == AUTO or self.tune == "loo" or (self.tune is None and not config.parameters)

    def fit(self, support: SupportSet) -> MethodFit:
        """The method of a support set: its parameters searched, if they are to be.

        Parameters that are given keep the labels, and the factor is fitted (`calibrate`); with tune="none" nothing is.
        """
        config = self.config
        images = len(support.embeddings)
        if self.searched and images:
            best = tune(config.method, support, reducer=config.reducer, seconds=self.seconds)
            kept = {name: getattr(config, name) for name in ("key_precision", "look_alikes")}
            config = replace(best.config, **kept)
            return MethodFit(config, best.reducer, config.with_keys(best.plan))
        config = replace(config, parameters={**config.entry.parameters, **config.parameters})
        reducer = config.fit_reducer(support)
        calibrated = images and self.tune != "none" and bool(self.config.parameters)
        if calibrated and unavailable_reason(config.method, support) is None:
            config = replace(config, factor=calibrate(config.entry, support, reducer, config.parameters))
        return MethodFit(config, reducer, config.compile(support, reducer))


def check_options(method: str, reducer: str | None, tuning: str | None, **parameters: float | None) -> dict[str, float]:
    """The parameters that are not None. Raises IosrFastError if they, method, reducer and tuning don't go together."""
    if reducer is not None:
        check_reducer(reducer)
    if tuning not in (None, "loo", "none"):
        raise IosrFastError(f"expected tune to be 'loo' or 'none', got {tuning!r}")
    if method != AUTO:
        if method not in METHODS:
            raise unknown_method(method, (AUTO, *METHODS))
        values = check_parameters(method, **parameters)
        if METHODS[method].is_stack and reducer not in (None, "none"):
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
) -> MethodFit:
    """The best parameters of `method` on a validation set, or without one by leave-one-out on the support set.

    "auto" is the stack, on plain and, if there are any, on adapted embeddings; without support images "zero-shot" where
    there are texts (a fit refuses it).
    `seconds` is the budget of a stack's regressions on one core, spent by a count of operations: the same data gives
    the same choice on every machine.

    On a validation set (`queries`, `labels`) the highest accuracy wins, then the widest plateau of alphas. By
    leave-one-out (folds.make_folds) the images are few: settings within two standard errors of the best (is_level)
    count as equal, and the lowest log-loss among them wins. Alpha is searched from 0 to MAX_ALPHA. If each class has
    one image, nothing can be left out, and one_shot_parameters decides. The accuracy that is reported is that of images
    that did not choose (Evidence.accuracy), on a validation set as by leave-one-out.

    Raises IosrFastError for an unknown method or reducer, labels that don't fit, or if the support set lacks what the
    method needs.

    >>> import numpy as np
    >>> from iosr_fast import Embeddings
    >>> from iosr_fast.methods.support_set import make_support_set
    >>> labels = np.repeat([0, 1], 8)
    >>> rows = np.random.default_rng(0).normal(size=(16, 4)) + 4 * np.eye(2, 4)[labels]
    >>> rows = Embeddings((rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32))
    >>> support = make_support_set(rows, labels, text=None, tau=100.0, n_classes=2)
    >>> config, reducer, plan = tune("gda", support)
    >>> config.evidence.protocol, config.evidence.scored, sorted(config.parameters), plan.linear.shape
    ('loo', 16, ['alpha'], (2, 4))
    """
    started = time.perf_counter()
    if method == AUTO and not len(support.embeddings):
        if support.text is None:
            raise IosrFastError("expected support images or text embeddings, got neither")
        return MethodFit(config := Config(method="zero-shot"), None, config.compile(support))
    if method == AUTO:
        method = "stack" if support.embeddings.adapted is None else "stack++"
    if method not in METHODS:
        raise unknown_method(method, (AUTO, *METHODS))
    if (reason := unavailable_reason(method, support)) is not None:
        raise IosrFastError(reason)
    entry = METHODS[method]
    fitted = fit_method_reducer(entry, reducer, support)
    by_itself = queries is None and not entry.needs_support  # it has seen none of the support images
    if by_itself and not len(support.embeddings):
        raise IosrFastError("expected support images or validation images to calibrate by, got none")
    if by_itself:
        held_out = HeldOut.validation(support, support.as_queries, support.labels)
    elif queries is None:
        held_out = HeldOut.of_support(support, make_folds(support))
    else:
        held_out = HeldOut.validation(support, queries, np.asarray(labels))
    plan: ScoringPlan | None = None
    if entry.is_stack:
        config, plan = fit_stack(held_out, entry, seconds)
    elif not len(held_out.labels):
        parameters = one_shot_parameters(entry, support, fitted)
        factor = usual_factor(entry, support, fitted, parameters)
        of_rule = Evidence(protocol="one-shot")
        config = Config(method=method, parameters=parameters, reducer=reducer, factor=factor, evidence=of_rule)
    elif not entry.needs_support:
        config = _calibrated(entry, held_out, "loo" if by_itself else "validation")
    else:
        config = ParameterSearch(entry, held_out, fitted).result(reducer)
    evidence = config.evidence
    assert evidence is not None
    _log.info("%s: %s", config.method, evidence.summary())
    plan = plan or config.compile(support, fitted)
    config = replace(config, evidence=replace(evidence, seconds=time.perf_counter() - started))
    return MethodFit(config, fitted, plan)


def _calibrated(method: Method, held_out: HeldOut, protocol: Protocol) -> Config:
    """A method without parameters: its factor alone is fitted."""
    logits = held_out.logits(method.terms(held_out.support, None, {}))
    factor, loss = fit_factor(logits, held_out.labels)
    accuracy = float((logits.argmax(1) == held_out.labels).mean())
    evidence = Evidence(
        accuracy=accuracy,
        scored=len(logits),
        protocol=protocol,
        search_accuracy=accuracy,
        log_loss=loss,
        settings=1,
    )
    return Config(method=method.name, factor=factor, evidence=evidence)


def calibrate(method: Method, support: SupportSet, reducer: Reducer | None, parameters: Mapping[str, float]) -> float:
    """The factor of the logits at all parameters. It minimises the log-loss of left-out support images
    (log_loss.fit_factor), of about 1,000 at most. If none can be left out, or if that takes more than seconds, it is
    `usual_factor`.
    """
    solved = method.is_stack or method.max_support is not None
    if len(support.embeddings) <= (_MOST_SOLVED if solved else _MOST):
        held_out = HeldOut.of_support(support, make_folds(support).first(_ENOUGH))
        if len(held_out.labels):
            return fit_factor(held_out.logits(method.terms(support, reducer, parameters)), held_out.labels)[0]
    return usual_factor(method, support, reducer, parameters)


def usual_factor(
    method: Method, support: SupportSet, reducer: Reducer | None, parameters: Mapping[str, float]
) -> float:
    """The factor that gives the logits of the support images the spread that a stack's have at one image a class:
    t + g, with its weights t of the texts and g of the images (stack_weights.one_shot_weights), over the
    classes that are not an image's own. 1 if the logits are constant over classes.
    """
    rows = np.zeros(len(support.embeddings), bool)
    rows[support.class_offsets[:-1][support.counts > 0]] = True
    logits = _sum(method.terms(support, reducer, parameters), support.as_queries[rows])
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
