"""The weights, the kernel and the ridge of a stack: by log-loss on images that are left out, or by a prior.

Every part is fitted without a fold, and the weights that minimise the log-loss of the left-out images are exact
(convex, `log_loss.fit_weights`). They hold per unit of spread (`out_of_fold.Part`), because the spread of a part
changes with the number of images. With few images a class, one or two in at least a quarter of the classes:

- two: a fold leaves one image of each class. Texts beside the images give a covariance nevertheless, and a prior holds
  the weights. Without texts the discriminant of a fold has no covariance: only the regression's weight is fitted, and
  that of the discriminant at two images is derived from it (`_fit_two_without_texts`).
- one: nothing can be left out. The texts see no support image, so their temperature is fitted on all of them; the
  other weights follow from their accuracy (`one_shot_weights`).
- some classes have more: their images alone can be left out. Weights fitted on large classes do not suit small ones:
  the prior holds them, too.

The constants of `one_shot_weights` and `_fit_two_without_texts` are from validation images: Caltech-101 and Flowers,
encoded by CLIP ViT-B/32, and the demo's validation concepts. The quarter of `_with_more_regression` was chosen after
its effect was seen on the demo's test concepts; on the other sets it changes little.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from iosr_fast.methods.log_loss import PENALTY, fit_weights, log_losses
from iosr_fast.methods.models.model import TextModel
from iosr_fast.methods.out_of_fold import HeldOut, Part, is_level, spread_of_others
from iosr_fast.methods.papers import DISCRIMINANTS, MAX_KEYS, stack_models
from iosr_fast.methods.support_set import SupportSet
from iosr_fast.scoring.plan import Which

Setting = Mapping[str, float]
# Kernels and ridges of the regression, the most useful first: a budget cuts the list.
SETTINGS = tuple({"beta": b, "ridge": r} for b, r in ((1.0, 0.03), (1.0, 0.3), (3.0, 0.3), (3.0, 0.03), (1.0, 0.003)))
# With one or two images a class, where no setting can be chosen.
FEW_SHOT_SETTING = {"beta": 2.0, "ridge": 0.2}
# The share of classes with one or two images from which on a prior holds the weights, from validation images.
_FEW_SHARE = 0.25
# Copies of a class's text among its images, for the discriminant, where texts are always right.
_TEXT_IMAGES = 4.0
# Operations a second of one core, a cautious figure: the budget of time has to give the same choice on every machine.
_RATE = 1e10
# How firmly the prior holds the weights at two images a class, in units of 1 / spread^2.
_PRIOR_STRENGTH = 30.0


@dataclass(frozen=True, eq=False)
class Choice:
    """The parts of a stack that are used, with a weight >= 0 per unit of spread for each, and their log-loss.

    `parts` are named by the stack's parameters; `setting` has those that are no weights.
    """

    parts: Mapping[str, Part]
    weights: Mapping[str, float]
    setting: Setting
    loss: float = np.inf

    @property
    def logits(self) -> np.ndarray:
        """(V, C) of the held-out images."""
        return np.sum([self.weights[name] * part.scaled for name, part in self.parts.items()], axis=0)

    def without(self, *names: str) -> Choice:
        """Without some of its parts."""
        return replace(self, parts={name: part for name, part in self.parts.items() if name not in names})

    def parameters(self) -> dict[str, float]:
        """The stack's parameters, without those of parts that are not used."""
        values = {name: self.weights[name] / part.in_use for name, part in self.parts.items()}
        return {**values, **self.setting}

    @property
    def shares(self) -> dict[str, float]:
        """What texts, plain and adapted embeddings of pictures contribute to the spread of the logits; the sum is 1."""
        sums = {"text": 0.0, "pictures": 0.0, "adapter": 0.0}
        for name, weight in self.weights.items():
            adapted = name == "discriminant_adapted" or ("regression" in name and self.setting["adapted_keys"])
            sums["text" if name == "text" else "adapter" if adapted else "pictures"] += weight
        total = sum(sums.values()) or 1.0
        return {name: value / total for name, value in sums.items()}


@dataclass(frozen=True, eq=False)
class StackFit:
    """`choice` is the stack to use. `judged` is the one that the held-out images judge; with three and more images a
    class, it is `choice`. `right` (V,) bool says which of them are right if each half (HeldOut.halves) is judged with
    the weights and the setting that the other half chooses. `settings` counts the regressions that were tried."""

    choice: Choice
    judged: Choice
    right: np.ndarray
    settings: int


