"""Choosing a method's parameters on labelled images that are held out.

For fixed beta and gamma a sample is right on one interval of alphas, so the alpha that makes most samples right is
found by sorting the intervals' ends (`alpha`): no grid of alphas is needed. The other parameters are tried on the
public grid's values and then, more finely, around the best. The default, the stack, fits all its weights together.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.exceptions import IosrFastError
from iosr_fast.methods import METHODS, Method, check_parameters, fit_method_reducer, unavailable_reason, unknown_method
from iosr_fast.methods.alpha import Intervals, Plateau, intervals
from iosr_fast.methods.held_out import HeldOut, is_level, spread_of_others
from iosr_fast.methods.log_loss import MAX_ALPHA, Fit, fit_alpha, fit_factor, spread
from iosr_fast.methods.models.model import Term, TextModel
from iosr_fast.methods.out_of_fold import OutOfFold, note_of_folds, usual_factor
from iosr_fast.methods.stack_weights import StackFit, fit_stack
from iosr_fast.methods.support_set import SupportSet
from iosr_fast.methods.tuned import Protocol, Tuned
from iosr_fast.scoring.reducers import Reducer, check_reducer
from iosr_fast.scoring.score import score

AUTO = "auto"
TUNE_SECONDS = 20.0
MAX_TUNE_SECONDS = 1e6
# A term whose spread over classes is below this share of the other term's affects only ties.
_NEGLIGIBLE = 1e-4
_SHORTLIST = 20
_ROUNDS = 2
_log = logging.getLogger("iosr_fast")
Setting = Mapping[str, float]  # a method's parameters but alpha


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
) -> Tuned:
    """The best parameters of `method` on a validation set, or without one by leave-one-out on the support set.

    "auto" is the stack, on plain and, if there are any, on adapted embeddings; without support images "zero-shot".
    `seconds` is the budget of a stack's regressions on one core, spent by a count of operations: the same data gives
    the same choice on every machine.

    On a validation set (`queries`, `labels`) the highest accuracy wins, then the widest plateau of alphas. By
    leave-one-out (folds.make_folds) the images are few: settings within two standard errors of the best (is_level)
    count as equal, and the lowest log-loss among them wins. Alpha is searched from 0 to MAX_ALPHA. If each class has
    one image, nothing can be left out, and one_shot_parameters decides. The accuracy that is reported is that of images
    that did not choose (Tuned.accuracy), on a validation set as by leave-one-out.

    Raises IosrFastError for an unknown method or reducer, labels that don't fit, or if the support set lacks what the
    method needs.

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
    started = time.perf_counter()
    if method == AUTO and not len(support.embeddings):
        if support.text is None:
            raise IosrFastError("expected support images or text embeddings, got neither")
        return Tuned("zero-shot", "none", {}, float("nan"), 0, "none")
    if method == AUTO:
        method = "stack" if support.embeddings.adapted is None else "stack++"
    if method not in METHODS:
        raise unknown_method(method, (AUTO, *METHODS))
    if (reason := unavailable_reason(method, support)) is not None:
        raise IosrFastError(reason)
    entry = METHODS[method]
    fitted = fit_method_reducer(entry, reducer, support)
    protocol: Protocol = "loo" if queries is None else "validation"
    if queries is None and not entry.needs_support:  # it has seen none of the images
        queries, labels = support.as_queries, support.labels
        if not len(labels):
            raise IosrFastError("expected support images or validation images to calibrate by, got none")
    if queries is None:
        held_out = HeldOut.of_support(support)
    else:
        held_out = HeldOut.validation(support, queries, np.asarray(labels))
    if entry.is_stack:
        tuned = _of_stack(entry, protocol, held_out, fit_stack(held_out, entry.needs_adapter, seconds))
    elif not len(held_out.labels):
        parameters = one_shot_parameters(entry, support, fitted)
        factor = usual_factor(entry, support, fitted, parameters)
        tuned = Tuned(method, reducer, parameters, float("nan"), 0, "one-shot", factor=factor)
    elif not entry.needs_support:
        base = held_out.logits(entry.terms(support, "plain", None, {}))
        fit, right = fit_factor(base, np.zeros_like(base), held_out.labels, 0.0), base.argmax(1) == held_out.labels
        accuracy = float(right.mean())
        tuned = Tuned(method, "none", {}, accuracy, len(right), protocol, accuracy, right=right, settings=1)
        tuned = replace(tuned, log_loss=fit.loss, factor=fit.factor)
    else:
        tuned = _Search(entry, held_out, fitted).result(reducer)
    notes = filter(None, (tuned.note, note_of_folds(held_out)))
    tuned = replace(tuned, note="; ".join(notes), seconds=time.perf_counter() - started)
    _log.info("%s: %.4f of %d held-out images right", tuned.method, tuned.accuracy, tuned.scored)
    return tuned


