"""The weights, the kernel and the ridge of a stack: by log-loss on images that are left out, held by a prior.

Every part is fitted without a fold, and the weights that minimise the log-loss of the left-out images are exact
(convex, `log_loss.fit_weights`). They hold per unit of spread (`out_of_fold.Part`), because the spread of a part
changes with the number of images.

Classes of few images are judged badly: of one image there is none to leave out, and of two a fold leaves one, which
gives the discriminant another covariance. With a share `few` (`few_share`) of them, from 0 to 1 and smooth in the
numbers of images,

- a prior (`one_shot_weights`) holds the weights, with a strength that rises with `few`; alone where nothing can be left
  out.
- the settings of the regression are moved to FEW_SHOT_SETTING (`settings_for`): images of large classes choose one
  that does not suit small ones.

Left-out images come from large classes more often than new ones do, so a part that prefers large classes would seem
better than it is. The loss is therefore that of softmax(logits + log share), with the share of each class in the
left-out images (Menon et al., ICLR 2021, "logit adjustment"); for classes of one size it is the plain one.

All constants are from validation images: Caltech-101 and Flowers, encoded by CLIP ViT-B/32, and the demo's validation
concepts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import msgspec
import numpy as np

from iosr_fast.methods.config import Config, Evidence
from iosr_fast.methods.log_loss import PENALTY, fit_weights, log_losses
from iosr_fast.methods.models.model import TextModel, join_terms
from iosr_fast.methods.out_of_fold import HeldOut, Part, spread_of_others
from iosr_fast.methods.papers import DISCRIMINANTS, MAX_KEYS, METHODS, Method, stack_models
from iosr_fast.methods.support_set import SupportSet
from iosr_fast.scoring.plan import ScoringPlan, Which

Setting = Mapping[str, float]
# Kernels and ridges of the regression, the most useful first: a budget cuts the list.
SETTINGS = tuple({"beta": b, "ridge": r} for b, r in ((1.0, 0.03), (1.0, 0.3), (3.0, 0.3), (3.0, 0.03), (1.0, 0.003)))
# With one or two images a class, where no setting can be chosen.
FEW_SHOT_SETTING = {"beta": 2.0, "ridge": 0.2}
# Copies of a class's text among its images, for the discriminant, where texts are always right.
_TEXT_IMAGES = 4.0
# Operations a second of one core, a cautious figure: the budget of time has to give the same choice on every machine.
_RATE = 1e10
# How firmly the prior holds the weights at one and two images a class, in units of 1 / spread^2.
_PRIOR_STRENGTH = 90.0
# Added to the number of left-out images of each class, so that a class without any is still told from the others.
_NOT_NONE = 0.3


@dataclass(frozen=True, eq=False)
class Stack:
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
        total: np.ndarray = np.sum([self.weights[name] * part.scaled for name, part in self.parts.items()], axis=0)
        return total

    @property
    def plain(self) -> Stack:
        """Without the discriminant of adapted embeddings."""
        return replace(self, parts={name: part for name, part in self.parts.items() if name != "discriminant_adapted"})

    @property
    def full_weights(self) -> dict[str, float]:
        """The weights of models of all support images."""
        return {name: self.weights[name] / part.spread_full for name, part in self.parts.items()}

    def plan(self, n_classes: int) -> ScoringPlan:
        """The sum of the parts that have a weight, of the models that were fitted to judge them."""
        weights = self.full_weights
        terms = ((weights[name], part.model.fields()) for name, part in self.parts.items() if weights[name] > 0)
        return join_terms(n_classes, terms)

    def config(self, asked: Config, evidence: Evidence) -> Config:
        """The config of the method that is `asked` for, or of the plain one where adapted embeddings have no part."""
        shares = self.shares
        method = asked.entry
        notes = list[str]()
        if shares["text"] == 0 and "text" in self.parts:
            notes.append("texts add nothing: class names do not matter here")
        if method.needs_adapter and not shares["adapter"]:
            notes.append("adapted embeddings add nothing: the plain engine does")
            method = METHODS[method.name.removesuffix("++")]
        values = {**self.full_weights, **self.setting}
        parameters = {name: values.get(name, 0.0) for name in method.parameters}
        evidence = msgspec.structs.replace(evidence, shares=shares, note="; ".join(notes))
        return msgspec.structs.replace(asked, method=method.name, parameters=parameters, evidence=evidence)

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
class WeightPrior:
    """What weights minimise: the log-loss of images with `labels` (V,), and their distance from a `prior`, by part,
    times `strength`. `log_shares` (C,) are added to the logits."""

    labels: np.ndarray
    log_shares: np.ndarray
    prior: Mapping[str, float]
    strength: float

    @classmethod
    def of(cls, held_out: HeldOut, prior: Mapping[str, float], few: float) -> WeightPrior:
        """That of held-out images. A validation set has the shares of new images."""
        labels = held_out.labels
        n_classes = held_out.support.n_classes
        numbers = np.ones(n_classes) if held_out.folds is None else np.bincount(labels, minlength=n_classes) + _NOT_NONE
        return cls(labels, np.log(numbers), prior, PENALTY + few * _PRIOR_STRENGTH)

    def losses(self, stack: Stack) -> np.ndarray:
        """(V,) log-loss of each image."""
        return log_losses(stack.logits + self.log_shares, self.labels)

    def best(self, stacks: Sequence[Stack], rows: np.ndarray | slice = slice(None)) -> Stack:
        """The stack with the least log-loss on some of the images, with its weights; without images the first one,
        with those of the prior."""
        fitted = []
        for stack in stacks:
            weights = np.array([self.prior[name] for name in stack.parts])
            if not len(self.labels):
                return replace(stack, weights=_named(stack.parts, weights))
            parts = [part.scaled[rows] for part in stack.parts.values()]
            best, loss = fit_weights(parts, self.labels[rows], weights, self.strength, offset=self.log_shares)
            fitted.append(replace(stack, weights=_named(stack.parts, best), loss=loss))
        return min(fitted, key=lambda stack: stack.loss)


def fit_stack(held_out: HeldOut, asked: Config, seconds: float) -> tuple[Config, ScoringPlan]:
    """The best stack within a budget of `seconds` on one core, and its plan; with "stack++" adapted embeddings may have
    a part.

    Its accuracy is that of held-out images if each half (HeldOut.halves) is judged with the weights and the setting
    that the other half chooses.
    """
    support = held_out.support
    method = asked.entry
    labels = held_out.labels
    few = few_share(held_out)
    embeddings: tuple[Which, ...] = ("adapted", "plain") if method.needs_adapter else ("plain",)
    settings = affordable(len(support.embeddings), support.n_classes, embeddings, seconds, few)
    copies = 0.0 if support.text is None else _TEXT_IMAGES * text_accuracy(support)
    objective = WeightPrior.of(held_out, one_shot_weights(support, embeddings, bool(settings)), few)
    if copies and few < 1:  # whether texts help the discriminant is asked of large classes, with the first setting
        tried = [_candidates(held_out, method, settings[:1], number) for number in (copies, 0.0)]
        chosen = objective.best([stack for some in tried for stack in some]).setting["text_images"]
        copies = few * copies + (1.0 - few) * chosen
    stacks = list(_candidates(held_out, method, settings, copies))
    best = objective.best(stacks)
    if len(labels) and best.shares["adapter"]:
        # The adapted embedding of a query is a second stream of the encoder, which has to pay: by more than the
        # standard error of the difference of log-losses.
        alone = replace(objective, prior=one_shot_weights(support, ("plain",), bool(settings)))
        plain = [stack.plain for stack in stacks if not stack.setting["adapted_keys"]]
        other = alone.best(plain)
        gains = alone.losses(other) - objective.losses(best)
        if gains.mean() <= gains.std() / np.sqrt(len(gains)):
            best, stacks, objective = other, plain, alone
    right = best.logits.argmax(1) == labels
    for half in held_out.halves:
        right[half] = (objective.best(stacks, ~half).logits.argmax(1) == labels)[half]
    if not len(labels):
        evidence = Evidence(protocol="one-shot", settings=len(stacks))
        return best.config(asked, evidence), best.plan(support.n_classes)
    best = _with_more_images(best, held_out, few)
    evidence = Evidence(
        accuracy=float(right.mean()),
        scored=len(right),
        protocol=held_out.protocol,
        log_loss=float(log_losses(best.logits, labels).mean()),
        settings=len(stacks),
    )
    return best.config(asked, evidence), best.plan(support.n_classes)


def few_share(held_out: HeldOut) -> float:
    """How much the classes with one or two images count, from 0 to 1: 1.2 times their share in the sum over classes of
    1 / n, the noise of the mean of n images. 0 on a validation set, which judges all classes."""
    if held_out.folds is None:
        return 0.0
    sizes = held_out.folds.distinct[held_out.folds.distinct > 0]
    return float(min(1.0, 1.2 * (1 / sizes[sizes < 3]).sum() / max((1 / sizes).sum(), 1e-9)))


def settings_for(few: float) -> list[Setting]:
    """SETTINGS, with beta and ridge nearer to FEW_SHOT_SETTING by `few`, geometrically, and the fewer the nearer: all
    as they are for 0, that setting alone for 1."""
    number = max(1, int(np.ceil((1.0 - few) * len(SETTINGS))))
    ends = FEW_SHOT_SETTING.items()
    return [{name: one[name] ** (1.0 - few) * end**few for name, end in ends} for one in SETTINGS[:number]]


def text_accuracy(support: SupportSet) -> float:
    """The share of all support images that the texts alone get right."""
    return float((TextModel(support).scores(support.as_queries).argmax(1) == support.labels).mean())


def _with_more_images(stack: Stack, held_out: HeldOut, few: float) -> Stack:
    """The stack for two images a class instead of the one that a fold leaves: texts lose weight if images alone are
    right more often. With a and b the accuracy of texts and of images: min(1, sqrt(a / b))^few of it."""
    texts = {"text", "text_regression"} & set(stack.parts)
    if not texts or few == 0:
        return stack
    images = replace(stack, weights={**stack.weights, **dict.fromkeys(texts, 0.0)})
    alone = float((images.logits.argmax(1) == held_out.labels).mean())
    share = min(1.0, (text_accuracy(held_out.support) / max(alone, 1e-9)) ** 0.5) ** few
    return replace(stack, weights={**stack.weights, **{name: share * stack.weights[name] for name in texts}})


def one_shot_weights(support: SupportSet, embeddings: Sequence[Which], regress: bool = True) -> dict[str, float]:
    """Weights at one image a class, which the discriminants share. With a the texts' accuracy on the support images and
    t the weight of the texts alone that minimises the log-loss of these images: text = 0.55 sqrt(a) t, text_regression
    = 0.15 a t, regression = 0.05, discriminants = 1.35. Without texts regression = 1.3 - 1.02 s, discriminants = 2.8 s,
    with s the mean over classes of the images beside the first one, at most 1: one image a class has no covariance. s
    is 1 where the stack does not `regress`."""
    second = min(1.0, float(np.maximum(support.counts - 1, 0).mean())) if regress else 1.0
    images = 2.8 * second if support.text is None else 1.35
    shares = (1.0,) if len(embeddings) == 1 else (0.74, 0.26)
    weights = {DISCRIMINANTS[which]: images * share for which, share in zip(embeddings, shares, strict=True)}
    if support.text is None:
        return {**weights, "regression": 1.3 - 1.02 * second}
    logits = TextModel(support).scores(support.as_queries)
    labels = support.labels
    alone = float(fit_weights([logits / spread_of_others(logits, labels)], labels)[0][0])
    accuracy = text_accuracy(support)
    texts = {"text": 0.55 * accuracy**0.5 * alone, "text_regression": 0.15 * accuracy * alone}
    return {**weights, **texts, "regression": 0.05}


def affordable(
    n_images: int, n_classes: int, embeddings: Sequence[Which], seconds: float, few: float = 0.0
) -> list[Setting]:
    """The first settings on each of the embeddings whose regressions fit into the budget, by a count of operations: the
    same everywhere."""
    operations = 2.0 * n_images**3 + 12.0 * n_images**2 * n_classes
    number = int(seconds * _RATE / (operations * len(embeddings))) if n_images <= MAX_KEYS else 0
    return on_each(settings_for(few)[:number], embeddings)


def on_each(settings: Sequence[Setting], embeddings: Sequence[Which]) -> list[Setting]:
    """The settings of the regression, with the keys of each of the embeddings."""
    return [{**setting, "adapted_keys": float(which == "adapted")} for setting in settings for which in embeddings]


def _candidates(held_out: HeldOut, method: Method, settings: Sequence[Setting], copies: float) -> Iterator[Stack]:
    """A stack, not yet weighted, for each setting of the regression; without regression if none fits."""
    for setting in settings or on_each([FEW_SHOT_SETTING], ["plain"]):
        values = {**setting, "text_images": copies}
        models = stack_models(held_out.support, values)
        if not settings:
            models = {name: model for name, model in models.items() if "regression" not in name}
        if not method.needs_adapter:
            models.pop("discriminant_adapted", None)
        yield Stack({name: held_out.part(model) for name, model in models.items()}, {}, values)


def _named(parts: Mapping[str, Part], weights: np.ndarray) -> dict[str, float]:
    """Weights by part. If no part beats a guess and all are 0, one part of the images gets a small weight: it gives
    labels, and probabilities near those of a guess."""
    weights = np.where(weights < 1e-9, 0.0, weights)  # a part without spread has no gradient
    by_name = dict(zip(parts, weights.tolist(), strict=True))
    if not weights.any():
        by_name[next(name for name in ("regression", "discriminant", "discriminant_adapted") if name in parts)] = 1e-3
    return by_name