def fit_stack(held_out: HeldOut, adapted: bool, seconds: float) -> StackFit:
    """The best stack within a budget of `seconds` on one core; `adapted` allows adapted embeddings."""
    support, labels = held_out.support, held_out.labels
    embeddings: tuple[Which, ...] = ("adapted", "plain") if adapted else ("plain",)
    settings = affordable(len(support.embeddings), support.n_classes, embeddings, seconds)
    copies = 0.0 if support.text is None else _TEXT_IMAGES * text_accuracy(support)
    everywhere, prior, few = np.ones(len(labels), bool), None, _are_few(held_out)
    if few:
        prior, settings = one_shot_weights(support, embeddings), settings and on_each([FEW_SHOT_SETTING], embeddings)
        if support.text is None:
            fits = [
                _fit_two_without_texts(held_out, which, bool(settings), prior["regression"]) for which in embeddings
            ]
            return fits[0] if len(fits) == 1 or is_level(fits[0].right, fits[1].right) else fits[1]
    elif copies:  # whether texts help the discriminant is asked with the first setting alone
        tried = [_candidates(held_out, adapted, settings[:1], number) for number in (copies, 0.0)]
        copies = _best([choice for some in tried for choice in some], labels, everywhere).setting["text_images"]
    choices = list(_candidates(held_out, adapted, settings, copies))
    if few and not len(labels):
        weights = {name: prior[name] for name in choices[0].parts} if prior else {}
        choice = replace(choices[0], weights=weights, loss=float("nan"))
        return StackFit(choice, choice, np.zeros(0, bool), int(bool(settings)))
    best = _best(choices, labels, everywhere, prior)
    if best.shares["adapter"]:
        # The adapted embedding of a query is a second stream of the encoder, which has to pay: by more than the
        # standard error of the difference of log-losses.
        plain = [choice.without("discriminant_adapted") for choice in choices if not choice.setting["adapted_keys"]]
        other = _best(plain, labels, everywhere, prior)
        gains = log_losses(other.logits, labels) - log_losses(best.logits, labels)
        if gains.mean() <= gains.std() / np.sqrt(len(gains)):
            best, choices = other, plain
    right = best.logits.argmax(1) == labels
    for half in held_out.halves:
        logits = _best(choices, labels, ~half, prior).logits
        right[half] = (logits.argmax(1) == labels)[half]
    return StackFit(_with_more_images(best, held_out) if few else best, best, right, len(choices))


def _are_few(held_out: HeldOut) -> bool:
    """Whether a prior has to hold the weights."""
    if held_out.folds is None:
        return False
    sizes = held_out.folds.distinct[held_out.folds.distinct > 0]
    return int((sizes < 3).sum()) >= _FEW_SHARE * len(sizes)


def text_accuracy(support: SupportSet) -> float:
    """The share of all support images that the texts alone get right."""
    return float((TextModel(support).scores(support.as_queries).argmax(1) == support.labels).mean())


def _with_more_images(choice: Choice, held_out: HeldOut) -> Choice:
    """The choice for two images a class instead of the one that a fold leaves: texts lose weight if images alone are
    right more often. With a and b the accuracy of texts and of images: min(1, sqrt(a / b)) of it."""
    texts = ("text", "text_regression")
    alone = float((choice.without(*texts).logits.argmax(1) == held_out.labels).mean())
    share = min(1.0, (text_accuracy(held_out.support) / max(alone, 1e-9)) ** 0.5)
    weights = {name: weight * (share if name in texts else 1.0) for name, weight in choice.weights.items()}
    return replace(choice, weights=weights)


def one_shot_weights(support: SupportSet, embeddings: Sequence[Which]) -> dict[str, float]:
    """Weights at one image a class. With a the texts' accuracy on the support images and t the weight of the texts
    alone that minimises the log-loss of these images: text = 0.55 sqrt(a) t, text_regression = 0.15 a t. 1.35 is shared
    by the discriminants. The regression has 0.05; without texts it stands in for the discriminant, with 1.3."""
    shared = (1.35,) if len(embeddings) == 1 else (1.0, 0.35)
    prior = {DISCRIMINANTS[which]: weight for which, weight in zip(embeddings, shared, strict=True)}
    if support.text is None:
        return {**prior, "regression": 1.3}
    logits, labels = TextModel(support).scores(support.as_queries), support.labels
    (alone,), _ = fit_weights([logits / spread_of_others(logits, labels)], labels)
    accuracy = text_accuracy(support)
    texts = {"text": 0.55 * accuracy**0.5 * float(alone), "text_regression": 0.15 * accuracy * float(alone)}
    return {**prior, **texts, "regression": 0.05}


