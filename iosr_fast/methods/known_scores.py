"""Scores of how well a query fits the known classes, each by one model of the support set; higher is more known."""

from __future__ import annotations

from functools import cached_property

import numpy as np

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.methods.conformal import log_odds_of_largest
from iosr_fast.methods.folds import Folds
from iosr_fast.methods.models.gaussian import GaussianModel, Gaussians, Moments, fit_gaussians, shrunk_precision
from iosr_fast.methods.models.model import TextModel
from iosr_fast.methods.models.ridge import RidgeModel
from iosr_fast.methods.support_set import SupportSet, image_rows
from iosr_fast.scoring.plan import Which

TEXT_SCORES = ("text cosine", "text softmax")
GAUSSIAN_SCORES = (
    "discriminant",
    "discriminant softmax",
    "centred discriminant",
    "mahalanobis",
    "relative mahalanobis",
)
KEY_SCORES = ("nearest key",)
REGRESSION_SCORES = ("regression", "regression margin")
UNKNOWN_KEY = "nearest unknown key"
# The least number of images of the largest class: models without one of each need a covariance, too.
LEAST_FOR_GAUSSIANS = 3
# The (N, N) system of the regression is solved for every fold, which takes a minute beyond this number of images.
MAX_REGRESSION = 4096
# Kernel and ridge of the regression, those of the stack at few shots (stack_weights).
BETA, RIDGE = 2.0, 0.2
_ROWS = 1024
Background = tuple[np.ndarray, np.ndarray]  # m (D,) and P0 (D, D) of KnownScores


def score_names(support: SupportSet, adapted: bool, unknown: Embeddings | None = None) -> tuple[str, ...]:
    """The scores that `KnownScores` gives for a support set, K names: those of the texts where fewer than two classes
    have an image, else those of both; and UNKNOWN_KEY if there are two `unknown` pictures or more."""
    known_not = () if unknown is None or len(unknown) < 2 else (UNKNOWN_KEY,)
    if np.count_nonzero(support.counts) < 2:
        return TEXT_SCORES + known_not
    image: tuple[str, ...] = GAUSSIAN_SCORES if support.counts.max(initial=0) >= LEAST_FOR_GAUSSIANS else ()
    image += KEY_SCORES + (REGRESSION_SCORES if len(support.embeddings) <= MAX_REGRESSION else ())
    text = () if support.text is None else TEXT_SCORES
    of_adapted = tuple(f"{name}, adapted" for name in image) if adapted else ()
    return text + image + of_adapted + known_not


class KnownScores:
    """The scores `names` (of `score_names`) of queries, (B, K) float64, by the C classes that have support images.

    With x a plain or adapted embedding, mu_c the mean of class c, m that of all N images, P the shrunk precision of
    the images about their class means and P0 that about m (inv(Sigma + tr(Sigma) / (N - 1) I), or I if Sigma is 0),
    and G_c = x' P mu_c - (mu_c' P mu_c - e_c) / 2 (models.gaussian):

        text cosine            max_c tau <x, text_c>
        text softmax           log p / (1 - p) of the largest p = softmax of tau <x, text> (MCM, as log-odds)
        discriminant           max_c G_c
        discriminant softmax   log p / (1 - p) of the largest p = softmax of G
        centred discriminant   max_c G_c - (x' P m - m' P m / 2): against an image in the middle
        mahalanobis            -min_c (x - mu_c)' P (x - mu_c)
        relative mahalanobis   that + (x - m)' P0 (x - m)
        nearest key            the largest cosine to a support image
        regression             max_c R_c, R the kernel ridge regression of the one-hot labels, exp(-2 (1 - cosine))
        regression margin      the largest R_c minus the second largest
        nearest unknown key    minus the largest cosine to one of the `unknown` pictures, adapted where others are

    Those with G or P need three images of a class (LEAST_FOR_GAUSSIANS), those with R at most MAX_REGRESSION images.

    Sources: MCM (Ming et al., NeurIPS 2022); Mahalanobis (Lee et al., NeurIPS 2018); relative Mahalanobis (Ren et al.,
    arXiv 2106.09022); nearest key (Sun et al., ICML 2022); largest logit (Hendrycks et al., ICML 2022). C >= 2.
    """

    def __init__(self, support: SupportSet, names: tuple[str, ...], unknown: Embeddings | None = None) -> None:
        self.names, self.support, images = names, support, {*names} - {*TEXT_SCORES, UNKNOWN_KEY}
        embeddings: tuple[Which, ...] = ("plain", "adapted") if any("adapted" in name for name in names) else ("plain",)
        self.unknown_which = embeddings[-1]
        self.unknown_keys = None
        if unknown is not None and UNKNOWN_KEY in names:
            self.unknown_keys = image_rows(unknown, self.unknown_which, None).astype(np.float64)
        self.models = [_ImageScores(support, which, images) for which in embeddings if images]

    def __call__(self, queries: Embeddings) -> np.ndarray:
        blocks = [self._block(queries[start : start + _ROWS]) for start in range(0, len(queries), _ROWS)]
        return np.concatenate(blocks) if blocks else np.zeros((0, len(self.names)))

    def _block(self, queries: Embeddings) -> np.ndarray:
        columns = self._of_texts(queries)
        for model in self.models:
            columns += model.scores(queries)
        if self.unknown_keys is not None:
            rows = image_rows(queries, self.unknown_which, None).astype(np.float64)
            columns.append(-(rows @ self.unknown_keys.T).max(1))
        return np.stack(columns, axis=1)

    def without(self, folds: Folds) -> np.ndarray:
        """(V, K): the scores of the support images `folds.rows`, each by a model without its fold; without UNKNOWN_KEY,
        which no fold changes."""
        columns = self._of_texts(self.support.as_queries[folds.rows])
        for model in self.models:
            columns += [column[folds.rows] for column in model.without(folds)]
        return np.stack(columns, axis=1)

    def _of_texts(self, queries: Embeddings) -> list[np.ndarray]:
        if self.support.text is None:
            return []
        logits = TextModel(self.support).scores(queries)
        return [logits.max(1), log_odds_of_largest(logits)]


