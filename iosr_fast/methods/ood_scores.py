"""Scores of out-of-distribution detection, each by one model of the support set: higher for the known classes."""

from __future__ import annotations

import numpy as np

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.methods.conformal import log_odds_of_largest
from iosr_fast.methods.folds import Folds
from iosr_fast.methods.models.gaussian import GaussianModel, Gaussians, fit_gaussians, shrunk_precision
from iosr_fast.methods.models.model import TextModel
from iosr_fast.methods.models.ridge import RidgeModel
from iosr_fast.methods.support_set import SupportSet, blocks, image_rows
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


def score_names(support: SupportSet, adapted: bool, unknown: Embeddings | None = None) -> tuple[str, ...]:
    """The scores that `OodScores` gives for a support set, K names: those of the texts where fewer than two classes
    have an image, else those of both; and UNKNOWN_KEY if there are two `unknown` pictures or more."""
    known_not = () if unknown is None or len(unknown) < 2 else (UNKNOWN_KEY,)
    if np.count_nonzero(support.counts) < 2:
        return TEXT_SCORES + known_not
    image: tuple[str, ...] = GAUSSIAN_SCORES if support.counts.max(initial=0) >= LEAST_FOR_GAUSSIANS else ()
    image += KEY_SCORES + (REGRESSION_SCORES if len(support.embeddings) <= MAX_REGRESSION else ())
    text = () if support.text is None else TEXT_SCORES
    of_adapted = tuple(f"{name}, adapted" for name in image) if adapted else ()
    return text + image + of_adapted + known_not


class OodScores:
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
        self.names, self.support, wanted = names, support, {*names} - {*TEXT_SCORES, UNKNOWN_KEY}
        embeddings: tuple[Which, ...] = ("plain", "adapted") if any("adapted" in name for name in names) else ("plain",)
        self.unknown_which, self.unknown_keys = embeddings[-1], None
        if unknown is not None and UNKNOWN_KEY in names:
            self.unknown_keys = _exact(unknown, self.unknown_which)
        there = support.counts > 0
        images = support if there.all() else support.of_classes(there)
        self.models = [_ImageScores(images, which, wanted) for which in embeddings if wanted]

    def __call__(self, queries: Embeddings) -> np.ndarray:
        parts = [self._block(queries[block]) for block in blocks(len(queries), _ROWS)]
        return np.concatenate([np.zeros((0, len(self.names))), *parts])

    def _block(self, queries: Embeddings) -> np.ndarray:
        columns = [*self._of_texts(queries), *(model.scores(queries) for model in self.models)]
        if self.unknown_keys is not None:
            columns.append(-(_exact(queries, self.unknown_which) @ self.unknown_keys.T).max(1))
        return np.column_stack(columns)

    def without(self, folds: Folds) -> np.ndarray:
        """(V, K): the scores of the support images `folds.rows`, each by a model without its fold; without UNKNOWN_KEY,
        which no fold changes."""
        texts = self._of_texts(self.support.as_queries[folds.rows])
        return np.column_stack([*texts, *(model.without(folds)[folds.rows] for model in self.models)])

    def _of_texts(self, queries: Embeddings) -> list[np.ndarray]:
        if self.support.text is None:
            return []
        logits = TextModel(self.support).scores(queries)
        return [logits.max(1), log_odds_of_largest(logits)]


class _ImageScores:
    """GAUSSIAN_SCORES, KEY_SCORES and REGRESSION_SCORES of one of the two embeddings, as far as they are wanted."""

    def __init__(self, support: SupportSet, which: Which, names: set[str]) -> None:
        self.support, self.which, self.keys = support, which, _exact(support.embeddings, which)
        self.gaussian = GaussianModel(support, which) if GAUSSIAN_SCORES[0] in names else None
        regression = RidgeModel(support, which, None, BETA, RIDGE, labels=1.0, texts=0.0)
        self.regression = regression if REGRESSION_SCORES[0] in names else None
        if self.gaussian is not None:  # of all images: it sees no label, so that no fold needs another one
            joined = self.gaussian.moments.joined
            self.mean, self.of_all = joined.means[0], shrunk_precision(joined.scatter, float(len(self.keys)))

    def scores(self, queries: Embeddings) -> np.ndarray:
        """(B, number of scores)."""
        rows = _exact(queries, self.which)
        cosines = rows @ self.keys.T
        columns = [] if self.gaussian is None else self._by_gaussians(self.gaussian.gaussians, rows)
        columns.append(cosines.max(1))
        if self.regression is not None:
            columns += _margins(np.exp(BETA * (cosines - 1.0)) @ self.regression.values)
        return np.stack(columns, axis=1)

    def without(self, folds: Folds) -> np.ndarray:
        """(N, number of scores) of the support images, each without its fold; of others NaN."""
        own = _exact(self.support.as_queries, self.which)
        found = np.full((len(own), len(GAUSSIAN_SCORES) * (self.gaussian is not None) + 1), np.nan)
        for rows, out in folds.splits:
            if self.gaussian is not None:
                fitted = fit_gaussians(self.gaussian.moments_without(out))
                found[rows, :-1] = np.stack(self._by_gaussians(fitted, own[rows]), axis=1)
            for block in np.array_split(rows, -(-len(rows) // _ROWS)):
                found[block, -1] = (own[block] @ self.keys[~out].T).max(1)
        margins = [] if self.regression is None else _margins(self.regression.without(folds))
        return np.column_stack([found, *margins])

    def _by_gaussians(self, fitted: Gaussians, rows: np.ndarray) -> list[np.ndarray]:
        """Columns of GAUSSIAN_SCORES."""
        logits, precision, mean = fitted.scores(rows), fitted.precision, self.mean
        largest = logits.max(1)
        towards = rows @ (precision @ mean) - 0.5 * mean @ precision @ mean
        distance = _quadratic(rows, precision) - 2.0 * largest
        relative = _quadratic(rows - mean, self.of_all) - distance
        return [largest, log_odds_of_largest(logits), largest - towards, -distance, relative]


def _margins(regression: np.ndarray) -> list[np.ndarray]:
    """Columns of REGRESSION_SCORES."""
    second, first = np.partition(regression, -2, axis=1)[:, -2:].T
    return [first, first - second]


def _quadratic(rows: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    products: np.ndarray = np.einsum("bd,bd->b", rows @ matrix, rows)
    return products


def _exact(embeddings: Embeddings, which: Which) -> np.ndarray:
    return image_rows(embeddings, which, None).astype(np.float64)