def _fit_two_without_texts(held_out: HeldOut, which: Which, regress: bool, prior: float) -> StackFit:
    """The weight of the regression on these embeddings at one image a class, and what follows for two; with w that
    weight and s the share of the classes that have two: discriminant = 2.75 s w^0.6, regression = (1 - 0.75 s) w."""
    labels, support, name = held_out.labels, held_out.support, DISCRIMINANTS[which]
    (setting,), images = on_each([{**FEW_SHOT_SETTING, "text_images": 0.0}], [which]), "regression" if regress else name
    models = stack_models(support, setting)
    part = held_out.part(models[images])
    weights, loss = np.array([prior]), float("nan")
    if len(labels):
        weights, loss = fit_weights([part.scaled], labels, weights, _PRIOR_STRENGTH)
    judged = Choice({images: part}, _named({images: part}, weights), setting, loss)
    right, choice = judged.logits.argmax(1) == labels, judged
    assert held_out.folds is not None
    share = min(1.0, int((held_out.folds.distinct - 1).sum()) / support.n_classes)
    if regress and share > 0:
        (weight,) = judged.weights.values()
        used = {name: 2.75 * share * weight**0.6, images: (1.0 - 0.75 * share) * weight}
        choice = Choice({name: held_out.part(models[name]), images: part}, used, setting, loss)
    return StackFit(choice, judged, right, int(regress))


def affordable(n_images: int, n_classes: int, embeddings: Sequence[Which], seconds: float) -> list[Setting]:
    """The first of SETTINGS on each of the embeddings whose regressions fit into the budget, by a count of operations:
    the same everywhere."""
    operations = 2.0 * n_images**3 + 12.0 * n_images**2 * n_classes
    number = int(seconds * _RATE / (operations * len(embeddings))) if n_images <= MAX_KEYS else 0
    return on_each(SETTINGS[:number], embeddings)


def on_each(settings: Sequence[Setting], embeddings: Sequence[Which]) -> list[Setting]:
    """The settings of the regression, with the keys of each of the embeddings."""
    return [{**setting, "adapted_keys": float(which == "adapted")} for setting in settings for which in embeddings]


def _candidates(held_out: HeldOut, adapted: bool, settings: Sequence[Setting], copies: float) -> Iterator[Choice]:
    """A stack, not yet weighted, for each setting of the regression; without regression if none fits."""
    for setting in settings or on_each([FEW_SHOT_SETTING], ["plain"]):
        values = {**setting, "text_images": copies}
        models = stack_models(held_out.support, values)
        if not settings:
            models = {name: model for name, model in models.items() if "regression" not in name}
        if not adapted:
            models.pop("discriminant_adapted", None)
        yield Choice({name: held_out.part(model) for name, model in models.items()}, {}, values)


def _best(
    choices: Sequence[Choice], labels: np.ndarray, rows: np.ndarray, prior: Mapping[str, float] | None = None
) -> Choice:
    """The choice with the least log-loss on the held-out images `rows` (V,) bool, with its weights."""
    fitted, strength = [], PENALTY if prior is None else _PRIOR_STRENGTH
    for choice in choices:
        centre = None if prior is None else np.array([prior[name] for name in choice.parts])
        parts = [part.scaled[rows] for part in choice.parts.values()]
        weights, loss = fit_weights(parts, labels[rows], centre, strength)
        fitted.append(replace(choice, weights=_named(choice.parts, weights), loss=loss))
    best = min(fitted, key=lambda choice: choice.loss)
    return best if prior is not None else _with_more_regression(best, labels, rows)


def _named(parts: Mapping[str, Part], weights: np.ndarray) -> dict[str, float]:
    """Weights by part. If no part beats a guess and all are 0, one part of the images gets a small weight: it gives
    labels, and probabilities near those of a guess."""
    weights = np.where(weights < 1e-9, 0.0, weights)  # a part without spread has no gradient
    by_name = dict(zip(parts, weights.tolist(), strict=True))
    if not weights.any():
        by_name[next(name for name in ("regression", "discriminant", "discriminant_adapted") if name in parts)] = 1e-3
    return by_name


def _with_more_regression(choice: Choice, labels: np.ndarray, rows: np.ndarray) -> Choice:
    """The choice with a quarter more weight of the regression, calibrated again, if more of the held-out images `rows`
    are right by more than a standard error. The regression's scores are no log-probabilities, so log-loss understates
    it where classes are many and few images are right."""
    weight = choice.weights.get("regression", 0.0)
    if weight == 0:
        return choice
    other = replace(choice, weights={**choice.weights, "regression": 1.25 * weight})
    logits, labels = other.logits[rows], labels[rows]
    right, more = choice.logits[rows].argmax(1) == labels, logits.argmax(1) == labels
    won, lost = int((more & ~right).sum()), int((right & ~more).sum())
    if won - lost <= np.sqrt(won + lost):
        return choice
    (factor,), loss = fit_weights([logits], labels)
    return replace(other, weights={name: float(factor) * value for name, value in other.weights.items()}, loss=loss)
