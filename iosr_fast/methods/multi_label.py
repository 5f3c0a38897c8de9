"""Images with any number of labels: a probability for each class by itself, and a threshold for each."""

from __future__ import annotations

import dataclasses

import numpy as np
from msgspec.structs import replace

from iosr_fast.methods.config import Config, Evidence
from iosr_fast.methods.links import Platt
from iosr_fast.methods.log_loss import fit_binary
from iosr_fast.methods.models.gaussian import CentredGaussianModel
from iosr_fast.methods.models.model import TextModel
from iosr_fast.methods.models.ridge import CentredRidgeModel
from iosr_fast.methods.out_of_fold import HeldOut, Part
from iosr_fast.methods.papers import DISCRIMINANTS
from iosr_fast.methods.stack_weights import FEW_SHOT_SETTING, SETTINGS, Setting, Stack, affordable, on_each
from iosr_fast.methods.support_set import SupportSet
from iosr_fast.scoring.plan import ScoringPlan, Which
from iosr_fast.utils.ranking import mean_average_precision

# The spread of the regression's logits where no class has two images; from the demo's validation concepts.
_ONE_SHOT_SPREAD = 0.5
_FIRM = 1e6  # a shrinkage that leaves only the common bias
_LEAST = 1e-4  # of a weight, per unit of spread, from which later pictures can learn: all have the same labels, say


def fit_multi_label(held_out: HeldOut, asked: Config, searched: bool, seconds: float) -> tuple[Config, ScoringPlan]:
    """The config that is best for left-out images with any number of labels each, and its plan; the method is "stack",
    "stack++" or "zero-shot":

        logits[b, c] = w[0] tau <plain[b], text[c]> + w[1] sum_j exp(-beta (1 - <x[b], key[j]>)) V[j, c]
                     + sum of w[i] G[i](b, c) + bias[c]
        probability of class c = 1 / (1 + exp(-logits[b, c]))

    x and the keys are plain or adapted embeddings; the fit chooses. V is that of CentredRidgeModel, G are Gaussian
    discriminants of plain and adapted embeddings (CentredGaussianModel). The weights w >= 0 and the biases, shrunk to a
    common one, minimise the log-loss of left-out images (log_loss.fit_binary). beta and ridge are those with the least
    log-loss within a budget of `seconds`, or those of `asked` unless they are `searched`.

    A class with a single image has no other to learn a bias from, and takes the common one. Where all classes have but
    one image, the weight of texts is fitted, and that of images is a rule: a spread of the texts' logits, or of 0.5.
    Probabilities hold for images of which as large a share has the label as of the support images.

    Sources: Platt scaling (1999); GDA and ProKeR as in methods.papers.

    >>> from iosr_fast import Embeddings, score
    >>> from iosr_fast.methods.tune import tune
    >>> from iosr_fast.methods.support_set import make_support_set
    >>> rng = np.random.default_rng(0)
    >>> centres = rng.standard_normal((3, 32))
    >>> def draw(n):  # each image shows some of three things
    ...     labels = rng.random((n, 3)) < 0.4
    ...     rows = labels @ centres + rng.standard_normal((n, 32))
    ...     return Embeddings((rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)), labels
    >>> config, _, plan = tune(Config(method="auto"), make_support_set(*draw(40), text=None, tau=100.0))
    >>> images, labels = draw(200)
    >>> config.method, bool(mean_average_precision(labels, score(plan, images)) > 0.95)
    ('stack', True)
    """
    support, entry = held_out.support, asked.entry
    assert held_out.folds is not None
    # Texts have seen no image, so that left-out images judge them for every class.
    judged = held_out.folds.distinct > 1 if entry.needs_support else np.ones(support.n_classes, bool)
    parts = dict[str, Part]()
    if support.text is not None:
        parts["text"] = dataclasses.replace(held_out, folds=None).part(TextModel(support))
    for which, name in DISCRIMINANTS.items():
        if name in entry.parameters:
            parts[name] = held_out.part(CentredGaussianModel(support, which))
    stacks = []
    for setting in _settings(asked, support, searched, seconds, bool(judged.any())):
        if setting:
            keys: Which = "adapted" if setting["adapted_keys"] else "plain"
            regression = CentredRidgeModel(support, keys, None, setting["beta"], setting["ridge"])
            parts["regression"] = held_out.part(regression)
        stacks.append(_weighted(Stack(dict(parts), {}, setting), held_out.labels, judged))
    best = min(stacks, key=lambda stack: stack.loss)
    evidence = Evidence(protocol="one-shot")
    if judged.any():
        precision = mean_average_precision(held_out.labels[:, judged], best.logits[:, judged])
        evidence = Evidence(protocol="loo", average_precision=precision, log_loss=best.loss, settings=len(stacks))
    factor = 1.0 if entry.is_stack else best.full_weights["text"]
    config = replace(best.config(asked, evidence), factor=factor)
    platt = Platt.fit(best.logits, held_out.labels, judged)
    return config, platt.applied_to(best.plan(support.n_classes))


def _settings(asked: Config, support: SupportSet, searched: bool, seconds: float, judged: bool) -> list[Setting]:
    """The settings of the regression to try: as many as the budget allows, and at least one; one where none is judged.
    The setting is empty for a method without regression."""
    entry = asked.entry
    if not entry.is_stack:
        return [{}]
    if not judged:
        return on_each([FEW_SHOT_SETTING], [entry.which])
    embeddings: tuple[Which, ...] = ("adapted", "plain") if entry.needs_adapter else ("plain",)
    if not searched:
        return on_each([{name: asked.parameters[name] for name in FEW_SHOT_SETTING}], embeddings)
    settings = affordable(len(support.embeddings), support.n_classes, embeddings, seconds)
    return settings or on_each(SETTINGS[:1], embeddings)


def _weighted(stack: Stack, labels: np.ndarray, judged: np.ndarray) -> Stack:
    """The stack with the weights of images with these labels (N, C)."""
    parts = stack.parts
    if judged.any():
        fit = fit_binary([part.scaled for part in parts.values()], labels, judged)
        weights = dict(zip(parts, fit.weights.tolist(), strict=True))
        stack = dataclasses.replace(stack, weights=weights, loss=fit.loss)
    else:
        stack = _by_rule(stack, labels)
    if max(stack.weights.values()) >= _LEAST:
        return stack
    return dataclasses.replace(stack, weights=dict.fromkeys(parts, _LEAST))


def _by_rule(stack: Stack, labels: np.ndarray) -> Stack:
    """Weights where no class has two images, so that no term of images can be judged (fit_multi_label)."""
    spread, loss = _ONE_SHOT_SPREAD, float("inf")
    if "text" in stack.parts:
        fit = fit_binary([stack.parts["text"].scaled], labels, np.ones(labels.shape[1], bool), _FIRM)
        spread, loss = float(fit.weights[0]), fit.loss
    weights = {name: 0.0 if "discriminant" in name else spread for name in stack.parts}
    return dataclasses.replace(stack, weights=weights, loss=loss)