def _of_stack(method: Method, protocol: Protocol, held_out: HeldOut, fit: StackFit) -> Tuned:
    choice, scored = fit.choice, len(fit.right)
    adapted = choice.shares["adapter"] > 0
    name = method.name if adapted else method.name.removesuffix("++")
    parameters = choice.parameters()
    notes = [
        f"{part} add nothing: {effect}"
        for part, effect, used in (
            ("texts", "class names do not matter here", held_out.support.text is None or choice.shares["text"] > 0),
            ("adapted embeddings", "the plain engine does", adapted or not method.needs_adapter),
        )
        if not used
    ]
    return Tuned(
        method=name,
        reducer="none",
        parameters={key: parameters.get(key, 0.0) for key in METHODS[name].parameters},
        accuracy=float(fit.right.mean()) if scored else float("nan"),
        scored=scored,
        protocol=protocol if scored else "one-shot",
        search_accuracy=float((fit.judged.logits.argmax(1) == held_out.labels).mean()) if scored else float("nan"),
        log_loss=choice.loss if scored else None,
        settings=fit.settings,
        note="; ".join(notes),
        shares=choice.shares,
        right=fit.right,
        out_of_fold=OutOfFold.of(held_out, choice.logits) if scored else None,
    )


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
    queries, n_images = support.as_queries, len(support.embeddings)
    right = int((TextModel(support).scores(queries).argmax(1) == support.labels).sum())
    accuracy = min(max(right, 1), max(n_images - 1, 1)) / n_images
    if "ridge" in parameters:
        return {**parameters, "ridge": 3.0 * accuracy**2}
    *others, (weight, images) = method.terms(support, method.which, reducer, {**parameters, "alpha": 1.0})
    base = np.sum([w * model.scores(queries) for w, model in others], axis=0)
    slope = weight * images.scores(queries)
    if support.n_classes < 3 or not spread(base) or not spread(slope):
        return parameters
    spreads = [spread_of_others(part, support.labels) for part in (base, slope)]
    return {**parameters, "alpha": min((1 - accuracy) / accuracy * spreads[0] / spreads[1], MAX_ALPHA)}


@dataclass(frozen=True, eq=False)
class _Candidate:
    """A setting with the alphas at which each held-out image is right, and its best ones."""

    setting: Setting
    intervals: Intervals
    plateau: Plateau

    @property
    def width(self) -> float:
        return (self.plateau.high - self.plateau.low) / max(self.plateau.alpha, 1e-30)

    def on(self, rows: np.ndarray) -> _Candidate:
        """With the best alphas of the images `rows` (V,) bool; the intervals stay those of all."""
        return replace(self, plateau=self.intervals.only(rows).best())