class _ImageScores:
    """The scores of one of the two embeddings."""

    def __init__(self, support: SupportSet, which: Which, names: set[str]) -> None:
        self.support, self.which, self.present = support, which, np.flatnonzero(support.counts)
        self.gaussian = GaussianModel(support, which) if GAUSSIAN_SCORES[0] in names else None
        regression = RidgeModel(support, which, None, BETA, RIDGE, labels=1.0, texts=0.0)
        self.regression = regression if REGRESSION_SCORES[0] in names else None

    @cached_property
    def keys(self) -> np.ndarray:
        return image_rows(self.support.embeddings, self.which, None).astype(np.float64)

    @property
    def _fitted(self) -> tuple[Gaussians, np.ndarray]:
        assert self.gaussian is not None
        return self.gaussian.gaussians, self.support.counts > 0

    @cached_property
    def background(self) -> Background:
        """Of all images: it sees no label, so that no fold needs another one."""
        assert self.gaussian is not None
        whole = self.gaussian.moments.joined
        return whole.means[0], shrunk_precision(whole.scatter, float(whole.counts.sum()))

    def scores(self, queries: Embeddings) -> list[np.ndarray]:
        """Columns (B,): GAUSSIAN_SCORES, KEY_SCORES and REGRESSION_SCORES, as far as they are wanted."""
        rows = image_rows(queries, self.which, None).astype(np.float64)
        cosines = rows @ self.keys.T
        columns = [] if self.gaussian is None else _gaussian_scores(*self._fitted, self.background, rows)
        columns.append(cosines.max(1))
        if self.regression is None:
            return columns
        return columns + self._margins(np.exp(BETA * (cosines - 1.0)) @ self.regression.values)

    def without(self, folds: Folds) -> list[np.ndarray]:
        """Columns (N,) of the support images, each without its fold; of others NaN."""
        own, keys = image_rows(self.support.as_queries, self.which, None).astype(np.float64), self.keys
        moments = None if self.gaussian is None else self.gaussian.moments
        columns = np.full((len(own), len(GAUSSIAN_SCORES) * (moments is not None) + 1), np.nan)
        for rows, out in folds.splits:
            if moments is not None:
                others = moments - Moments.of(keys[out], self.support.one_hot[out])
                fitted = fit_gaussians(others), others.counts > 0
                columns[rows, :-1] = np.stack(_gaussian_scores(*fitted, self.background, own[rows]), axis=1)
            others_keys = keys[~out]
            for block in np.array_split(rows, -(-len(rows) // _ROWS)):
                columns[block, -1] = (own[block] @ others_keys.T).max(1)
        found = list(columns.T)
        return found if self.regression is None else found + self._margins(self.regression.without(folds))

    def _margins(self, regression: np.ndarray) -> list[np.ndarray]:
        second, first = np.partition(regression[:, self.present], -2, axis=1)[:, -2:].T
        return [first, first - second]


def _gaussian_scores(
    fitted: Gaussians, present: np.ndarray, background: Background, rows: np.ndarray
) -> list[np.ndarray]:
    """Columns of GAUSSIAN_SCORES, by the Gaussians of the classes that are `present` (C,) bool."""
    mean, of_all = background
    logits, precision = fitted.scores(rows)[:, present], fitted.precision
    largest, centred = logits.max(1), rows - mean
    towards = rows @ (precision @ mean) - 0.5 * mean @ precision @ mean
    distance = _quadratic(rows, precision) - 2.0 * largest
    relative = _quadratic(centred, of_all) - distance
    return [largest, log_odds_of_largest(logits), largest - towards, -distance, relative]


def _quadratic(rows: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    products: np.ndarray = np.einsum("bd,bd->b", rows @ matrix, rows)
    return products
