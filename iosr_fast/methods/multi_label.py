"""Images with any number of labels: a probability for each class by itself, and a threshold for each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from iosr_fast.exceptions import IosrFastError
from iosr_fast.methods.config import AUTO, Config
from iosr_fast.methods.log_loss import fit_binary, sigmoid
from iosr_fast.methods.multi_label_set import MultiLabelSet, fixed_parts, regression
from iosr_fast.methods.out_of_fold import Part
from iosr_fast.methods.papers import MAX_KEYS, METHODS, Method
from iosr_fast.methods.stack_weights import FEW_SHOT_SETTING, SETTINGS, Setting, Stack, affordable, on_each
from iosr_fast.methods.tune import TUNE_SECONDS
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
_LEAST = 1e-4  # of a weight that a plan needs, per unit of spread


@dataclass(frozen=True, eq=False)
class MultiLabelFit:
    """A plan whose logits are those of each class by itself, with the evidence of left-out support images.

    plan               sigmoid(logits) are the probabilities (B, C)
    thresholds         (C,) float32: an image has the labels whose probability reaches them. Halfway between the class's
                       own (f1_thresholds) and their mean, because left-out images of one class are few
    average_precision  mean over classes with two images or more, of left-out support images (N); NaN without any
    log_loss           of a pair of image and class, in nats; NaN likewise
    scored             the number of these classes
    """

    config: Config
    plan: ScoringPlan
    thresholds: np.ndarray
    average_precision: float
    log_loss: float
    scored: int


def multi_label_reason(method: str, reducer: str | None = None) -> str | None:
    """Why a method can't learn from images with several labels; None if it can.

    >>> multi_label_reason("gda++")
    "gda++ can't learn from several labels an image: its formula has one label an image; use 'auto'"
    """
    if method != AUTO and METHODS[method].needs_support and not METHODS[method].is_stack:
        return f"{method} can't learn from several labels an image: its formula has one label an image; use 'auto'"
    if reducer not in (None, "none"):
        return f"several labels an image take no reducer, got {reducer!r}: leave it out"
    return None


def fit_multi_label(
    images: MultiLabelSet,
    method: str = AUTO,
    setting: Mapping[str, float] | None = None,
    key_precision: Precision = "fp32",
    seconds: float = TUNE_SECONDS,
) -> MultiLabelFit:
    """The plan of "auto", "stack", "stack++" or "zero-shot" for images with any number of labels each:

        logits[b, c] = w[0] tau <plain[b], text[c]> + w[1] sum_j exp(-beta (1 - <x[b], key[j]>)) V[j, c]
                     + sum of w[i] G[i](b, c) + bias[c]
        probability of class c = 1 / (1 + exp(-logits[b, c]))

    V = (K + ridge I)^-1 (Y - share) (N, C), with Y the indicator of labels and `share` (C,) the share of images that
    have the label. x and the keys are plain or adapted embeddings; the fit chooses. G are Gaussian discriminants of
    plain and adapted embeddings. The weights w >= 0 and the biases, shrunk to a common one, minimise the log-loss of
    left-out images (log_loss.fit_binary); beta and ridge are those with the least log-loss, unless `setting` gives
    them. Every image is left out by itself, in closed form; of discriminants those of a fold together, and so
    everywhere where images share units (MultiLabelSet.units).

    A class with a single image has no other to learn a bias from, and takes the common one. Where all classes have but
    one image, the weight of texts is fitted, and that of images is a rule: a spread of the texts' logits, or of 0.5.
    Probabilities hold for images of which as large a share has the label as of the support images.

    Raises IosrFastError for fewer than two images or more than 8192, a class without images unless the method is
    "zero-shot", and what the method needs and the images lack: texts, adapted embeddings.

    Sources: Platt scaling (1999); GDA and ProKeR as in methods.papers.

    >>> from iosr_fast import Embeddings, score
    >>> rng = np.random.default_rng(0)
    >>> centres = rng.standard_normal((3, 32))
    >>> def draw(n):  # each image shows some of three things
    ...     labels = rng.random((n, 3)) < 0.4
    ...     rows = labels @ centres + rng.standard_normal((n, 32))
    ...     return Embeddings((rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)), labels
    >>> fit = fit_multi_label(MultiLabelSet(*draw(40), text=None, tau=100.0))
    >>> images, labels = draw(200)
    >>> fit.config.method, bool(mean_average_precision(labels, score(fit.plan, images)) > 0.95)
    ('stack', True)
    """
    if method == AUTO:
        method = "stack" if images.embeddings.adapted is None else "stack++"
    _check(entry := METHODS[method], images)
    used, fixed = _used(entry, images), fixed_parts(images, entry)
    fits = [_fit(images, fixed, used, one) for one in _settings(entry, images, setting, seconds)]
    best, bias = min(fits, key=lambda fit: fit[0].loss)
    logits = best.logits + bias
    thresholds = f1_thresholds(sigmoid(logits))
    values = best.parameters()
    name = entry.name if best.shares["adapter"] else entry.name.removesuffix("++")
    config = Config(
        method=name,
        parameters={key: values.get(key, 0.0) for key in METHODS[name].parameters},
        factor=1.0 if entry.is_stack else values["text"],
        key_precision=key_precision,
    )
    return MultiLabelFit(
        config,
        config.with_keys(best.plan(images.n_classes, bias=bias)),
        (thresholds + thresholds.mean()) / 2,
        mean_average_precision(images.labels[:, used], logits[:, used]),
        best.loss if used.any() else float("nan"),
        int(used.sum()),
    )


def f1_thresholds(probabilities: np.ndarray) -> np.ndarray:
    """The threshold (C,) float32 of each class that maximises its expected F1 on images of which these are the
    probabilities (N, C).

    F[k] = 2 sum_{i <= k} p[i] / (k + sum_i p[i]) of the k largest p of a class; the threshold is max_k F[k] / 2, which
    is never above 0.5. Only probabilities are used, because few images have the label.

    Source: Lipton, Elkan & Naryanaswamy, ECML PKDD 2014, theorem 1 (half of the optimal F1).
    """
    largest = -np.sort(-probabilities, axis=0)
    first = np.arange(1, len(largest) + 1)[:, None]
    expected = 2 * np.cumsum(largest, axis=0) / (first + largest.sum(0))
    return (expected.max(0) / 2).astype(np.float32)


def _check(entry: Method, images: MultiLabelSet) -> None:
    """Raise IosrFastError where the images lack what the method needs."""
    n_images = len(images.labels)
    if (reason := multi_label_reason(entry.name)) is not None:
        raise IosrFastError(reason)
    if not images.n_classes:
        raise IosrFastError("several labels an image: expected labels of at least one class, got empty sets alone")
    if not 2 <= n_images <= MAX_KEYS:
        raise IosrFastError(f"several labels an image: expected 2 to {MAX_KEYS} support images, got {n_images}")
    if entry.needs_support and len(empty := np.flatnonzero(images.counts == 0)):
        columns = abbreviate([str(column) for column in empty])
        raise IosrFastError(
            f"{entry.name} needs at least one image of each class, got none of the classes at {columns}"
        )
    if (reason := Config(method=entry.name).unavailable_reason(images.pairs)) is not None:
        raise IosrFastError(reason)


def _settings(
    entry: Method, images: MultiLabelSet, setting: Mapping[str, float] | None, seconds: float
) -> list[Setting]:
    """The settings of the regression to try: as many as the budget allows, and at least one; one where none is judged.
    The setting is empty for a method without regression."""
    if not entry.is_stack:
        return [{}]
    if not _used(entry, images).any():
        return on_each([FEW_SHOT_SETTING], [entry.which])
    embeddings: tuple[Which, ...] = ("adapted", "plain") if entry.needs_adapter else ("plain",)
    if setting is not None:
        values = {**entry.parameters, **setting}
        return on_each([{name: values[name] for name in FEW_SHOT_SETTING}], embeddings)
    settings = affordable(len(images.labels), images.n_classes, embeddings, seconds)
    return settings or on_each(SETTINGS[:1], embeddings)


def _used(entry: Method, images: MultiLabelSet) -> np.ndarray:
    """(C,) bool, the classes of which left-out images say something: texts have seen no image."""
    return images.folds.distinct > 1 if entry.needs_support else np.ones(images.n_classes, bool)


def _fit(
    images: MultiLabelSet, fixed: Mapping[str, Part], used: np.ndarray, setting: Setting
) -> tuple[Stack, np.ndarray]:
    """Weights and biases (C,) at one setting of the regression."""
    parts = dict(fixed)
    if setting:
        keys: Which = "adapted" if setting["adapted_keys"] else "plain"
        parts["regression"] = regression(images, keys, setting["beta"], setting["ridge"])
    if used.any():
        some = slice(None, None, -(-images.labels.size // _PAIRS))
        fit = fit_binary([part.scaled[some] for part in parts.values()], images.labels[some], used, SHRINKAGE)
        weights = dict(zip(parts, fit.weights.tolist(), strict=True))
        bias = fit.bias
        loss = fit.loss
    else:
        weights, bias, loss = _by_rule(parts, images.labels)
        weights |= {name: 0.0 for name in parts if "discriminant" in name}
    if not any(weights.values()):
        weights["regression" if images.text is None else "text"] = _LEAST
    return Stack(parts, weights, setting, loss), bias


def _by_rule(parts: Mapping[str, Part], labels: np.ndarray) -> tuple[dict[str, float], np.ndarray, float]:
    """Weights and biases where no class has two images, so that no term of images can be judged (fit_multi_label)."""
    labelled = int(labels.sum())
    spread = _ONE_SHOT_SPREAD
    common = float(np.log(labelled / (labels.size - labelled)))
    loss = float("inf")
    if "text" in parts:
        fit = fit_binary([parts["text"].scaled], labels, np.ones(labels.shape[1], bool), _FIRM)
        spread = float(fit.weights[0])
        common = fit.common
        loss = fit.loss
    shift = sum(spread * float(part.scaled.mean()) for name, part in parts.items() if name != "text")
    return dict.fromkeys(parts, spread), np.full(labels.shape[1], common - shift), loss
