"""Terms of a key for each support image: Tip-Adapter, APE's channels and weights, Tip-X's divergences."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.methods.folds import Folds
from iosr_fast.methods.models.model import Model
from iosr_fast.methods.support_set import ROUNDING, blocks, class_weights, image_rows
from iosr_fast.scoring.lower import text_distribution
from iosr_fast.scoring.reducers import Reducer

CHANNEL_SHARE = 0.75  # of the channels that APE keeps
SIMILARITY_WEIGHT = 0.7
TEMPERATURE = 0.5  # of Tip-X's distributions over texts
_SMALL = 1e-6  # inside APE's logarithm, as in the public code
_KEPT = 1 << 22  # cosines of the queries of a fold that are kept: 16 MB
_TILE = 1 << 23  # elements of a block of products: 64 MB


@dataclass(frozen=True)
class KeyModel(Model):
    """w_c sum over keys j of class c: exp(-beta (1 - <x, key[j]>)), the cache term of Tip-Adapter (Zhang et al., ECCV
    2022, equations 4 to 6). w_c (support_set.class_weights) is 1 where classes are equally large, as in the paper;
    otherwise it makes a sum as large as that of a class of mean size.
    """

    beta: float = 5.5

    @property
    def key_reducer(self) -> Reducer | None:
        """What moves the keys and the queries that are compared with them."""
        return self.reducer

    @property
    def key_weights(self) -> np.ndarray | None:
        """(N,), `class_weights` of each image; None for classes of one size, for which all are 1."""
        weights = class_weights(self.support.counts)
        return None if (weights == 1.0).all() else np.repeat(weights, self.support.counts)

    def _compared(self, embeddings: Embeddings) -> np.ndarray:
        return image_rows(embeddings, self.which, self.key_reducer)

    def scores(self, queries: Embeddings) -> np.ndarray:
        keys, rows = self._compared(self.support.embeddings), self._compared(queries)
        parts = [self._sums(rows[block] @ keys.T) for block in blocks(len(rows), _TILE // max(1, len(keys)))]
        return np.concatenate([np.zeros((0, self.support.n_classes)), *parts])

    def without(self, folds: Folds) -> np.ndarray:
        """A search tries many betas: cosines with the queries of a fold are kept where they are few."""
        scores = np.full((len(self.support.labels), self.support.n_classes), np.nan)
        for rows, queries, others in folds.others(self.support):
            model = self.refitted(others)
            if len(rows) * len(others.labels) > _KEPT:
                scores[rows] = model.scores(queries)
            else:
                scores[rows] = model._sums(model._shared("cosines", partial(model._cosines, queries)))
        return scores

    def _cosines(self, queries: Embeddings) -> np.ndarray:
        """(B, N) float32, as a plan computes them."""
        return self._compared(queries) @ self._compared(self.support.embeddings).T

    def _sums(self, cosines: np.ndarray) -> np.ndarray:
        """The term (B, C) of queries with these cosines (B, N) to the keys."""
        scores, weights = np.zeros((len(cosines), self.support.n_classes)), self.key_weights
        present = np.flatnonzero(self.support.counts)  # for an empty class reduceat gives a row, not 0
        affinity = np.exp((cosines - np.float32(1.0)) * np.float32(self.beta))
        if weights is not None:
            affinity *= weights.astype(np.float32)
        if len(present):
            offsets = self.support.class_offsets[present]
            scores[:, present] = np.add.reduceat(affinity, offsets, axis=1, dtype=np.float64)
        return scores

    def fields(self) -> dict[str, Any]:
        return {
            "keys": self._compared(self.support.embeddings),
            "class_offsets": self.support.class_offsets,
            "weights": self.key_weights,
            "query": self.which,
            "reducer": self.key_reducer,
            "alpha": 1.0,
            "beta": self.beta,
        }


@dataclass(frozen=True)
class RefinedKeyModel(KeyModel):
    """KeyModel on a subset of channels, with key j weighted by exp(gamma * KL(label[j] || p[j])): APE, adaptive prior
    refinement (Zhu et al., ICCV 2023, equations 6 to 12).

    p[j] = softmax(<key[j], text>), both restricted to the subset and normalised again. The subset is the three quarters
    of the D channels with the largest 0.3 * variance over texts - 0.7 * similarity between classes (`choose_channels`):
    the paper's weights for ImageNet. The paper chooses the number of channels for each data set.
    """

    gamma: float = 0.1

    @property
    def channels(self) -> np.ndarray:
        rows = image_rows(self.support.embeddings, self.which, self.reducer)
        return self._shared("channels", lambda: choose_channels(rows, self.support.one_hot, self._text))

    @property
    def key_reducer(self) -> Reducer:
        return Reducer(projection=self.channels) if self.reducer is None else self.reducer.then(self.channels)

    @property
    def key_weights(self) -> np.ndarray | None:
        with np.errstate(over="ignore"):  # ScoringPlan rejects weights that are too large
            weights = np.exp(self.gamma * self._shared("divergences", self._divergences))
        of_classes = super().key_weights
        return weights if of_classes is None else weights * of_classes

    def _divergences(self) -> np.ndarray:
        """KL(label[j] || p[j]), (N,) in bits."""
        only = Reducer(projection=self.channels)
        cosines = (only(self.support.embeddings.plain) @ only(self._text).T).astype(np.float64)
        powers = np.exp(cosines - cosines.max(1, keepdims=True))
        own = powers[np.arange(len(powers)), self.support.labels] / powers.sum(1)
        return np.log2((1 + _SMALL) / (own + _SMALL))


def choose_channels(rows: np.ndarray, labels: np.ndarray, text: np.ndarray) -> np.ndarray:
    """(D,), 1 for chosen channels and 0 for others, by images (N, D) with labels (N, C) and texts (C, D).

    A channel's similarity is the mean of f_i f_j over all pairs of embeddings of different classes; the embeddings of a
    class are its text and its images. With F_c and m_c their sum and number in class c, that is
    ((sum F)^2 - sum F^2) / ((sum m)^2 - sum m^2). A channel's variance is that of the texts.
    """
    exact = text.astype(np.float64)
    sums, numbers = exact + labels.T @ rows, 1 + labels.sum(0)
    similarity = (sums.sum(0) ** 2 - (sums**2).sum(0)) / max(1.0, numbers.sum() ** 2 - (numbers**2).sum())
    variance = exact.var(0, ddof=1) if len(exact) > 1 else np.zeros(exact.shape[1])
    criterion = (1 - SIMILARITY_WEIGHT) * variance - SIMILARITY_WEIGHT * similarity
    channels = np.zeros(exact.shape[1])
    channels[np.argsort(-criterion, kind="stable")[: max(1, round(CHANNEL_SHARE * len(channels)))]] = 1
    return channels


@dataclass(frozen=True)
class DivergenceModel(Model):
    """w_c sum over images j of class c: -scale(KL(s || S[j])), the third term of Tip-X (Udandarao et al., ICCV 2023,
    equations 5 to 7), w_c as in KeyModel.

    s (B, C) and S (N, C) are softmax(<plain, text> / 0.5) of queries and images; scale takes the range of the
    divergences to that of the cosines between images. With H = sum of s log(C s), the sum over a class collapses to a
    linear term over [s, H]:

        sum_j KL(s || S[j]) = n_c H - <s, sum_j log(C S[j])>

    The factor C affects only the rounding: both terms are as small as the divergences, instead of differences of large
    entropies. The public code takes both ranges over the whole test set, so that a label depends on its batch. Here
    they are those over all pairs of different support images, frozen in the plan (with a single image the term is not
    scaled). tests/methods/test_parity_formulas.py has the literal form.
    """

    @cached_property
    def term(self) -> tuple[np.ndarray, np.ndarray]:
        """The linear term (C, C + 1) and its bias (C,)."""
        support = self.support
        s = self._distributions(support.embeddings)
        log_s = np.log(support.n_classes * s[:, :-1])
        least, most = pair_range(-log_s, s[:, :-1], s[:, -1:])
        keys = image_rows(support.embeddings, self.which, self.reducer)
        low, high = pair_range(keys, keys)
        # Divergences that differ by no more than their rounding in float32 have no usable range.
        resolved = most - least > ROUNDING * float(np.abs(log_s).max(initial=0.0))
        slope = (high - low) / (most - least) if resolved else 1.0
        weights = class_weights(support.counts)
        counts, summed = weights * support.counts, weights[:, None] * (support.one_hot.T @ log_s)
        return slope * np.hstack([summed, -counts[:, None]]), -(low - slope * least) * counts

    def _distributions(self, embeddings: Embeddings) -> np.ndarray:
        """[s, H], (B, C + 1) float64."""
        cosines = np.asarray(embeddings.plain, np.float64) @ self._text.T.astype(np.float64)
        return text_distribution(cosines, TEMPERATURE)

    def scores(self, queries: Embeddings) -> np.ndarray:
        linear, bias = self.term
        return self._distributions(queries) @ linear.T + bias

    def fields(self) -> dict[str, Any]:
        linear, bias = self.term
        return {"linear": linear, "bias": bias, "feature": "text-distribution", "temperature": TEMPERATURE}


def pair_range(rows: np.ndarray, others: np.ndarray, offset: np.ndarray | float = 0.0) -> tuple[float, float]:
    """The least and the largest of offset[i] + <others[i], rows[j]> over i != j; (0, 0) for fewer than two rows.

    rows, others (N, D), offset (N, 1) or a number; in blocks of bounded memory.
    """
    if len(rows) < 2:
        return 0.0, 0.0
    low, high, numbers = np.inf, -np.inf, np.arange(len(rows))
    offsets = np.broadcast_to(offset, (len(rows), 1))
    for block in blocks(len(rows), _TILE // len(rows)):
        apart = (others[block] @ rows.T + offsets[block])[numbers[block, None] != numbers]
        low, high = min(low, float(apart.min())), max(high, float(apart.max()))
    return low, high
