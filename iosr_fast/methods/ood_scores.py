"""Scores of out-of-distribution detection, each by one model of the support set: higher for the known classes."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.methods.folds import Folds
from iosr_fast.methods.log_loss import log_odds_of_largest
from iosr_fast.methods.models.gaussian import GaussianModel, Gaussians, Moments
from iosr_fast.methods.models.keys import KeyModel
from iosr_fast.methods.models.model import Memory, Model, TextModel
from iosr_fast.methods.models.ridge import RidgeModel
from iosr_fast.methods.support_set import SupportSet, blocks, image_rows
from iosr_fast.scoring.plan import Which

TEXT_SCORES = ("text cosine", "text softmax")
GAUSSIAN_SCORES = ("discriminant softmax", "mahalanobis", "relative mahalanobis")
NEAREST_KEY, REGRESSION, UNKNOWN_KEY = "nearest key", "regression", "nearest unknown key"
# The least number of images of the largest class: models without one of each need a covariance, too.
LEAST_FOR_GAUSSIANS = 3
# The (N, N) system of the regression is solved for every fold, which takes a minute beyond this number of images.
MAX_REGRESSION = 4096
# Kernel and ridge of the regression, those of the stack at few shots (stack_weights).
BETA, RIDGE = 2.0, 0.2
_ROWS = 1024


def score_names(support: SupportSet, adapted: bool, unknown: Embeddings | None = None) -> tuple[str, ...]:
    """The scores that `OodScores` gives for a support set, K names: those of the texts where fewer than two classes
    have an image, else those of both; and UNKNOWN_KEY if there are two `unknown` pictures or more."""
    last = () if unknown is None or len(unknown) < 2 else (UNKNOWN_KEY,)
    if np.count_nonzero(support.counts) < 2:
        return TEXT_SCORES + last
    image: tuple[str, ...] = GAUSSIAN_SCORES if support.counts.max(initial=0) >= LEAST_FOR_GAUSSIANS else ()
    image += (NEAREST_KEY, REGRESSION) if len(support.embeddings) <= MAX_REGRESSION else (NEAREST_KEY,)
    text = () if support.text is None else TEXT_SCORES
    of_adapted = tuple(f"{name}, adapted" for name in image) if adapted else ()
    return text + image + of_adapted + last


class OodScores:
    """The scores `names` (of `score_names`) of queries, (B, K) float64, by the C classes that have support images.

    For each of texts, and of plain and (named "..., adapted") adapted embeddings x, with G and P of fit_gaussians, and
    m and P0 the mean and the shrunk precision of all images as one class:

        text cosine            max_c tau <x, text_c>
        text softmax           log p / (1 - p) of the largest p = softmax of tau <x, text> (MCM, as log-odds)
        discriminant softmax   log p / (1 - p) of the largest p = softmax of G
        mahalanobis            -min_c (x - mu_c)' P (x - mu_c) / 2
        relative mahalanobis   that + (x - m)' P0 (x - m) / 2
        nearest key            the largest cosine to a support image
        regression             max_c R_c, R the kernel ridge regression of the one-hot labels, exp(-2 (1 - cosine))
        nearest unknown key    minus the largest cosine to one of the `unknown` pictures, adapted where others are

    Those with G or P need three images of a class (LEAST_FOR_GAUSSIANS), R at most MAX_REGRESSION images.

    Sources: MCM (Ming et al., NeurIPS 2022); Mahalanobis (Lee et al., NeurIPS 2018); relative Mahalanobis (Ren et al.,
    arXiv 2106.09022); nearest key (Sun et al., ICML 2022). C >= 2.
    """

    def __init__(self, support: SupportSet, names: tuple[str, ...], unknown: Embeddings | None = None) -> None:
        self.names, self.support = names, support
        embeddings: tuple[Which, ...] = ("plain", "adapted") if any("adapted" in name for name in names) else ("plain",)
        self.unknown_which = embeddings[-1]
        self.unknown_keys = None
        if unknown is not None and UNKNOWN_KEY in names:
            self.unknown_keys = _exact(unknown, self.unknown_which)
        has_images = support.counts > 0
        shared = Memory()  # of the moments
        images = support if has_images.all() else support.of_classes(has_images)
        self.models: list[Model] = [] if support.text is None else [TextModel(support)]
        for which in embeddings if NEAREST_KEY in names else ():
            if GAUSSIAN_SCORES[0] in names:
                self.models += [model(images, which, memory=shared) for model in (DensityModel, BackgroundModel)]
            self.models.append(NearestKeyModel(images, which))
            if REGRESSION in names:
                self.models.append(RidgeModel(images, which, None, BETA, RIDGE, label_weight=1.0, text_weight=0.0))

    def kept(self) -> OodScores:
        """The same scores, fitted, by models that hold nothing but what queries need."""
        made = copy.copy(self)
        made.models = [model.kept() for model in self.models]
        return made

    def __call__(self, queries: Embeddings) -> np.ndarray:
        parts = [self._of_block(queries[block]) for block in blocks(len(queries), _ROWS)]
        return np.concatenate([np.zeros((0, len(self.names))), *parts])

    def _of_block(self, queries: Embeddings) -> np.ndarray:
        scores = self._columns(lambda model: model.scores(queries))
        return scores if self.unknown_keys is None else np.column_stack([scores, self.unlike_unknown(queries)])

    def without(self, folds: Folds) -> np.ndarray:
        """(V, K): the scores of the support images `folds.rows`, each by a model without its fold; without UNKNOWN_KEY,
        which no fold changes."""
        return self._columns(lambda model: model.without(folds)[folds.rows])

    def _columns(self, logits_of: Callable[[Model], np.ndarray]) -> np.ndarray:
        """The scores of queries by each model's logits of them."""
        columns = list[np.ndarray]()
        for model in self.models:
            logits = logits_of(model)
            largest = logits.max(1)
            match model:
                case TextModel():
                    columns += [largest, log_odds_of_largest(logits)]
                case BackgroundModel():  # after DensityModel, which gives "mahalanobis"
                    columns.append(columns[-1] - largest)
                case DensityModel():
                    columns += [log_odds_of_largest(logits), largest]
                case _:
                    columns.append(largest)
        return np.column_stack(columns)

    def unlike_unknown(self, queries: Embeddings) -> np.ndarray:
        """(B,): UNKNOWN_KEY."""
        assert self.unknown_keys is not None
        return -(_exact(queries, self.unknown_which) @ self.unknown_keys.T).max(1)


class Densities(Gaussians):
    """log N(x; mu_c, Sigma) but for a constant: G minus x' P x / 2."""

    def scores(self, rows: np.ndarray) -> np.ndarray:
        inside = self.span(rows)
        return super().scores(rows) - np.einsum("bd,bd->b", inside @ self.precision, inside)[:, None] / 2


class DensityModel(GaussianModel):
    """Densities of classes."""

    def fit(self, moments: Moments) -> Gaussians:
        return Densities(**vars(super().fit(moments)))


class BackgroundModel(DensityModel):
    """-(x - m)' P0 (x - m) / 2, the density of all images as one class: (B, 1)."""

    def fit(self, moments: Moments) -> Gaussians:
        return super().fit(moments.joined)


class NearestKeyModel(KeyModel):
    """The largest cosine to a support image of any class, the same for all classes."""

    def _sums(self, cosines: np.ndarray, weights: np.ndarray | None, counts: np.ndarray) -> np.ndarray:
        return np.repeat(cosines.max(1, keepdims=True), len(counts), axis=1)


def _exact(embeddings: Embeddings, which: Which) -> np.ndarray:
    return image_rows(embeddings, which, None).astype(np.float64)