class _Search:
    """Every setting that was tried of a method base + alpha * images, each with its best alphas."""

    def __init__(self, method: Method, held_out: HeldOut, reducer: Reducer | None) -> None:
        self.method, self.held_out, self.reducer, self.labels = method, held_out, reducer, held_out.labels
        self.tried: list[_Candidate] = []
        for settings in self._schedule():
            for setting in settings:
                found = intervals(*self._logits(setting), self.labels)
                self.tried.append(_Candidate(setting, found, found.best()))

    def _schedule(self) -> Iterator[list[Setting]]:
        """All combinations of the axes' values; then, twice, finer ones around the best."""
        values = {name: list(axis) for name, axis in self.method.axes.items()}
        yield _combinations(values)
        for _ in range(_ROUNDS if values else 0):
            best = _most_right(self.tried).setting
            values = {name: _between(axis, best[name]) for name, axis in values.items()}
            yield _combinations(values)

    def _logits(self, setting: Setting) -> tuple[np.ndarray, np.ndarray]:
        """base, slope (V, C): the logits at alpha are base + alpha * slope, as the models without a fold give them: an
        alpha for fewer images is right for all, because more images are worth more weight."""
        parts = [weight * self.held_out.part(model).logits for weight, model in self._terms({"alpha": 1.0, **setting})]
        return np.sum(parts[:-1], axis=0), parts[-1]

    def _terms(self, parameters: Mapping[str, float]) -> list[Term]:
        return self.method.terms(self.held_out.support, self.method.which, self.reducer, parameters)

    def result(self, reducer: str) -> Tuned:
        """By leave-one-out the least log-loss chooses among the candidates that are level with the best, each tried at
        its best alpha and at its alpha of least log-loss; on a validation set the most right. Each half of the images
        (HeldOut.halves) is judged at the setting and the alpha that the other half chooses by the same rule; images
        that can't be halved, at those of the candidate."""
        everything, halves = np.ones(len(self.labels), bool), self.held_out.halves
        others = [~half for half in halves] if all(half.any() for half in halves) else []
        if self.held_out.folds is None:
            chosen = [_at_plateau(_most_right([c.on(rows) for c in self.tried])) for rows in (everything, *others)]
        else:
            chosen = self._level_with_least_loss([everything, *others])
        (best, fit), *by_halves = chosen
        judged = best.intervals.right_at(fit.alpha)
        for half, (candidate, of_half) in zip(halves if others else (), by_halves, strict=True):
            judged[half] = candidate.intervals.right_at(of_half.alpha)[half]
        base, slope = self._logits(best.setting)
        right = (base + fit.alpha * slope).argmax(1) == self.labels
        parameters = {"alpha": fit.alpha, **best.setting}
        logits = self.held_out.logits(self._terms(parameters))
        calibrated = fit_factor(logits, np.zeros_like(logits), self.labels, 0.0)
        return Tuned(
            method=self.method.name,
            reducer=reducer,
            parameters=parameters,
            accuracy=float(judged.mean()),
            scored=len(judged),
            protocol="validation" if self.held_out.folds is None else "loo",
            search_accuracy=float(right.mean()),
            alpha_range=(best.plateau.low, best.plateau.high),
            log_loss=calibrated.loss,
            factor=calibrated.factor,
            settings=len(self.tried),
            right=judged,
            out_of_fold=OutOfFold.of(self.held_out, calibrated.factor * logits),
            note="; ".join(filter(None, self._notes(best.setting, base, slope, fit, right))),
        )

    def _level_with_least_loss(self, masks: Sequence[np.ndarray]) -> list[tuple[_Candidate, Fit]]:
        """For each of the masks (V,) bool the choice of these images. Logits are computed once a setting."""
        shortlists = [_near_the_best([c.on(rows) for c in self.tried], int(rows.sum())) for rows in masks]
        measured: list[list[tuple[_Candidate, Fit, np.ndarray]]] = [[] for _ in masks]
        settings = {tuple(c.setting.items()): c.setting for shortlist in shortlists for c in shortlist}
        for key, setting in settings.items():
            base, slope = self._logits(setting)
            for rows, shortlist, results in zip(masks, shortlists, measured, strict=True):
                some = base[rows], slope[rows], self.labels[rows]
                for candidate in (c for c in shortlist if tuple(c.setting.items()) == key):
                    for fit in (fit_factor(*some, candidate.plateau.alpha), fit_alpha(*some)):
                        results.append((candidate, fit, candidate.intervals.right_at(fit.alpha)[rows]))
        return [_least_loss(results) for results in measured]

    def _notes(
        self, setting: Setting, base: np.ndarray, slope: np.ndarray, fit: Fit, right: np.ndarray
    ) -> Iterator[str]:
        """What a user has to know: a term without effect, or images that the encoder does not distinguish."""
        text, images = spread(base), fit.alpha * spread(slope)
        if self.held_out.support.text is not None and text <= _NEGLIGIBLE * images:
            yield f"alpha {fit.alpha:.3g}: the texts have no effect"
        elif images <= _NEGLIGIBLE * text:
            yield f"alpha {fit.alpha:.3g}: similarity to support images has no effect"
        support = self.held_out.support
        plan = self.method.compile(support, self.reducer, {"alpha": fit.alpha, **setting})
        labels = np.unique(score(plan, support.as_queries).argmax(1))
        if len(labels) == 1 and len(np.unique(self.labels[right])) > 1:
            yield (
                f"all {len(support.labels)} support images get the label of class {labels[0]}: the encoder does not "
                "distinguish them"
            )


def _at_plateau(candidate: _Candidate) -> tuple[_Candidate, Fit]:
    return candidate, Fit(candidate.plateau.alpha, 1.0, float("nan"))


def _most_right(tried: Sequence[_Candidate]) -> _Candidate:
    """The candidate with most images right; then with the widest plateau relative to alpha; then the first."""
    return max(tried, key=lambda c: (c.plateau.right, c.width))


def _near_the_best(tried: Sequence[_Candidate], n_samples: int) -> list[_Candidate]:
    """Some candidates within three standard errors of the best."""
    best = max(c.plateau.right for c in tried) / n_samples
    error = float(np.sqrt(best * (1 - best) / n_samples))
    near = [c for c in tried if c.plateau.right / n_samples >= best - 3 * error]
    near.sort(key=lambda c: -c.plateau.right)
    return near[:: -(-len(near) // _SHORTLIST)]


def _least_loss(measured: Sequence[tuple[_Candidate, Fit, np.ndarray]]) -> tuple[_Candidate, Fit]:
    """Of the candidates that are level with the most right, the one with the least log-loss."""
    top = max(measured, key=lambda one: one[2].sum())[2]
    candidate, fit, _ = min((one for one in measured if is_level(one[2], top)), key=lambda one: one[1].loss)
    return candidate, fit


def _combinations(values: Mapping[str, Sequence[float]]) -> list[Setting]:
    return [dict(zip(values, point, strict=True)) for point in product(*values.values())]


def _between(axis: Sequence[float], value: float) -> list[float]:
    """`value` and the points halfway to its neighbours on the axis."""
    at = axis.index(value)
    neighbours = (axis[max(at - 1, 0)], value, axis[min(at + 1, len(axis) - 1)])
    return sorted({(value + neighbour) / 2 for neighbour in neighbours})
