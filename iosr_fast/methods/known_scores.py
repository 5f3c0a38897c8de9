"""Scores of how well a query fits the known classes, each by one model of the support set; higher is more known."""

from __future__ import annotations

import numpy as np

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.methods.gda import shrunk_precision
from iosr_fast.methods.kernel_ridge import kernel_matrix
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
# Kernel and ridge of the regression, those of the stack at few shots (tuning.stack_weights).
BETA, RIDGE = 2.0, 0.2
_ROWS = 1024


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
    and G_c = x' P mu_c - mu_c' P mu_c / 2:

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
        self.names, self.text, self.tau = names, support.text, support.tau
        parts = GAUSSIAN_SCORES[0] in names, REGRESSION_SCORES[0] in names
        embeddings: tuple[Which, ...] = ("plain", "adapted") if any("adapted" in name for name in names) else ("plain",)
        self.unknown_which = embeddings[-1]
        self.unknown_keys = None
        if unknown is not None and UNKNOWN_KEY in names:
            self.unknown_keys = image_rows(unknown, self.unknown_which, None).astype(np.float64)
        if set(names) <= {*TEXT_SCORES, UNKNOWN_KEY}:
            embeddings = ()
        self.models = [(which, ImageModel(support, which, *parts)) for which in embeddings]

    def __call__(self, queries: Embeddings) -> np.ndarray:
        blocks = [self._block(queries[start : start + _ROWS]) for start in range(0, len(queries), _ROWS)]
        return np.concatenate(blocks) if blocks else np.zeros((0, len(self.names)))

    def _block(self, queries: Embeddings) -> np.ndarray:
        columns = []
        if self.text is not None:
            logits = self.tau * (queries.plain.astype(np.float64) @ self.text.T)
            columns += [logits.max(1), log_odds_of_largest(logits)]
        for which, model in self.models:
            columns += model.scores(image_rows(queries, which, None).astype(np.float64))
        if self.unknown_keys is not None:
            rows = image_rows(queries, self.unknown_which, None).astype(np.float64)
            columns.append(-(rows @ self.unknown_keys.T).max(1))
        return np.stack(columns, axis=1)


class ImageModel:
    """The scores of one of the two embeddings."""

    def __init__(self, support: SupportSet, which: Which, gaussian: bool, regress: bool) -> None:
        self.keys = rows = image_rows(support.embeddings, which, None).astype(np.float64)
        present = np.flatnonzero(support.counts)
        labels = np.searchsorted(present, support.labels)
        self.gaussians = GaussianModel(rows, labels) if gaussian else None
        self.values = None
        if regress:
            kernel = kernel_matrix(rows, rows, BETA)
            kernel[np.diag_indices(len(rows))] += RIDGE
            self.values = np.linalg.solve(kernel, np.eye(len(present))[labels])

    def scores(self, queries: np.ndarray) -> list[np.ndarray]:
        cosines = queries @ self.keys.T
        columns = [] if self.gaussians is None else self.gaussians.scores(queries)
        columns.append(cosines.max(1))
        if self.values is not None:
            regression = np.exp(BETA * (cosines - 1.0)) @ self.values
            second, first = np.partition(regression, -2, axis=1)[:, -2:].T
            columns += [first, first - second]
        return columns


class GaussianModel:
    """One Gaussian a class with a shared covariance, of rows (N, D) with labels 0 to C - 1 that don't fall."""

    def __init__(self, rows: np.ndarray, labels: np.ndarray) -> None:
        counts = np.bincount(labels)
        means = np.add.reduceat(rows, np.cumsum(counts) - counts, axis=0) / counts[:, None]
        self.mean = rows.mean(0)
        self.precision, self.whole_precision = _precision(rows - means[labels]), _precision(rows - self.mean)
        self.linear = means @ self.precision
        self.bias = -0.5 * np.einsum("cd,cd->c", self.linear, means)

    def scores(self, queries: np.ndarray) -> list[np.ndarray]:
        """Columns of GAUSSIAN_SCORES."""
        logits = queries @ self.linear.T + self.bias
        largest, centred = logits.max(1), queries - self.mean
        towards = queries @ (self.precision @ self.mean) - 0.5 * self.mean @ self.precision @ self.mean
        distance = _quadratic(queries, self.precision) - 2.0 * largest
        relative = _quadratic(centred, self.whole_precision) - distance
        return [largest, log_odds_of_largest(logits), largest - towards, -distance, relative]


def _precision(centred: np.ndarray) -> np.ndarray:
    """inv(Sigma + tr(Sigma) / (N - 1) I), or I if Sigma is 0: of one image, so that its size does not grow with N."""
    scatter = centred.T @ centred
    precision = shrunk_precision(scatter, len(centred))
    zero = np.trace(scatter) <= len(centred) * np.finfo(np.float32).eps
    return precision if zero else precision * ((len(centred) - 1) / len(precision))


def _quadratic(rows: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    products: np.ndarray = np.einsum("bd,bd->b", rows @ matrix, rows)
    return products


def log_sum_exp(logits: np.ndarray) -> np.ndarray:
    """(B,) of (B, C); -inf where all are."""
    top = logits.max(1)
    top = np.where(np.isfinite(top), top, 0.0)
    with np.errstate(divide="ignore"):
        sums: np.ndarray = top + np.log(np.exp(logits - top[:, None]).sum(1))
    return sums


def log_odds_of_largest(logits: np.ndarray) -> np.ndarray:
    """log p / (1 - p) of the largest p = softmax(logits), (B,) float64; it does not saturate as p does.

    >>> log_odds_of_largest(np.array([[100.0, 0.0]]))
    array([100.])
    """
    rows, top = np.arange(len(logits)), logits.argmax(1)
    others = logits.astype(np.float64)
    others[rows, top] = -np.inf
    odds: np.ndarray = logits[rows, top] - log_sum_exp(others)
    return odds
