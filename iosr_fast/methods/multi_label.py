"""Images with any number of labels: a probability for each class by itself, and a threshold for each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

from iosr_fast.exceptions import IosrFastError
from iosr_fast.methods import METHODS
from iosr_fast.methods.log_loss import fit_binary, sigmoid
from iosr_fast.methods.multi_label_set import KeyTerm, LinearTerm, MultiLabelSet, MultiLabelTerms, multi_label_terms
from iosr_fast.methods.papers import Method
from iosr_fast.methods.stack import MAX_KEYS
from iosr_fast.methods.stack_weights import FEW_SHOT_SETTING, SETTINGS, affordable
from iosr_fast.methods.tune import AUTO, TUNE_SECONDS
from iosr_fast.scoring.key_precision import Precision
from iosr_fast.scoring.plan import ScoringPlan, Which
from iosr_fast.utils.ranking import mean_average_precision
from iosr_fast.utils.text import abbreviate

# How firmly the bias of a class is held at the common one, in images with and without the label. From the demo's
# validation concepts, pasted two to an image: from 0.5 to 1e6 the log-loss of other images changes by less than 1%.
SHRINKAGE = 4.0
# The spread of the regression's logits where no class has two images; from the same concepts.
_ONE_SHOT_SPREAD = 0.5
_PAIRS = 1 << 21  # of image and class that weights are fitted to; if there are more, every n-th image is used
_FIRM = 1e6  # a shrinkage that leaves only the common bias
_ROUNDING = 1e-12  # a spread of a term that is nothing but rounding
_LEAST = 1e-4  # of a weight that a plan needs, per unit of spread


@dataclass(frozen=True, eq=False)
class MultiLabelFit:
    """A plan whose logits are those of each class by itself, with the evidence of left-out support images.

    method, parameters  as chosen or given; `factor` multiplies the logits, as Head's config has it
    plan                sigmoid(logits) are the probabilities (B, C)
    thresholds          (C,) float32: an image has the labels whose probability reaches them. Halfway between the
                        class's own (f1_thresholds) and their mean, because left-out images of one class are few
    average_precision   mean over classes with two images or more, of left-out support images (N); NaN without any
    log_loss            of a pair of image and class, in nats; NaN likewise
    scored              the number of these classes
    """

    method: str
    parameters: dict[str, float]
    factor: float
    plan: ScoringPlan
    thresholds: np.ndarray
    average_precision: float
    log_loss: float
    scored: int


@dataclass(frozen=True, eq=False)
class _Choice:
    """The fit of a method at one setting: `weights` of the texts' logits and of each of the `terms`, by parameter, the
    biases (C,), and the `logits` (N, C) of left-out images with these."""

    which: Which
    setting: Mapping[str, float]
    terms: MultiLabelTerms
    weights: Mapping[str, float]
    bias: np.ndarray
    logits: np.ndarray
    loss: float


def multi_label_reason(method: str, reducer: str | None = None) -> str | None:
    """Why a method can't learn from images with several labels; None if it can.

    >>> multi_label_reason("gda++")
    "gda++ can't learn from several labels an image: it takes each image to be of one Gaussian class; use 'auto'"
    """
    if method != AUTO and (reason := METHODS[method].one_label):
        return f"{method} can't learn from several labels an image: {reason}; use 'auto'"
    if reducer not in (None, "none"):
        return f"several labels an image take no reducer, got {reducer!r}: leave it out"
    return None


def fit_multi_label(
    images: MultiLabelSet,
    method: str = AUTO,
    parameters: Mapping[str, float] | None = None,
    search: bool = True,
    key_precision: Precision = "fp32",
    seconds: float = TUNE_SECONDS,
) -> MultiLabelFit:
    """The plan of `method` for images with any number of labels each:

        logits[b, c] = w[0] tau <plain[b], text[c]> + w[1] sum_j exp(-beta (1 - <x[b], key[j]>)) V[j, c] + bias[c]
        probability of class c = 1 / (1 + exp(-logits[b, c]))

    V (N, C) is that of the method with an indicator of labels in the place of one-hot ones (multi_label_terms):
    Tip-Adapter's cache, ProKeR's regression, or that of "auto" and "stack", (K + ridge I)^-1 (Y - share), with Y the
    indicator and `share` (C,) the share of images that have the label. x and the keys are plain embeddings or, for the
    "++" form, adapted ones; the stack chooses. It also weighs Gaussian discriminants of plain and adapted embeddings
    (multi_label_set._discriminant). The weights w >= 0 and the biases, shrunk to a common one, minimise the log-loss
    of left-out images (log_loss.fit_binary); beta and ridge are those with the least log-loss. Every image is left
    out by itself, in closed form; of discriminants those of a fold together. `search=False`, or a parameter, takes the
    method's parameters as given or by default; then one slope and the biases are fitted.

    A class with a single image has no other to learn a bias from, and takes the common one. Where all classes have but
    one image, the weight of texts is fitted, and that of images is a rule: a spread of the texts' logits, or of 0.5.
    Probabilities hold for images of which as large a share has the label as of the support images.

    Raises IosrFastError for fewer than two images or more than 8192, a class without images unless the method is
    "zero-shot", and what the method needs and the images lack: texts, adapted embeddings.

    Sources: Platt scaling (1999); CLIP, Tip-Adapter and ProKeR as in methods.papers.

    >>> from iosr_fast import Embeddings, score
    >>> rng = np.random.default_rng(0)
    >>> centres = rng.standard_normal((3, 32))
    >>> def draw(n):  # each image shows some of three things
    ...     labels = rng.random((n, 3)) < 0.4
    ...     rows = labels @ centres + rng.standard_normal((n, 32))
    ...     return Embeddings((rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)), labels
    >>> fit = fit_multi_label(MultiLabelSet(*draw(40), text=None, tau=100.0))
    >>> images, labels = draw(200)
    >>> fit.method, bool(mean_average_precision(labels, score(fit.plan, images)) > 0.95)
    ('stack', True)
    """
    given, adapted = dict(parameters or {}), images.embeddings.adapted is not None
    if method == AUTO:
        method = "stack++" if adapted else "stack"
    _check(entry := METHODS[method], images)
    if search and not given:
        choices = [_fit(images, entry, *setting) for setting in _settings(entry, images, seconds)]
    else:
        given = {**entry.parameters, **given}
        which: Which = "adapted" if given.get("adapted_keys", entry.needs_adapter) else "plain"
        choices = [_fit(images, entry, which, given, fixed={"text": 1.0, **given})]
    best, used = min(choices, key=lambda choice: choice.loss), _used(entry, images)
    name, values, factor = _config(entry, best, given)
    thresholds = f1_thresholds(sigmoid(best.logits))
    return MultiLabelFit(
        name,
        values,
        factor,
        _plan(images, entry, best, key_precision),
        (thresholds + thresholds.mean()) / 2,
        mean_average_precision(images.labels[:, used], best.logits[:, used]),
        best.loss if used.any() else float("nan"),
        int(used.sum()),
    )


def f1_thresholds(probabilities: np.ndarray) -> np.ndarray:
    """The threshold (C,) float32 of each class that maximises its expected F1 on images of which these are the
    probabilities (N, C).

    F[k] = 2 sum_{i <= k} p[i] / (k + sum_i p[i]) of the k largest p of a class; the threshold is max_k F[k] / 2, which
    is never above 0.5. Only probabilities are used, because few images have the label.

    Source: Lipton, Elkan & Naryanaswamy, ECML PKDD 2014, theorem 1 (half of the optimal F1).

    >>> f1_thresholds(np.array([[0.9], [0.8], [0.1], [0.0]])).round(3)
    array([0.447], dtype=float32)
    """
    largest = -np.sort(-probabilities, axis=0)
    first = np.arange(1, len(largest) + 1)[:, None]
    expected = 2 * np.cumsum(largest, axis=0) / (first + largest.sum(0))
    thresholds: np.ndarray = (expected.max(0) / 2).astype(np.float32)
    return thresholds


def _check(entry: Method, images: MultiLabelSet) -> None:
    """Raise IosrFastError where the images lack what the method needs."""
    n_images = len(images.labels)
    if (reason := multi_label_reason(entry.name)) is not None:
        raise IosrFastError(reason)
    if not images.n_classes:
        raise IosrFastError("several labels an image: expected labels of at least one class, got empty sets alone")
    if not 2 <= n_images <= MAX_KEYS:
        raise IosrFastError(f"several labels an image: expected 2 to {MAX_KEYS} support images, got {n_images}")
    if entry.needs_text and images.text is None:
        raise IosrFastError(f"{entry.name} compares images with texts, and these images have no text embeddings")
    if entry.needs_adapter and images.embeddings.adapted is None:
        name = entry.name.removesuffix("++")
        raise IosrFastError(f"{entry.name} needs an encoder with an adapter; this one has none: use {name!r}")
    if entry.needs_support and len(empty := np.flatnonzero(images.counts == 0)):
        columns = abbreviate([str(column) for column in empty])
        raise IosrFastError(
            f"{entry.name} needs at least one image of each class, got none of the classes at {columns}"
        )


def _settings(entry: Method, images: MultiLabelSet, seconds: float) -> Iterator[tuple[Which, Mapping[str, float]]]:
    """The embeddings and settings to try: as many as the budget allows, and at least one; one where none is judged."""
    if not _used(entry, images).any():
        yield entry.which, FEW_SHOT_SETTING if entry.is_stack else entry.parameters
    elif entry.is_stack:
        embeddings: tuple[Which, ...] = ("adapted", "plain") if entry.needs_adapter else ("plain",)
        settings = affordable(len(images.labels), images.n_classes, len(embeddings), seconds) or SETTINGS[:1]
        yield from product(embeddings, settings)
    else:
        for values in product(*entry.axes.values()):
            yield entry.which, dict(zip(entry.axes, values, strict=True))


def _used(entry: Method, images: MultiLabelSet) -> np.ndarray:
    """(C,) bool, the classes of which left-out images say something: texts have seen no image."""
    return images.counts > 1 if entry.needs_support else np.ones(images.n_classes, bool)


def _fit(
    images: MultiLabelSet,
    entry: Method,
    which: Which,
    setting: Mapping[str, float],
    fixed: Mapping[str, float] | None = None,
) -> _Choice:
    """Weights and biases at one setting; with `fixed` weights, a factor of them all and biases."""
    terms, used = multi_label_terms(images, entry, which, setting), _used(entry, images)
    arrays = {} if images.text is None else {"text": images.tau * images.zero_shot(queries=True)}
    arrays |= {name: term.left_out for name, term in terms.items()}
    if fixed is None:
        mixtures = {name: {name: 1.0} for name in arrays}
    else:
        mixtures = {"text" if not terms else "all": {name: fixed[name] for name in arrays}}
    parts = {k: np.sum([w * arrays[n] for n, w in mixture.items()], axis=0) for k, mixture in mixtures.items()}
    units = {name: std if (std := float(part.std())) > _ROUNDING else 1.0 for name, part in parts.items()}
    scaled = {name: part / units[name] for name, part in parts.items()}
    if used.any():
        some = slice(None, None, -(-images.labels.size // _PAIRS))
        fit = fit_binary([part[some] for part in scaled.values()], images.labels[some], used, SHRINKAGE)
        factors, bias, loss = dict(zip(scaled, fit.weights.tolist(), strict=True)), fit.bias, fit.loss
    else:
        factors, bias, loss = _by_rule(scaled, images.labels)
        factors |= {name: 0.0 for name, term in terms.items() if isinstance(term, LinearTerm) and name in factors}
    if not any(factors.values()) or (entry.needs_support and not entry.is_stack):
        first = next(iter(factors))  # a method's weights are relative to that of the texts
        factors[first] = max(factors[first], _LEAST)
    weights = dict.fromkeys(arrays, 0.0)
    for name, factor in factors.items():
        for array, weight in mixtures[name].items():
            weights[array] += factor / units[name] * weight
    logits = np.sum([weight * arrays[name] for name, weight in weights.items()], axis=0) + bias
    return _Choice(which, setting, terms, weights, bias, logits, loss)


def _by_rule(scaled: Mapping[str, np.ndarray], labels: np.ndarray) -> tuple[dict[str, float], np.ndarray, float]:
    """Weights and biases where no class has two images, so that no term over keys can be judged (fit_multi_label)."""
    texts, there = scaled.get("text"), int(labels.sum())
    spread, common, loss = _ONE_SHOT_SPREAD, float(np.log(there / (labels.size - there))), float("inf")
    if texts is not None:
        fit = fit_binary([texts], labels, np.ones(labels.shape[1], bool), _FIRM)
        spread, common, loss = float(fit.weights[0]), fit.common, fit.loss
    shift = sum(spread * float(part.mean()) for name, part in scaled.items() if name != "text")
    return dict.fromkeys(scaled, spread), np.full(labels.shape[1], common - shift), loss


def _config(entry: Method, choice: _Choice, given: Mapping[str, float]) -> tuple[str, dict[str, float], float]:
    """Method, parameters and factor of the logits, as a MethodConfig has them."""
    weights, setting = choice.weights, choice.setting
    if entry.is_stack:
        adapted = choice.which == "adapted"
        name = entry.name if adapted or weights.get("discriminant_adapted") else entry.name.removesuffix("++")
        values = {**dict.fromkeys(METHODS[name].parameters, 0.0), **weights, "beta": setting["beta"]}
        values |= {"ridge": setting["ridge"], "adapted_keys": float(adapted)}
        return name, {key: values[key] for key in METHODS[name].parameters}, 1.0
    if "alpha" not in weights:
        return entry.name, {}, weights["text"]
    alpha = given.get("alpha") or entry.parameters["alpha"]
    factor = weights.get("text", weights["alpha"] / alpha)
    axes = {name: setting[name] for name in entry.parameters if name != "alpha"}
    return entry.name, {"alpha": weights["alpha"] / factor, **axes}, factor


def _plan(images: MultiLabelSet, entry: Method, choice: _Choice, key_precision: Precision) -> ScoringPlan:
    """A stack leaves out what has no weight."""
    weights, bias = choice.weights, choice.bias
    text = weights.get("text", 0.0)
    arrays: dict[str, Any] = {"text": images.text, "tau": text * images.tau} if text > 0 else {}
    used = [(term, weights[name]) for name, term in choice.terms.items() if weights[name] or not entry.is_stack]
    if keys := [(term, weight) for term, weight in used if isinstance(term, KeyTerm)]:
        values = np.sum([weight * term.values for term, weight in keys], axis=0)
        arrays |= {"keys": images.rows(choice.which), "values": values, "query": choice.which}
        arrays |= {"beta": choice.setting["beta"]}
    if linear := [(term, weight) for term, weight in used if isinstance(term, LinearTerm)]:
        arrays["linear"] = np.concatenate([weight * term.linear for term, weight in linear], axis=1)
        arrays["feature"] = linear[0][0].which if len(linear) == 1 else "both"
        bias = bias + sum(weight * term.bias for term, weight in linear)
    plan = ScoringPlan(images.n_classes, bias=bias, **arrays)
    return plan if plan.keys is None else plan.with_key_precision(key_precision)
